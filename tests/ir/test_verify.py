"""The verifier: each rule, broken once, is named with its place; a sound program passes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from helpers import parse
from laconic.ir.alias import Aliasing, boundary, root
from laconic.ir.errors import VerificationError
from laconic.ir.program import Alias, Kind, Program
from laconic.ir.rewrite import find
from laconic.ir.torch_private import quiet
from laconic.ir.verify import changed_nodes, verify, verify_rewrite

aten = torch.ops.aten

TEXT = """
size batch in [1, 9] like 3
parameter @w: f32[4, 2] trainable
buffer @b: f32[2]
state @s: f32[2]
entry forward {
  input %x: f32[batch, 2] in [-1.0, 1.0]
  argument x = %x
  %a: f32[batch, 4] = aten.linear(%x, @w) !0
  %t: f32[4, batch]{1, 4} = aten.permute(%a, [1, 0]) !1
  %c: f32[2] = aten.add.Tensor(@s, @b)
  update @s = %c
  return {"out": %t, "raw": %x}
}
site 0..1 = "block.linear" "model.py:12"
"""


@pytest.fixture
def program() -> Program:
    return parse(TEXT)


def _node(program: Program, name: str) -> Any:
    return find(program.forward, name)


def _stale(p: Program) -> None:
    _node(p, "t").meta["val"] = _node(p, "a").meta["val"]


def _strides(p: Program) -> None:
    with quiet(p.mode):
        _node(p, "t").meta["val"] = _node(p, "t").meta["val"].contiguous()


def _order(p: Program) -> None:
    _node(p, "t").append(_node(p, "a"))


def _in_place(p: Program) -> None:
    _node(p, "c").target = aten.add_.Tensor


def _view(p: Program) -> None:
    node = _node(p, "t")
    node.target, node.args = aten.view.default, (node.args[0], [4, -1])


def _module_call(p: Program) -> None:
    node = _node(p, "c")
    node.op, node.target = "call_module", "block_9"


def _no_type(p: Program) -> None:
    del _node(p, "c").meta["val"]


def _two_names(p: Program) -> None:
    next(n for n in p.forward.placeholders() if n.meta["name"] == "b").meta["name"] = "s"


def _lost_row(p: Program) -> None:
    del p.weights["b"]


def _kind(p: Program) -> None:
    p.weights["b"] = replace(p.weights["b"], kind=Kind.PARAMETER)


def _weight_type(p: Program) -> None:
    p.weights["w"] = replace(p.weights["w"], value=p.weights["w"].value.t().contiguous().t())


def _no_state(p: Program) -> None:
    p.weights["s"] = replace(p.weights["s"], kind=Kind.BUFFER)
    next(n for n in p.forward.placeholders() if n.meta["name"] == "s").meta["kind"] = Kind.BUFFER


def _alias(p: Program) -> None:
    p.aliases["old"] = Alias("none such")


def _too_few(p: Program) -> None:
    p.forward.output_node.args = (p.forward.output_values[:-1],)


def _paths(p: Program) -> None:
    p.forward.results = {"out": p.forward.results["raw"], "raw": p.forward.results["out"], "x": None}
    p.forward.outputs[1] = replace(p.forward.outputs[1], name="other")


def _undeclared(p: Program) -> None:
    p.forward.inputs.clear()


_BROKEN: dict[Callable[[Program], None], str] = {
    _stale: "%t is recorded as f32[batch, 4] but computes f32[4, batch]{1, 4}",
    _strides: "%t is recorded as f32[4, batch] but computes f32[4, batch]{1, 4}",
    _order: "%t uses %a, which does not stand before it",
    _in_place: "writes into an operand",
    _view: "aten.view.default is not allowed here",
    _module_call: "there is no function 'block_9'",
    _no_type: "%c has no recorded type",
    _two_names: "a second one has its name",
    _lost_row: "uses 'b', which the weight table lacks",
    _kind: "'b' is a parameter and entry 'forward' takes it as another kind",
    _weight_type: "weight 'w' is f32[4, 2]{1, 4} but entry 'forward' takes it as f32[4, 2]",
    _no_state: "updates 's', which is no state",
    _alias: "points at 'none such'",
    _too_few: "declares 3 outputs and has another number",
    _paths: "names its results otherwise than their tree",
    _undeclared: "declares inputs [] and has placeholders ['x']",
}


@pytest.mark.parametrize("damage", _BROKEN, ids=lambda d: d.__name__.strip("_"))
def test_a_broken_rule_is_named(damage: Callable[[Program], None], program: Program) -> None:
    damage(program)
    with pytest.raises(VerificationError) as caught:
        verify(program)
    assert _BROKEN[damage] in caught.value.what


def test_the_place_is_the_users_line(program: Program) -> None:
    _stale(program)
    with pytest.raises(VerificationError) as caught:
        verify(program)
    assert "block.linear (model.py:12)" in caught.value.where


def test_no_size_may_be_decided_by_the_example(program: Program) -> None:
    assert _node(program, "x").meta["val"].shape[0] > 2
    with pytest.raises(VerificationError, match="a dynamic size was compared"):
        verify(program)


def test_a_copy_is_a_sound_rewrite(program: Program) -> None:
    verify_rewrite(program, program.clone())
    assert changed_nodes(program.forward, program.clone().forward) == []


def test_who_reads_a_value_of_another_type_counts_as_changed(program: Program) -> None:
    after = program.clone()
    node = _node(after, "a")
    node.target, node.args = aten.linear.default, (node.args[0], node.args[1])
    with quiet(after.mode):
        node.meta["val"] = node.meta["val"].double()
    assert [n.name for n in changed_nodes(program.forward, after.forward)] == ["a", "t"]


_SHARING = {
    "%x": {("result output", "input x")},
    "%v": {("result output", "input x")},
    "%r": {("result output", "input x")},
    "%g": {("result output", "input x")},
    "%c": set(),
    "%e": set(),
    "%l": set(),
    "@w": {("result output", "parameter w")},
    "(%v, %g)": {("result 0", "input x"), ("result 1", "input x"), ("result 0", "result 1")},
    "(%e, %e)": {("result 0", "result 1")},
    "(%e, %c)": set(),
}


def _views(returned: str) -> Program:
    return parse(
        f"""
        parameter @w: f32[4]
        entry forward {{
          input %x: f32[2, 4] in [-1.0, 1.0]
          argument x = %x
          %v: f32[4, 2]{{1, 4}} = aten.permute(%x, [1, 0])
          %r: f32[8] = aten.reshape(%v, [8])
          %p: (f32[2, 2]{{4, 1}}, f32[2, 2]{{4, 1}}) = aten.split.Tensor(%x, 2, -1)
          %g: f32[2, 2]{{4, 1}} = operator.getitem(%p, 1)
          %c: f32[2, 4] = aten.clone(%x)
          %e: f32[2, 4] = aten.exp(%c)
          %q: (f32[2], i64[2]) = aten.max.dim(%x, 1)
          %l: f32[2] = operator.getitem(%q, 0)
          %u: (f32[2, 1]{{4, 1}}, f32[2, 3]{{4, 1}}) = aten.split_with_sizes(%e, [1, 3], 1)
          %m: f32[2]{{4}} = aten.select.int(%e, 1, 0)
          return {returned}
        }}
        """
    )


@pytest.mark.parametrize("returned", _SHARING)
def test_what_callers_may_see_of_shared_storage(returned: str) -> None:
    assert boundary(_views(returned).forward) == _SHARING[returned]


def test_an_element_of_a_split_is_a_view_and_an_element_of_a_max_is_not() -> None:
    entry = _views("(%g, %l)").forward
    assert Aliasing(entry).escapes(find(entry, "p"))
    assert root(find(entry, "g")).op == "placeholder"
    assert root(find(entry, "l")) is find(entry, "l")


def test_a_copy_that_a_reshape_makes_does_not_stand_for_another() -> None:
    program = _views("(%r, %v)")
    aliasing = Aliasing(program.forward)
    reshaped, permuted = find(program.forward, "r"), find(program.forward, "v")
    assert not aliasing.may_replace(reshaped, permuted)
    assert aliasing.may_replace(permuted, permuted)
    assert not aliasing.may_replace(find(program.forward, "r"), find(program.forward, "c").args[0])  # type: ignore[arg-type]
