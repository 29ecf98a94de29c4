"""Attention sites, fused or written out, from the softmax to the projections on all four sides.

From the core (q, k, v, mask) the matcher walks back to the nearest products with constants, past views, norms and
rotary embeddings, but not beyond the residual stream; and forward to the product that reads the result.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from laconic.ir.cost import is_attention, is_product
from laconic.ir.program import Kind
from laconic.ir.structure.masks import read_mask
from laconic.ir.structure.mlp import project
from laconic.ir.structure.reading import Linear, Reading, arranged, is_part, rearranges, scalar_of, shape_of
from laconic.ir.structure.records import Attention, NearMiss, Norm, Projection
from laconic.ir.traits import argument

aten = torch.ops.aten

_SOFTMAX = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)
_FILL = (aten.masked_fill.Scalar, aten.masked_fill.Tensor)
_WHERE = (aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf)


_BEHIND_SCORES = (aten.add.Tensor, aten.tanh.default, *_FILL)


@dataclass(frozen=True)
class Core:
    """softmax(q k^T * scale + mask) v, before anything is known of where its operands come from. `out` is the result,
    `keys` is k with keys before channels or (of a written-out product) its transpose."""

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


@dataclass(frozen=True)
class Way:
    """From a projection to an operand of the core: the calls between, and the products found."""

    value: fx.Node
    linear: Linear | None
    inside: frozenset[fx.Node]
    passed: tuple[fx.Node, ...]
    found: int


def find_attentions(
    reading: Reading, norms: list[Norm], carried: frozenset[fx.Node], near: list[NearMiss]
) -> list[Attention]:
    """The attentions of an entry, in order. `carried` are the values of residual streams, `norms` all norms."""
    normed = {norm.out for norm in norms}
    found = []
    for node in reading.entry.calls():
        core = _fused(node) if is_attention(node) else _written(reading, node, near)
        if core is not None:
            site = _attention(reading, core, normed, carried, near)
            if site is not None:
                found.append(site)
    return found


# The core


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
    return Core(
        node=node,
        q=q,
        keys=keys,
        v=v,
        masks=(mask,) if isinstance(mask, fx.Node) else (),
        scale=float(scale) if isinstance(scale, (int, float)) else _default_scale(q),
        causal=bool(given.get("is_causal")),
        out=out,
        fused=True,
        inside=(node,) if out is node else (node, out),
    )


def _default_scale(q: fx.Node) -> float:
    size = shape_of(q)[-1]
    return 1 / math.sqrt(size) if isinstance(size, int) and size else 1.0


def _written(reading: Reading, node: fx.Node, near: list[NearMiss]) -> Core | None:
    """The core whose softmax is `node`."""
    if node.target not in _SOFTMAX or not isinstance(node.args[0], fx.Node):
        return None
    inside: list[fx.Node] = [node]
    scores = _scores(reading, node.args[0], inside)
    if scores is None:
        return None
    product, masks, scale = scores
    values = next(_product_users(node, inside), None)
    if values is None:
        where = str(reading.program.site(node) or "")
        near.append(NearMiss("attention", node, "the softmax of a product is not multiplied with values", where))
        return None
    weights, v = values.args[:2]
    if not isinstance(v, fx.Node) or not isinstance(weights, fx.Node):
        return None
    q, keys = product.args[:2]
    assert isinstance(q, fx.Node)
    assert isinstance(keys, fx.Node)
    return Core(node, q, keys, v, masks, scale, False, values, False, (*inside, product, values))


def _scores(
    reading: Reading, node: fx.Node, inside: list[fx.Node]
) -> tuple[fx.Node, tuple[fx.Node, ...], float] | None:
    """The product q k^T that a softmax reads, the masks on the way and the scale."""
    masks: list[fx.Node] = []
    scale = 1.0
    for _ in range(24):
        if is_product(node):
            operands = reading.reads(node)
            if len(operands) == 2 and not any(reading.constant(n) for n in operands):
                return node, tuple(masks), scale
            return None
        inside.append(node)
        operand: Any = node.args[0] if node.args else None
        factor = scalar_of(node)
        if factor is not None:
            scale *= factor
        elif node.target is aten.add.Tensor and isinstance(node.args[1], fx.Node):
            first, second = _comes_from_product(reading, node.args[0]), _comes_from_product(reading, node.args[1])
            if first == second:
                return None
            operand = node.args[0] if first else node.args[1]
            masks.append(node.args[1] if first else node.args[0])  # type: ignore[arg-type]
        elif node.target is aten.sub.Tensor and _is_greatest(node.args[1], of=operand):
            pass  # for the softmax's sake: it changes nothing
        elif node.target is aten.cat.default:  # a learned score beside those of the keys
            operand = next((n for n in operand if _comes_from_product(reading, n)), None)
        elif node.target in _FILL:
            masks.append(node.args[1])  # type: ignore[arg-type]
        elif node.target in _WHERE:
            masks.append(node.args[0])  # type: ignore[arg-type]
            operand = next(
                (n for n in node.args[1:] if isinstance(n, fx.Node) and _comes_from_product(reading, n)), None
            )
        elif not (rearranges(node) or node.target is aten.tanh.default):  # tanh caps scores
            return None
        if not isinstance(operand, fx.Node):
            return None
        node = operand
    return None


def _comes_from_product(reading: Reading, node: Any) -> bool:
    """Whether a value is a product of two computed values, but for scales, masks and views behind it."""
    for _ in range(24):
        if not isinstance(node, fx.Node) or node.op != "call_function":
            return False
        if is_product(node):
            return not any(reading.constant(n) for n in reading.reads(node))
        if not (rearranges(node) or scalar_of(node) is not None or node.target in _BEHIND_SCORES):
            return False
        node = node.args[0]
    return False


def _is_greatest(node: Any, of: Any) -> bool:
    """Whether a value is the greatest of another along an axis."""
    while isinstance(node, fx.Node) and (rearranges(node) or node.target is operator.getitem):
        node = node.args[0]
    return isinstance(node, fx.Node) and node.target in (aten.max.dim, aten.amax.default) and node.args[0] is of


def _product_users(node: fx.Node, inside: list[fx.Node]) -> Iterator[fx.Node]:
    """The products that read a value, past views, copies and dropout, as their first operand."""
    for user in node.users:
        if is_product(user):
            if user.args[0] is node:
                yield user
        elif rearranges(user) or user.target is aten.slice.Tensor:  # a slice drops a learned score
            inside.append(user)
            yield from _product_users(user, inside)


# The site


def _attention(
    reading: Reading, core: Core, normed: set[fx.Node], carried: frozenset[fx.Node], near: list[NearMiss]
) -> Attention | None:
    def miss(reason: str) -> None:
        near.append(NearMiss("attention", core.node, reason, str(reading.program.site(core.node) or "")))

    heads, kv_heads = _heads(core.q), _kv_heads(core)
    head_dim, value_dim = shape_of(core.q)[-1], shape_of(core.v)[-1]
    if not all(isinstance(n, int) for n in (heads, kv_heads, head_dim, value_dim)):
        miss("the axis of heads is not a fixed one")
        return None
    q, k, v = (_way(reading, value, carried) for value in (core.q, core.keys, core.v))
    for name, way in (("queries", q), ("keys", k), ("values", v)):
        if way.linear is None:
            miss(f"{name} are computed from {way.found} products with constants where one was looked for")
    o, behind = _output(reading, core.out)
    if o is None:
        miss("the result is not read by one product with a constant")
    facts = [read_mask(reading, mask) for mask in core.masks]
    inside = {*core.inside, *q.inside, *k.inside, *v.inside, *behind}
    scales = [s for way in (q, k) for n in way.inside if (s := scalar_of(n)) is not None]
    return Attention(
        site=core.node.meta.get("site", -1),
        node=core.node,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        value_dim=value_dim,
        scale=core.scale * math.prod(scales),
        causal=core.causal or any(f.causal for f in facts),
        window=next((f.window for f in facts if f.window is not None), None),
        masked=bool(core.masks),
        cross=_crosses(reading, q, k, carried),
        fused=core.fused,
        rotary=_is_rotated(q.inside),
        qk_norm=not normed.isdisjoint(q.inside) and not normed.isdisjoint(k.inside),
        cached=_is_cached(k),
        q=_projection(q),
        k=_projection(k),
        v=_projection(v),
        o=project(o) if o is not None else None,
        mask=core.masks[0] if core.masks else None,
        nodes=tuple(sorted(inside, key=reading.position.__getitem__)),
    )


def _heads(value: fx.Node) -> Any:
    """The axis in front of (positions, channels); where it is joined with the batch, before that."""
    while len(shape_of(value)) == 3 and rearranges(value):
        value = value.all_input_nodes[0]
    shape = shape_of(value)
    return shape[-3] if len(shape) >= 4 else 1 if len(shape) in (2, 3) else None


def _kv_heads(core: Core) -> Any:
    """The heads that keys have before each is repeated for several queries."""
    value = core.keys
    while value.op == "call_function":
        if value.target is aten.expand.default:
            before, after = shape_of(value.args[0]), shape_of(value)  # type: ignore[arg-type]
            grown = [k for k in range(-len(before), 0) if before[k] == 1 and after[k] != 1]
            if len(before) == 5 and grown and grown[0] - 1 >= -len(before):
                return before[grown[0] - 1]
        if value.target in (aten.repeat_interleave.self_int, aten.repeat.default):
            return _heads(value.args[0])  # type: ignore[arg-type]
        if not rearranges(value):
            break
        value = value.args[0]  # type: ignore[assignment]
    return _heads(core.keys)


def _way(reading: Reading, value: fx.Node, carried: frozenset[fx.Node]) -> Way:
    stopped, passed = reading.back(value, lambda n: n in reading.linears or n in carried)
    found = [reading.linears[n] for n in stopped if n in reading.linears]
    linear = found[0] if len(found) == 1 else None
    inside = reading.from_to(linear.node, value) if linear is not None else None
    nodes = {linear.node, *inside} if linear is not None and inside is not None else set()
    return Way(value, linear, frozenset(nodes), tuple(passed), len(found))


def _projection(way: Way) -> Projection | None:
    return project(way.linear, _columns(way)) if way.linear is not None else None


def _columns(way: Way) -> tuple[int, int] | None:
    """The columns of a joint projection that a way takes, where it is cut along its last axis."""
    assert way.linear is not None
    for node in way.inside:
        if not is_part(node) or arranged(node) is not node:
            continue
        source: Any = node.args[0]
        if node.target is operator.getitem and source.target in (aten.split.Tensor, aten.split_with_sizes.default):
            operand, sizes, axis = (*source.args, 0)[:3]
            if shape_of(operand)[-1] != way.linear.outputs or axis not in (-1, len(shape_of(operand)) - 1):
                continue
            index: Any = node.args[1]
            if isinstance(sizes, int):
                return index * sizes, min((index + 1) * sizes, way.linear.outputs)
            return sum(sizes[:index]), sum(sizes[: index + 1])
        if node.target is aten.slice.Tensor and shape_of(source)[-1] == way.linear.outputs:
            _, axis, start, stop = (*node.args, None, None)[:4]
            if axis in (-1, len(shape_of(source)) - 1) and isinstance(start, int) and isinstance(stop, int):
                return start, min(stop, way.linear.outputs)
    return None


def _output(reading: Reading, out: fx.Node) -> tuple[Linear | None, list[fx.Node]]:
    """The product that reads the result past views, and the calls on the way."""
    for user in out.users:
        if user in reading.linears and reading.linears[user].x is out:
            return reading.linears[user], [user]
        if rearranges(user):
            found, way = _output(reading, user)
            if found is not None:
                return found, [user, *way]
    return None, []


def _crosses(reading: Reading, q: Way, k: Way, carried: frozenset[fx.Node]) -> bool | None:
    """Whether keys come from another stream than queries; without streams, whether from another value."""
    starts = [way.linear.x if way.linear is not None else way.value for way in (q, k)]
    if arranged(starts[0]) is arranged(starts[1]):
        return False
    sources = [set(reading.back(start, lambda n: n in carried)[0]) for start in starts]
    if all(sources):
        return sources[0].isdisjoint(sources[1])
    return None if q.linear is None or k.linear is None else True


def _is_rotated(inside: frozenset[fx.Node]) -> bool:
    """Whether on the way x * cos + turned(x) * sin is computed, or a product of complex numbers."""

    def by_table(node: Any) -> bool:
        if not isinstance(node, fx.Node) or node.target is not aten.mul.Tensor or node not in inside:
            return False
        return len(node.all_input_nodes) == 2 and any(n not in inside for n in node.all_input_nodes)

    for node in inside:
        if node.target in (aten.add.Tensor, aten.sub.Tensor) and all(by_table(n) for n in node.args[:2]):
            return True
        if node.target is aten.view_as_complex.default:
            return True
    return False


def _is_cached(way: Way) -> bool:
    """Whether keys are read from a state or an input, beside those that are projected."""
    for node in way.passed:
        for operand in (node, *node.all_input_nodes):
            source = arranged(operand)
            kind = source.meta["kind"] if source.op == "placeholder" else None
            if kind == Kind.STATE or (kind == Kind.INPUT and source.meta["val"].is_floating_point()):
                return True
    return False
