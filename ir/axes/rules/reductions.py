"""Reductions, softmaxes, and what runs along an axis in its order."""

from __future__ import annotations

import math
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


def _reduced(call: Call, kind: Pin | None, neutral: float | None = None) -> Label:
    """A reduction; with `neutral`, positions that hold it do not count."""
    value = call.operand
    call.observe(value)
    dims = call.dims(value)
    axes = [k for k in _axes(call, value) if k < len(dims)]
    if kind is not None:
        call.pin([dims[k] for k in axes], kind, f"{call.node.target} over it")
    for k in axes:
        if neutral is not None:
            call.gathers(dims[k], (value, k), neutral=neutral)
    return call.without(dims, axes)


@rule("aten.sum", "aten.nansum")
def summed(call: Call) -> Label:
    return _reduced(call, None, 0.0)


@rule("aten.linalg_vector_norm", "aten.norm")
def length(call: Call) -> Label:
    """A sum of powers, at zeros too where the power is above zero."""
    power = call.given("ord" if call.takes("ord") else "p")
    sums = power is None or (isinstance(power, (int, float)) and power > 0)
    return _reduced(call, None if sums else Pin.COUNT, 0.0 if sums else None)


@rule("aten.mean", "aten.var", "aten.std")
def counted(call: Call) -> Label:
    return _reduced(call, Pin.COUNT)


#: What leaves a reduction as it is.
_NEUTRAL = {"prod": 1.0, "amax": -math.inf, "max": -math.inf, "logsumexp": -math.inf, "amin": math.inf, "min": math.inf}
_NEUTRAL |= {"any": 0.0, "all": 1.0}


@rule("aten.prod", "aten.logsumexp", "aten.any", "aten.all")
@rule("aten.amax", "aten.amin", "aten.max.default", "aten.min.default")
def masked(call: Call) -> Label:
    return _reduced(call, Pin.MASK, _NEUTRAL[call.node.target._schema.name.partition("::")[2]])  # type: ignore[union-attr]


@rule("aten.var_mean", "aten.std_mean", "aten.aminmax")
def several(call: Call) -> Several:
    found = _reduced(call, Pin.COUNT)
    return Several((found, found))


@rule("aten.softmax", "aten.log_softmax", "aten._softmax", "aten._log_softmax", "aten._safe_softmax")
def softmax(call: Call) -> Label:
    value = call.operand
    dims = call.dims(value)
    if dims:
        axis = axis_of(call, value)
        call.pin([dims[axis]], Pin.MASK, "a softmax over it")
        call.gathers(dims[axis], (value, axis), neutral=-math.inf)
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
