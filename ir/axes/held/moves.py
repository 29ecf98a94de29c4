"""Ops of which each element is an element of an operand: views, parts, concatenations, chosen rows."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from laconic.ir.axes.dims import quotient
from laconic.ir.axes.held.table import Asked, Held, agreeing, rule
from laconic.ir.types import Size, same_size

#: Longer products of axes are not looked through.
_LONGEST = 2**22


@rule("aten.permute", "aten.transpose", "aten.swapaxes", "aten.swapdims", "aten.t", "aten.numpy_T", "aten.mT")
def turned(asked: Asked) -> Held | None:
    if asked.axis is None:
        return asked.of(asked.operand, None)
    order = list(range(asked.rank))
    if asked.op == "permute":
        order = list(asked.given("dims"))
    elif asked.op in ("t", "numpy_T"):
        order.reverse()
    else:
        a, b = (-1, -2) if asked.op == "mT" else (int(k) for k in asked.node.args[1:3])  # type: ignore[arg-type]
        order[a], order[b] = order[b], order[a]
    return asked.of(asked.operand, order[asked.axis] % asked.rank)


@rule(
    *("aten.reshape", "aten.view", "aten._unsafe_view", "aten.flatten", "aten.unflatten", "aten.ravel"),
    *("aten.reshape_as", "aten.unsqueeze", "aten.squeeze"),
)
def reshape(asked: Asked) -> Held | None:
    """Axes that together become others: what they hold is told position by position, and told of the others again."""
    value = asked.operand
    if asked.axis is None:
        return asked.of(value, None)
    before, after = asked.shape(value), asked.kind.shape
    olds, news = _regrouped(before, after, asked.axis)
    sizes = [before[k] for k in olds]
    if len(olds) == len(news) == 1:
        return asked.of(value, olds[0])
    if not all(isinstance(n, int) for n in (*sizes, *(after[k] for k in news))) or math.prod(sizes) > _LONGEST:
        return None
    together = _together([asked.of(value, k) for k in olds], sizes)
    return _apart(together, [after[k] for k in news], news.index(asked.axis)) if together else None


def _regrouped(before: tuple[Size, ...], after: tuple[Size, ...], axis: int) -> tuple[list[int], list[int]]:
    """The axes before and after of which the products are the same, and of which `axis` after is one."""
    i, j = len(before), len(after)
    while j > 0 or i > 0:
        olds: list[int] = []
        news: list[int] = []
        p: Size = 1
        q: Size = 1
        while not (olds or news) or not same_size(p, q):
            longer = bool(olds) and quotient(p, q) is not None and j > 0
            if i > 0 and not longer:
                i -= 1
                olds.insert(0, i)
                p = p * before[i]
            elif j > 0:
                j -= 1
                news.insert(0, j)
                q = q * after[j]
            else:
                break
        if axis in news:
            return olds, news
    return [], []


def _together(held: list[Held | None], sizes: list[int]) -> Held | None:
    """What axes hold, told of their product: (product of sizes,)."""
    found: Held | None = None
    for k, own in enumerate(held):
        if not own:
            continue
        shape = [1] * len(sizes)
        shape[k] = sizes[k]
        known, value = (t.expand(sizes[k]).reshape(shape).expand(sizes).reshape(-1) for t in (own.known, own.value))
        if found is None:
            found = Held(known, value)
        else:
            found = Held(found.known | known, torch.where(found.known, found.value, value))
    return found


def _apart(held: Held, sizes: list[int], k: int) -> Held:
    """What a product of axes holds, told of one of them."""
    known, value = (t.reshape(sizes).movedim(k, 0).reshape(sizes[k], -1) for t in (held.known, held.value))
    return Held(known.all(1) & (value == value[:, :1]).all(1), value[:, 0])


@rule("aten.expand", "aten.broadcast_to", "aten.expand_as")
def expand(asked: Asked) -> Held | None:
    return asked.aligned(asked.operand)


@rule("aten.repeat", "aten.tile")
def repeat(asked: Asked) -> Held | None:
    found = asked.aligned(asked.operand)
    if not found or asked.axis is None or len(found.known) == asked.size:
        return found
    times = asked.size // len(found.known)
    return Held(found.known.repeat(times), found.value.repeat(times))


@rule("aten.repeat_interleave.self_int")
def repeat_interleave(asked: Asked) -> Held | None:
    value, dim, times = asked.operand, asked.given("dim"), asked.given("repeats")
    if dim is None or asked.axis is None:
        return asked.of(value, None) if asked.axis is None else None
    found = asked.of(value, asked.axis)
    if not found or asked.axis != int(dim) % asked.rank:
        return found
    return (
        None if isinstance(times, fx.Node) else Held(*(t.repeat_interleave(times) for t in (found.known, found.value)))
    )


@rule("aten.slice", "aten.narrow", "aten.select.int", "aten.split", "aten.chunk", "aten.split_with_sizes")
@rule("aten.unsafe_split", "aten.unsafe_chunk", "aten.unsafe_split_with_sizes", "aten.unbind")
def part(asked: Asked) -> Held | None:
    """All other axes hold what they held, and so does the one that is cut, at the positions that are taken."""
    value = asked.operand
    if asked.axis is None:
        return asked.of(value, None)
    shape = asked.shape(value)
    cut = int(asked.given("dim")) % len(shape)
    if len(shape) > asked.rank:  # the axis itself is gone
        return asked.of(value, asked.axis + (asked.axis >= cut))
    found = asked.of(value, asked.axis)
    if not found or asked.axis != cut:
        return found
    taken = _taken(asked, shape[cut], cut)
    return found.spread(shape[cut])[taken] if taken is not None else None


def _taken(asked: Asked, size: Size, cut: int) -> torch.Tensor | None:
    """The positions that a part of an axis is, as the op itself takes them; None if that depends on dynamic sizes."""
    arguments = [*asked.node.args[1:], *asked.node.kwargs.values()]
    if not isinstance(size, int) or any(isinstance(a, fx.Node) for a in arguments):
        return None
    flat: dict[str, Any] = {**asked.node.kwargs, "dim": 0}
    args = list(asked.node.args[1:])
    place = next(k for k, a in enumerate(asked.node.target._schema.arguments) if a.name == "dim") - 1  # type: ignore[union-attr]
    if place < len(args):
        args[place] = 0
        del flat["dim"]
    found: Any = asked.node.target(torch.arange(size), *args, **flat)  # type: ignore[operator]
    taken: torch.Tensor = found[asked.output] if isinstance(found, (list, tuple)) else found
    return taken


@rule("aten.cat", "aten.concat")
def cat(asked: Asked) -> Held | None:
    values = [v for v in asked.given("tensors") if asked.shape(v) != (0,)]
    joined = int(asked.given("dim")) % asked.rank
    if asked.axis != joined:
        return agreeing(asked.of(v, asked.axis) for v in values)
    pieces = []
    for v in values:
        size = asked.shape(v)[joined]
        if not isinstance(size, int):
            return None
        own = asked.of(v, joined)
        pieces.append(own.spread(size) if own else Held.where(torch.zeros(size, dtype=torch.bool), 0, asked.kind.dtype))
    return Held(torch.cat([h.known for h in pieces]), torch.cat([h.value.to(asked.kind.dtype) for h in pieces]))


@rule("aten.stack")
def stack(asked: Asked) -> Held | None:
    values = asked.given("tensors")
    new = int(asked.given("dim")) % asked.rank
    if asked.axis != new:
        axis = asked.axis if asked.axis is None or asked.axis < new else asked.axis - 1
        return agreeing(asked.of(v, axis) for v in values)
    found = [asked.of(v, None) or Held.where(torch.zeros(1, dtype=torch.bool), 0, asked.kind.dtype) for v in values]
    return Held(torch.cat([h.known for h in found]), torch.cat([h.value.to(asked.kind.dtype) for h in found]))


@rule("aten.constant_pad_nd", "aten.pad")
def pad(asked: Asked) -> Held | None:
    """What is padded holds the number; what is not, what it held, along axes that are not padded if that is it too."""
    value, amounts, number = asked.operand, asked.given("pad"), asked.given("value")
    if asked.op == "pad" and asked.given("mode") != "constant":
        return None
    if any(isinstance(n, fx.Node) or n < 0 for n in amounts) or isinstance(number, fx.Node):
        return None
    number = 0 if number is None else number
    padded = {asked.rank - 1 - k for k in range(len(amounts) // 2) if any(amounts[2 * k : 2 * k + 2])}
    found = asked.of(value, asked.axis)
    around = Held.everywhere(number, asked.size, asked.kind.dtype)
    if asked.axis is None or asked.axis not in padded:
        return agreeing([found, around]) if padded and found else found
    low, high = amounts[2 * (asked.rank - 1 - asked.axis) :][:2]
    size = asked.size - low - high
    own = found.spread(size) if found else Held.where(torch.zeros(size, dtype=torch.bool), 0, asked.kind.dtype)
    if padded - {asked.axis}:
        own = Held(own.known & (own.value == number), own.value)
    pieces = (around[:low], own, around[:high])
    return Held(torch.cat([h.known for h in pieces]), torch.cat([h.value.to(asked.kind.dtype) for h in pieces]))


@rule("aten.embedding", "aten.index_select")
def rows(asked: Asked) -> Held | None:
    """Whichever rows are chosen: other axes hold what they hold in all of them."""
    value = asked.given("weight" if asked.op == "embedding" else "self")
    if asked.axis is None:
        return asked.of(value, None)
    if asked.op == "index_select":
        return None if asked.axis == int(asked.given("dim")) % asked.rank else asked.of(value, asked.axis)
    axis = asked.axis - asked.rank + len(asked.shape(value))
    return asked.of(value, axis) if axis > 0 else None


@rule("aten.index")
def index(asked: Asked) -> Held | None:
    """One tensor of indices along one axis; the axes before and behind it stay."""
    value, indices = asked.given("self"), asked.given("indices")
    chosen = [(k, i) for k, i in enumerate(indices) if isinstance(i, fx.Node)]
    if asked.axis is None:
        return asked.of(value, None)
    if len(chosen) != 1 or chosen[0][1].meta["val"].dtype in (torch.bool, torch.uint8):
        return None
    ((k, i),) = chosen
    wide = len(asked.shape(i))
    if k <= asked.axis < k + wide:
        return None
    return asked.of(value, asked.axis if asked.axis < k else asked.axis - wide + 1)


@rule("aten.index_copy", "aten.slice_scatter")
def written(asked: Asked) -> Held | None:
    """Where what is written over and what is written are the same."""
    value, source = asked.node.args[0], asked.given("source" if asked.op == "index_copy" else "src")
    if asked.axis is not None and asked.axis == int(asked.given("dim")) % asked.rank:
        return None
    return agreeing([asked.of(value, asked.axis), asked.of(source, asked.axis)])  # type: ignore[arg-type]
