"""How structure reads an entry: which values a call computes from, what only rearranges, what are constants, where a
weight is multiplied with. Every question that several matchers ask, asked once.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from laconic.ir.cost import is_product
from laconic.ir.program import Entry, Kind, Program
from laconic.ir.traits import argument, op_name, traits
from laconic.ir.types import NumberType, TensorType, TupleType, type_of

aten = torch.ops.aten

_COPIES = (aten.clone.default, aten._to_copy.default, aten.lift_fresh_copy.default, aten.contiguous.default)
_PARTS = (aten.slice.Tensor, aten.select.int, aten.narrow.default, aten.diagonal.default, aten.as_strided.default)


@dataclass(frozen=True)
class Linear:
    """A product of a value with a constant matrix: `x` is (..., inputs), the result (..., outputs), whichever way the
    matrix is stored. A convolution of one point is one too. `weight` and `bias` are placeholders where they are rows
    of the weight table, seen through views."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    inputs: int
    outputs: int


class Reading:
    """An entry as the matchers see it. The entry must not change while it is in use."""

    def __init__(self, program: Program, entry: Entry) -> None:
        self.program, self.entry = program, entry
        self.position = {node: k for k, node in enumerate(entry.graph.nodes)}
        self._reads: dict[fx.Node, tuple[fx.Node, ...]] = {}
        self._constant: dict[fx.Node, bool] = {}
        self.linears: dict[fx.Node, Linear] = {}
        for node in entry.graph.nodes:
            self._reads[node] = tuple(_reads(node))
            if node.op == "placeholder":
                self._constant[node] = node.meta["kind"] != Kind.INPUT
            else:
                self._constant[node] = all(self._constant[n] for n in self._reads[node])
            found = self._linear(node)
            if found is not None:
                self.linears[node] = found

    def reads(self, node: fx.Node) -> tuple[fx.Node, ...]:
        """The tensors whose values `node` is computed from: neither sizes, nor what is asked for its type alone."""
        return self._reads[node]

    def constant(self, node: fx.Node) -> bool:
        """Whether a value depends on weights, states and literals alone."""
        return self._constant[node]

    def weight(self, node: Any) -> fx.Node | None:
        """The placeholder that a constant is a view or cast of, if it is."""
        if not isinstance(node, fx.Node):
            return None
        source = arranged(node)
        return source if source.op == "placeholder" and source.meta["kind"] != Kind.INPUT else None

    def is_bias(self, node: fx.Node) -> bool:
        """Whether a value is a constant, or rows of one that were gathered."""
        source = arranged(node)
        gathered: Any = source.args[0] if source.target is aten.index.Tensor else source
        return self.constant(gathered)

    def multiplies_constant(self, node: fx.Node) -> bool:
        """Whether a call is a matrix product or convolution with a constant."""
        return is_product(node) and any(self.constant(n) and rank(n) > 1 for n in self.reads(node))

    def from_to(self, source: fx.Node, target: fx.Node) -> set[fx.Node] | None:
        """The calls by which `target` is computed from `source`, `target` included; None if it is not."""
        first = self.position[source]
        seen: set[fx.Node] = set()
        order: list[fx.Node] = []
        waiting = [target]
        while waiting:
            node = waiting.pop()
            if node in seen or self.position[node] <= first:
                continue
            seen.add(node)
            order.append(node)
            waiting += self.reads(node)
        reached = {source}
        for node in sorted(order, key=self.position.__getitem__):
            if any(n in reached for n in self.reads(node)):
                reached.add(node)
        return reached - {source} if target in reached else None

    def back(
        self, node: fx.Node, until: Callable[[fx.Node], bool], limit: int = 96
    ) -> tuple[list[fx.Node], list[fx.Node]]:
        """Walk back from `node` (included), not beyond where `until` holds: the values at which it does, nearest first,
        and the others seen. Constants are not walked into; after `limit` values the walk ends."""
        stopped: list[fx.Node] = []
        passed: list[fx.Node] = []
        waiting, seen = [node], {node}
        for here in waiting:
            if until(here):
                stopped.append(here)
                continue
            passed.append(here)
            if len(passed) > limit:
                break
            for n in self.reads(here):
                if n not in seen and not self.constant(n):
                    seen.add(n)
                    waiting.append(n)
        return stopped, passed

    def _linear(self, node: fx.Node) -> Linear | None:
        if node.op != "call_function" or not isinstance(node.target, torch._ops.OpOverload):
            return None
        name = op_name(node.target)
        args: Any = node.args
        if name in ("aten.linear", "aten.conv1d", "aten.conv2d", "aten.conv3d"):
            x, matrix, bias = args[0], args[1], args[2] if len(args) > 2 else None
            if name != "aten.linear" and not _pointwise_convolution(node):
                return None
        elif name == "aten.addmm":
            bias, x, matrix = args[:3]
        elif name in ("aten.mm", "aten.matmul"):
            bias, (x, matrix) = None, args
            if self.constant(x) and not self.constant(matrix):
                x, matrix = matrix, x
        else:
            return None
        if self.constant(x) or not self.constant(matrix):
            return None
        kind = type_of(matrix.meta["val"])
        shape = [n for n in kind.shape if isinstance(n, int)] if isinstance(kind, TensorType) else []
        if len(shape) < 2 or (name == "aten.matmul" and len(shape) != 2):
            return None
        outputs, inputs = (shape[1], shape[0]) if name in ("aten.addmm", "aten.mm") else (shape[0], shape[1])
        if name == "aten.matmul" and x is args[0]:
            outputs, inputs = inputs, outputs
        if name == "aten.mm" and x is args[1]:
            outputs, inputs = inputs, outputs
        return Linear(node, x, self.weight(matrix), self.weight(bias), inputs, outputs)


def _reads(node: fx.Node) -> Iterator[fx.Node]:
    if node.op != "call_function":
        return
    type_only = traits(node).type_only
    for operand in node.all_input_nodes:
        kind = type_of(operand.meta["val"])
        if isinstance(kind, NumberType) or (type_only and operand is node.args[0]):
            continue
        yield operand


def _pointwise_convolution(node: fx.Node) -> bool:
    """Whether a convolution is a product at each point: a kernel of size 1, stride 1, one group."""
    kind = type_of(node.args[1].meta["val"])  # type: ignore[union-attr]
    assert isinstance(kind, TensorType)
    stride, padding, groups = (argument(node, name) for name in ("stride", "padding", "groups"))
    return all(n == 1 for n in (*kind.shape[2:], *_each(stride), groups)) and not any(_each(padding))


def _each(value: Any) -> tuple[Any, ...]:
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def rank(node: fx.Node) -> int:
    kind = type_of(node.meta["val"])
    return len(kind.shape) if isinstance(kind, TensorType) else 0


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """A tensor's sizes, ints and expressions; () for what is no tensor."""
    kind = type_of(node.meta["val"])
    return kind.shape if isinstance(kind, TensorType) else ()


def is_part(node: fx.Node) -> bool:
    """Whether a call takes a part of its operand: a slice, a row, an element of a split."""
    if node.target in _PARTS:
        return not _whole(node)
    return node.target is operator.getitem


def rearranges(node: fx.Node) -> bool:
    """Whether a call only shows its operand otherwise: a view, copy, cast or broadcast of all its elements."""
    if node.op != "call_function" or is_part(node) or isinstance(type_of(node.meta["val"]), TupleType):
        return False
    return node.target in _COPIES or (traits(node).alias == 0 and node.target is not operator.getitem)


def arranged(node: fx.Node) -> fx.Node:
    """What a value is a rearrangement of."""
    while rearranges(node):
        operand: Any = node.args[0]
        if not isinstance(operand, fx.Node):
            break
        node = operand
    return node


def _whole(node: fx.Node) -> bool:
    """Whether a part is all there is: a slice from end to end, the only row."""
    operand: Any = node.args[0]
    before, after = shape_of(operand), shape_of(node)
    if node.target is aten.slice.Tensor:
        return before == after
    return node.target is aten.select.int and before[node.args[1]] == 1  # type: ignore[index]


def scalar_of(node: fx.Node) -> float | None:
    """The number that a call multiplies its first operand with, if it does only that."""
    if node.target in (aten.mul.Tensor, aten.mul.Scalar) and isinstance(node.args[1], (int, float)):
        return float(node.args[1])
    if node.target in (aten.div.Tensor, aten.div.Scalar) and isinstance(node.args[1], (int, float)):
        return 1 / node.args[1]
    return None
