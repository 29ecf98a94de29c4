"""Reductions, softmaxes, and what runs along an axis in its order."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from laconic.ir.axes.call import Call
from laconic.ir.axes.dims import Dim, Pin
from laconic.ir.axes.labels import Label, Several
from laconic.ir.axes.rules.table import rule
from laconic.ir.axes.rules.views import axis_of

_GROUPED = ("_grouped_mm", "grouped_mm_fallback")


def _axes(call: Call, value: fx.Node) -> list[int]:
    """The axes that a reduction is over: one, several, or all."""
    rank = len(call.dims(value))
    said = call.given("dim") if call.takes("dim") else None
    if said is None or (isinstance(said, (list, tuple)) and not said):
        return list(range(rank))
    return [int(k) % max(rank, 1) for k in ([said] if isinstance(said, int) else said)]


def _reduced(call: Call, kind: Pin | None, reason: str) -> Label:
    value = call.operand
    call.observe(value)
    dims, axes = call.dims(value), _axes(call, value)
    if kind is not None:
        call.pin([dims[k] for k in axes if k < len(dims)], kind, reason)
    return call.without(dims, axes)


@rule("aten.sum", "aten.linalg_vector_norm", "aten.norm", "aten.nansum")
def summed(call: Call) -> Label:
    return _reduced(call, None, "")


@rule(
    *("aten.mean", "aten.var", "aten.std", "aten.prod", "aten.amax", "aten.amin", "aten.logsumexp"),
    *("aten.any", "aten.all", "aten.max.default", "aten.min.default"),
)
def counted(call: Call) -> Label:
    return _reduced(call, Pin.COUNT, f"{call.node.target} over it")


@rule("aten.var_mean", "aten.std_mean", "aten.aminmax")
def several(call: Call) -> Several:
    found = _reduced(call, Pin.COUNT, f"{call.node.target} over it")
    return Several((found, found))


@rule("aten.softmax", "aten.log_softmax", "aten._softmax", "aten._log_softmax", "aten._safe_softmax")
def softmax(call: Call) -> Label:
    value = call.operand
    dims = call.dims(value)
    if dims:
        call.pin([dims[axis_of(call, value)]], Pin.COUNT, "a softmax over it")
    return tuple(dims)


@rule(
    *("aten.cumsum", "aten.cumprod", "aten.logcumsumexp", "aten.flip", "aten.fliplr", "aten.roll"),
    *("aten.tril", "aten.triu"),
)
def in_order(call: Call) -> Any:
    """Elements depend on those before them, or change places."""
    value = call.operand
    call.observe(value)
    dims = call.dims(value)
    name = str(call.node.target)
    if "cumsum" in name and _ends_of_groups(call.node, value):
        return tuple(dims)
    if "tri" in name:
        moved: list[Dim] = dims[-2:]
    else:
        said: Any = call.node.args[1] if "roll" not in name else call.given("dims")
        axes = [said] if isinstance(said, int) else list(said or range(len(dims)))
        moved = [dims[int(k)] for k in axes] if dims else []
    call.pin(moved, Pin.ORDER, f"{call.node.target} along it")
    return tuple(dims)


@rule("aten.diff")
def differences(call: Call) -> Label:
    """Each element minus the one before it; what is put in front or behind stands on the same axis."""
    value = call.operand
    dims = call.dims(value)
    axis = axis_of(call, value)
    for operand in call.node.all_input_nodes:
        call.observe(operand)
        call.pin(call.dims(operand), Pin.ORDER, "differences along it")
    (dims[axis],) = call.fresh([call.shape[axis]], Pin.ORDER, "differences along another axis")
    return tuple(dims)


def _ends_of_groups(node: fx.Node, value: fx.Node) -> bool:
    """Counts added up, which only say a grouped product where each group of rows ends."""
    while value.target in (torch.ops.aten._to_copy.default, torch.ops.aten.clone.default):
        value = value.args[0]  # type: ignore[assignment]
    if value.target is not torch.ops.aten.histc.default:
        return False
    return all(any(name in str(user.target) for name in _GROUPED) for user in node.users)
