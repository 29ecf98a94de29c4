"""Ops that compute each element from one of each operand, copies and casts, and what is made of given sizes."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx

from laconic.ir.axes.call import Call
from laconic.ir.axes.dims import Dim, Pin, factors, fresh, quotient, size_of
from laconic.ir.axes.labels import Label
from laconic.ir.axes.rules.table import rule
from laconic.ir.axes.table import POINTWISE
from laconic.ir.types import NumberType, type_of


def broadcast(call: Call, labels: Iterable[list[Dim]]) -> list[Dim]:
    """Labels aligned at their right ends; an axis of size 1 is the others'."""
    rows = list(labels)
    found: list[Dim] = [()] * max(map(len, rows), default=0)
    for row in rows:
        for k, dim in enumerate(reversed(row), 1):
            if dim and found[-k]:
                call.join(found[-k], dim)
            elif dim:
                found[-k] = dim
    return found


def tensors(call: Call) -> list[fx.Node]:
    """The operands that are tensors."""
    return [n for n in call.node.all_input_nodes if not isinstance(type_of(n.meta["val"]), NumberType)]


@rule(
    POINTWISE,
    *("aten.__and__", "aten.__or__", "aten.__xor__", "aten.where", "aten.masked_fill"),
    *("aten.lerp", "aten.addcmul", "aten.addcdiv", "aten.dropout"),
)
def pointwise(call: Call) -> Label:
    return _elementwise(call)


def _elementwise(call: Call) -> Label:
    operands = tensors(call)
    for value in operands:
        call.observe(value)
    return tuple(broadcast(call, map(call.dims, operands)))


@rule(
    "aten.clone",
    "aten._to_copy",
    "aten.to",
    "aten.contiguous",
    "aten.detach",
    "aten.alias",
    "aten.lift_fresh_copy",
    "aten.type_as",
)
def copied(call: Call) -> Label:
    value = call.operand
    call.counts_as(value)
    return tuple(call.dims(value))


@rule("aten.zeros_like", "aten.ones_like", "aten.full_like", "aten.empty_like", "aten.rand_like", "aten.randn_like")
def sized_like(call: Call) -> Label:
    """As large as another, whose positions are not its own where they are in the order of values: what says where each
    went is made so."""
    value = call.operand
    call.ignores(value)
    return tuple(
        fresh(size_of(dim)) if any(Pin.ARRANGED in f.pins for f in factors(dim)) else dim for dim in call.dims(value)
    )


@rule("aten.copy")
def overwritten(call: Call) -> Label:
    into, source = (call.given(name) for name in ("self", "src"))
    call.observe(source)
    return tuple(broadcast(call, [call.dims(into), call.dims(source)]))


@rule("aten.floor_divide", "aten.div.Tensor_mode")
def divided(call: Call) -> Label:
    """Positions divided by what stands to the right of a product are positions of what stands to the left of it."""
    value, by = call.node.args[:2]
    domain = call.domain(value) if isinstance(value, fx.Node) else None
    floors = call.node.kwargs.get("rounding_mode", "floor") == "floor"
    if domain is None or not isinstance(by, int) or domain.origin is not None or not floors:
        return _elementwise(call)
    assert isinstance(value, fx.Node)
    left = _left_of(call, domain.dim, by)
    if left is None:
        return _elementwise(call)
    call.counts(left)
    return tuple(call.dims(value))


def _left_of(call: Call, dim: Dim, right: int) -> Dim | None:
    """What is left of a dim without the product of `right` positions at its right end."""
    times = quotient(size_of(dim), right)
    if times is None:
        return None
    left, rest = fresh(times), fresh(right)
    call.join(dim, (*left, *rest))
    call.literal(("args", 1), rest)
    return left


@rule("aten.full", "aten.zeros", "aten.ones", "aten.empty", "aten.rand", "aten.randn")
@rule("aten.new_full", "aten.new_zeros", "aten.new_ones", "aten.new_empty")
def made(call: Call) -> Label:
    found = tuple(map(fresh, call.shape))
    call.spells("size", found)
    return found


@rule("aten.scalar_tensor")
def number(call: Call) -> Label:
    return ()


@rule("aten.arange")
def arange(call: Call) -> Label:
    """Positions themselves, where they are counted from 0 in steps of 1."""
    start = call.given("start") if call.takes("start") else 0
    step = call.given("step") if call.takes("step") else 1
    if (start, step) != (0, 1):
        return call.fresh(call.shape, Pin.ORDER, "counted from elsewhere, or in other steps")
    (dim,) = (fresh(size) for size in call.shape)
    call.literal(call.place("end"), dim)
    call.counts(dim, origin=call.node)
    return (dim,)


@rule("aten.linspace", "aten.logspace", "aten.eye", "aten.hann_window")
def ordered(call: Call) -> Label:
    return call.fresh(call.shape, Pin.ORDER, f"{call.node.target} says positions in order")


@rule("aten.view_as_complex")
def as_complex(call: Call) -> Label:
    *rest, pair = call.dims(call.given("self"))
    call.pin([pair], Pin.ENUM, "real and imaginary parts")
    return tuple(rest)


@rule("aten.view_as_real")
def as_real(call: Call) -> Label:
    return (*call.dims(call.given("self")), *call.fresh([2], Pin.ENUM, "real and imaginary parts"))
