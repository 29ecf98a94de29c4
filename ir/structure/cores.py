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
from laconic.ir.structure.reading import Reading, is_part, rank, rearranges, scalar_of, shape_of
from laconic.ir.structure.records import NearMiss
from laconic.ir.traits import argument, op_name, traits

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_FILL = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)
_MASKING = (aten.add.Tensor, aten.sub.Tensor, *_FILL, *_WHERE)
_TURNED = tuple(f"aten.{name}" for name in ("t", "numpy_T", "mT", "mH", "matrix_H", "adjoint", "movedim.int"))
_ADDING = ("aten.baddbmm", "aten.addmm")
_LINEAR = tuple(op_name(op) for op in (*_MASKING, aten.mul.Tensor, aten.neg.default))
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
    behind_cap: int = 0  # how many of the masks come between the cap and the softmax


@dataclass(frozen=True)
class _Factors:
    """A product of two values: `depth` is the size of the axis that is summed, `width` of the one that the right
    operand alone has; the axes of heads, from the right; `scale` times the product is added to `added`."""

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
    if scores.added is not None:
        found.masks.append(scores.added)
    if found.softcap is not None and len(found.masks) > found.behind_cap:
        return "a mask is added to the scores before they are capped"
    reader = _reader(node, found, inside)
    if isinstance(reader, list):
        said = f", but read by {', '.join(reader)}" if reader else ""
        return f"the softmax of a product is not multiplied with values{said}"
    values, weights = reader
    read = _factors(values, first=weights)
    if isinstance(read, str):
        return f"the product with values {read}"
    if read.added is not None or read.scale != 1:
        return f"the product with values is {op_name(values.target)}, which scales it or adds to it"
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
        operand: Any = node.args[0]
        factor = scalar_of(node)
        if factor is not None:
            found.scale *= factor
        elif node.target is aten.sub.Tensor and _is_greatest(node.args[1], of=operand):
            pass  # for the softmax's sake: it changes nothing
        elif node.target in _MASKING:
            operand = _masked(reading, node, found)
        elif node.target is aten.cat.default:
            operand = next(n for n in operand if _from_scores(reading, n))
            constant = all(reading.constant(n) for n in node.args[0] if n is not operand)
            if not constant or argument(node, "dim") not in (-1, rank(node) - 1):
                return "aten.cat joins the scores with others than constant ones of further keys"
            found.sink = True
        elif node.target is aten.tanh.default:
            if found.softcap is not None:
                return "the scores are capped twice"
            found.softcap, found.behind_cap = found.scale, len(found.masks)
        elif not rearranges(node):
            return f"the scores go through {op_name(node.target)} before the softmax"
        elif not _keeps_last(node):
            return f"{op_name(node.target)} rearranges the axis of the keys before the softmax"
        if not isinstance(operand, fx.Node):
            return f"{op_name(node.target)} reads the scores otherwise than once, beside a mask"
        node = operand
    return f"the product of queries and keys is more than {_LIMIT} calls before the softmax"


def _masked(reading: Reading, node: fx.Node, found: _Scores) -> fx.Node | None:
    """The scores that a call masks, if it reads them once. The mask is added to `found`."""
    operands = node.args[1:] if node.target in _WHERE else node.args[:1] if node.target in _FILL else node.args[:2]
    scores = [n for n in operands if isinstance(n, fx.Node) and _from_scores(reading, n)]
    if len(scores) != 1 or (node.target is aten.sub.Tensor and scores[0] is not node.args[0]):
        return None
    if node.target in _WHERE:
        mask = node.args[0]
    else:
        mask = node.args[1] if scores[0] is node.args[0] else node.args[0]
        if scores[0] is node.args[1]:
            found.scale *= float(node.kwargs.get("alpha", 1))  # type: ignore[arg-type]
    if isinstance(mask, fx.Node):
        if reading.back(mask, lambda n: n is scores[0])[0]:
            return None
        found.masks.append(mask)
    return scores[0]


def _from_scores(reading: Reading, node: Any) -> bool:
    """Whether a value is made of a product of two computed values by scales, masks, views and other pointwise calls."""
    waiting = [node]
    for here in waiting:
        if not isinstance(here, fx.Node) or here.op != "call_function":
            continue
        if is_product(here):
            if sum(not reading.constant(n) for n in _factors_read(reading, here)) >= 2:
                return True
        elif len(waiting) < 4 * _LIMIT and (
            rearranges(here) or is_part(here) or traits(here).pointwise or here.target is aten.cat.default
        ):
            waiting += [n for n in reading.reads(here) if n not in waiting]
    return False


def _factors_read(reading: Reading, product: fx.Node) -> tuple[fx.Node, ...]:
    """The values that a product multiplies, without the one it adds."""
    if op_name(product.target) in _ADDING:
        return tuple(n for n in product.args[1:3] if isinstance(n, fx.Node))
    return reading.reads(product)


def _is_greatest(node: Any, of: Any) -> bool:
    """Whether a value is the greatest of another along its last axis, or of all."""
    last = rank(of) - 1
    while isinstance(node, fx.Node) and (rearranges(node) or node.target is operator.getitem):
        node = node.args[0]
    if not isinstance(node, fx.Node) or node.target not in (aten.max.dim, aten.amax.default) or node.args[0] is not of:
        return False
    axes: Any = argument(node, "dim")
    axes = (axes,) if isinstance(axes, int) else tuple(axes or ())
    return not axes or any(axis in (-1, last) for axis in axes)


def _keeps_last(node: fx.Node) -> bool:
    """Whether a view's last axis is its operand's."""
    operand: Any = node.args[0]
    last = rank(operand) - 1
    if node.target is aten.transpose.int:
        return last not in (axes := {axis % (last + 1) for axis in node.args[1:3]}) or len(axes) == 1  # type: ignore[operator]
    if node.target is aten.permute.default:
        return node.args[1][-1] % (last + 1) == last  # type: ignore[index, operator, return-value]
    if op_name(node.target) in _TURNED:
        return last < 1
    return shape_of(operand)[-1:] == shape_of(node)[-1:]


def _reader(node: fx.Node, found: _Scores, inside: list[fx.Node]) -> tuple[fx.Node, fx.Node] | list[str]:
    """The product that reads a softmax's result, past views and copies, and the operand by which it does; or the ops
    that do. Adds the calls between to `inside`."""
    others: list[str] = []
    for user in node.users:
        if is_product(user) and node in user.all_input_nodes:
            return user, node
        cut = found.sink and user.target is aten.slice.Tensor and user.args[1] in (-1, rank(node) - 1)
        if cut or (rearranges(user) and _keeps_last(user)):
            behind = _reader(user, found, inside)
            if isinstance(behind, tuple):
                inside.append(user)
                return behind
            others += behind
        elif user.op == "call_function":
            others.append(op_name(user.target))
    return others


# Products


def _factors(node: fx.Node, first: fx.Node | None = None) -> _Factors | str:
    """What a product multiplies, or what was expected of it. `first` is the operand that must be the left one."""
    name, scale, added = op_name(node.target), 1.0, None
    if name == "aten.einsum":
        return _einsum_factors(node, first)
    if name in _ADDING:
        added, left, right = node.args[:3]
        scale = float(argument(node, "alpha"))
        added = added if argument(node, "beta") != 0 else None
    elif name in _PLAIN:
        left, right = node.args[:2]
    else:
        return f"is {name} where a batched product of two values was expected"
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    if first is not None and left is not first:
        return f"is {name} of the weights as second operand where they were expected as first"
    if rank(left) < 2 or rank(right) < 2:
        return f"is {name} of a vector where matrices were expected"
    depth, width = shape_of(left)[-1], shape_of(right)[-1]
    return _Factors(left, right, depth, width, added=added, scale=scale)  # type: ignore[arg-type]


def _einsum_factors(node: fx.Node, first: fx.Node | None) -> _Factors | str:
    """Of scores (no `first`) the right operand is that with the last axis of the result, the keys; the heads are the
    last of the axes that all three share. Of values, it is that beside `first`, whose last axis is summed."""
    said, operands = f"is aten.einsum {node.args[0]!r}", list(node.args[1])  # type: ignore[arg-type]
    if len(operands) != 2:
        return f"{said} of {len(operands)} operands where two were expected"
    subscripts, result = einsum_subscripts(str(node.args[0]), [rank(n) for n in operands])
    sides = list(zip(operands, subscripts, strict=True))
    turned = operands[0] is not first if first is not None else result[-1:] in subscripts[0]
    (left, a), (right, b) = reversed(sides) if turned else sides
    assert isinstance(left, fx.Node)
    assert isinstance(right, fx.Node)
    summed, shared = set(a + b) - set(result), [c for c in result if c in a and c in b]
    width = set(b) - set(a)
    if len(summed) != 1 or not summed <= set(a) & set(b) or len(width) != 1:
        return f"{said} where one axis summed and one of the second operand's own were expected"
    depth = shape_of(left)[a.index(*summed)]
    columns = shape_of(right)[b.index(*width)]
    if first is not None:
        if {a[-1]} != summed:
            return f"{said} where a sum over the last axis of the weights, that of the keys, was expected"
        return _Factors(left, right, depth, columns)
    if {result[-1]} != width or len(set(a) - set(b)) != 1:
        return f"{said} where one axis of queries and, last, one of keys were expected"
    q_heads, k_heads = (side.index(shared[-1]) - len(side) if shared else -3 for side in (a, b))
    if len(shared) == 1 and (q_heads, k_heads) != (-3, -3):
        return f"{said} whose one shared axis may be the batch or the heads"
    return _Factors(left, right, depth, columns, q_heads, k_heads)


def _without_softmax(reading: Reading, node: fx.Node) -> str | None:
    """Why a product of values with what is made of another product is no attention: there is no softmax between, but
    another function. Rows of a weight that were gathered (experts) are no computed values."""

    def computed(product: fx.Node) -> bool:
        factors = _factors_read(reading, product)
        return len(factors) == 2 and not any(reading.is_bias(n) for n in factors)

    if not computed(node):
        return None
    here, passed = _factors_read(reading, node)[0], list[str]()
    for _ in range(_LIMIT):
        if is_product(here):
            return (
                f"the scores go through {passed[-1]} where a softmax was expected"
                if passed and computed(here)
                else None
            )
        if not (rearranges(here) or traits(here).pointwise):
            return None
        if not rearranges(here) and scalar_of(here) is None and op_name(here.target) not in _LINEAR:
            passed.append(op_name(here.target))
        behind = next((n for n in reading.reads(here) if _from_scores(reading, n)), None)
        if behind is None:
            return None
        here = behind
    return None
