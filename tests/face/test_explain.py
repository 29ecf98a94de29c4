"""`explain`: what a saved DIR says of itself, damaged or not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from helpers import optimize, parse
from laconic.artefact import save
from laconic.cli.main import run
from laconic.explain import Place, actions_of, explain

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
    assert found.files == {"program.txt": "ok", "weights.safetensors": "ok"}
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
    for said in ("net", "verified; program.txt ok", "3 copy", "block.0 net.py:7 x 2", "no two calls compute", "@spare"):
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
    assert f"{name} {state}" in out
    assert "problem:" in out


def test_what_is_no_dir_is_refused(saved: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["explain", str(tmp_path / "nowhere")]) == 2
    assert run(["explain", str(tmp_path)]) == 1
    capfd.readouterr()
    folder = shutil.copytree(saved, tmp_path / "out")
    ledger = json.loads((folder / "ledger.json").read_text())
    for spoiled in ("{", "[]", "{}", json.dumps({**ledger, "passes": [1]}), json.dumps({**ledger, "before": {"x": 1}})):
        (folder / "ledger.json").write_text(spoiled)
        assert run(["explain", str(folder)]) == 1
        assert "ledger.json cannot be read" in capfd.readouterr().err
    (folder / "ledger.json").write_text(json.dumps(ledger))
    (folder / "plans" / "1.json").unlink()
    assert run(["explain", str(folder)]) == 1
    assert "1.json" in capfd.readouterr().err


def test_an_unverified_dir_says_so(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    done = optimize(parse(TEXT), "cse")
    done.ledger.verified = False
    save(done.program, done.ledger, done.plans, tmp_path / "out")
    assert run(["explain", str(tmp_path / "out")]) == 0
    assert "UNVERIFIED" in capfd.readouterr().out
