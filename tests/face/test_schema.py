"""What the commands print as JSON, held to the committed schema, which refuses what it should."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from laconic.cli.main import app, run
from laconic.ir.errors import UsageError
from laconic.schema import VERSION, schema, schema_of

ROOT = Path(__file__).parents[2]
MODEL = "examples.twice:model"

#: A command line for each definition; DIR stands for a saved DIR, ONNX and PT2 for files to write.
COMMANDS = {
    "passes": ["passes"],
    "optimize": ["optimize", MODEL, "--dry-run", "--disable-pass", "cse"],
    "eval": ["eval", "DIR", "--against", "DIR", "--repeats", "2"],
    "export": ["export", "DIR", "-o", "F.onnx"],
    "audit": ["audit", MODEL, "--axes"],
    "bisect": ["bisect", MODEL, "--check", "grep -q '\"passes\": \\[\\]' {}/ledger.json"],
    "bench": ["bench", MODEL, "--repeats", "6", "--against", "eager"],
    "diff": ["diff", MODEL, "DIR"],
    "explain": ["explain", "DIR"],
    "actions": ["explain", "DIR", "--pass", "1"],
    "doctor": ["doctor"],
}


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        folder = tmp_path_factory.mktemp("saved") / "out"
        assert run(["optimize", MODEL, "-o", str(folder), "-q", "--stop-after", "cse"]) == 0
    return str(folder)


def document(capfd: pytest.CaptureFixture[str], arguments: list[str], saved: str) -> Any:
    capfd.readouterr()
    assert run([*(saved if a == "DIR" else a for a in arguments), "--json"]) == 0
    return json.loads(capfd.readouterr().out, parse_constant=lambda word: pytest.fail(f"{word} is no JSON"))


def check(data: Any, command: str) -> None:
    jsonschema.Draft202012Validator(schema_of(command)).validate(data)


def test_the_schema_is_one_and_carries_its_version() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert schema()["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema()["$id"].endswith(f":{VERSION}")
    with pytest.raises(UsageError, match="no schema 'optimise'"):
        schema_of("optimise")


def test_every_command_that_prints_json_has_a_definition() -> None:
    named = {c.name for c in app.registered_commands if "json" in c.callback.__annotations__}  # type: ignore[union-attr]
    assert named >= {"passes", "optimize", "eval", "export", "bench", "diff", "explain", "doctor"}
    assert named <= set(schema()["$defs"])
    assert named <= set(COMMANDS), "and is tested below"


def test_actions_are_a_form_of_explain(saved: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = document(capfd, COMMANDS["actions"], saved)
    check(data, "explain")
    with pytest.raises(jsonschema.ValidationError):
        check(data, "explanation")
    with pytest.raises(jsonschema.ValidationError):
        check({"schema": VERSION}, "explain")


@pytest.mark.parametrize("name", COMMANDS)
def test_json_of_each_command_is_valid(name: str, saved: str, capfd: pytest.CaptureFixture[str]) -> None:
    data = document(capfd, COMMANDS[name], saved)
    assert data["schema"] == VERSION
    check(data, name)
    for other in COMMANDS:
        if other != name and (name, other) != ("actions", "explain"):  # of which it is one form
            with pytest.raises(jsonschema.ValidationError):
                check(data, other)


def test_a_pt2_export_and_the_ledger_of_a_dir_are_valid(saved: str, capfd: pytest.CaptureFixture[str]) -> None:
    check(document(capfd, ["export", "DIR", "-o", "F.pt2"], saved), "export")
    ledger = json.loads((Path(saved) / "ledger.json").read_text())
    check(ledger, "optimize")
    assert [row["skipped"] for row in ledger["passes"]] == [False, False, False, True]


def _each(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all objects in a document."""
    found = [path] if isinstance(value, dict) else []
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return found + [p for key, child in children for p in _each(child, (*path, key))]


def _at(data: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        data = data[key]
    return data


@pytest.mark.parametrize("change", ["extra", "missing", "version"])
def test_a_ledger_with_a_field_too_many_or_too_few_is_refused(change: str, saved: str) -> None:
    ledger = json.loads((Path(saved) / "ledger.json").read_text())
    if change == "version":
        with pytest.raises(jsonschema.ValidationError):
            check({**ledger, "schema": VERSION + 1}, "optimize")
        return
    for path in _each(ledger):
        if path and path[-1] == "metrics":
            continue  # names of metrics are free
        damaged = copy.deepcopy(ledger)
        place = _at(damaged, path)
        if change == "extra":
            place["something"] = 1
        else:
            place.pop(next(iter(place)))
        with pytest.raises(jsonschema.ValidationError):
            check(damaged, "optimize")


@pytest.mark.parametrize(
    ("name", "spoil"),
    [
        ("optimize", lambda d: d["passes"][0].update(seconds=-1)),
        ("optimize", lambda d: d["passes"][0].update(contract="nearly")),
        ("optimize", lambda d: d["before"].update(nodes=1.5)),
        ("optimize", lambda d: d["before"]["metrics"].update(accuracy="high")),
        ("optimize", lambda d: d.update(verified="yes")),
    ],
)
def test_values_of_another_kind_are_refused(name: str, spoil: Callable[[Any], None], saved: str) -> None:
    ledger = json.loads((Path(saved) / "ledger.json").read_text())
    spoil(ledger)
    with pytest.raises(jsonschema.ValidationError):
        check(ledger, name)


def test_numbers_that_are_not_finite_are_null(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "log_of_less.py").write_text(
        "import torch\nfrom torch import nn\n\nclass Log(nn.Module):\n    def forward(self, x):\n"
        "        return torch.log(-x.abs() - 1)\n\ndef model():\n    return Log(), {'x': torch.randn(3, 4)}\n"
    )
    monkeypatch.chdir(tmp_path)
    assert run(["eval", "log_of_less:model", "--against", "log_of_less:model", "--repeats", "1", "-q", "--json"]) == 0
    document = json.loads(capsys.readouterr().out, parse_constant=lambda word: pytest.fail(word))
    assert [row["cosine"] for row in document["rows"]] == [None] * len(document["rows"])
    jsonschema.validate(document, schema_of("eval"))
