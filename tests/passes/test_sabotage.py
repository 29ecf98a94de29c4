"""Passes that break a rule are caught, and named with the right reason; honest ones are not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import nn
from torch.export import Dim

import saboteurs as bad
from helpers import apart, own_values
from laconic.ir.calibration import Calibration
from laconic.ir.capture import capture_module
from laconic.ir.errors import VerificationError
from laconic.ir.parse import parse_program
from laconic.ir.program import Program, Weight
from laconic.ir.rewrite import insert_call
from laconic.passes.base import Contract, Pass, PassResult, Plan
from laconic.passes.manager import PassManager

aten = torch.ops.aten


class Model(nn.Module):
    """A state update, a random draw, a view that is returned, two equal weights, a dynamic batch."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)
        self.frozen = nn.Parameter(torch.randn(4), requires_grad=False)
        self.register_buffer("scale", torch.rand(4) + 0.5)
        self.register_buffer("count", torch.zeros(4))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        hidden = torch.tanh(self.linear(x)) * self.scale + self.frozen
        noise = torch.rand_like(x)
        self.count.add_(hidden.mean(0))
        return {"first": hidden + noise, "second": hidden * 2, "view": y.transpose(0, 1), "copy": -torch.relu(y)}


@dataclass(frozen=True)
class Sabotage(Pass):
    """Applies `change` to a copy and says that it did."""

    change: bad.Change = lambda program: None
    says: bool = True

    name: ClassVar[str] = "sabotage"
    summary: ClassVar[str] = "break a rule"
    contract: ClassVar[Contract] = Contract.EXACT

    @property
    def spec(self) -> str:
        return "sabotage"

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        return Plan(self.spec, ({"rule": "change"},))

    def rewrite(self, program: Program, plan: Plan) -> None:
        self.change(program)

    def apply(self, program: Program, plan: Plan) -> PassResult:
        result = super().apply(program, plan)
        return result if self.says else PassResult(result.program, False, "nothing to do")


@pytest.fixture(scope="module")
def captured() -> Program:
    batch = Dim("batch", max=32)
    x, y = torch.randn(3, 4), torch.randn(3, 4)
    return capture_module(Model(), (x, y), {}, {"x": {0: batch}, "y": {0: batch}})


#: change -> what the message must say
_CAUGHT: dict[bad.Change, str] = {
    bad.wrong_shape: "is recorded as",
    bad.stale_type_of_a_user: "cannot be computed from its operands",
    bad.fixes_the_batch_of_a_reshape: "is recorded as",
    bad.missing_type: "has no recorded type",
    bad.refused_operands: "cannot be computed from its operands",
    bad.changed_dtype: "was TensorType",
    bad.changed_weight_dtype: "takes it as",
    bad.returns_an_input: "may now share storage",
    bad.copies_a_view: "no longer shares storage",
    bad.merges_two_results: "may now share storage",
    bad.swaps_results: "'exact' is broken",
    bad.renames_an_output: "changed the names or order of the outputs",
    bad.renames_a_key: "names its results otherwise than their tree",
    bad.drops_an_output: "lost result second",
    bad.renames_an_input: "inputs",
    bad.adds_an_input: "the inputs of entry 'forward' changed",
    bad.removes_an_entry: "entries were",
    bad.drops_the_update: "dropped an update",
    bad.writes_the_state_back_unchanged: "the state is written back unchanged",
    bad.copies_the_state_back: "'exact' is broken: state count changed",
    bad.removes_the_state: "the state 'count' is gone",
    bad.makes_a_buffer_of_the_state: "changed its kind",
    bad.drops_a_weight: "'linear.bias'",
    bad.trains_what_was_frozen: "whether it is trained",
    bad.changes_a_weight: "'exact' is broken",
    bad.points_an_alias_at_other_values: "the weight 'frozen'",
    bad.alias_to_nowhere: "gives a name that the model never had",
    bad.writes_a_weight: "in place",
    bad.writes_a_weight_through_data: "in place",
    bad.writes_a_weight_through_numpy: "in place",
    bad.writes_the_given_program: "it wrote into the program it was given",
    bad.swaps_the_arguments: "the inputs of entry 'forward' changed",
    bad.forgets_a_fact: "a fact about the captured model changed",
    bad.forgets_the_examples: "the example inputs changed",
    bad.renumbers_a_site: "a site was renumbered",
    bad.makes_a_weight_transient: "trained or persistent",
    bad.shadows_a_row: "is a row of the weight table and an alias",
    bad.narrows_a_size: "dynamic axes or their ranges changed",
    bad.off_by_1e_6: "'exact' is broken",
    bad.off_in_one_element: "'exact' is broken",
    bad.minus_zero_becomes_zero: "'exact' is broken",
    bad.nan_in_one_result: "'exact' is broken: result",
    bad.right_for_the_example_only: "'exact' is broken: state count changed",
    bad.folds_the_example_values: "'exact' is broken",
    bad.reorders_random_draws: "'exact' is broken",
    bad.removes_a_random_draw: "'exact' is broken",
    bad.draws_once_more_at_the_end: "another number of random draws",
    bad.brings_view_back: "is not allowed here",
    bad.writes_in_place: "writes into an operand",
    bad.uses_before_it_stands: "does not stand before it",
    bad.calls_a_method: "is a call_method",
    bad.calls_python: "is no op that may stand in a program",
    bad.compares_a_dynamic_size: "a dynamic size was compared",
    bad.fixes_a_dynamic_size: "wrote into the program it was given",
}


@pytest.fixture
def fresh(captured: Program) -> Program:
    """A program that a saboteur may ruin, with a shape environment of its own."""
    program = apart(parse_program(str(captured), own_values(captured)))
    program.examples = captured.examples
    return program


@pytest.mark.parametrize("change", _CAUGHT, ids=lambda c: c.__name__)
def test_catches_a_pass_that(change: bad.Change, fresh: Program) -> None:
    with pytest.raises(VerificationError) as caught:
        PassManager([Sabotage(change)]).run(fresh)
    message = str(caught.value)
    assert "the pass 'sabotage' failed" in message
    assert _CAUGHT[change] in message
    assert "pass 1 of 1" in message


@pytest.mark.parametrize(
    "change", [bad.writes_a_weight_through_data, bad.writes_a_weight_through_numpy, bad.writes_a_weight]
)
def test_catches_a_write_by_a_pass_that_says_it_did_nothing(change: bad.Change, captured: Program) -> None:
    with pytest.raises(VerificationError, match="in place"):
        PassManager([Sabotage(change, says=False)]).run(apart(captured))


def test_catches_a_pass_that_says_it_changed_what_it_did_not(captured: Program) -> None:
    with pytest.raises(VerificationError, match="says the program is modified, which is not so"):
        PassManager([Sabotage(lambda program: None)]).run(captured)


def test_catches_a_pass_that_hides_its_change(captured: Program) -> None:
    with pytest.raises(VerificationError, match="says the program is unmodified, which is not so"):
        PassManager([Sabotage(bad.off_by_1e_6, says=False)]).run(captured)


def test_catches_a_pass_that_does_nothing_and_does_not_say_why(captured: Program) -> None:
    @dataclass(frozen=True)
    class Silent(Sabotage):
        def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
            return Plan(self.spec)

    with pytest.raises(VerificationError, match="does not say why"):
        PassManager([Silent()]).run(captured)


def test_the_message_names_place_and_predecessors(captured: Program) -> None:
    from laconic.passes.cse import Cse
    from laconic.passes.dce import Dce

    with pytest.raises(VerificationError) as caught:
        PassManager([Dce(), Sabotage(bad.off_by_1e_6), Cse()]).run(captured)
    assert "pass 2 of 3, after dce" in str(caught.value)
    assert "-p 'dce,cse'" in str(caught.value)
    assert "inputs (batch=" in str(caught.value)


# Honest passes


def rearranges_equal_bits(program: Program) -> None:
    """x * 2 becomes x + x: the same bits for every float."""
    node = bad.first(program, aten.mul.Tensor)
    node = next(n for n in program.forward.calls() if n.target is aten.mul.Tensor and n.args[1] == 2)
    hidden: Any = node.args[0]
    new = insert_call(program, program.forward, node, aten.add.Tensor, (hidden, hidden), by="s", like=node)
    node.replace_all_uses_with(new)
    program.forward.graph.erase_node(node)


def copies_a_weight(program: Program) -> None:
    program.weights["frozen"] = Weight(
        "frozen", program.weights["frozen"].value.clone(), program.weights["frozen"].kind
    )


@pytest.mark.parametrize("change", [rearranges_equal_bits, copies_a_weight], ids=lambda c: c.__name__)
def test_an_honest_exact_pass_passes(change: bad.Change, captured: Program) -> None:
    run = PassManager([Sabotage(change)]).run(captured)
    assert run.ledger.rows[0].modified
    assert run.ledger.rows[0].after.max_abs == 0.0


def test_an_honest_idle_pass_passes(captured: Program) -> None:
    run = PassManager([Sabotage(lambda program: None, says=False)]).run(captured)
    assert not run.ledger.rows[0].modified
    assert any(node.target is aten.tanh.default for node in run.program.forward.calls())
