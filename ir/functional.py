"""A functional graph, as AOTAutograd makes them for a compiler, seen as a Program of one entry.

Every placeholder is an input. Writes into inputs, which such a graph holds as `copy_` calls at its end, become updates
of these inputs; so that what passes know of updates holds for them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from laconic.ir.program import Entry, Input, Kind, Output, Program, Role, copy_graph
from laconic.ir.torch_private import FakeTensorMode
from laconic.ir.traits import traits
from laconic.ir.tree import Leaf

_copy_ = torch.ops.aten.copy_.default


def program_of(graph: fx.Graph) -> Program | str:
    """A Program with a copy of the graph; or why it is none: it writes elsewhere, or has no fake values."""
    inside = copy_graph(graph)
    mode: FakeTensorMode | None = None
    inputs: list[Input] = []
    updates: dict[str, Any] = {}
    for node in inside.nodes:
        if node.op == "placeholder":
            node.meta.update(kind=Kind.INPUT, name=node.name)
            inputs.append(Input(node.name, -1.0, 1.0))
        if node.op == "get_attr":
            return f"%{node.name} is a constant tensor"
        mode = mode or getattr(node.meta.get("val"), "fake_mode", None)
        if node.op == "call_function" and "val" not in node.meta:
            return f"%{node.name} has no fake value"
    if mode is None or mode.shape_env is None:
        return "there are no fake tensors"
    for node in _last_writes(inside):
        target: Any = node.args[0]
        updates[target.name] = node.args[1]
        inside.erase_node(node)
    for node in inside.nodes:
        if node.op == "call_function" and traits(node).effectful:
            return f"%{node.name} has an effect"
    returned: Any = inside.output_node().args[0]
    if not isinstance(returned, (list, tuple)):
        return "it returns no tuple"
    outputs = [Output(Role.RESULT, str(k)) for k in range(len(returned))]
    outputs += [Output(Role.INPUT_UPDATE, name) for name in updates]
    inside.output_node().args = ((*returned, *updates.values()),)
    results = tuple(Leaf(k) for k in range(len(returned)))
    entry = Entry("forward", inside, inputs, outputs, {i.name: Leaf(k) for k, i in enumerate(inputs)}, results)
    return Program({"forward": entry}, {}, mode=mode)


def _last_writes(graph: fx.Graph) -> list[fx.Node]:
    """The `copy_` calls at the end of a graph, each into an input of its own."""
    found: list[fx.Node] = []
    written: set[Any] = set()
    for node in reversed(list(graph.nodes)):
        if node.op == "output":
            continue
        target = node.args[0] if node.args else None
        into = isinstance(target, fx.Node) and target.op == "placeholder" and target not in written
        if node.target is not _copy_ or not into or node.users or not isinstance(node.args[1], fx.Node):
            break
        written.add(target)
        found.append(node)
    return found[::-1]


def write_back(program: Program, graph: fx.Graph) -> None:
    """Put what a Program made of `graph` by `program_of` says in place of what `graph` says."""
    entry = program.forward
    targets = {node.name: node for node in graph.nodes if node.op == "placeholder"}
    final = graph.output_node()
    old = [node for node in graph.nodes if node.op == "call_function"]
    mapped: dict[fx.Node, fx.Node] = {}
    with graph.inserting_before(final):
        for node in entry.graph.nodes:
            if node.op == "placeholder" and node.meta["kind"] == Kind.INPUT:
                mapped[node] = targets[node.meta["name"]]
            elif node.op == "placeholder":
                mapped[node] = _constant(graph, program.weights[node.meta["name"]].value, node)
            elif node.op == "call_function":
                mapped[node] = graph.node_copy(node, lambda leaf: mapped[leaf])
        values = fx.node.map_arg(entry.output_values, lambda leaf: mapped[leaf])
        for output, value in zip(entry.outputs, values, strict=True):
            if output.role is Role.INPUT_UPDATE:
                write = graph.call_function(_copy_, (targets[output.name], value))
                write.meta["val"] = targets[output.name].meta["val"]
    results = sum(output.role is Role.RESULT for output in entry.outputs)
    final.args = (values[:results],)
    for node in reversed(old):
        graph.erase_node(node)


def _constant(graph: fx.Graph, value: torch.Tensor, like: fx.Node) -> fx.Node:
    """A tensor that a pass made, as a constant of the module that owns the graph."""
    owner, number = graph.owning_module, 0
    assert owner is not None
    while hasattr(owner, f"_laconic_constant_{number}"):
        number += 1
    owner.register_buffer(f"_laconic_constant_{number}", value)
    node = graph.get_attr(f"_laconic_constant_{number}")
    node.meta["val"] = like.meta["val"]
    return node
