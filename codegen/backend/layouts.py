"""What leaves a piece with convolutions for another piece lies in memory as convolutions want it.

    piece (%a0) { %y = conv2d(%a0, ...)  return %y }
      ->
    piece (%a0) { %x = %a0.contiguous()  %y = conv2d(%x, ...)  %z = %y.contiguous(channels_last)  return %z }

Inductor computes around convolutions in channels-last order, but what enters or leaves a graph has the strides that
the graph says. In one graph nothing is turned between two layers; at a cut it would be, there and back. Here the pieces
hand it over as it is. Inside a piece nothing changes: the copy at its beginning is in the first kernel's reads, and
costs nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx
from torch.nn import functional

from laconic.codegen.backend.cut import Cut, Piece
from laconic.ir.dynamo import memory
from laconic.ir.torch_traits import written

#: A slot of a piece ("in") or one of its outputs ("out").
Port = tuple[str, int, int]

_CONVOLUTIONS = {functional.conv2d, torch.ops.aten.conv2d.default, torch.ops.aten.convolution.default}


def hand_over_channels_last(found: Cut) -> int:
    """Rewrite the pieces of a cut. Returns how many values are handed over in another layout."""
    nodes, ports = _candidates(found)
    while True:  # all that is bound to a slot lies alike, and a value lies alike wherever it goes
        kept = {node for node, where in nodes.items() if where <= ports.keys()}
        fitting = {port: bound for port, bound in ports.items() if bound <= kept}
        if fitting == ports:
            break
        ports = fitting
    for number, piece in enumerate(found.pieces):
        slots = [slot for kind, home, slot in ports if kind == "in" and home == number]
        outputs = [output for kind, home, output in ports if kind == "out" and home == number]
        if slots or outputs:
            found.pieces[number] = _turned(piece, slots, outputs)
    return len({node for bound in ports.values() for node in bound})


def _candidates(found: Cut) -> tuple[dict[fx.Node, set[Port]], dict[Port, set[fx.Node]]]:
    """Where each value stands that may be handed over otherwise; and what stands at each port that may take it."""
    places: dict[fx.Node, set[Port]] = {}
    bound: dict[Port, set[fx.Node]] = {}
    for step in found.steps:
        for kind, values in (("in", step.operands), ("out", step.results)):
            for number, node in enumerate(values):
                if node is not None:
                    places.setdefault(node, set()).add((kind, step.piece, number))
                    bound.setdefault((kind, step.piece, number), set()).add(node)
    convolving = {number for number, piece in enumerate(found.pieces) if _convolves(piece)}
    seen = {*found.graph.find_nodes(op="placeholder"), *found.graph.output_node().all_input_nodes}
    kept = _changing(found) | {memory(node) for node in seen} - {None}  # must stay the memory that it is
    free = {
        node: where
        for node, where in places.items()
        if node not in seen and any(kind == "out" for kind, _, _ in where) and memory(node) not in kept
    }
    fitting = {
        port: nodes
        for port, nodes in bound.items()
        if (port[1] in convolving if port[0] == "out" else _turns(found.pieces[port[1]].examples[port[2]]))
    }
    return free, fitting


def _convolves(piece: Piece) -> bool:
    return any(node.target in _CONVOLUTIONS for node in piece.graph.graph.nodes)


def _turns(value: Any) -> bool:
    """Whether a value on the CPU lies otherwise in channels-last order, and a copy of it at the ends of a piece would
    keep its gradient. Looks at fixed sizes only: others would be guarded on."""
    return (
        isinstance(value, torch.Tensor)
        and value.dim() == 4
        and value.is_floating_point()
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and all(type(size) is int for size in (*value.shape, *value.stride()))
        and (torch.is_grad_enabled() or not value.requires_grad)
        and value.is_contiguous()
        and not value.is_contiguous(memory_format=torch.channels_last)
    )


def _changing(found: Cut) -> set[int | None]:
    """The memory that steps write into."""
    slots: dict[int, list[int]] = {}
    for number, piece in enumerate(found.pieces):
        calls = [node for node in piece.graph.graph.nodes if node.op in ("call_function", "call_method")]
        targets = {memory(target) for node in calls for target in written(node)} - {None}
        if targets:
            inputs = piece.graph.graph.find_nodes(op="placeholder")
            slots[number] = [k for k, node in enumerate(inputs) if memory(node) in targets]
    return {memory(step.operands[k]) for step in found.steps for k in slots.get(step.piece, ())} - {None}


def _turned(piece: Piece, slots: list[int], outputs: list[int]) -> Piece:
    graph, examples = piece.graph.graph, list(piece.examples)
    inputs = graph.find_nodes(op="placeholder")
    first = next(node for node in graph.nodes if node.op != "placeholder")
    for slot in slots:
        with graph.inserting_before(first):
            inside = graph.call_function(torch.ops.aten.contiguous.default, (inputs[slot],))
        inside.meta["example_value"] = examples[slot]
        examples[slot] = inputs[slot].meta["example_value"] = _channels_last(examples[slot])
        inputs[slot].replace_all_uses_with(inside, delete_user_cb=lambda user, inside=inside: user is not inside)
    end = graph.output_node()
    results: Any = list(end.args[0])  # type: ignore[arg-type]
    with graph.inserting_before(end):
        for output in outputs:
            results[output] = graph.call_function(torch.ops.aten.contiguous.default, (results[output],))
            results[output].kwargs = {"memory_format": torch.channels_last}
    end.args = (tuple(results),)
    piece.graph.recompile()
    return replace(piece, examples=tuple(examples))


def _channels_last(value: torch.Tensor) -> torch.Tensor:
    with torch.set_grad_enabled(value.requires_grad):
        return value.clone(memory_format=torch.channels_last)
