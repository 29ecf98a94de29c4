"""Ops that take parts of an axis or put parts one behind the other: there the axis is a sum."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy

from laconic.ir.axes.call import Call
from laconic.ir.axes.dims import Dim, Pin, Sum, fresh, order, size_of, sum_of
from laconic.ir.axes.labels import Label, Several
from laconic.ir.axes.rules.table import rule
from laconic.ir.axes.rules.views import axis_of, number
from laconic.ir.types import Size, same_size

#: From here on an end means "to the end".
_END = 2**62


def cut(call: Call, dim: Dim, sizes: Sequence[Size]) -> list[Dim]:
    """An axis as parts of these sizes, which it is found to be a sum of."""
    call.chooses(dim)
    found = [fresh(size) for size in sizes]
    if len([size for size in sizes if not same_size(size, 0)]) == 1:
        return [piece if same_size(size, 0) else dim for piece, size in zip(found, sizes, strict=True)]
    call.join(dim, sum_of(found))
    return found


def minus(a: Size, b: Size) -> Size:
    difference = a - b
    if isinstance(difference, sympy.Expr):
        difference = sympy.expand(difference)
        return int(difference) if difference.is_Integer else difference
    return difference


def window(call: Call, dim: Dim, start: Size, size: Size) -> tuple[Dim, Dim, Dim]:
    """An axis as what is before, in and behind a window."""
    sizes = (start, size, minus(minus(size_of(dim), start), size))
    before, inside, behind = cut(call, dim, sizes)
    return before, inside, behind


@rule("aten.slice", "aten.narrow")
def slice_(call: Call) -> Label:
    value = call.operand
    call.counts_as(value)
    dims = call.dims(value)
    axis = axis_of(call, value)
    dims[axis] = _sliced(call, dims[axis], call.shape[axis])
    return tuple(dims)


def _sliced(call: Call, dim: Dim, size: Size) -> Dim:
    """The label of a slice of an axis, whose size is known."""
    whole = size_of(dim)
    step = call.given("step") if call.takes("step") else 1
    if same_size(size, whole) and step == 1:
        return _whole(call, dim)
    if step != 1:
        return _strided(call, dim, size, step)
    start = number(call.given("start")) or 0
    from_end = order(start, 0) == -1
    first = whole + start if from_end else start
    if order(first, 0) in (-1, None) or order(minus(whole, first), size) in (-1, None):
        call.pin([dim], Pin.ORDER, "cut at a place that is not known beforehand")
        return call.fresh([size], Pin.ORDER, "cut at a place that is not known beforehand")[0]
    before, inside, behind = window(call, dim, first, size)
    if from_end:
        call.literal(call.place("start"), sum_of([inside, behind]), times=-1)
    else:
        call.literal(call.place("start"), before)
    if call.takes("end"):
        _ends(call, before, inside, behind)
    elif call.takes("length"):
        call.literal(call.place("length"), inside)
    return inside


def _whole(call: Call, dim: Dim) -> Dim:
    """A slice of everything: its end, if it is the size itself, follows it."""
    end = call.given("end") if call.takes("end") else call.given("length")
    if end is not None and not (isinstance(end, int) and end >= _END):
        call.literal(call.place("end" if call.takes("end") else "length"), dim)
    return dim


def _ends(call: Call, before: Dim, inside: Dim, behind: Dim) -> None:
    end = call.given("end")
    said = number(end)
    if said is None or (isinstance(said, int) and said >= _END):
        return
    if order(said, 0) == -1:
        call.literal(call.place("end"), behind, times=-1)
    else:
        call.literal(call.place("end"), sum_of([before, inside]))


def _strided(call: Call, dim: Dim, size: Size, step: Any) -> Dim:
    """Every so manieth element, as the gates in interleaved matrices: the axis is a product with `step`, of which one
    is taken."""
    start, whole = call.given("start") or 0, size_of(dim)
    if isinstance(step, int) and isinstance(start, int) and 0 <= start < step and same_size(size * step, whole):
        call.chooses(dim)
        outer = fresh(size)
        call.join(dim, (*outer, Sum([()] * step)))
        end = call.given("end")
        if end is not None and not (isinstance(end, int) and end >= _END):
            call.literal(call.place("end"), dim)
        return outer
    call.pin([dim], Pin.ORDER, "every so manieth element is taken")
    return call.fresh([size], Pin.ORDER, "every so manieth element of another axis")[0]


@rule("aten.select.int")
def select(call: Call) -> Label:
    value = call.operand
    call.counts_as(value)
    dims = call.dims(value)
    axis = axis_of(call, value)
    dim = dims.pop(axis)
    index, whole = number(call.given("index")), size_of(dim)
    if not isinstance(index, int) or order(whole, abs(index)) in (-1, None):
        call.pin([dim], Pin.ENUM, "one element is taken")
        return tuple(dims)
    first = index if index >= 0 else minus(whole, -index)
    before, _, behind = window(call, dim, first, 1)
    if index >= 0:
        call.literal(call.place("index"), before)
    else:
        call.literal(call.place("index"), behind, times=-1, plus=-1)
    return tuple(dims)


@rule("aten.split", "aten.unsafe_split", "aten.chunk", "aten.unsafe_chunk", "aten.split_with_sizes")
@rule("aten.unsafe_split_with_sizes")
def split(call: Call) -> Several:
    value = call.operand
    dims = call.dims(value)
    axis = axis_of(call, value)
    found = cut(call, dims[axis], [shape[axis] for shape in call.shapes])
    if "with_sizes" in str(call.node.target) or isinstance(call.node.args[1], (list, tuple)):
        name = "split_size" if "split.sizes" in str(call.node.target) else "split_sizes"
        for k, dim in enumerate(found):
            call.literal(call.place(name, k), dim)
    else:
        call.resplit(axis, found)
    for k in range(len(found)):
        call.counts_as(value, output=k)
    return Several(tuple((*dims[:axis], part, *dims[axis + 1 :]) for part in found))


@rule("aten.unbind")
def unbind(call: Call) -> Several:
    value = call.operand
    dims = call.dims(value)
    dim = dims.pop(axis_of(call, value))
    call.chooses(dim)
    if len(call.shapes) > 1:
        call.join(dim, (Sum([()] * len(call.shapes)),))
    for k in range(len(call.shapes)):
        call.counts_as(value, output=k)
    return Several(tuple(tuple(dims) for _ in call.shapes))


@rule("aten.cat", "aten.concat")
def cat(call: Call) -> Label:
    values = [v for v in call.given("tensors") if call.sizes(v) != (0,)]
    for value in values:
        call.observe(value)
    labels = list(map(call.dims, values))
    axis = int(call.given("dim")) % len(labels[0])
    found = list(labels[0])
    for label in labels[1:]:
        for k, dim in enumerate(label):
            if k != axis:
                call.join(found[k], dim)
    found[axis] = sum_of([label[axis] for label in labels])
    return tuple(found)


@rule("aten.constant_pad_nd", "aten.pad")
def pad(call: Call) -> Label:
    value = call.operand
    call.observe(value)
    dims, amounts = call.dims(value), list(call.given("pad"))
    for k in range(len(amounts) // 2):
        low, high = number(amounts[2 * k]), number(amounts[2 * k + 1])
        if (low, high) == (0, 0):
            continue
        axis = len(dims) - 1 - k
        constant = "constant_pad" in str(call.node.target) or call.given("mode") == "constant"
        if not constant or order(low, 0) in (-1, None) or order(high, 0) in (-1, None):
            call.pin([dims[axis]], Pin.ORDER, "cut, or padded with its own elements")
            dims[axis] = call.fresh([call.shape[axis]], Pin.ORDER, "cut or padded with its own elements")[0]
            continue
        before, behind = call.fresh([low, high], Pin.ENUM, "padding")
        dims[axis] = sum_of([part for part, n in ((before, low), (dims[axis], 1), (behind, high)) if n != 0])
    return tuple(dims)


@rule("aten.slice_scatter", "aten.select_scatter")
def scattered_window(call: Call) -> Label:
    """A part of an axis is written over: it is the same as what is written."""
    value, source = call.given("self"), call.given("src")
    call.observe(value)
    call.observe(source)
    dims, written = call.dims(value), call.dims(source)
    axis = axis_of(call, value)
    whole = size_of(dims[axis])
    if "select" in str(call.node.target):
        index = number(call.given("index"))
        inside: Size = 1
        start = None if not isinstance(index, int) else index if index >= 0 else minus(whole, -index)
        written.insert(axis, ())
        step = 1
    else:
        start, inside, step = number(call.given("start")) or 0, call.sizes(source)[axis], call.given("step")
        if start is not None and order(start, 0) == -1:
            start = whole + start
    others = [k for k in range(len(dims)) if k != axis]
    for k in others:
        call.join(dims[k], written[k])
    if start is None or step != 1 or order(minus(whole, start), inside) in (-1, None):
        call.pin([dims[axis], written[axis]], Pin.ORDER, "written at places that are not known beforehand")
        return tuple(dims)
    before, middle, behind = window(call, dims[axis], start, inside)
    call.join(middle, written[axis])
    if "select" in str(call.node.target):
        call.literal(call.place("index"), before)
    else:
        call.literal(call.place("start"), before)
        _ends(call, before, middle, behind)
    return tuple(dims)


@rule("aten.glu")
def glu(call: Call) -> Label:
    value = call.operand
    dims = call.dims(value)
    axis = axis_of(call, value)
    half = call.shape[axis]
    first, second = cut(call, dims[axis], [half, half])
    call.join(first, second)
    dims[axis] = first
    return tuple(dims)
