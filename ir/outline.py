"""Outlining: a block that a program says several times becomes a function that is called; inlining is the way back.

    %linear_9 = aten.linear(%x, @h.0.w)         function block_0 { slot %linear  slot %h_w  ...  return (%relu_10,) }
    %relu_10 = aten.relu(%linear_9)         ->  %relu_10 = call block_0(%x, @h.0.w) !+0
    %linear_11 = aten.linear(%relu_10, @h.1.w)  %relu_12 = call block_0(%relu_10, @h.1.w) !+2
    %relu_12 = aten.relu(%linear_11)

Both keep every node's name and site, its order and so the random numbers it draws; `inline(outline(p))` prints as `p`
does. It is the last step before a program leaves, and the first after it was read: passes see flat programs.
"""

from __future__ import annotations

import builtins
import keyword
import operator
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import fx

from laconic.ir.listing import Repeat, list_nodes
from laconic.ir.program import Entry, Function, Program
from laconic.ir.repeats import find_repeats
from laconic.ir.rewrite import placeholder_name
from laconic.ir.types import NumberType, TensorType, type_of

#: The (name, site) of a node; a node that a pass made may have no site.
Label = tuple[str, int | None]

_NUMBERED = re.compile(r"(.*_)(\d+)\Z")


def pays(repeat: Repeat) -> bool:
    """Whether the text gets shorter: a function has a line for each slot, each call one and some words a slot."""
    return repeat.saved > 2 * repeat.count + len(repeat.slots)


def outline(program: Program, worth: Callable[[Repeat], bool] = pays) -> Program:
    """The program with the repeated blocks that are `worth` it as functions; itself if there are none, or it has
    functions. What the program computes, and in which order, stays as it is.
    """
    if program.functions:
        return program
    functions: dict[str, Function] = {}
    entries = {name: _outline_entry(entry, functions, worth) for name, entry in program.entries.items()}
    return replace(program.clone(), entries=entries, functions=functions) if functions else program


def inline(program: Program) -> Program:
    """The program with every call replaced by what the function says; the program itself if it has no functions."""
    if not program.functions:
        return program
    entries = {name: _inline_entry(program, entry) for name, entry in program.entries.items()}
    return replace(program.clone(), entries=entries, functions={})


def results_of(call: fx.Node) -> list[fx.Node]:
    """The nodes that read the results of a function call, in order."""
    return sorted(call.users, key=lambda user: int(user.args[1]))  # type: ignore[arg-type]


def reads_call(node: fx.Node) -> bool:
    """Whether a node is a result of a function call."""
    return bool(node.args) and isinstance(node.args[0], fx.Node) and node.args[0].op == "call_module"


def shifted(label: Label, by: int) -> Label | None:
    """The label of the same node in a repeat whose sites are `by` further on; None if its name does not tell its site,
    as the names that capture gives do."""
    name, site = label
    found = _NUMBERED.match(name)
    if site is None or found is None or int(found[2]) != site or site + by < 0:
        return None
    return f"{found[1]}{site + by}", site + by


def shift_of(body: Sequence[Label], repeat: Sequence[Label]) -> int | None:
    """By how much the sites of a repeat are further on than those of the function's body; None if its labels do not
    all follow from that."""
    first, own = body[0][1], repeat[0][1]
    if first is None or own is None:
        return None
    by = own - first
    same = all(shifted(label, by) == mine for label, mine in zip(body, repeat, strict=True))
    return by if same else None


def label_of(node: fx.Node) -> Label:
    return node.name, node.meta.get("site")


def _outline_entry(entry: Entry, functions: dict[str, Function], worth: Callable[[Repeat], bool]) -> Entry:
    nodes = list(entry.calls())
    returned = [value for value in entry.output_values if isinstance(value, fx.Node)]
    listing = list_nodes(nodes, returned, also=lambda node: node.meta.get("by"))
    starting: dict[int, tuple[Repeat, int, Function]] = {}
    for repeat in find_repeats(listing):
        if repeat.outputs and worth(repeat) and all(_writable(nodes, bound[0]) for bound in repeat.slots):
            function = _function(f"block_{len(functions)}", nodes, repeat)
            functions[function.name] = function
            starting.update({start: (repeat, k, function) for k, start in enumerate(repeat.starts)})
    return _rebuild(entry, nodes, starting) if starting else entry


def _writable(nodes: list[fx.Node], operand: Any) -> bool:
    """Whether a slot's type can be written and read back: tensors and whole numbers."""
    kind = type_of((nodes[operand] if isinstance(operand, int) else operand).meta["val"])
    return isinstance(kind, TensorType) or (isinstance(kind, NumberType) and kind.kind == "int")


def _function(name: str, nodes: list[fx.Node], repeat: Repeat) -> Function:
    """The function that says the first repeat of a block."""
    body = [nodes[k] for k in repeat.positions(0)]
    taken = {node.name for node in body}
    graph = fx.Graph()
    inside: dict[fx.Node, fx.Node] = {}
    for bound in repeat.slots:
        operands = [nodes[o] if isinstance(o, int) else o for o in bound]
        label = _slot_name(operands, taken)  # type: ignore[arg-type]
        slot = graph.create_node("placeholder", label, name=label)
        slot.meta["val"] = operands[0].meta["val"]  # type: ignore[attr-defined]
        taken.add(slot.name)
        inside[operands[0]] = slot  # type: ignore[index]
    for node in body:
        inside[node] = graph.node_copy(node, lambda leaf: inside[leaf])
    graph.output(tuple(inside[body[offset]] for offset in repeat.outputs))
    return Function(name, graph)


def _slot_name(operands: list[fx.Node], taken: set[str]) -> str:
    """What the names of all that a slot is bound to have in common, without numbers."""
    names = [str(n.meta["name"]) if n.op == "placeholder" else n.name.rstrip("0123456789").strip("_") for n in operands]
    parts = [re.split(r"[^A-Za-z0-9]+|_", name) for name in names]
    common = [p for p in parts[0] if p and not p.isdigit() and all(p in other for other in parts)]
    name = placeholder_name("_".join(common)).removeprefix("w_").strip("_") or "slot"
    name = re.sub(r"^(\d)", r"_\1", re.sub(r"_(\d+)$", r"_\1_", name))
    while name in taken or keyword.iskeyword(name) or hasattr(builtins, name):
        name += "_"
    return name


def _rebuild(entry: Entry, nodes: list[fx.Node], starting: dict[int, tuple[Repeat, int, Function]]) -> Entry:
    """The entry with a call wherever a block starts."""
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    position = {node: k for k, node in enumerate(nodes)}
    skip_to = 0
    for node in entry.graph.nodes:
        at = position.get(node)
        if at is not None and at < skip_to:
            continue
        if at not in starting:
            mapped[node] = graph.node_copy(node, lambda leaf: mapped[leaf])
            continue
        repeat, number, function = starting[at]
        skip_to = at + repeat.period
        block = [nodes[k] for k in repeat.positions(number)]
        operands = [nodes[o] if isinstance(o, int) else o for bound in repeat.slots for o in [bound[number]]]
        results = [block[offset] for offset in repeat.outputs]
        labels, named = [label_of(n) for n in block], [n.name for n in results]
        call = add_call(graph, function, [mapped[o] for o in operands], labels, results, named)  # type: ignore[index]
        mapped.update(zip(results, results_of(call), strict=True))
    return replace(entry.clone(), graph=graph)


def add_call(
    graph: fx.Graph,
    function: Function,
    operands: list[fx.Node],
    labels: Sequence[Label],
    results: Sequence[fx.Node],
    named: Sequence[str],
) -> fx.Node:
    """A call of a function at the end of `graph`, and a node for each result, typed as `results` are."""
    call = graph.create_node("call_module", function.name, tuple(operands), name=f"call_{labels[0][0]}")
    call.meta.update(val=tuple(r.meta["val"] for r in results), labels=tuple(labels))
    for number, (result, name) in enumerate(zip(results, named, strict=True)):
        read = graph.create_node("call_function", operator.getitem, (call, number), name=name)
        read.meta["val"] = result.meta["val"]
    return call


def _inline_entry(program: Program, entry: Entry) -> Entry:
    graph = fx.Graph()
    mapped: dict[fx.Node, fx.Node] = {}
    for node in entry.graph.nodes:
        if node.op == "call_module":
            _say(graph, program.functions[str(node.target)], node, mapped)
        elif node not in mapped:
            mapped[node] = graph.node_copy(node, lambda leaf: mapped[leaf])
    return replace(entry.clone(), graph=graph)


def _say(graph: fx.Graph, function: Function, call: fx.Node, mapped: dict[fx.Node, fx.Node]) -> None:
    """Write out what a call says at the end of `graph`; what read its results reads the nodes that make them."""
    inside = {slot: mapped[given] for slot, given in zip(function.slots(), call.args, strict=True)}  # type: ignore[index]

    def known(leaf: fx.Node) -> fx.Node:
        return inside[leaf]

    for said, (name, site) in zip(function.calls(), call.meta["labels"], strict=True):
        args, kwargs = fx.node.map_arg((said.args, said.kwargs), known)
        copy = graph.create_node("call_function", said.target, args, kwargs, name=name)
        copy.meta = {key: value for key, value in said.meta.items() if key != "site"}
        if site is not None:
            copy.meta["site"] = site
        inside[said] = copy
    for read, result in zip(results_of(call), function.results, strict=True):
        mapped[read] = inside[result]
