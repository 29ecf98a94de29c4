"""`explain`: what a saved DIR says of itself, damaged or not."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from helpers import optimize, parse
from laconic.artefact import save
from laconic.cli.main import run
from laconic.explain import Place, actions_of, explain
from laconic.ir.errors import ModelError
from laconic.passes.ledger import Ledger

TEXT = """
parameter @a: f32[4, 4] trainable
buffer @spare: f32[64]
entry forward {
  input %x: f32[2, 4] in [-1.0, 1.0]
  argument x = %x
  %c: f32[2, 4] = aten.clone(%x) !0
  %d: f32[2, 4] = aten.clone(%c) !1
  %e: f32[2, 4] = aten.clone(%d) !2
  %t: f32[2, 4] = aten.tanh(%e) !4
  %m: f32[2, 4] = aten.mul.Tensor(%t, 1) !3
  %p: f32[2, 4] = aten.linear(%m, @a) !4
  return %p
}
site 0..1 = "block.0" "net.py:7"
site 2..2 = "block.1" "net.py:7"
site 3..4 = "" "net.py:9"
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    done = optimize(parse(TEXT), "simplify,cse,dce")
    done.ledger.model = "net"
    return save(done.program, done.ledger, done.plans, tmp_path_factory.mktemp("saved") / "out", seed=4)


def test_rules_are_counted_by_place(saved: Path) -> None:
    found = explain(saved)
    simplify, cse, dce = found.passes
    assert simplify.rules == {
        "copy": [Place("block.0", "net.py:7", 2), Place("block.1", "net.py:7", 1)],
        "identity": [Place("<model>", "net.py:9", 1)],
    }
    assert (simplify.before.nodes, simplify.row.after.nodes) == (6, 2)
    assert cse.rules == {}
    assert cse.row.reason == "no two calls compute the same"
    assert dce.rules == {"unused weight": [Place("@spare", "", 1)]}
    assert dce.before.weight_bytes - dce.row.after.weight_bytes == 256
    plans = [f"plans/{number}.json" for number in (1, 2, 3)]
    assert found.files == dict.fromkeys(("program.txt", "weights.safetensors", "ledger.json", *plans), "ok")
    assert found.damaged == []
    assert (found.recipe["seed"], found.recipe["model"], found.problem) == (4, "net", "")


def test_actions_of_one_pass(saved: Path) -> None:
    actions = actions_of(saved, 1)
    assert [(a["rule"], a["node"], a["place"]) for a in actions] == [
        ("copy", "c", "block.0 net.py:7"),
        ("copy", "d", "block.0 net.py:7"),
        ("copy", "e", "block.1 net.py:7"),
        ("identity", "m", "<model> net.py:9"),
    ]
    assert actions_of(saved, 2) == []


def test_the_command_prints_all_of_it(saved: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(saved)]) == 0
    out = capfd.readouterr().out
    for said in (
        "net",
        "state:      verified\n",
        "program.txt ok",
        "3 copy",
        "block.0 net.py:7 x 2",
        "no two calls compute",
        "@spare",
    ):
        assert said in out
    assert run(["explain", str(saved), "--pass", "1"]) == 0
    assert len(capfd.readouterr().out.splitlines()) == 4
    assert run(["explain", str(saved), "--pass", "4"]) == 2
    assert "known: 1 simplify, 2 cse, 3 dce" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("name", "state"), [("program.txt", "damaged"), ("weights.safetensors", "damaged"), ("program.txt", "missing")]
)
def test_a_damaged_dir_is_explained_as_far_as_it_can_be(
    saved: Path, tmp_path: Path, name: str, state: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(saved, tmp_path / "out")
    if state == "missing":
        (folder / name).unlink()
    else:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: len(content) // 2])
    found = explain(folder)
    assert found.files[name] == state
    assert found.problem
    assert {rule: sum(p.count for p in places) for rule, places in found.passes[0].rules.items()} == {
        "copy": 3,
        "identity": 1,
    }
    assert run(["explain", str(folder)]) == 0
    out = capfd.readouterr().out
    assert f"state:      DAMAGED: {name} {state}; as it was written: verified\n" in out
    assert "plans/3.json ok" in out
    assert "problem:" in out


def test_what_is_no_dir_is_refused(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(tmp_path / "nowhere")]) == 2
    assert run(["explain", str(tmp_path)]) == 1
    capfd.readouterr()
    folder = shutil.copytree(saved, tmp_path / "out")
    ledger = json.loads((folder / "ledger.json").read_text())
    for spoiled in ("{", "[]", "{}", "[" * 9000):
        (folder / "ledger.json").write_text(spoiled)
        assert run(["explain", str(folder)]) == 1
        assert "ledger.json cannot be read" in capfd.readouterr().err
    (folder / "ledger.json").write_text(json.dumps(ledger))
    (folder / "plans" / "1.json").unlink()
    assert run(["explain", str(folder)]) == 1
    assert "plans/1.json is missing" in capfd.readouterr().err
    (folder / "ledger.json").unlink()
    for arguments in ([], ["--pass", "2"]):
        assert run(["explain", str(folder), *arguments]) == 1
        assert "ledger.json is missing" in capfd.readouterr().err


def test_what_kind_of_folder_it_is_instead_is_said(
    saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def said(path: str) -> str:
        for arguments in ([], ["--pass", "1"]):
            assert run(["explain", path, *arguments]) == 1
        return capfd.readouterr().err

    monkeypatch.chdir(tmp_path)
    assert ". is no DIR\n  why: it is empty\n" in said(".")
    (tmp_path / "notes").touch()
    assert "it holds no recipe.yaml" in said(".")
    dump = tmp_path / "dumps" / "000-captured"
    shutil.copytree(saved, dump, ignore=shutil.ignore_patterns("recipe.yaml", "ledger.json", "plans"))
    assert "is a dump, and no DIR" in said("dumps/000-captured")
    assert "`laconic diff A B` compares" in said("dumps/000-captured")
    assert "other folders with a program: 000-captured" in said("dumps")
    shutil.copytree(saved, tmp_path / "cut", ignore=shutil.ignore_patterns("recipe.yaml"))
    assert "recipe.yaml is missing" in said("cut")


#: A change to ledger.json, and what must be said of it.
_LEDGERS = [
    (lambda d: d["passes"][0]["after"].update(max_abs="x"), "passes[0].after.max_abs is 'x', not a number"),
    (lambda d: d["passes"][1].update(modified=0), "passes[1].modified is 0, not true or false"),
    (lambda d: d["passes"][1].update(contract="nearly"), "passes[1].contract is 'nearly', which is none"),
    (lambda d: d["passes"][1].update(seconds=-1), "passes[1].seconds is -1"),
    (lambda d: d["passes"][1].pop("reason"), "passes[1] lacks 'reason'"),
    (lambda d: d["passes"][1].update(more=1), "passes[1] has 'more', which is not known"),
    (lambda d: d["passes"].__setitem__(2, 1), "passes[2] is 1, not an object"),
    (lambda d: d["passes"].pop(0), "does not fit recipe.yaml"),
    (lambda d: d["passes"].reverse(), "after is not what the last pass left"),
    (lambda d: d.update(passes={}), "passes is {}, not a list"),
    (lambda d: d.pop("passes"), "it lacks 'passes'"),
    (lambda d: d.update(rows=d["passes"]), "it has 'rows', which is not known"),
    (lambda d: d["before"].update(nodes=True), "before.nodes is True, not a whole number"),
    (lambda d: d["before"].update(nodes=-1), "before.nodes is -1, not a whole number"),
    (lambda d: d["before"].update(metrics=[]), "before.metrics is [], not an object"),
    (lambda d: d["before"].update(metrics={"a": None}), "before.metrics.a is None, not a number"),
    (lambda d: d.update(checked=["a", 1]), "checked[1] is 1, not a text"),
    (lambda d: d.update(checked="all"), "checked is 'all', not a list"),
    (lambda d: d.update(model=None), "model is None, not a text"),
    (lambda d: d.update(model="other"), "model: other against net"),
    (lambda d: d.update(verified=False), "verified: False against True"),
    (lambda d: d.update(schema=2), "no object with schema 1"),
]


@pytest.mark.parametrize(("change", "message"), _LEDGERS, ids=[m for _, m in _LEDGERS])
def test_a_damaged_ledger_is_named_with_its_fault(
    saved: Path, tmp_path: Path, change: Callable[[Any], object], message: str
) -> None:
    folder = shutil.copytree(saved, tmp_path / "out")
    ledger = json.loads((folder / "ledger.json").read_text())
    change(ledger)
    (folder / "ledger.json").write_text(json.dumps(ledger))
    for act in (lambda: explain(folder), lambda: actions_of(folder, 1)):
        with pytest.raises(ModelError, match=re.escape(message)) as caught:
            act()
        assert "ledger.json" in str(caught.value)


def test_a_ledger_with_what_is_no_number_reads_back(saved: Path) -> None:
    data = json.loads((saved / "ledger.json").read_text())
    for sizes in (data["after"], data["passes"][-1]["after"]):
        sizes.update(max_abs=float("nan"), metrics={"accuracy": -1})
    read = Ledger.from_json(json.loads(json.dumps(data)))
    assert json.dumps(read.to_json()) == json.dumps(data)


def test_rows_plans_and_recipe_must_be_of_one_run(saved: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(saved, tmp_path / "out")
    shutil.copy(folder / "plans" / "1.json", folder / "plans" / "4.json")
    with pytest.raises(ModelError, match=r"plans holds 4 plans, ledger.json has 3 passes"):
        explain(folder)
    (folder / "plans" / "4.json").unlink()
    shutil.copy(folder / "plans" / "1.json", folder / "plans" / "2.json")
    with pytest.raises(ModelError, match=r"plans/2.json is another pass's plan"):
        explain(folder)


@pytest.mark.parametrize(
    "change", [{"actions": [1]}, {"actions": [{"rule": 2}]}, {"actions": 3}, {"strides": [1]}, {"spec": 1}], ids=str
)
def test_a_damaged_plan_is_named(saved: Path, tmp_path: Path, change: dict[str, Any]) -> None:
    folder = shutil.copytree(saved, tmp_path / "out")
    plan = json.loads((folder / "plans" / "1.json").read_text())
    (folder / "plans" / "1.json").write_text(json.dumps({**plan, **change}))
    with pytest.raises(ModelError, match=r"the plan 1.json cannot be read"):
        explain(folder)


@pytest.mark.parametrize("name", ["ledger.json", "plans/1.json"])
def test_an_edited_file_that_still_reads_is_damage(
    saved: Path, tmp_path: Path, name: str, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = shutil.copytree(saved, tmp_path / "out")
    (folder / name).write_text((folder / name).read_text().replace("\n", "\n "))
    assert run(["explain", str(folder)]) == 0
    assert f"state:      DAMAGED: {name} damaged; as it" in capfd.readouterr().out
    assert run(["explain", str(folder), "--pass", "1"]) == 0
    assert f"{name} is damaged" in capfd.readouterr().err
    assert run(["explain", str(folder), "--json", "--no-progress"]) == 0
    assert json.loads(capfd.readouterr().out)["damaged"] == [name]


def test_an_unverified_dir_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = optimize(parse(TEXT), "cse")
    done.ledger.verified = False
    save(done.program, done.ledger, done.plans, tmp_path / "out")
    assert run(["explain", str(tmp_path / "out")]) == 0
    assert "UNVERIFIED" in capfd.readouterr().out
