"""Where gradients are recorded, what is written in place is read through copies.

    %y = sin(%m)                      %s = laconic.snapshot(%m)
    %z = mul(%x, %y)           ->     %y = sin(%s)
    add_(%m, 1)                       %z = mul(%x, %y)
                                      add_(%m, 1)

AOTAutograd keeps what is cheapest for the backward: here not %y but %m, to compute %y again. By then %m holds other
numbers. If a later piece has written them autograd notices and raises; if the same piece has, nobody does, and the
gradients are wrong (torch 2.13, Inductor on the whole graph too). A copy is written by nobody, and since it is made by
an op that AOTAutograd does not know, it is kept and not made again.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from laconic.ir.dynamo import memory, value_of
from laconic.ir.signature import layout
from laconic.ir.torch_private import quiet, storage_key
from laconic.ir.torch_traits import written


@torch.library.custom_op("laconic::snapshot", mutates_args=())
def snapshot(value: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor, made once."""
    return value.clone()


@snapshot.register_fake
def _(value: torch.Tensor) -> torch.Tensor:
    return value.clone()


@torch.library.custom_op("laconic::snapshot_as_it_lies", mutates_args=())
def snapshot_as_it_lies(value: torch.Tensor) -> torch.Tensor:
    """A copy of a tensor with gaps or overlaps (a column, an expanded row), with the same strides."""
    return _span(value).clone().as_strided(value.shape, value.stride())


@snapshot_as_it_lies.register_fake
def _(value: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(_span(value)).as_strided(value.shape, value.stride())


def _span(value: torch.Tensor) -> torch.Tensor:
    """All memory from the first to the last element, as one axis."""
    pairs = zip(value.shape, value.stride(), strict=True)
    length = 0 if any(size == 0 for size in value.shape) else 1 + sum((size - 1) * stride for size, stride in pairs)
    return value.as_strided((length,), (1,))


def read_through_copies(graph: fx.Graph) -> int:
    """Rewrite a graph in which gradients are recorded. Returns how many copies it makes."""
    calls = [node for node in graph.nodes if node.op in ("call_function", "call_method")]
    targets = {node: [t for t in written(node) if memory(t) is not None] for node in calls}
    changing = {memory(target) for found in targets.values() for target in found}
    if not changing:
        return 0
    last: dict[int | None, fx.Node] = {}  # the last write into a memory
    copies: dict[tuple[fx.Node, fx.Node | None], fx.Node] = {}
    for node in calls:
        kept = {*_memories(value_of(node)), *map(memory, targets[node])}  # a view is no read, a write none of its own
        for operand in node.all_input_nodes:
            where = memory(operand)
            if where not in changing or where in kept or value_of(operand).requires_grad:
                continue
            write = last.get(where)
            if (operand, write) not in copies:
                copies[operand, write] = _copied(operand, _later(operand, write), calls[0])
            node.replace_input_with(operand, copies[operand, write])
        last.update((memory(target), node) for target in targets[node])
    return len(copies)


def _memories(value: Any) -> Iterator[int]:
    """The memory of a value or of its parts."""
    if isinstance(value, (list, tuple)):
        for part in value:
            yield from _memories(part)
    elif isinstance(value, torch.Tensor):
        yield storage_key(value)


def _later(operand: fx.Node, write: fx.Node | None) -> fx.Node:
    return operand if write is None or operand > write else write


def _copied(operand: fx.Node, behind: fx.Node, first: fx.Node) -> fx.Node:
    """A copy of an operand, made behind a node."""
    was, op = value_of(operand), torch.ops.laconic.snapshot.default
    with quiet(was.fake_mode):
        now = was.clone()
        if layout(now) != layout(was):
            op = torch.ops.laconic.snapshot_as_it_lies.default
            now = op(was)
    graph = operand.graph
    with graph.inserting_before(first) if behind.op == "placeholder" else graph.inserting_after(behind):
        copy = graph.call_function(op, (operand,))
    copy.meta = {name: behind.meta[name] for name in ("stack_trace", "nn_module_stack") if name in behind.meta}
    copy.meta["example_value"] = now
    return copy
