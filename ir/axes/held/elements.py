"""Ops that compute each element from one of each operand, what is made of numbers, norms and softmaxes."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from laconic.ir.axes.held.table import Asked, Held, agreeing, rule
from laconic.ir.axes.table import POINTWISE
from laconic.ir.traits import traits
from laconic.ir.types import NumberType, type_of

#: By which operands a zero makes zero of whatever the others are.
_ANNIHILATED = {"mul": 2, "div": 1, "logical_and": 2, "bitwise_and": 2, "__and__": 2}


def _given(asked: Asked, value: Any) -> Held | None:
    """What an operand holds where it meets the axis that is asked for: a tensor, or a number."""
    if isinstance(value, fx.Node):
        return None if isinstance(type_of(value.meta["val"]), NumberType) else asked.aligned(value)
    if isinstance(value, (bool, int, float)):
        return Held(torch.ones(asked.size, dtype=torch.bool), torch.tensor(value).expand(asked.size))
    return None


@rule(POINTWISE, "aten.__and__", "aten.__or__", "aten.__xor__", "aten.lerp", "aten.addcmul", "aten.addcdiv")
def pointwise(asked: Asked) -> Held | None:
    """The op itself, where all operands are known; zero where a product has a zero, infinite where a sum has that."""
    node = asked.node
    if not traits(node).pure:
        return None
    held = {value: _given(asked, value) for value in node.all_input_nodes}
    known, value = _none(asked)
    if all(held.values()):
        known = torch.stack([h.known for h in held.values() if h]).all(0)
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: held[n].value[known])  # type: ignore[union-attr]
        value[known] = node.target(*args, **kwargs).to(value.dtype)  # type: ignore[operator]
    for operand in node.args[: _ANNIHILATED.get(asked.op, 0)]:
        known, value = _overruled(known, value, _given(asked, operand), 0.0)
    for operand in node.args[:2] if asked.op == "add" and not node.kwargs else ():
        for infinite in (-math.inf, math.inf):
            known, value = _overruled(known, value, _given(asked, operand), infinite)
    return Held(known, value)


def _overruled(
    known: torch.Tensor, value: torch.Tensor, by: Held | None, number: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What is known once a number of one operand decides for all."""
    if not by:
        return known, value
    decided = by.at(number)
    return known | decided, value.masked_fill(decided, number) if bool(decided.any()) else value


def _none(asked: Asked) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(asked.size, dtype=torch.bool), torch.zeros(asked.size, dtype=asked.kind.dtype)


@rule("aten.where")
def where(asked: Asked) -> Held | None:
    if len(asked.node.args) != 3:
        return None
    condition, a, b = (_given(asked, value) for value in asked.node.args)
    return _chosen(asked, condition, a, b)


@rule("aten.masked_fill")
def masked_fill(asked: Asked) -> Held | None:
    value, mask, fill = (_given(asked, value) for value in asked.node.args[:3])
    return _chosen(asked, mask, fill, value)


def _chosen(asked: Asked, condition: Held | None, a: Held | None, b: Held | None) -> Held | None:
    """Where it is known what is chosen, and what that is, or both are the same."""
    known, value = _none(asked)
    both = agreeing([a, b])
    if both:
        known, value = both.known.clone(), both.value.to(value.dtype)
    for found, choice in ((a, True), (b, False)):
        if condition and found:
            sure = condition.at(choice) & found.known
            known, value = known | sure, torch.where(sure, found.value.to(value.dtype), value)
    return Held(known, value)


@rule(
    *("aten.clone", "aten._to_copy", "aten.to", "aten.contiguous", "aten.detach", "aten.alias"),
    *("aten.lift_fresh_copy", "aten.type_as", "aten.dropout"),
)
def copied(asked: Asked) -> Held | None:
    found = asked.aligned(asked.operand)
    if found is None or not traits(asked.node).pure:
        return None
    return Held(found.known, found.value.to(asked.kind.dtype))


@rule("aten.zeros_like", "aten.zeros", "aten.new_zeros")
def zeros(asked: Asked) -> Held:
    return Held.everywhere(0, asked.size, asked.kind.dtype)


@rule("aten.ones_like", "aten.ones", "aten.new_ones")
def ones(asked: Asked) -> Held:
    return Held.everywhere(1, asked.size, asked.kind.dtype)


@rule("aten.full_like", "aten.full", "aten.new_full", "aten.scalar_tensor")
def full(asked: Asked) -> Held | None:
    number = asked.given("s" if asked.op == "scalar_tensor" else "fill_value")
    return None if isinstance(number, fx.Node) else Held.everywhere(number, asked.size, asked.kind.dtype)


@rule("aten.arange")
def arange(asked: Asked) -> Held | None:
    """The positions themselves."""
    if asked.axis is None or asked.node.all_input_nodes:
        return None
    made: torch.Tensor = asked.node.target(*asked.node.args, **asked.node.kwargs)  # type: ignore[operator]
    return Held(torch.ones(asked.size, dtype=torch.bool), made.to("cpu"))


@rule("aten.softmax", "aten._softmax", "aten._safe_softmax", "aten.log_softmax", "aten._log_softmax")
def softmax(asked: Asked) -> Held | None:
    """What is masked has no share. Along another axis nothing is known."""
    if asked.axis is None or asked.axis != int(asked.given("dim")) % asked.rank:
        return None
    found = asked.of(asked.operand, asked.axis)
    share = -math.inf if "log" in asked.op else 0.0
    return Held.where(found.at(-math.inf), share, asked.kind.dtype) if found else None


@rule("aten.layer_norm", "aten.rms_norm", "aten.native_layer_norm", "aten._fused_rms_norm")
def norm(asked: Asked) -> Held | None:
    """A channel of which the weight is zero holds its bias."""
    if asked.output or asked.axis is None or asked.axis < asked.rank - len(asked.given("normalized_shape")):
        return None
    wide = len(asked.given("normalized_shape"))
    bias = asked.given("bias") if "layer" in asked.op else None
    return _scaled_away(asked, asked.given("weight"), bias, asked.axis - asked.rank + wide)


@rule("aten.group_norm", "aten.native_group_norm", "aten.instance_norm")
def group_norm(asked: Asked) -> Held | None:
    if asked.output or asked.axis != 1:
        return None
    return _scaled_away(asked, asked.given("weight"), asked.given("bias"), 0)


def _scaled_away(asked: Asked, weight: Any, bias: Any, axis: int) -> Held | None:
    """The bias where the weight is zero; both along this axis of theirs."""
    scale = asked.of(weight, axis) if isinstance(weight, fx.Node) else None
    if not scale:
        return None
    if not isinstance(bias, fx.Node):
        return Held.where(scale.at(0), 0.0, asked.kind.dtype)
    shift = asked.of(bias, axis)
    return Held(scale.at(0) & shift.known, shift.value) if shift else None


@rule("aten._native_batch_norm_legit_no_training", "aten.batch_norm", "aten._batch_norm_no_update")
def batch_norm(asked: Asked) -> Held | None:
    """A channel of which the weight is zero holds its bias; one that is constant stays so."""
    training = asked.op == "batch_norm" and asked.given("training")
    if asked.output or asked.axis != 1 or training:
        return None
    usual = {"weight": 1.0, "bias": 0.0, "running_mean": 0.0, "running_var": 1.0}
    vectors = [
        asked.of(v, 0) if isinstance(v := asked.given(name), fx.Node) else Held.everywhere(n, asked.size, torch.float64)
        for name, n in usual.items()
    ]
    if not all(vectors):
        return None
    scale, shift, mean, variance = (v for v in vectors if v)
    known, value = scale.at(0) & shift.known, shift.value.to(asked.kind.dtype)
    x = asked.of(asked.operand, 1)
    if x:
        normal = (x.value.double() - mean.value) / (variance.value.double() + asked.given("eps")).sqrt()
        sure = torch.stack([h.known for h in (x, scale, shift, mean, variance)]).all(0)
        known, value = known | sure, torch.where(sure, (normal * scale.value + shift.value).to(value.dtype), value)
    return Held(known, value)
