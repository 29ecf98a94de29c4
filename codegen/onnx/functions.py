"""Repeated blocks of an ONNX graph as local functions: what is said k times is written once, and called k times.

    (nodes of layer 0) (nodes of layer 1) ...  ->  laconic::block_0(x, weights of layer 0) laconic::block_0(...) ...

Weights and all else that a block reads are inputs of its function. Runtimes inline functions before they optimise, so
nothing is computed otherwise; `onnx.inliner` gives the flat graph back.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from dataclasses import dataclass

import onnx_ir as ir

from laconic.codegen.onnx.edit import sizes
from laconic.ir.listing import Listing, Operand, Repeat
from laconic.ir.repeats import find_repeats
from laconic.ir.signature import Interner

#: The domain of the functions.
DOMAIN = "laconic"
#: Ops with which layers begin.
_OF_LAYERS = ("Attention", "Conv", "Gemm", "LayerNormalization", "MatMul", "RMSNormalization", "ReduceMean")


@dataclass(frozen=True)
class FunctionCount:
    """How many functions a model has, how often they are called, and how many nodes stand in the file."""

    functions: int
    calls: int
    stored: int


def count(model: ir.Model) -> FunctionCount:
    stored = list(model.graph.all_nodes()) + [n for f in model.functions.values() for n in f.all_nodes()]
    return FunctionCount(len(model.functions), sum(node.domain == DOMAIN for node in stored), len(stored))


def inlined_nodes(model: ir.Model) -> int:
    """How many nodes of standard ops there are once all functions are inlined."""

    def size(nodes: Iterator[ir.Node]) -> int:
        return sum(size(model.functions[n.op_identifier()].all_nodes()) if n.domain == DOMAIN else 1 for n in nodes)

    return size(model.graph.all_nodes())


def outline(model: ir.Model) -> None:
    """Put calls of local functions in place of repeated blocks, in place. Leaves a model without repeats as it is."""
    put_shared_first(model.graph)
    nodes = list(model.graph)
    worthwhile = [r for r in find_repeats(list_graph(model.graph)) if r.saved > r.count]  # each call is a node, too
    for number, repeat in enumerate(worthwhile):
        _outline(model, nodes, repeat, f"block_{number}")
    if model.functions:
        model.opset_imports[DOMAIN] = 1


def put_shared_first(graph: ir.Graph) -> None:
    """Move to the front what no layer leads to and several nodes read, with what it is made from; else all stays.

    Masks, positions and rotary tables serve all layers, but stand where the first one reads them, which would then
    differ from the others.
    """
    nodes = list(graph)
    inside: set[ir.Node | None] = set()
    for node in nodes:
        subgraphs = any(_graphs(given) for given in node.attributes.values())
        made = any(v is not None and v.producer() in inside for v in _read(node))
        if made or subgraphs or node.op_type in _OF_LAYERS:
            inside.add(node)
    early: set[ir.Node] = set()
    for node in reversed(nodes):
        users = [user for value in node.outputs for user, _ in value.uses()]
        if node not in inside and (len(users) > 1 or not early.isdisjoint(users)):
            early.add(node)
    graph.remove(nodes)
    graph.extend([node for node in nodes if node in early] + [node for node in nodes if node not in early])


def _read(node: ir.Node) -> list[ir.Value | None]:
    """What a node reads, in its subgraphs too."""
    subgraphs = [part for name in node.attributes.values() for part in _graphs(name)]
    inner = [n for graph in subgraphs for n in graph.all_nodes()]
    return [*node.inputs, *(value for n in inner for value in n.inputs)]


def _graphs(given: ir.Attr) -> list[ir.Graph]:
    if given.type == ir.AttributeType.GRAPH:
        return [given.value]
    return list(given.value) if given.type == ir.AttributeType.GRAPHS else []


def list_graph(graph: ir.Graph) -> Listing:
    """The nodes of a graph as the repeat finder sees them; operands from outside are values.

    A node of several results is one that may not stand at the end of a block, since a Listing knows nodes, not results;
    which of them is read counts as part of the reader. A node with subgraphs is like no other.
    """
    nodes = list(graph)
    position = {value: k for k, node in enumerate(nodes) for value in node.outputs}
    number = Interner()
    signatures, operands = [], []
    for k, node in enumerate(nodes):
        own = k if any(_graphs(given) for given in node.attributes.values()) else None
        signatures.append(number((_signature(node), own)))
        operands.append(tuple(position.get(value, value) for value in _read(node) if value is not None))

    def kind(operand: Operand) -> Hashable:
        if isinstance(operand, int):
            return tuple(_type(value) for value in nodes[operand].outputs)
        assert isinstance(operand, ir.Value)
        return (_type(operand),)

    return Listing(
        signatures,
        operands,
        kind,
        kept=frozenset(position[value] for value in graph.outputs if value in position),
        uncut=frozenset(k for k, node in enumerate(nodes) if len(node.outputs) > 1),
    )


def _type(value: ir.Value) -> Hashable:
    return (str(value.type), sizes(value))


def _signature(node: ir.Node) -> Hashable:
    """What a node says: op, attributes, types of its results, and which result of another node each operand is."""
    attributes = tuple(sorted((name, _content(given)) for name, given in node.attributes.items()))
    read = tuple(None if value is None else value.index() or 0 for value in node.inputs)
    return (node.op_identifier(), attributes, read, tuple(_type(value) for value in node.outputs))


def _content(given: ir.Attr) -> Hashable:
    """An attribute's value by content."""
    if given.type == ir.AttributeType.TENSOR:
        array = given.value.numpy()
        return ("tensor", str(given.value.dtype), array.shape, array.tobytes())
    return (str(given.type), repr(given.value))


def _outline(model: ir.Model, nodes: list[ir.Node], repeat: Repeat, name: str) -> None:
    """Make one function of a repeat, and calls of it."""
    blocks = [[nodes[k] for k in repeat.positions(number)] for number in range(repeat.count)]
    bound = [_bound(block) for block in blocks]
    made = [[block[offset].outputs[0] for offset in repeat.outputs] for block in blocks]
    function = _function(model, blocks[0], bound[0], made[0], name)
    model.functions[function.identifier()] = function
    for block, operands, results in zip(blocks, bound, made, strict=True):
        call = ir.Node(DOMAIN, name, operands, num_outputs=len(results), name=f"{block[0].name}_{name}")
        source = block[0].metadata_props.get("source")
        if source:
            call.metadata_props["source"] = source
        model.graph.insert_before(block[0], call)
        for old, new in zip(results, call.outputs, strict=True):
            new.name, new.type, new.shape = old.name, old.type, old.shape
            ir.convenience.replace_all_uses_with(old, new, replace_graph_outputs=True)
        model.graph.remove(block, safe=True)


def _bound(block: list[ir.Node]) -> list[ir.Value]:
    """What a block reads from outside, in order of first use: as the finder numbers its slots."""
    inside = {value for node in block for value in node.outputs}
    read = (value for node in block for value in node.inputs if value is not None and value not in inside)
    return list(dict.fromkeys(read))


def _function(
    model: ir.Model, block: list[ir.Node], operands: list[ir.Value], results: list[ir.Value], name: str
) -> ir.Function:
    """The function that computes what a block does."""
    values: dict[ir.Value | None, ir.Value | None] = {None: None}
    for k, operand in enumerate(operands):
        values[operand] = ir.Value(name=f"in_{k}", type=operand.type)
    copies = []
    for k, node in enumerate(block):
        outputs = [ir.Value(name=f"v_{k}_{j}" if j else f"v_{k}") for j in range(len(node.outputs))]
        values.update(zip(node.outputs, outputs, strict=True))
        copy = ir.Node(
            node.domain,
            node.op_type,
            [values[value] for value in node.inputs],
            list(node.attributes.values()),
            outputs=outputs,
            name=f"n_{k}",
            metadata_props=dict(node.metadata_props),
        )
        copies.append(copy)
    graph = ir.Graph(
        [values[operand] for operand in operands],  # type: ignore[misc]
        [values[result] for result in results],  # type: ignore[misc]
        nodes=copies,
        opset_imports={domain: version for domain, version in model.opset_imports.items() if domain == ""},
        name=name,
    )
    return ir.Function(DOMAIN, name, graph=graph, attributes=[])
