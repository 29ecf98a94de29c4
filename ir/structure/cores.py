"""Cores of attentions: softmax(q k^T * scale + mask) v as one op or written out, before anything is known of where its
operands come from.

A written-out core is read from its softmax: back to the product q k^T, forward to the product with values. What is a
core but for one condition is a near miss; so are scores that reach the values through no softmax.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from laconic.ir.cost import einsum_subscripts, is_attention, is_product
from laconic.ir.structure.reading import Reading, rank, rearranges, scalar_of, shape_of
from laconic.ir.structure.records import NearMiss
from laconic.ir.traits import argument, op_name, traits

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_FILL = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
_PLAIN = ("aten.matmul", "aten.bmm", "aten.mm", "aten.linalg_matmul")
_LIMIT = 24


@dataclass(frozen=True)
class Core:
    """`out` is the result, `keys` is k with keys before channels or (of a written-out product) its transpose;
    `q_heads` and `k_heads` are their axes of heads, from the right. `softcap` and `sink` are those of `Attention`."""

    node: fx.Node
    q: fx.Node
    keys: fx.Node
    v: fx.Node
    masks: tuple[fx.Node, ...]
    scale: float
    causal: bool
    out: fx.Node
    fused: bool
    inside: tuple[fx.Node, ...]
    head_dim: Any
    value_dim: Any
    q_heads: int = -3
    k_heads: int = -3
    softcap: float | None = None
    sink: bool = False


@dataclass
class _Scores:
    """What lies between a softmax and the product q k^T that it reads."""

    masks: list[fx.Node] = field(default_factory=list)
    scale: float = 1.0
    softcap: float | None = None
    sink: bool = False


@dataclass(frozen=True)
class _Factors:
    """A product of `left` (..., rows, sums) and `right`: the length of the axis that belongs to neither rows nor sums
    (`width`) or to the sums (`depth`), and the axes of heads."""

    left: fx.Node
    right: fx.Node
    depth: Any
    width: Any
    left_heads: int = -3
    right_heads: int = -3
    added: fx.Node | None = None
    scale: float = 1.0


def find_cores(reading: Reading, near: list[NearMiss]) -> Iterator[Core]:
    """The cores of an entry, in order."""
    for node in reading.entry.calls():
        found: Core | str | None = None
        if is_attention(node):
            found = _fused(node)
        elif node.target in _SOFTMAX and _from_scores(reading, node.args[0]):
            found = _written(reading, node)
        elif is_product(node):
            found = _without_softmax(reading, node)
        if isinstance(found, str):
            near.append(NearMiss("attention", node, found, str(reading.program.site(node) or "")))
        elif found is not None:
            yield found


def _fused(node: fx.Node) -> Core:
    q, keys, v = node.args[:3]
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    given = {name: argument(node, name) for name in names}
    mask = given.get("attn_mask", given.get("attn_bias"))
    scale = given.get("scale")
    assert isinstance(q, fx.Node)
    assert isinstance(keys, fx.Node)
    assert isinstance(v, fx.Node)
    out = next((u for u in node.users if u.target is operator.getitem and u.args[1] == 0), node)
    size = shape_of(q)[-1]
    default = 1 / math.sqrt(size) if isinstance(size, int) and size else 1.0
    return Core(
        node=node,
        q=q,
        keys=keys,
        v=v,
        masks=(mask,) if isinstance(mask, fx.Node) else (),
        scale=float(scale) if isinstance(scale, (int, float)) else default,
        causal=bool(given.get("is_causal")),
        out=out,
        fused=True,
        inside=(node,) if out is node else (node, out),
        head_dim=size,
        value_dim=shape_of(v)[-1],
    )


# Written out


def _written(reading: Reading, node: fx.Node) -> Core | str:
    """The core whose softmax is `node`, or why it is none."""
    axis = argument(node, "dim")
    if axis not in (-1, rank(node) - 1):
        return f"the softmax is over axis {axis} where the last one, that of the keys, was expected"
    found = _Scores()
    inside: list[fx.Node] = [node]
    product = _product_of(reading, node, found, inside)
    if isinstance(product, str):
        return product
    scores = _factors(product)
    if isinstance(scores, str):
        return f"the product of queries and keys {scores}"
    values, others = _reader(node, found.sink, inside)
    if values is None:
        said = f", but read by {', '.join(others)}" if others else ""
        return f"the softmax of a product is not multiplied with values{said}"
    read = _factors(values, first=inside[-1])
    if isinstance(read, str):
        return f"the product with values {read}"
    if read.added is not None:
        return f"{op_name(values.target)} adds to the product with values"
    if scores.added is not None:
        found.masks.append(scores.added)
    return Core(
        node=node,
        q=scores.left,
        keys=scores.right,
        v=read.right,
        masks=tuple(found.masks),
        scale=found.scale * scores.scale,
        causal=False,
        out=values,
        fused=False,
        inside=(*inside, product, values),
        head_dim=scores.depth,
        value_dim=read.width,
        q_heads=scores.left_heads,
        k_heads=scores.right_heads,
        softcap=found.softcap,
        sink=found.sink,
    )


def _product_of(reading: Reading, softmax: fx.Node, found: _Scores, inside: list[fx.Node]) -> fx.Node | str:
    """The product q k^T that a softmax reads, or what stands in the way. Fills `found` and `inside`."""
    node: Any = softmax.args[0]
    for _ in range(_LIMIT):
        if is_product(node):
            return node  # type: ignore[no-any-return]
        inside.append(node)
        operand: Any = node.args[0] if node.args else None
        factor = scalar_of(node)
        if factor is not None:
            found.scale *= factor
        elif node.target in (aten.add.Tensor, aten.where.self):
            both = [n for n in node.args if _from_scores(reading, n)]
            if len(both) != 1 or node.kwargs:
                return f"{op_name(node.target)} joins scores of several products where one was expected"
            operand = both[0]
            if node.target is aten.where.self and operand is node.args[0]:
                return "aten.where.self chooses by the scores"
            mask = node.args[0] if operand is not node.args[0] else node.args[1]
            if isinstance(mask, fx.Node):
                found.masks.append(mask)
        elif node.target is aten.sub.Tensor and _is_greatest(node.args[1], of=operand):
            pass  # for the softmax's sake: it changes nothing
        elif node.target is aten.cat.default:
            scores = [n for n in node.args[0] if _from_scores(reading, n)]
            axis = argument(node, "dim")
            learned = all(reading.constant(n) for n in node.args[0] if n not in scores)
            if len(scores) != 1 or not learned or axis not in (-1, rank(node) - 1):
                return "aten.cat joins the scores with others than constant ones of further keys"
            operand, found.sink = scores[0], True
        elif node.target in _FILL or node.target in _WHERE:
            found.masks.append(node.args[1] if node.target in _FILL else node.args[0])
            operand = next(n for n in node.args if _from_scores(reading, n))
        elif node.target is aten.tanh.default:
            if found.softcap is not None:
                return "the scores are capped twice"
            found.softcap, outside = found.scale, len(found.masks)
            if any(_masks(reading, n) for n in _behind(node.args[0])):
                return "a mask is added to the scores before they are capped"
            assert outside == len(found.masks)
        elif not rearranges(node):
            return f"the scores go through {op_name(node.target)} before the softmax"
        elif not _keeps_last(node):
            return f"{op_name(node.target)} moves the axis of the keys before the softmax"
        node = operand
    return f"the product of queries and keys is more than {_LIMIT} calls before the softmax"
