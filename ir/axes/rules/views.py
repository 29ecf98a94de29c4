"""Ops that show the same elements otherwise: reshapes, permutations, broadcasts, repetitions."""

from __future__ import annotations

from typing import Any

from torch import fx

from laconic.ir.axes.call import Call
from laconic.ir.axes.dims import Dim, Sum, fresh
from laconic.ir.axes.labels import Label
from laconic.ir.axes.rules.pointwise import broadcast
from laconic.ir.axes.rules.table import rule
from laconic.ir.torch_private import expression
from laconic.ir.types import Size, same_size


def axis_of(call: Call, value: fx.Node, name: str = "dim") -> int:
    """An axis among the arguments, counted from the left."""
    rank = max(len(call.axes.labels[value]), 1)  # type: ignore[arg-type]
    return int(call.given(name)) % rank


def number(value: Any) -> Size | None:
    """A number among the arguments: as it is, or as the node that computes it says."""
    return expression(value.meta["val"]) if isinstance(value, fx.Node) else value


@rule(
    *("aten.reshape", "aten.reshape_as", "aten.view", "aten._unsafe_view"),
    *("aten.flatten", "aten.unflatten", "aten.ravel"),
)
def reshape(call: Call) -> Label:
    """The product of all axes before is the product of all axes after."""
    value = call.operand
    call.counts_as(value)
    found = tuple(map(fresh, call.shape))
    if not any(same_size(size, 0) for size in call.shape):
        _flattened(call, call.dims(value), list(found))
    for name in ("shape", "size", "sizes"):
        if call.takes(name):
            said = call.given(name)
            first = axis_of(call, value) if name == "sizes" else 0
            for k in range(len(said)):
                if not (isinstance(said[k], int) and said[k] == -1):
                    call.literal(call.place(name, k), found[first + k])
    return found


def _flattened(call: Call, before: list[Dim], after: list[Dim]) -> None:
    call.join(tuple(a for dim in before for a in dim), tuple(a for dim in after for a in dim))


@rule("aten.view.dtype")
def bits(call: Call) -> Label:
    value = call.operand
    if not all(map(same_size, call.sizes(value), call.shape)):
        return call.opaque("elements are read as others of another width")  # type: ignore[return-value]
    call.observe(value)
    return tuple(call.dims(value))


@rule("aten.permute")
def permute(call: Call) -> Label:
    value = call.operand
    call.counts_as(value)
    dims = call.dims(value)
    return tuple(dims[k] for k in call.given("dims"))


@rule("aten.transpose", "aten.swapaxes", "aten.swapdims")
def transpose(call: Call) -> Label:
    value = call.operand
    call.counts_as(value)
    dims = call.dims(value)
    a, b = (int(k) % max(len(dims), 1) for k in call.node.args[1:3])  # type: ignore[arg-type]
    if dims:
        dims[a], dims[b] = dims[b], dims[a]
    return tuple(dims)


@rule("aten.t", "aten.numpy_T", "aten.mT", "aten.adjoint")
def turned(call: Call) -> Label:
    value = call.operand
    call.counts_as(value)
    dims = call.dims(value)
    if "numpy_T" in str(call.node.target) or len(dims) <= 2:
        return tuple(reversed(dims))
    return (*dims[:-2], dims[-1], dims[-2])


@rule("aten.movedim")
def moved(call: Call) -> Label:
    value = call.operand
    call.counts_as(value)
    dims = call.dims(value)
    source, target = (call.given(name) for name in ("source", "destination"))
    pairs = [(source, target)] if isinstance(source, int) else list(zip(source, target, strict=True))
    places = {b % len(dims): dims[a % len(dims)] for a, b in pairs}
    rest = iter(dim for k, dim in enumerate(dims) if k not in {a % len(dims) for a, _ in pairs})
    return tuple(places[k] if k in places else next(rest) for k in range(len(dims)))


@rule("aten.unsqueeze")
def unsqueeze(call: Call) -> Label:
    value = call.operand
    call.counts_as(value)
    dims = call.dims(value)
    axis = int(call.given("dim")) % (len(dims) + 1)
    return (*dims[:axis], (), *dims[axis:])


@rule("aten.squeeze")
def squeeze(call: Call) -> Label:
    """Axes of size 1 go: all, one, or those named."""
    value = call.operand
    call.counts_as(value)
    dims, sizes = call.dims(value), call.sizes(value)
    named = call.node.args[1] if len(call.node.args) > 1 else range(len(dims))
    axes = {int(k) % max(len(dims), 1) for k in ([named] if isinstance(named, int) else named)}  # type: ignore[arg-type, union-attr]
    gone = [k for k in axes if same_size(sizes[k], 1)] if dims else []
    call.axes.squeezes.append((call.node, sorted(gone)))
    return tuple(dim for k, dim in enumerate(dims) if k not in gone)


@rule("aten.expand", "aten.broadcast_to", "aten.expand_as")
def expand(call: Call) -> Label:
    """An axis of size 1, or none, becomes a new one."""
    value = call.operand
    call.counts_as(value)
    dims = call.dims(value)
    before = [()] * (len(call.shape) - len(dims)) + dims
    found = tuple(dim or fresh(size) for dim, size in zip(before, call.shape, strict=True))
    if call.takes("size"):
        call.spells("size", found)
    elif isinstance(other := call.given("other"), fx.Node):
        for a, b in zip(found, call.dims(other), strict=True):
            call.join(a, b)
    return found


@rule("aten.repeat", "aten.tile")
def repeat(call: Call) -> Label:
    """The whole axis again and again: the times stand at the left of the product."""
    value = call.operand
    call.counts_as(value)
    dims = call.dims(value)
    name = "repeats" if "repeat" in str(call.node.target) else "dims"
    times = list(call.given(name))
    before = [()] * (len(call.shape) - len(dims)) + dims
    again = [fresh(number(n)) for n in [1] * (len(call.shape) - len(times)) + times]
    for k in range(len(times)):
        call.literal(call.place(name, k), again[k + len(call.shape) - len(times)])
    return tuple((*n, *dim) for n, dim in zip(again, before, strict=True))


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(call: Call) -> Label:
    """Each element again and again: the times stand at the right of the product."""
    value = call.operand
    call.counts_as(value)
    dims = call.dims(value)
    times = fresh(number(call.given("repeats")))
    call.literal(call.place("repeats"), times)
    if call.given("dim") is None:
        return ((*(a for dim in dims for a in dim), *times),)
    axis = axis_of(call, value)
    dims[axis] = (*dims[axis], *times)
    return tuple(dims)


@rule("aten.stack")
def stack(call: Call) -> Label:
    values = call.given("tensors")
    for value in values:
        call.observe(value)
    dims = broadcast(call, map(call.dims, values))
    axis = int(call.given("dim")) % (len(dims) + 1)
    new: Dim = (Sum([()] * len(values)),) if len(values) > 1 else ()
    return (*dims[:axis], new, *dims[axis:])
