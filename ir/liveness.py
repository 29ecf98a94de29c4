"""How much memory an entry's values take at once, in the order in which the program computes them.

A value takes memory from its call to its last use, a view none of its own but it keeps what it is a view of. Inputs are
the caller's and live throughout, results to the end; weights and states are not counted. At each call its results are
there before its operands are given up.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from laconic.ir.alias import alias_operand
from laconic.ir.cost import Measure, measure_at
from laconic.ir.program import Entry, Kind, Program
from laconic.ir.traits import traits
from laconic.ir.types import TensorType, TupleType, ValueType, type_of

aten = torch.ops.aten

#: A stretch of memory: the node whose call makes it, and which of its results it is.
Storage = tuple[fx.Node, int]


@dataclass(frozen=True)
class Peak:
    """The most bytes alive at once, the call at which that is, and what is alive there, largest first."""

    bytes: int
    node: fx.Node | None
    live: tuple[tuple[fx.Node, int], ...]


def peak_activation(program: Program, entry: Entry, sizes: Mapping[str, int] | None = None) -> Peak:
    """The peak at these sizes (by display name; the example's where not given)."""
    measure = measure_at(program, sizes)
    storages = _storages(entry)
    until = _last_uses(entry, storages)
    alive = {(node, 0): _bytes(type_of(node.meta["val"]), measure) for node in entry.input_nodes()}
    ending: dict[fx.Node, list[Storage]] = {}
    for storage, node in until.items():
        ending.setdefault(node, []).append(storage)
    total = sum(alive.values())
    best = Peak(total, None, _largest(alive))
    for node in entry.calls():
        for part, kind in _made(node):
            alive[node, part] = _bytes(kind, measure)
            total += alive[node, part]
        if total > best.bytes:
            best = Peak(total, node, _largest(alive))
        for storage in ending.get(node, ()):
            total -= alive.pop(storage)
    return best


def shares_storage(node: fx.Node, operand: fx.Node) -> bool:
    """Whether a call that may return a view of `operand` does so, by the strides that both have."""
    if not traits(node).may_copy:
        return True
    was, now = type_of(operand.meta["val"]), type_of(node.meta["val"])
    if not isinstance(was, TensorType) or not isinstance(now, TensorType):
        return True
    if was.dtype != now.dtype or was.device != now.device or node.kwargs.get("copy"):
        return False
    return was.contiguous or not now.contiguous  # a copy is dense and row-major


def _largest(alive: Mapping[Storage, int]) -> tuple[tuple[fx.Node, int], ...]:
    found = sorted(((node, size) for (node, _), size in alive.items() if size), key=lambda pair: -pair[1])
    return tuple(found[:16])


def _storages(entry: Entry) -> dict[fx.Node, tuple[Storage, ...]]:
    """The memory that each node's value lies in; of a tuple, that of each part. None for weights and numbers."""
    found: dict[fx.Node, tuple[Storage, ...]] = {}
    for node in entry.graph.nodes:
        if node.op == "placeholder":
            found[node] = ((node, 0),) if node.meta["kind"] == Kind.INPUT else ()
            continue
        if node.op != "call_function":
            continue
        operand = alias_operand(node)
        if operand is not None and shares_storage(node, operand):
            found[node] = found[operand]
        elif node.target is operator.getitem:
            source: Any = node.args[0]
            found[node] = tuple(s for s in found[source] if s[1] == node.args[1])
        else:
            found[node] = tuple((node, part) for part, _ in _made(node))
    return found


def _made(node: fx.Node) -> Iterator[tuple[int, ValueType]]:
    """The parts of a call's result that are memory of their own."""
    operand = alias_operand(node)
    if node.target is operator.getitem or (operand is not None and shares_storage(node, operand)):
        return
    kind = type_of(node.meta["val"])
    for part, each in enumerate(kind.parts if isinstance(kind, TupleType) else (kind,)):
        if isinstance(each, TensorType):
            yield part, each


def _last_uses(entry: Entry, storages: Mapping[fx.Node, tuple[Storage, ...]]) -> dict[Storage, fx.Node]:
    """The last call that reads, or is, a value in each piece of memory; inputs and results are not there."""
    until: dict[Storage, fx.Node] = {}
    for node in entry.calls():
        for value in (*node.all_input_nodes, node):
            for storage in storages.get(value, ()):
                until[storage] = node
    kept = [s for value in entry.output_values if isinstance(value, fx.Node) for s in storages.get(value, ())]
    kept += [(node, 0) for node in entry.input_nodes()]
    for storage in kept:
        until.pop(storage, None)
    return until


def _bytes(kind: ValueType | None, measure: Measure) -> int:
    """The bytes from the first to the last element."""
    if not isinstance(kind, TensorType):
        return 0
    shape, stride = [measure(n) for n in kind.shape], [measure(s) for s in kind.stride]
    if 0 in shape:
        return 0
    return int(kind.dtype.itemsize * (1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))))
