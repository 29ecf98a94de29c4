"""Bisection: planted harm is found by pass, by action, and by pair; by a metric and by a command."""

from __future__ import annotations

import json
import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from compiled import Stack, drawn, made
from laconic.bisect import Bisection, Finding, Tester, Verdict, _first_bad, by_metric
from laconic.cli.main import run
from laconic.data.named import ListedData
from laconic.figures import Judge
from laconic.ir.calibration import Calibration
from laconic.ir.capture import capture_module
from laconic.ir.data import Batch
from laconic.ir.errors import UsageError
from laconic.ir.metrics.quality import Divergence
from laconic.ir.program import Program
from laconic.passes.base import Contract, Pass, Plan
from laconic.passes.manager import Run


@dataclass(frozen=True)
class Scale(Pass):
    """Multiplies each matrix by nearly one, an action each; the one numbered `harm` by minus one."""

    name: ClassVar[str] = "scale"
    summary: ClassVar[str] = "for tests"
    contract: ClassVar[Contract] = Contract.LOSSY
    tag: str = ""
    harm: int = -1
    by: float = 1 + 1e-6

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        rows = [row for row in program.weights if row.endswith("weight") and "norm" not in row]
        return Plan(self.spec, tuple({"rule": "scale", "weight": row, "site": k} for k, row in enumerate(rows)))

    def rewrite(self, program: Program, plan: Plan) -> None:
        for action in plan.actions:
            row = program.weights[action["weight"]]
            factor = -1.0 if action["site"] == self.harm else self.by
            program.weights[action["weight"]] = replace(row, value=row.value.detach() * factor)


@pytest.fixture(scope="module")
def program() -> Program:
    return capture_module(made(Stack).eval(), (drawn(4, 12),), {}, None)


@pytest.fixture(scope="module")
def test_by_kl(program: Program) -> Tester:
    judge = Judge(program, ListedData("x", [Batch({"x": drawn(4, 12)})]), [Divergence()])
    return by_metric(judge, program, 1e-4)


def search(program: Program, passes: Sequence[Pass], test: Tester) -> Finding:
    return Bisection(program, passes, test).search()


@pytest.mark.parametrize(("position", "harm"), [(1, 0), (3, 4), (5, 10)])
def test_the_pass_and_its_action_are_found(program: Program, test_by_kl: Tester, position: int, harm: int) -> None:
    passes = [Scale(tag=f"t{k}", harm=harm if k == position else -1) for k in range(1, 6)]
    found = search(program, passes, test_by_kl)
    assert found.culprit == passes[position - 1]
    assert found.position == position
    assert found.actions == harm + 1
    assert found.action == passes[0].plan(program).actions[harm]
    assert found.alone
    assert found.partner is None
    assert len(found.trials) <= 2 + math.ceil(math.log2(5)) + math.ceil(math.log2(11)) + 1
    assert all(trial.measured is not None for trial in found.trials)


def test_what_is_not_a_number_is_bad(program: Program, test_by_kl: Tester) -> None:
    passes = [Scale(tag="a"), Scale(tag="b", by=math.nan), Scale(tag="c")]
    found = search(program, passes, test_by_kl)
    assert found.culprit == passes[1]


def test_nothing_is_found_where_all_is_good(program: Program, test_by_kl: Tester) -> None:
    found = search(program, [Scale(tag="a"), Scale(tag="b")], test_by_kl)
    assert found.culprit is None
    assert [trial.verdict for trial in found.trials] == [Verdict.GOOD, Verdict.GOOD]
    with pytest.raises(UsageError, match="not good before any pass"):
        search(program, [Scale()], lambda run: (Verdict.BAD, None))


def tags(run: Run) -> set[str]:
    return {plan.spec.partition("tag=")[2].rstrip("}") for plan in run.plans}


@pytest.mark.parametrize(("bad", "partner"), [({"b", "d"}, "b"), ({"a", "b", "d"}, None)])
def test_two_passes_that_only_hurt_together(program: Program, bad: set[str], partner: str | None) -> None:
    passes = [Scale(tag=tag) for tag in "abcde"]

    def test(run: Run) -> tuple[Verdict, float | None]:
        return (Verdict.BAD if bad <= tags(run) else Verdict.GOOD), None

    found = search(program, passes, test)
    assert found.culprit == Scale(tag="d")
    assert found.alone is False
    assert found.partner == (Scale(tag=partner) if partner else None)


@pytest.mark.parametrize("count", [1, 2, 7, 16])
def test_halving_finds_the_first_bad_one_around_what_cannot_be_judged(count: int) -> None:
    for first in range(1, count + 1):
        asked: list[int] = []

        def verdict(n: int, first: int = first, asked: list[int] = asked) -> Verdict:
            asked.append(n)
            return Verdict.BAD if n >= first else Verdict.GOOD

        assert _first_bad(count, verdict) == first
        assert len(asked) <= math.ceil(math.log2(count)) if count > 1 else not asked
        skipped = _first_bad(count, lambda n, first=first: Verdict.SKIP if n == first - 1 else verdict(n, first))
        assert first - 1 <= skipped <= first


#: Loads nothing but the names of the weights, which stand in front of them.
CHECK = """
import json, pathlib, sys
print("what a command prints is none of the document")
stored = pathlib.Path(sys.argv[1], "weights.safetensors").read_bytes()
weights = json.loads(stored[8 : 8 + int.from_bytes(stored[:8], "little")])
weights.pop("__metadata__", None)
sys.exit({exit})
"""


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))

    def written(exit_code: str) -> str:
        script = tmp_path / "check.py"
        script.write_text(CHECK.format(exit=exit_code))
        return shlex.join([sys.executable, "-S", str(script)])

    return written


def test_by_a_command(command: Callable[[str], str], capfd: pytest.CaptureFixture[str]) -> None:
    before = ["bisect", "examples.twice:model", "-p", "dedup,cse,dce", "--json", "-q"]
    assert run([*before, "--check", command("len(weights) < 6")]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["culprit"] == "dedup"
    assert found["alone"] is True
    assert run([*before, "--check", command("0")]) == 0
    assert json.loads(capfd.readouterr().out)["culprit"] is None
    assert run([*before, "--check", command("125")]) == 2
    assert "not good before any pass" in capfd.readouterr().err
    assert run([*before, "--check", command("125 if len(weights) < 6 else 0")]) == 2
    assert "cannot be told" in capfd.readouterr().err
    assert run([*before, "--check", "no_such_command {}"]) == 2
    assert "cannot be started" in capfd.readouterr().err


def test_by_a_metric(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    from safetensors.torch import save_file

    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    save_file({"x": torch.randn(6, 4)}, tmp_path / "x.safetensors")
    what = ["bisect", "examples.twice:model", "--data", str(tmp_path / "x.safetensors")]
    assert run([*what, "--metric", "cosine", "--max-drop", "0.01"]) == 0
    assert "nothing found" in capfd.readouterr().out
    assert run([*what, "--metric", "cosine", "--max-drop", "-1"]) == 2  # nothing is so good
    assert "not good before any pass" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "--data, or by --check"),
        (["--data", "x.npz", "--check", "true"], "--data, or by --check"),
        (["--check", "true", "--metric", "kl"], "says nothing without data"),
        (["--check", ""], "names no command"),
        (["--check", "'"], "cannot be read"),
        (["--check", "true", "--max-drop", "0"], "says nothing without data"),
        (["--data", "x.npz", "--max-drop", "nan"], "not a number"),
        (["--check", "true", "-p", "cze"], "cse"),
    ],
)
def test_slips(
    arguments: list[str], said: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    assert run(["bisect", "examples.twice:model", *arguments]) == 2
    assert said in capfd.readouterr().err
