"""Attention sites, fused or written out, from the softmax to the projections on all four sides.

From the core (q, k, v, mask) the matcher walks back to the nearest products with constants, past views, norms and
rotary embeddings, but not beyond the residual stream; and forward to the product that reads the result.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from laconic.ir.program import Kind
from laconic.ir.structure.cores import Core, find_cores
from laconic.ir.structure.masks import read_mask
from laconic.ir.structure.mlp import project
from laconic.ir.structure.reading import Linear, Reading, arranged, is_part, rearranges, scalar_of, shape_of
from laconic.ir.structure.records import Attention, NearMiss, Norm, Projection

aten = torch.ops.aten


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
    for core in find_cores(reading, near):
        site = _attention(reading, core, normed, carried, near)
        if site is not None:
            found.append(site)
    return found


# The site


def _attention(
    reading: Reading, core: Core, normed: set[fx.Node], carried: frozenset[fx.Node], near: list[NearMiss]
) -> Attention | None:
    def miss(reason: str) -> None:
        near.append(NearMiss("attention", core.node, reason, str(reading.program.site(core.node) or "")))

    heads, kv_heads = _heads(core.q, core.q_heads), _kv_heads(core)
    head_dim, value_dim = core.head_dim, core.value_dim
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
        softcap=core.softcap,
        sink=core.sink,
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


def _heads(value: fx.Node, axis: int = -3) -> Any:
    """The size of the axis of heads: by default in front of (positions, channels), or, where it is joined with the
    batch, before that."""
    if axis != -3:
        return shape_of(value)[axis]
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
            return _heads(value.args[0], core.k_heads)  # type: ignore[arg-type]
        if not rearranges(value):
            break
        value = value.args[0]  # type: ignore[assignment]
    return _heads(core.keys, core.k_heads)


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
