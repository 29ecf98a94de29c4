"""Activations, found by their values: what stands between two products is evaluated on a grid of numbers and compared
with the functions that have a name. So a written-out GELU is a GELU, and what only looks like one is not."""

from __future__ import annotations

import operator
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

from laconic.ir.structure.reading import Reading, arranged, is_part, rearranges
from laconic.ir.traits import op_name, traits
from laconic.ir.types import TensorType, TupleType, type_of

aten = torch.ops.aten

UNKNOWN = "unknown"

_KNOWN: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "identity": lambda x: x,
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "relu2": lambda x: torch.relu(x) ** 2,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "mish": F.mish,
    "softplus": F.softplus,
    "elu": F.elu,
    "selu": F.selu,
    "relu6": F.relu6,
    "hardswish": F.hardswish,
    "hardsigmoid": F.hardsigmoid,
    "leaky_relu": F.leaky_relu,
}
_ARITHMETIC = {f"aten.{op}.{form}" for op in ("add", "sub", "mul", "div") for form in ("Tensor", "Scalar")}
_LIMIT = 40


@dataclass(frozen=True)
class Leaf:
    """A product, or the part of one, that a region of pointwise calls reads. `part` is 0 or 1 of two halves, `step` 2
    if the halves are interleaved."""

    node: fx.Node
    product: fx.Node
    part: int | None = None
    step: int = 1


@dataclass(frozen=True)
class Region:
    """The pointwise calls between products and what reads their result."""

    end: fx.Node
    leaves: tuple[Leaf, ...]
    nodes: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Blocked:
    """Why there is no region, and whether one was near, since an activation is there."""

    reason: str
    activated: bool


def region_before(
    reading: Reading, end: fx.Node, products: Container[fx.Node], barred: Container[fx.Node] = ()
) -> Region | Blocked:
    """The pointwise calls that compute `end` from `products`; what is `barred` may not be among them."""
    leaves: dict[fx.Node, Leaf] = {}
    nodes: list[fx.Node] = []
    waiting, seen = [end], {end}
    for node in waiting:
        leaf = _leaf(reading, node, products)
        if leaf is not None:
            leaves[node] = leaf
            continue
        if node in barred:
            return Blocked(f"reads %{node.name}", activated=False)
        activated = any(_activates(n) for n in nodes)
        if not (rearranges(node) or traits(node).pointwise):
            return Blocked(f"reads {_in_words(node)}, which is no product with a constant", activated)
        nodes.append(node)
        if len(nodes) > _LIMIT:
            return Blocked(f"more than {_LIMIT} calls before a product", activated)
        for n in reading.reads(node):
            if n not in seen and not reading.constant(n):
                seen.add(n)
                waiting.append(n)
    ordered = sorted(leaves.values(), key=lambda leaf: reading.position[leaf.node])
    return Region(end, tuple(ordered), tuple(sorted(nodes, key=reading.position.__getitem__)))


def activates(region: Region) -> bool:
    """Whether a region has a call that is neither arithmetic nor a rearrangement."""
    return any(_activates(n) for n in region.nodes)


def name_activation(reading: Reading, region: Region) -> tuple[str, Leaf]:
    """The activation and the leaf that goes through it. With two leaves the other one must be a factor.

    The name is "unknown" where no named function has these values.
    """
    grid = torch.linspace(-7, 7, 141, dtype=torch.float64)
    one = torch.ones_like(grid)
    if len(region.leaves) == 1:
        return _named(grid, _values(reading, region, {region.leaves[0].node: grid})), region.leaves[0]
    for gate, factor in (region.leaves, region.leaves[::-1]):
        single = _values(reading, region, {gate.node: grid, factor.node: one})
        double = _values(reading, region, {gate.node: grid, factor.node: 3 * one})
        if single is None or double is None or not torch.allclose(3 * single, double):
            continue
        name = _named(grid, single)
        if name not in (UNKNOWN, "identity"):
            return name, gate
    first = next((leaf for leaf in region.leaves if any(_activates(user) for user in leaf.node.users)), None)
    return UNKNOWN, first or region.leaves[0]


def _leaf(reading: Reading, node: fx.Node, products: Container[fx.Node]) -> Leaf | None:
    """A product with its bias, or a part of it."""
    source, part, step = arranged(node), None, 1
    while source not in products:
        if source.target is aten.add.Tensor and len(source.all_input_nodes) == 2:
            first, second = source.all_input_nodes
            if reading.is_bias(second) == reading.is_bias(first):
                return None
            source = arranged(first if reading.is_bias(second) else second)
            continue
        if source.target is operator.getitem and isinstance(source.args[1], int):
            part = source.args[1]
        elif is_part(source) and source.target is aten.slice.Tensor:
            start, step = source.args[2] or 0, (*source.args[4:], 1)[0]  # type: ignore[assignment]
            part = int(bool(start))
        elif not isinstance(type_of(source.meta["val"]), TupleType):
            return None
        operand: Any = source.args[0] if source.args else None
        if not isinstance(operand, fx.Node):
            return None
        source = arranged(operand)
    return Leaf(node, source, part, step)


def _activates(node: fx.Node) -> bool:
    return traits(node).pointwise and not rearranges(node) and op_name(node.target) not in _ARITHMETIC


def _in_words(node: fx.Node) -> str:
    if node.op == "placeholder":
        return f"the {node.meta['kind']} {node.meta['name']!r}"
    return f"%{node.name} ({op_name(node.target)})"


def _values(reading: Reading, region: Region, given: Mapping[fx.Node, torch.Tensor]) -> torch.Tensor | None:
    """The region's result for these values of its leaves; None if it reads more than numbers beside them."""
    values: dict[fx.Node, Any] = dict(given)

    def value(node: fx.Node) -> Any:
        if node in values:
            return values[node]
        kind, row = type_of(node.meta["val"]), reading.weight(node)
        if row is None or not isinstance(kind, TensorType) or any(n != 1 for n in kind.shape):
            raise LookupError(node.name)
        return reading.program.weights[row.meta["name"]].value.detach().double().reshape(())

    try:
        for node in region.nodes:
            if node in values:
                continue
            if rearranges(node):
                values[node] = value(node.args[0])  # type: ignore[arg-type]
            else:
                values[node] = node.target(*fx.node.map_arg(node.args, value), **fx.node.map_arg(node.kwargs, value))  # type: ignore[operator]
        found = value(region.end)
    except LookupError:
        return None
    return found if isinstance(found, torch.Tensor) else None


def _named(grid: torch.Tensor, values: torch.Tensor | None) -> str:
    if values is None or values.shape != grid.shape:
        return UNKNOWN
    for name, function in _KNOWN.items():
        if torch.allclose(function(grid), values.double(), rtol=1e-5, atol=1e-6):
            return name
    return UNKNOWN
