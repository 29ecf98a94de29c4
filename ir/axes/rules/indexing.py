"""Ops that choose positions by integers: the axis that the integers count is the one that they index."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from laconic.ir.axes.call import Call
from laconic.ir.axes.dims import Dim, Pin, size_of
from laconic.ir.axes.labels import Label, Several
from laconic.ir.axes.rules.pointwise import broadcast
from laconic.ir.axes.rules.table import rule
from laconic.ir.axes.rules.views import axis_of
from laconic.ir.types import same_size


@rule("aten.embedding")
def embedding(call: Call) -> Label:
    table, index = call.dims(call.given("weight")), call.given("indices")
    call.indexed(table[0], index)
    return (*call.dims(index), *table[1:])


@rule("aten.index_select")
def index_select(call: Call) -> Label:
    value, index = call.given("self"), call.given("index")
    dims = call.dims(value)
    axis = axis_of(call, value)
    call.indexed(dims[axis], index)
    _counting(call, value)
    dims[axis : axis + 1] = call.dims(index) or [()]
    return tuple(dims)


def _counting(call: Call, value: fx.Node) -> None:
    """Chosen elements count what all of them counted; some positions of an arange are used as numbers."""
    domain = call.domain(value)
    if domain is not None and domain.origin is not None:
        call.observe(value, "some of its positions are chosen")
    elif domain is not None:
        call.counts_as(value)


def _tensors(call: Call, value: fx.Node, indices: Any) -> list[tuple[int, fx.Node]] | None:
    """The axes that integers index; None if masks do."""
    found = [(k, index) for k, index in enumerate(indices) if isinstance(index, fx.Node)]
    if any(index.meta["val"].dtype in (torch.bool, torch.uint8) for _, index in found):
        return None
    return found


def _indexed_label(call: Call, value: fx.Node, found: list[tuple[int, fx.Node]]) -> list[Dim]:
    """The label of x[.., i, j, ..]: chosen axes stand where the first of them was, in front if they were apart."""
    dims = call.dims(value)
    for k, index in found:
        call.indexed(dims[k], index)
    chosen = broadcast(call, [call.dims(index) for _, index in found])
    axes = [k for k, _ in found]
    first = axes[0] if axes == list(range(axes[0], axes[0] + len(axes))) else 0
    rest = [dim for k, dim in enumerate(dims) if k not in axes]
    return [*rest[:first], *chosen, *rest[first:]]


@rule("aten.index")
def index(call: Call) -> Any:
    value = call.given("self")
    found = _tensors(call, value, call.given("indices"))
    if found is None:
        return call.opaque("a mask chooses elements")
    if not found:
        return tuple(call.dims(value))
    _counting(call, value)
    return tuple(_indexed_label(call, value, found))


_EMPTY = (torch.ops.aten.empty_like.default, torch.ops.aten.empty.memory_format, torch.ops.aten.new_empty.default)


@rule("aten.index_put", "aten._unsafe_index_put")
def index_put(call: Call) -> Any:
    value, source = call.given("self"), call.given("values")
    found = _tensors(call, value, call.given("indices"))
    if found is None:
        return call.opaque("a mask chooses elements")
    call.observe(value)
    if value.target in _EMPTY and not call.given("accumulate"):
        call.counts_as(source)  # as where each went, for who puts it back
    else:
        call.observe(source)
    places = _indexed_label(call, value, found) if found else call.dims(value)
    broadcast(call, [places, call.dims(source)])
    return tuple(call.dims(value))


@rule("aten.gather")
def gather(call: Call) -> Label:
    value, chosen = call.given("self"), call.given("index")
    dims, where = call.dims(value), call.dims(chosen)
    axis = axis_of(call, value)
    if not dims:
        return ()
    _along(call, value, chosen, axis)
    _counting(call, value)
    call.indexed(dims[axis], chosen)
    return tuple(where)


def _along(call: Call, value: fx.Node, index: fx.Node, axis: int) -> None:
    """All axes but the indexed one go together; where the integers reach less far, by order."""
    a, b = call.dims(value), call.dims(index)
    for k in range(len(a)):
        if k == axis:
            continue
        if same_size(size_of(a[k]), size_of(b[k])):
            call.join(a[k], b[k])
        else:
            call.pin([a[k], b[k]], Pin.ORDER, "the first of its positions are used")


@rule("aten.scatter", "aten.scatter_add", "aten.scatter_reduce")
def scatter(call: Call) -> Label:
    value, chosen = call.given("self"), call.given("index")
    dims = call.dims(value)
    axis = axis_of(call, value)
    source = call.node.args[3] if len(call.node.args) > 3 else call.node.kwargs.get("src")
    call.observe(value)
    if not dims:
        return ()
    _along(call, value, chosen, axis)
    call.indexed(dims[axis], chosen)
    if isinstance(source, fx.Node) and call.dims(source):
        call.observe(source)
        for a, b in zip(call.dims(source), call.dims(chosen), strict=True):
            if same_size(size_of(a), size_of(b)):
                call.join(a, b)
            else:
                call.pin([a, b], Pin.ORDER, "the first of its positions are used")
    return tuple(dims)


@rule("aten.index_copy", "aten.index_add", "aten.index_fill")
def index_copy(call: Call) -> Label:
    """Positions of one axis are written over, as of a cache; all other axes go together."""
    value, chosen = call.given("self"), call.given("index")
    dims = call.dims(value)
    axis = axis_of(call, value)
    call.observe(value)
    call.indexed(dims[axis], chosen)
    source = call.node.args[3] if len(call.node.args) > 3 else call.given("source")
    if isinstance(source, fx.Node) and call.dims(source):
        call.observe(source)
        written, where = call.dims(source), call.dims(chosen)
        for k, dim in enumerate(written):
            call.join(dim, dims[k] if k != axis else where[0] if where else ())
    return tuple(dims)


@rule("aten.one_hot")
def one_hot(call: Call) -> Label:
    value = call.given("self")
    domain, size = call.domain(value), call.shape[-1]
    if domain is None or domain.origin is not None or not same_size(size_of(domain.dim), size):
        call.observe(value)
        return (*call.dims(value), *call.fresh([size], Pin.OBSERVED, "positions by number"))
    call.literal(call.place("num_classes"), domain.dim)
    return (*call.dims(value), domain.dim)


@rule("aten.histc")
def histc(call: Call) -> Any:
    """How often each position is among the integers."""
    value = call.given("self")
    domain, (size,) = call.domain(value), call.shape
    counted = domain is not None and domain.origin is None and same_size(size_of(domain.dim), size)
    if not counted or domain is None or (call.given("min"), call.given("max")) != (0, size - 1):
        return call.opaque("a histogram")
    call.literal(call.place("bins"), domain.dim)
    call.literal(call.place("max"), domain.dim, plus=-1)
    return (domain.dim,)


@rule("aten.masked_scatter")
def masked_scatter(call: Call) -> Any:
    """Elements put in one after another where a mask says so. A last axis along which the mask does not change goes
    together with that of what is put in."""
    value, mask, source = (call.given(name) for name in ("self", "mask", "source"))
    dims, spread, written = call.dims(value), call.dims(mask), call.dims(source)
    whole = not spread or not spread[-1] or _spread_out(mask)
    if not (dims and written and whole and same_size(size_of(dims[-1]), size_of(written[-1]))):
        return call.opaque("a mask chooses elements")
    call.join(dims[-1], written[-1])
    broadcast(call, [dims, spread])
    call.pin([*dims[:-1], *written[:-1]], Pin.ORDER, "elements are put in one after another")
    return tuple(dims)


def _spread_out(mask: fx.Node) -> bool:
    """Whether a mask is one value all along its last axis: made so by an expand."""
    while mask.target in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default):
        mask = mask.args[0]  # type: ignore[assignment]
    if mask.target is not torch.ops.aten.expand.default:
        return False
    before = mask.args[0].meta["val"].shape  # type: ignore[union-attr]
    return len(before) > 0 and isinstance(before[-1], int) and before[-1] == 1


@rule("aten.bucketize", "aten.searchsorted", "aten.isin")
def looked_up(call: Call) -> Label:
    """Each element is compared with all of a list in order."""
    value = call.node.args[0] if "searchsorted" not in str(call.node.target) else call.node.args[1]
    other = next(n for n in call.node.all_input_nodes if n is not value)
    call.observe(value)
    call.pin(call.dims(other), Pin.ORDER, "a list that is searched")
    return tuple(call.dims(value))  # type: ignore[arg-type]


def _chosen(call: Call, value: fx.Node, dims: list[Dim], reason: str) -> None:
    """Some positions are chosen by what they hold; by their order too, where several may hold the same."""
    call.pin(dims, Pin.TOPK, reason)
    by = call.axes.ties.get(value)
    if by is not None:
        call.pin(dims, Pin.TIES, f"{reason}, the first of those that are equal by {by}")


@rule("aten.topk")
def topk(call: Call) -> Several:
    value = call.given("self")
    dims = call.dims(value)
    axis = axis_of(call, value)
    _chosen(call, value, [dims[axis]], "the greatest along it are chosen")
    call.gathers(dims[axis], (value, axis), neutral=-math.inf if call.given("largest") else math.inf)
    found = list(dims)
    call.observe(value, "the greatest are chosen")
    found[axis] = call.arranges(call.shapes[0][axis], None)
    call.literal(call.place("k"), found[axis])
    call.counts_as(value, output=0)
    call.counts(dims[axis], output=1)
    return Several((tuple(found), tuple(found)))


@rule("aten.sort", "aten.argsort")
def sort(call: Call) -> Any:
    value = call.given("self")
    dims = call.dims(value)
    if not dims:
        return Several(((), ())) if "argsort" not in str(call.node.target) else ()
    axis = axis_of(call, value)
    _chosen(call, value, [dims[axis]], "sorted along it")
    found = list(dims)
    found[axis] = call.arranges(size_of(dims[axis]), call.domain(value))
    if "argsort" in str(call.node.target):
        call.counts(dims[axis])
        return tuple(found)
    call.counts_as(value, output=0)
    call.counts(dims[axis], output=1)
    return Several((tuple(found), tuple(found)))


def _least(call: Call) -> float:
    """What is never chosen as an extreme."""
    return -math.inf if "max" in str(call.node.target) else math.inf


@rule("aten.argmax", "aten.argmin")
def argmax(call: Call) -> Label:
    value = call.given("self")
    dims = call.dims(value)
    if call.given("dim") is None:
        _chosen(call, value, dims, "the greatest of all is chosen")
        call.counts(tuple(atom for dim in dims for atom in dim))
        return tuple([()] * len(call.shape))
    axis = axis_of(call, value)
    _chosen(call, value, [dims[axis]], "the greatest along it is chosen")
    call.gathers(dims[axis], (value, axis), neutral=_least(call))
    call.counts(dims[axis])
    return call.without(dims, [axis])


@rule("aten.max.dim", "aten.min.dim", "aten.median.dim", "aten.kthvalue")
def extreme(call: Call) -> Several:
    value = call.given("self")
    call.observe(value)
    dims = call.dims(value)
    axis = axis_of(call, value)
    name = str(call.node.target)
    if "max" in name or "min" in name:
        _chosen(call, value, [dims[axis]], "the greatest along it is chosen")
        call.gathers(dims[axis], (value, axis), neutral=_least(call))
    else:
        call.pin([dims[axis]], Pin.COUNT, "chosen by rank along it")
    call.counts(dims[axis], output=1)
    found = call.without(dims, [axis])
    return Several((found, found))
