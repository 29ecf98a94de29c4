"""Instruments: what is skipped, printed, dumped and timed is what ran."""

from __future__ import annotations

import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers import own_values, parse
from laconic.ir.calibration import Calibration
from laconic.ir.errors import LaconicError, PipelineError, UsageError, VerificationError
from laconic.ir.parse import parse_program
from laconic.ir.program import Program
from laconic.ir.store import read_program
from laconic.passes.base import Contract, Pass, PassResult, Plan
from laconic.passes.instruments import Advice, Bisect, Dump, PrintAfter, PrintChanged, Skip, Timing
from laconic.passes.ledger import Ledger
from laconic.passes.manager import Instrument, PassManager, Phase, Run
from laconic.passes.pipeline import parse_pipeline, positions

TEXT = """
size batch in [1, 9] like 2
parameter @a: f32[4, 4] trainable
parameter @b: f32[4, 4] trainable
buffer @unused: f32[64]
entry forward {
  input %x: f32[batch, 4] in [-1.0, 1.0]
  argument x = %x
  %copy: f32[batch, 4] = aten.clone(%x) !1
  %p: f32[batch, 4] = aten.linear(%copy, @a) !2
  %q: f32[batch, 4] = aten.linear(%x, @b) !3
  %t: f32[batch, 4] = aten.add.Tensor(%p, %q) !4
  return %t
}
site 0..4 = "block" "model.py:3"
"""
EXACT = "simplify,dedup,cse,dce"


@pytest.fixture
def program() -> Program:
    value = torch.arange(16.0).reshape(4, 4)
    return parse(TEXT, a=value, b=value.clone())


def run(program: Program, pipeline: str, *instruments: Instrument) -> Run:
    return PassManager(parse_pipeline(pipeline), instruments=instruments).run(program)


class Wrong(Pass):
    """Claims to be exact and drops the copy's operand for zeros."""

    name = "wrong"
    summary = "break the contract"
    contract = Contract.EXACT

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        return Plan(self.spec, ({"rule": "wrong"},))

    def rewrite(self, program: Program, plan: Plan) -> None:
        node = next(n for n in program.forward.calls() if n.target is torch.ops.aten.add.Tensor)
        node.target = torch.ops.aten.sub.Tensor


class Slow(Pass):
    """Sleeps while planning."""

    name = "slow"
    summary = "take time"
    contract = Contract.EXACT

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        time.sleep(0.05)
        return Plan(self.spec, reason="nothing but sleep")

    def rewrite(self, program: Program, plan: Plan) -> None:
        raise AssertionError


class Watch(Instrument):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def started(self, program: Program, passes: Any) -> None:
        self.seen.append("started")

    def should_run(self, position: int, item: Pass) -> str | None:
        self.seen.append(f"asked {item.name}")
        return None

    def skipped_pass(self, position: int, item: Pass, reason: str) -> None:
        self.seen.append(f"skipped {item.name}: {reason}")

    def before_pass(self, position: int, item: Pass, program: Program) -> None:
        self.seen.append(f"before {position} {item.name}")

    def spent(self, phase: Phase, seconds: float) -> None:
        assert seconds >= 0
        self.seen.append(phase)

    def after_pass(self, position: int, item: Pass, result: PassResult) -> None:
        self.seen.append(f"after {position} {item.name} {result.modified}")

    def failed_pass(self, position: int, item: Pass, problem: LaconicError) -> str | None:
        self.seen.append(f"failed {item.name}")
        return "look at the watch"

    def finished(self, program: Program, ledger: Ledger) -> None:
        self.seen.append("finished")


def test_events_come_in_order(program: Program) -> None:
    watch = Watch()
    run(program, "cse,dce", watch, Skip({1: "why not"}))
    phases = ["plan", "apply", "verify", "check"]
    assert watch.seen == [
        *("started", "verify", "check", "verify", "asked cse", "before 0 cse", *phases, "after 0 cse False"),
        *("asked dce", "skipped dce: why not", "finished"),
    ]


def test_a_failure_asks_each_instrument_what_to_do_next(program: Program) -> None:
    watch = Watch()
    with pytest.raises(VerificationError) as failure:
        PassManager([Wrong()], instruments=[watch, Advice("sleep over it")]).run(program)
    assert failure.value.hint.splitlines() == ["to go on without it: -p 'none'", "look at the watch", "sleep over it"]
    assert watch.seen[-2:] == ["check", "failed wrong"]


def test_what_is_skipped_is_as_if_it_were_not_in_the_pipeline(program: Program) -> None:
    done, without = run(program, EXACT, Skip({1: "--disable-pass dedup"})), run(program, "simplify,cse,dce")
    assert str(done.program) == str(without.program)
    row = done.ledger.rows[1]
    assert (row.spec, row.skipped, row.modified, row.actions, row.seconds) == ("dedup", True, False, 0, 0.0)
    assert row.reason == "skipped: --disable-pass dedup"
    assert row.after == done.ledger.rows[0].after
    assert done.ledger.verified
    assert done.ledger.pipeline == EXACT
    assert [plan.spec for plan in done.plans] == EXACT.split(",")
    assert done.plans[1].actions == ()
    assert Ledger.from_json(done.ledger.to_json()).to_json() == done.ledger.to_json()


def test_a_failure_does_not_count_skipped_passes_among_those_that_ran(program: Program) -> None:
    passes = [*parse_pipeline("simplify,cse"), Wrong()]
    with pytest.raises(VerificationError) as failure:
        PassManager(passes, instruments=[Skip({0: "no"})]).run(program)
    assert "pass 3 of 3, after cse;" in failure.value.where


@pytest.mark.parametrize(("limit", "ran"), [(-1, 4), (0, 0), (2, 2), (4, 4), (9, 4)])
def test_bisect_runs_the_first_passes_and_says_so(program: Program, limit: int, ran: int) -> None:
    lines: list[str] = []
    done = run(program, EXACT, Bisect(limit, lines.append))
    assert [row.skipped for row in done.ledger.rows] == [False] * ran + [True] * (4 - ran)
    names = EXACT.split(",")
    verbs = ["running"] * ran + ["NOT running"] * (4 - ran)
    assert lines == [f"BISECT: {verb} pass ({k}) {names[k - 1]} on program" for k, verb in enumerate(verbs, 1)]


def test_bisect_gives_no_number_to_what_another_instrument_skips(program: Program) -> None:
    lines: list[str] = []
    done = run(program, EXACT, Skip({0: "off"}), Bisect(1, lines.append))
    assert [row.skipped for row in done.ledger.rows] == [True, False, True, True]
    assert lines[0] == "BISECT: running pass (1) dedup on program"
    assert done.ledger.rows[2].reason == "skipped: --bisect-limit 1"


def test_halving_the_limit_finds_the_faulty_pass(program: Program) -> None:
    passes = [*parse_pipeline("simplify,dedup,cse"), Wrong(), *parse_pipeline("dce")]
    low, high = 0, len(passes)
    while high - low > 1:
        limit = (low + high) // 2
        try:
            PassManager(passes, instruments=[Bisect(limit, lambda line: None)]).run(program)
            low = limit
        except VerificationError:
            high = limit
    assert passes[high - 1].name == "wrong"


def test_print_after_prints_what_parses_back(program: Program) -> None:
    texts: list[str] = []
    done = run(program, "simplify,dce,dce", PrintAfter(texts.append, {0, 2}))
    assert [text.splitlines()[0] for text in texts] == ["*** after simplify (1 of 3) ***", "*** after dce (3 of 3) ***"]
    last = parse_program(texts[1].split("\n", 1)[1] + "\n", own_values(done.program), "printed")
    assert str(last) == str(done.program)
    everything: list[str] = []
    run(program, "simplify,dce", PrintAfter(everything.append), Skip({1: "off"}))
    assert [text.splitlines()[0] for text in everything] == [
        "*** after simplify (1 of 2) ***",
        "*** after dce (2 of 2): skipped: off ***",
    ]


def test_print_changed_shows_the_lines_that_differ_and_no_others(program: Program) -> None:
    texts: list[str] = []
    done = run(program, "simplify,simplify", PrintChanged(texts.append))
    before, after = Counter(str(program).splitlines()), Counter(str(done.program).splitlines())
    lines = texts[0].splitlines()[1:]
    assert Counter(line[1:] for line in lines if line.startswith("-")) == before - after
    assert Counter(line[1:] for line in lines if line.startswith("+")) == after - before
    assert texts[1] == "*** after simplify (2 of 2): no change ***"


def test_dumps_read_back_and_share_equal_weights(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "dumps"
    done = run(program, EXACT, Dump(folder), Skip({1: "off"}))
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["000-captured", "001-simplify", "003-cse", "004-dce"]
    assert str(read_program(folder / "000-captured")) == str(program)
    last = read_program(folder / "004-dce")
    assert str(last) == str(done.program)
    assert all(torch.equal(w.value, done.program.weights[name].value) for name, w in last.weights.items())
    files = [(folder / name / "weights.safetensors").stat().st_ino for name in names]
    assert files[0] == files[1] == files[2]
    assert files[3] != files[2], "dce dropped a weight"


def test_dumps_do_not_share_rows_that_only_have_equal_names(tmp_path: Path) -> None:
    """A constant that a pass makes anew under an old name is another tensor."""

    class Doubles(Wrong):
        def rewrite(self, program: Program, plan: Plan) -> None:
            weight = program.weights["a"]
            program.weights["a"] = type(weight)("a", weight.value * 2, weight.kind, weight.trainable)

    program = parse(TEXT, a=torch.ones(4, 4), b=torch.ones(4, 4))
    with pytest.raises(VerificationError):
        PassManager([Doubles()], instruments=[Dump(tmp_path / "checked")]).run(program)
    assert [path.name for path in (tmp_path / "checked").iterdir()] == ["000-captured"]
    PassManager([Doubles()], False, False, [Dump(tmp_path / "d")]).run(program)
    values = [read_program(tmp_path / "d" / name).weights["a"].value for name in ("000-captured", "001-wrong")]
    assert [float(v[0, 0]) for v in values] == [1.0, 2.0]


def test_a_failed_pass_leaves_the_dump_before_it_and_names_the_line_that_reproduces_it(
    program: Program, tmp_path: Path
) -> None:
    folder = tmp_path / "my dumps"
    passes = [*parse_pipeline("dedup{slices=no},cse"), Wrong()]
    with pytest.raises(VerificationError) as failure:
        PassManager(passes, instruments=[Skip({1: "off"}), Dump(folder, options=["--seed", "3"])]).run(program)
    assert sorted(path.name for path in folder.iterdir()) == ["000-captured", "001-dedup"]
    line = f"to reproduce it: laconic optimize '{folder}/001-dedup' -p wrong --dry-run --seed 3"
    assert failure.value.hint.splitlines()[-1] == line
    with pytest.raises(VerificationError, match="the contract 'exact' is broken"):
        PassManager([Wrong()]).run(read_program(folder / "001-dedup"))


def test_dumps_replace_dumps_only_if_asked_and_nothing_else(program: Program, tmp_path: Path) -> None:
    folder = tmp_path / "dumps"
    run(program, EXACT, Dump(folder))
    with pytest.raises(UsageError, match="exists already"):
        run(program, "cse", Dump(folder))
    assert len(list(folder.iterdir())) == 5
    run(program, "cse", Dump(folder, force=True))
    assert sorted(path.name for path in folder.iterdir()) == ["000-captured", "001-cse"]
    (folder / "notes.txt").write_text("mine")
    with pytest.raises(UsageError, match=r"holds 'notes\.txt', which is no dump"):
        run(program, "cse", Dump(folder, force=True))
    assert (folder / "notes.txt").read_text() == "mine"
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        run(program, "cse", Dump(tmp_path / "file", force=True))
    assert (tmp_path / "file").read_text() == "mine"


def test_time_is_told_apart_by_phase(program: Program) -> None:
    timing = Timing()
    PassManager([Slow(), *parse_pipeline("simplify")], instruments=[timing]).run(program)
    captured, slow, simplify = timing.rows
    assert [row.name for row in timing.rows] == ["captured", "slow", "simplify"]
    assert captured.phases[Phase.PLAN] == captured.phases[Phase.APPLY] == 0.0
    assert captured.phases[Phase.VERIFY] > 0
    assert captured.phases[Phase.CHECK] > 0
    assert slow.phases[Phase.PLAN] >= 0.05
    assert slow.phases[Phase.PLAN] == max(slow.phases.values())
    assert slow.total == sum(slow.phases.values())
    assert all(seconds > 0 for seconds in simplify.phases.values())
    assert sum(row.total for row in timing.rows) <= timing.wall


def test_no_verifying_takes_no_time_for_it(program: Program) -> None:
    timing = Timing()
    PassManager(parse_pipeline("simplify"), False, False, [timing]).run(program)
    assert timing.rows[0].phases[Phase.CHECK] == 0.0
    assert timing.rows[1].phases[Phase.CHECK] < 0.01


def test_a_pass_is_named_by_its_name_or_by_all_of_its_options() -> None:
    passes = parse_pipeline("dedup,cse,dedup{slices=no},dce")
    assert positions("dedup", passes) == {0, 2}
    assert positions("dedup{slices=no}", passes) == {2}
    assert positions("dedup{slices=yes}", passes) == {0}
    assert positions(" dce ", passes) == {3}


@pytest.mark.parametrize(
    ("text", "kind", "says"),
    [
        ("dedupe", PipelineError, "did you mean 'dedup'"),
        ("dedup{slice=no}", PipelineError, "slices"),
        ("simplify", UsageError, "the pipeline has no pass 'simplify'"),
        ("cse{}", PipelineError, "expected an option"),
        ("exact", UsageError, "is not one pass"),
        ("none", UsageError, "is not one pass"),
        ("cse,dce", UsageError, "is not one pass"),
        ("", UsageError, "is not one pass"),
    ],
)
def test_what_names_no_pass_of_the_pipeline_is_an_error(text: str, kind: type[LaconicError], says: str) -> None:
    with pytest.raises(kind) as failure:
        positions(text, parse_pipeline("dedup,cse,dce"))
    assert says in failure.value.render()
