"""Runnable: called as the model was, and clear about what does not fit."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from helpers import bits, parse
from laconic.ir.errors import UsageError
from laconic.ir.program import Program
from laconic.ir.run import Runnable, evaluate

TEXT = """
size batch in [1, 8] like 2
size tokens in [2, inf] like 3
parameter @block.w: f32[4, 4] trainable
constant @forward.c: f32[4]
state @count: f32[4]
alias @tied = @block.w
entry forward {
  input %x: f32[batch, tokens, 4] in [-1.0, 1.0]
  input %m: bool[batch, tokens] in [0, 1] named "mask"
  input %f: f32[4] in [-1.0, 1.0]
  argument x = %x
  argument mask = %m
  argument rest = [%f, {"k": True}]
  %a: f32[batch, tokens, 4] = aten.linear(%x, @block.w, @forward.c)
  %u: bool[batch, tokens, 1] = aten.unsqueeze(%m, -1)
  %b: f32[batch, tokens, 4] = aten.masked_fill.Scalar(%a, %u, 0)
  %n: f32[4] = aten.add.Tensor(@count, %f)
  update @count = %n seen "count"
  return {"out": %b, "count": %n, "none": None}
}
"""


@pytest.fixture
def program() -> Program:
    return parse(TEXT)


def inputs(batch: int = 2, tokens: int = 3) -> tuple[Any, ...]:
    return torch.randn(batch, tokens, 4), torch.zeros(batch, tokens, dtype=torch.bool), [torch.ones(4), {"k": True}]


def test_results_are_trees_and_states_advance_in_place(program: Program) -> None:
    model = Runnable(program)
    start = program.weights["count"].value.clone()
    other = Runnable(program)
    x, mask, rest = inputs()
    found = model(x, mask=mask, rest=rest)
    assert list(found) == ["out", "count", "none"]
    assert found["none"] is None
    model(x, mask, rest)
    assert bits(model.get_buffer("count")) == bits(start + 1 + 1)
    assert bits(program.weights["count"].value) == bits(start) == bits(other.get_buffer("count"))
    assert found["count"] is model.get_buffer("count")


def test_evaluate_leaves_states_alone(program: Program) -> None:
    held = bits(program.weights["count"].value)
    x, mask, rest = inputs()
    outcome = evaluate(program, program.forward, [x, mask, rest[0]])
    assert set(outcome.tensors()) == {"result 0", "result 1", "state count"}
    assert bits(program.weights["count"].value) == held


def test_weights_have_their_names_and_share_memory(program: Program) -> None:
    model = Runnable(program)
    assert set(model.state_dict()) >= {"block.w", "count", "tied"}
    assert model.get_parameter("block.w").data_ptr() == program.weights["block.w"].value.data_ptr()
    assert model.get_parameter("block.w").requires_grad
    assert model.get_parameter("tied") is model.get_parameter("block.w")


def test_a_weight_whose_name_is_a_method_runs(program: Program) -> None:
    """`forward.c` would hide the method `forward`."""
    x, mask, rest = inputs()
    assert Runnable(program)(x, mask, rest)["out"].shape == (2, 3, 4)


@pytest.mark.parametrize(("batch", "tokens"), [(1, 2), (8, 2), (3, 50)])
def test_every_size_in_range_runs(program: Program, batch: int, tokens: int) -> None:
    assert Runnable(program)(*inputs(batch, tokens))["out"].shape == (batch, tokens, 4)


def changed(**what: Any) -> dict[str, Any]:
    x, mask, rest = inputs()
    return {**{"x": x, "mask": mask, "rest": rest}, **what}


_WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "another fixed size": (changed(x=torch.ones(2, 3, 5)), "input 'x' must be f32[batch, tokens, 4], is f32[2, 3, 5]"),
    "another rank": (changed(x=torch.ones(2, 3)), "input 'x' must be f32[batch, tokens, 4], is f32[2, 3]"),
    "another dtype": (
        changed(x=torch.ones(2, 3, 4).double()),
        "input 'x' must be f32[batch, tokens, 4], is f64[2, 3, 4]",
    ),
    "no tensor": (changed(x=3), "input 'x' must be f32[batch, tokens, 4], is int"),
    "above the range": (changed(x=torch.ones(9, 3, 4)), "is f32[9, 3, 4]"),
    "below the range": (changed(x=torch.ones(2, 1, 4)), "is f32[2, 1, 4]"),
    "two sizes of one axis": (
        changed(mask=torch.ones(3, 3).bool()),
        "input 'mask' must be bool[batch, tokens], is bool[3, 3]",
    ),
    "an unknown argument": (changed(y=torch.ones(1)), "the captured model has no argument 'y'"),
    "another constant": (
        changed(rest=[torch.ones(4), {"k": False}]),
        "captured as the constant True, called with False",
    ),
    "a number that equals the constant": (
        changed(rest=[torch.ones(4), {"k": 1}]),
        "captured as the constant True, called with 1",
    ),
    "another key": (changed(rest=[torch.ones(4), {"j": True}]), "expected a dict with keys ['k']"),
    "a shorter list": (changed(rest=[torch.ones(4)]), "argument 'rest': expected a sequence of 2"),
}


@pytest.mark.parametrize(("arguments", "message"), _WRONG.values(), ids=_WRONG)
def test_what_does_not_fit_is_said(program: Program, arguments: dict[str, Any], message: str) -> None:
    held = bits(program.weights["count"].value)
    with pytest.raises(UsageError) as caught:
        Runnable(program)(**arguments)
    assert message in caught.value.what
    assert bits(program.weights["count"].value) == held


def test_missing_repeated_and_too_many_arguments_are_said(program: Program) -> None:
    model = Runnable(program)
    x, mask, rest = inputs()
    with pytest.raises(UsageError, match="argument 'rest' is missing"):
        model(x, mask)
    with pytest.raises(UsageError, match="argument 'x' is given twice"):
        model(x, mask, rest, x=x)
    with pytest.raises(UsageError, match="called with 4 positional arguments; the model takes 3"):
        model(x, mask, rest, None)


def test_an_argument_of_none_that_was_not_captured_is_allowed(program: Program) -> None:
    assert Runnable(program)(**changed(cache=None))["out"].shape == (2, 3, 4)


def test_two_states_may_swap() -> None:
    program = parse(
        """
        state @s: f32[2]
        state @t: f32[2]
        entry forward {
          input %x: f32[2] in [-1.0, 1.0]
          argument x = %x
          update @s = @t
          update @t = @s
          return %x
        }
        """,
        s=torch.tensor([1.0, 2.0]),
        t=torch.tensor([3.0, 4.0]),
    )
    model = Runnable(program)
    model(torch.zeros(2))
    assert model.get_buffer("s").tolist() == [3.0, 4.0]
    assert model.get_buffer("t").tolist() == [1.0, 2.0]
