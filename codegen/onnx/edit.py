"""Reading and changing an ONNX graph: what the rewrites share."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

import numpy as np
import onnx_ir as ir
from onnxscript.optimizer import FOLDED_FROM_KEY

#: A size: a number, the text of an expression over named sizes, or None where nothing is known.
Size = int | str | None
Sizes = tuple[Size, ...]

#: Constants of at most this many elements are not weights.
SMALL = 16


@dataclass(frozen=True)
class Editor:
    """A graph being rewritten, with what is known of it.

    `positive`: names of sizes that are never 0. `parameters`: names of initializers that are weights of the Program,
    whose values no rewrite looks at: what it does to a model should not depend on a bias that happens to be zero.
    """

    graph: ir.Graph
    opset: int
    positive: frozenset[str] = frozenset()
    parameters: set[str] = field(default_factory=set)

    def nodes(self, *ops: str) -> Iterable[ir.Node]:
        """The nodes of these ops that are in the graph when their turn comes."""
        for node in list(self.graph):
            if node.graph is not None and node.domain == "" and node.op_type in ops:
                yield node

    def constant(self, array: np.ndarray[Any, Any], name: str, *, parameter: bool = False) -> ir.Value:
        """A new initializer; a parameter, if it is made from one."""
        number, unused = 0, name
        while unused in self.graph.initializers:
            number += 1
            unused = f"{name}.{number}"
        tensor = ir.tensor(array, name=unused)
        value = ir.Value(name=unused, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
        self.graph.register_initializer(value)
        if parameter:
            self.parameters.add(unused)
        return value

    def integers(self, numbers: Sequence[int]) -> ir.Value:
        """A 1-D int64 constant, one for equal numbers."""
        name = "ints_" + "_".join(map(str, numbers))
        there = self.graph.initializers.get(name)
        if there is not None and self.numbers(there) == list(numbers):
            return there
        return self.constant(np.array(numbers, dtype=np.int64), name)

    def insert(
        self,
        before: ir.Node,
        op: str,
        inputs: Sequence[ir.Value | None],
        attributes: Mapping[str, Any] | None = None,
        outputs: Sequence[tuple[Sizes | None, ir.DataType | None]] = ((None, None),),
    ) -> tuple[ir.Value, ...]:
        """A new node in front of another, whose source line it takes; what it makes, of these sizes and dtypes."""
        node = ir.node(op, list(inputs), dict(attributes or {}), num_outputs=len(outputs))
        source = before.metadata_props.get(SOURCE)
        if source:
            node.metadata_props[SOURCE] = source
        for value, (shape, dtype) in zip(node.outputs, outputs, strict=True):
            value.shape = None if shape is None else ir.Shape(shape)
            value.type = None if dtype is None else ir.TensorType(dtype)
        self.graph.insert_before(before, node)
        return tuple(node.outputs)

    def replace(self, old: ir.Value, new: ir.Value) -> None:
        """Let all that reads one value, the graph's results too, read another; what nobody reads any more goes."""
        ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        self.sweep(old.producer())

    def sweep(self, node: ir.Node | None) -> None:
        """Remove a node that nobody reads, and what only it read."""
        waiting = [node]
        while waiting:
            gone = waiting.pop()
            if (
                gone is None
                or gone.graph is not self.graph
                or any(v.uses() or v.is_graph_output() for v in gone.outputs)
            ):
                continue
            read = {v.producer() for v in gone.inputs if v is not None}
            self.graph.remove(gone, safe=True)
            waiting += read

    def content(self, value: ir.Value | None) -> np.ndarray[Any, Any] | None:
        """What a constant holds, if it is no parameter."""
        if value is None or value.const_value is None or value.is_graph_input() or self.is_parameter(value):
            return None
        return value.const_value.numpy()

    def is_parameter(self, value: ir.Value) -> bool:
        """Whether this constant is a weight, or was folded from one."""
        return value.name in self.parameters or not self.parameters.isdisjoint(value.meta.get(FOLDED_FROM_KEY, ()))

    def numbers(self, value: ir.Value | None) -> list[int] | None:
        """A constant's integers."""
        held = self.content(value)
        return None if held is None or held.ndim > 1 else [int(n) for n in held.reshape(-1)]

    def uniform(self, value: ir.Value | None) -> Any:
        """The number that all elements of a constant are; None if there is none."""
        held = self.content(value)
        if held is None or not held.size or held.dtype.kind not in "biuf":
            return None
        first = held.reshape(-1)[0]
        return first.item() if np.array_equal(held, np.broadcast_to(first, held.shape)) else None


#: The metadata key under which a node has the user's source line.
SOURCE = "pkg.torch.onnx.stack_trace"

Rewrite = Callable[[Editor], int]


def sizes(value: ir.Value | None) -> Sizes | None:
    """The sizes of a value, None if not even their number is known."""
    if value is None or value.shape is None:
        return None
    return tuple(d if isinstance(d, int) else d.value for d in value.shape)


def known(shape: Sizes | None) -> bool:
    return shape is not None and None not in shape


def made_by(value: ir.Value | None, *ops: str) -> ir.Node | None:
    """The node that makes this value, if it is one of these standard ops."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.domain == "" and node.op_type in ops else None


def sole(value: ir.Value) -> bool:
    """Whether exactly one operand reads this value, and the graph does not return it."""
    return len(value.uses()) == 1 and not value.is_graph_output()


def only_reader(value: ir.Value | None) -> ir.Node | None:
    """The standard node that alone reads a value, and once, in the same graph."""
    if value is None or not sole(value):
        return None
    ((node, _),) = value.uses()
    return node if node.domain == "" and node.graph is value.graph else None


def owned(value: ir.Value | None, rank: int | None = None) -> TypeGuard[ir.Value]:
    """Whether this is a constant (of this rank) that can be replaced by one made from it without being stored twice. A
    vector may be: it weighs nothing beside the matrix whose result it is added to."""
    if value is None or not value.is_initializer() or value.const_value is None or value.is_graph_input():
        return False
    found = len(value.const_value.shape)
    return rank in (None, found) and (sole(value) or found <= 1)


def array_of(value: ir.Value) -> np.ndarray[Any, Any]:
    """What a constant holds."""
    assert value.const_value is not None
    return value.const_value.numpy()


def shared_weight(value: ir.Value) -> bool:
    """Whether this is a weight, not a mere constant, that stays beside what is folded from it."""
    if not value.is_initializer() or len(value.uses()) + value.is_graph_output() < 2:
        return False
    return value.const_value is None or value.const_value.size > SMALL


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    found = node.attributes.get(name)
    return default if found is None else found.value


def axis_of(node: ir.Node, rank: int, default: int = 0) -> int:
    """A node's axis, counted from the front."""
    return int(attribute(node, "axis", default)) % rank


def broadcast(*shapes: Sizes) -> Sizes | None:
    """The sizes of what operands of these sizes are broadcast to; None where that cannot be told."""
    rank = max(map(len, shapes))
    result: list[Size] = []
    for column in zip(*((1,) * (rank - len(shape)) + shape for shape in shapes), strict=True):
        greater = {size for size in column if size != 1}
        if len(greater) > 1 or None in greater:
            return None
        result.append(greater.pop() if greater else 1)
    return tuple(result)
