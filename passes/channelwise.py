"""Calls that scale and shift each channel of a value by constants: y = s x + t, with s and t along one axis.

Multiplication, division, addition and subtraction with a constant, batch normalisation in inference, and what a layer
or RMS norm does after normalising.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from laconic.ir.traits import argument
from laconic.ir.types import same_type, type_of
from laconic.passes.constants import Constants

aten = torch.ops.aten
ONE, ZERO = torch.ones((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class Channelwise:
    """`result` = scale * `source` + shift, both float64, of no axes or of one, which stands along `axis` (counted from
    behind). `nodes` compute it from the constants `reads`, and go when it is folded; a norm (`norm`) stays, without its
    weights."""

    rule: str
    source: fx.Node
    result: fx.Node
    scale: torch.Tensor
    shift: torch.Tensor
    axis: int | None
    nodes: tuple[fx.Node, ...]
    reads: tuple[fx.Node, ...]
    norm: fx.Node | None = None

    def after(self, first: Channelwise) -> Channelwise | None:
        """Both in turn, or None if they go along different axes."""
        if self.axis is not None and first.axis is not None and self.axis != first.axis:
            return None
        return Channelwise(
            self.rule if self.rule == first.rule else f"{first.rule}, {self.rule}",
            first.source,
            self.result,
            self.scale * first.scale,
            self.scale * first.shift + self.shift,
            first.axis if self.axis is None else self.axis,
            (*first.nodes, *self.nodes),
            (*first.reads, *self.reads),
            first.norm,
        )

    def unusable(self) -> str:
        """Why it must not be folded; "" if it may be."""
        if not bool(torch.isfinite(self.scale).all() and torch.isfinite(self.shift).all()):
            return "its constant is not finite"
        return "" if bool((self.scale != 0).all()) else "its scale holds a zero"


def channelwise(node: fx.Node, constants: Constants) -> Channelwise | None:
    """What a call does to its one operand that is no constant, if that is to scale and shift its channels.

    The result must have the operand's type: no broadcasting of the operand, no other dtype.
    """
    reader = _READERS.get(node.target) if node.op == "call_function" else None
    found = reader(node, constants) if reader else None
    if found is None or not isinstance(found.result.meta["val"], torch.Tensor):
        return None
    kind, was = type_of(found.result.meta["val"]), type_of(found.source.meta["val"])
    return found if same_type(kind, was) and found.result.meta["val"].is_floating_point() else None


def _constant(operand: Any, constants: Constants, axes: int) -> tuple[torch.Tensor, int | None] | None:
    """A number or constant as a float64 number or vector with the axis that it stands along in a value of so many axes;
    None if it is neither."""
    if not isinstance(operand, fx.Node):
        plain = isinstance(operand, (int, float)) and not isinstance(operand, bool)
        return (torch.tensor(float(operand), dtype=torch.float64), None) if plain else None
    kind = operand.meta["val"]
    if not constants.known(operand) or not isinstance(kind, torch.Tensor) or kind.is_complex() or kind.dim() > axes:
        return None
    long = [k for k, n in enumerate(kind.shape) if n != 1]
    if len(long) > 1:
        return None
    value = constants.value(operand).detach().double()
    return (value.reshape(-1), long[0] - kind.dim()) if long else (value.reshape(()), None)


#: What is done with a value x and a constant c, as scale and shift; `first` says that x is the first operand.
_Rule = Callable[[torch.Tensor, bool], tuple[torch.Tensor, torch.Tensor] | None]


def _multiply(c: torch.Tensor, first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return c, ZERO


def _divide(c: torch.Tensor, first: bool) -> tuple[torch.Tensor, torch.Tensor] | None:
    return (1 / c, ZERO) if first else None


def _add(c: torch.Tensor, first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return ONE, c


def _subtract(c: torch.Tensor, first: bool) -> tuple[torch.Tensor, torch.Tensor]:
    return (ONE, -c) if first else (-ONE, c)


def _arithmetic(name: str, rule: _Rule, *, swapped: bool = False) -> Callable[..., Channelwise | None]:
    """A reader of a call with a value and a constant as its operands, in either order."""

    def read(node: fx.Node, constants: Constants) -> Channelwise | None:
        if len(node.args) != 2 or node.kwargs.get("rounding_mode") is not None or node.kwargs.get("alpha", 1) != 1:
            return None
        left, right = node.args
        for source, other, first in ((left, right, not swapped), (right, left, swapped)):
            if not isinstance(source, fx.Node) or constants.known(source):
                continue
            value = source.meta["val"]
            found = _constant(other, constants, value.dim()) if isinstance(value, torch.Tensor) else None
            does = rule(found[0], first) if found else None
            if found is None or does is None:
                return None
            reads = (other,) if isinstance(other, fx.Node) else ()
            return Channelwise(name, source, node, *does, found[1], (node,), reads)
        return None

    return read


def _vector(node: Any, constants: Constants, absent: torch.Tensor) -> torch.Tensor | None:
    """An optional weight of a norm in float64; None if it is no constant."""
    if node is None:
        return absent
    return constants.value(node).detach().double() if constants.known(node) else None


_BATCH_NORMS = (aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)


def _batch_norm(node: fx.Node, constants: Constants) -> Channelwise | None:
    source: Any = node.args[0]
    if node.target is operator.getitem:
        return _batch_norm(source, constants) if source.target in _BATCH_NORMS else None
    weight, bias, mean, variance = (argument(node, name) for name in ("weight", "bias", "running_mean", "running_var"))
    result = node
    if node.target is aten.batch_norm.default:
        if argument(node, "training"):
            return None
    else:
        result = next(iter(node.users), node)
        if len(node.users) != 1 or result.args[1] != 0:
            return None
    m, v = (_vector(n, constants, ZERO) for n in (mean, variance))
    w, b = _vector(weight, constants, ONE), _vector(bias, constants, ZERO)
    if mean is None or m is None or v is None or w is None or b is None:
        return None
    scale = w * torch.rsqrt(v + float(argument(node, "eps")))
    nodes = (node,) if result is node else (node, result)
    reads = tuple(n for n in (weight, bias, mean, variance) if n is not None)
    return Channelwise("batch norm", source, result, scale, b - m * scale, 1 - source.meta["val"].dim(), nodes, reads)


def _norm(node: fx.Node, constants: Constants) -> Channelwise | None:
    weight = argument(node, "weight")
    bias = argument(node, "bias") if node.target is aten.layer_norm.default else None
    scale, shift = _vector(weight, constants, ONE), _vector(bias, constants, ZERO)
    if (weight is None and bias is None) or scale is None or shift is None:
        return None
    if len(argument(node, "normalized_shape")) != 1:
        return None
    reads = tuple(n for n in (weight, bias) if n is not None)
    return Channelwise("norm", node, node, scale, shift, -1, (), reads, norm=node)


_READERS: dict[Any, Callable[[fx.Node, Constants], Channelwise | None]] = {
    **dict.fromkeys((aten.mul.Tensor, aten.mul.Scalar), _arithmetic("scale", _multiply)),
    **dict.fromkeys((aten.div.Tensor, aten.div.Scalar), _arithmetic("scale", _divide)),
    **dict.fromkeys((aten.add.Tensor, aten.add.Scalar), _arithmetic("shift", _add)),
    **dict.fromkeys((aten.sub.Tensor, aten.sub.Scalar), _arithmetic("shift", _subtract)),
    **dict.fromkeys((aten.rsub.Tensor, aten.rsub.Scalar), _arithmetic("shift", _subtract, swapped=True)),
    **dict.fromkeys((*_BATCH_NORMS, operator.getitem), _batch_norm),
    **dict.fromkeys((aten.layer_norm.default, aten.rms_norm.default), _norm),
}
