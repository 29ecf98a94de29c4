"""The manager: rows telescope, plans replay bit for bit, the given program stays as it is."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch

import laconic
from helpers import bits, optimize, parse
from laconic.ir.calibration import Calibration
from laconic.ir.capture import capture_module
from laconic.ir.errors import UsageError, VerificationError
from laconic.ir.inputs import draw
from laconic.ir.program import Program
from laconic.ir.run import evaluate
from laconic.ir.signature import fingerprint
from laconic.passes.base import Contract, Pass, PassResult, Plan
from laconic.passes.ledger import Ledger
from laconic.passes.manager import Instrument, PassManager, Run
from laconic.passes.pipeline import parse_pipeline
from laconic.passes.plans import read_plan, write_plan
from random_modules import random_module

PLANTED = """
size batch in [1, 9] like 2
parameter @a: f32[4, 4] trainable
parameter @b: f32[4, 4] trainable
buffer @unused: f32[64]
state @s: f32[4]
entry forward {
  input %x: f32[batch, 4] in [-1.0, 1.0]
  argument x = %x
  %dead: f32[batch, 4] = aten.exp(%x) !0
  %made: f32[batch, 4] = aten.neg(%x) !9
  %copy: f32[batch, 4] = aten.clone(%made) !1
  %p: f32[batch, 4] = aten.linear(%copy, @a) !2
  %q: f32[batch, 4] = aten.linear(%made, @b) !3
  %half: f32[4] = aten.full([4], 0.5) !4
  %third: f32[4] = aten.mul.Tensor(%half, 3) !5
  %r: f32[batch, 4] = aten.mul.Tensor(%p, %third) !6
  %t: f32[batch, 4] = aten.add.Tensor(%q, %r) !7
  %u: f32[4] = aten.sum.dim_IntList(%t, [0]) !8
  %n: f32[4] = aten.add.Tensor(@s, %u) !9
  update @s = %n
  return %t
}
site 0..9 = "block" "model.py:3"
"""


@pytest.fixture
def planted() -> Program:
    value = torch.arange(16.0).reshape(4, 4)
    return parse(PLANTED, a=value, b=value.clone())


def run(program: Program, pipeline: str = "exact") -> Run:
    return PassManager(parse_pipeline(pipeline)).run(program)


def test_each_planted_redundancy_is_named_by_the_pass_that_removed_it(planted: Program) -> None:
    rows = {row.name: row for row in run(planted).ledger.rows}
    assert all(row.modified for row in rows.values())
    assert "1 copy" in rows["simplify"].reason
    assert "1 constant" in rows["simplify"].reason
    assert rows["dedup"].reason == "1 same bytes"
    assert rows["cse"].reason == "1 common subexpression"
    assert rows["dce"].reason == "2 dead call, 1 unused weight"


def test_nothing_planted_nothing_done() -> None:
    program = parse(
        """
        entry forward {
          input %x: f32[2] in [-1.0, 1.0]
          argument x = %x
          %a: f32[2] = aten.exp(%x)
          return %a
        }
        """
    )
    done = run(program)
    assert done.program is program
    assert all(not row.modified and row.reason for row in done.ledger.rows)
    assert done.ledger.before == done.ledger.after


def test_rows_telescope_and_the_ledger_survives_json(planted: Program) -> None:
    done = run(planted)
    ledger = done.ledger
    assert ledger.before.nodes == planted.node_count()
    assert ledger.before.weight_bytes == planted.weight_bytes()
    assert ledger.after == ledger.rows[-1].after
    assert ledger.after.nodes == done.program.node_count()
    assert ledger.after.weight_bytes == done.program.weight_bytes()
    assert [row.after.max_abs for row in ledger.rows] == [0.0] * 4
    for position in range(1, 5):
        part = run(planted, ",".join(row.spec for row in ledger.rows[:position])).ledger
        assert part.after == ledger.rows[position - 1].after
    data = json.loads(json.dumps(ledger.to_json()))
    assert data["schema"] == 1
    assert Ledger.from_json(data).to_json() == ledger.to_json()


def test_the_given_program_is_left_as_it_is(planted: Program) -> None:
    text, held = str(planted), fingerprint(planted)
    done = run(planted)
    assert (str(planted), fingerprint(planted)) == (text, held)
    assert done.program is not planted


def replay(program: Program, plans: list[Plan], folder: Path) -> Program:
    passes = parse_pipeline("exact")
    for position, plan in enumerate(plans):
        write_plan(plan, folder, position)
        program = passes[position].apply(program, read_plan(folder, position)).program
    return program


def same_bits(a: Program, b: Program, seed: int) -> None:
    assert str(a) == str(b)
    assert {n: bits(w.value) for n, w in a.weights.items()} == {n: bits(w.value) for n, w in b.weights.items()}
    case = draw(a, a.forward, {}, seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = bits(evaluate(a, a.forward, case.clone()).tensors())
        torch.manual_seed(0)
        assert bits(evaluate(b, b.forward, case.clone()).tensors()) == first


def test_saved_plans_replay_bit_for_bit(planted: Program, tmp_path: Path) -> None:
    done = run(planted)
    same_bits(replay(planted, done.plans, tmp_path), done.program, 0)


@pytest.mark.parametrize("seed", [1, 4, 9, 16])
def test_saved_plans_of_random_modules_replay_bit_for_bit(seed: int, tmp_path: Path) -> None:
    module, inputs, dynamic = random_module(seed)
    captured = capture_module(module, inputs, {}, dynamic)
    done = run(captured)
    same_bits(replay(captured, done.plans, tmp_path), done.program, seed)


def test_a_plan_restricted_to_some_sites_does_only_that(planted: Program) -> None:
    simplify = parse_pipeline("simplify")[0]
    plan = simplify.plan(planted)
    assert {a["site"] for a in plan.actions} == {1, 5}
    part = plan.restricted({1})
    assert [a["node"] for a in part.actions] == ["copy"]
    rewritten = simplify.apply(planted, part).program
    assert len(rewritten.weights) == len(planted.weights)
    assert rewritten.node_count() == planted.node_count() - 1
    nothing = simplify.apply(planted, plan.restricted({7}))
    assert not nothing.modified
    assert nothing.reason == "no action at these sites"
    assert nothing.program is planted


@pytest.mark.parametrize(("each", "contracts"), [(False, True), (True, False), (False, False)])
def test_what_was_not_checked_is_not_called_verified(planted: Program, each: bool, contracts: bool) -> None:
    done = PassManager(parse_pipeline("exact"), verify_each=each, check_contracts=contracts).run(planted)
    assert not done.ledger.verified
    assert all(row.modified for row in done.ledger.rows)
    assert (done.ledger.after.max_abs is None) == (not contracts)
    assert bool(done.ledger.checked) == contracts


def test_what_was_checked_is_called_verified_on_several_sizes(planted: Program) -> None:
    ledger = run(planted).ledger
    assert ledger.verified
    assert len({text.partition("batch=")[2] for text in ledger.checked}) == 3


class Watch(Instrument):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def before_pass(self, position: int, item: Pass, program: Program) -> None:
        self.seen.append(f"{position} {item.spec}")

    def after_pass(self, position: int, item: Pass, result: PassResult) -> None:
        self.seen.append(f"{position} {result.modified}")

    def finished(self, program: Program, ledger: Ledger) -> None:
        self.seen.append("finished")


def test_instruments_see_every_pass(planted: Program) -> None:
    watch = Watch()
    PassManager(parse_pipeline("dce,cse"), instruments=[watch]).run(planted)
    assert watch.seen == ["0 dce", "0 True", "1 cse", "1 False", "finished"]


def test_a_pass_with_needs_that_nothing_provides_is_refused(planted: Program) -> None:
    from laconic.passes.base import Needs
    from laconic.passes.dce import Dce

    class Hungry(Dce):
        needs = Needs.ACTIVATIONS

    with pytest.raises(UsageError, match="needs activations"):
        PassManager([Hungry()]).run(planted)


@dataclass(frozen=True)
class _Capped(Pass):
    """Says `tolerance` and lets relu stop at six, which small inputs do not show."""

    name: ClassVar[str] = "capped"
    summary: ClassVar[str] = "for this test"
    contract: ClassVar[Contract] = Contract.TOLERANCE
    entry: str = "forward"

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        return Plan(self.spec, ({"rule": "cap", "entry": self.entry},))

    def rewrite(self, program: Program, plan: Plan) -> None:
        for node in program.entries[self.entry].calls():
            if node.target is torch.ops.aten.relu.default:
                node.target = torch.ops.aten.relu6.default


def test_the_case_that_breaks_a_tolerance_is_judged_again() -> None:
    inputs = [(torch.rand(3, 4),), (torch.full((3, 4), 100.0),)]
    with pytest.raises(VerificationError, match="the contract 'tolerance' is broken"):
        laconic.optimize(torch.nn.ReLU(), [_Capped()], inputs=inputs)


def test_entries_beside_forward_are_held_to_the_contract_too() -> None:
    body = """
      input %x: f32[3] in [-20.0, 20.0]
      argument x = %x
      %y: f32[3] = aten.relu(%x)
      return %y
    """
    both = parse(f"entry forward {{{body}}}\nentry decode {{{body}}}")
    with pytest.raises(VerificationError, match="the contract 'tolerance' is broken") as caught:
        optimize(both, [_Capped(entry="decode")])
    assert "inputs of decode" in str(caught.value)
    assert optimize(both, "cse").ledger.verified
