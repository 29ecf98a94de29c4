"""A Program as calls of pieces: its functions, and what stands between their calls.

    entry forward {                                     piece 0 (%a0) { %n0 = embedding(...)  return %n0 }
      %e = aten.embedding(@table, %ids)             ->  piece 1: what block_0 says
      %x = call block_0(%e, @h.0.w)
      %y = call block_0(%x, @h.1.w)                     %e = piece 0 (@table, %ids)
    }                                                   %x = piece 1 (%e, @h.0.w)  ...

An outlined program, as a saved DIR holds it, is taken apart where its text does; a flat one is outlined first. Tensors
and whole numbers cross between pieces. What is known already (a number of fixed value) is written where it is used, and
what else cannot cross (a number that is not whole) is computed again.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx, nn

from laconic.codegen.backend.cut import FEW, SMALL, WORTHWHILE, Cut, Piece, Step
from laconic.ir.dynamo import Refusal
from laconic.ir.listing import Repeat
from laconic.ir.outline import inline, outline, reads_call, results_of
from laconic.ir.program import Entry, Program
from laconic.ir.signature import layout, signature
from laconic.ir.torch_private import free_symbols
from laconic.ir.traits import traits
from laconic.ir.types import NumberType, TensorType, type_of

#: Ops whose results are conjugated or negated when they are read: a piece could not tell this from their type.
_LAZY = {torch.ops.aten._conj.default, torch.ops.aten._neg_view.default}


@dataclass
class ProgramCut(Cut):
    """A cut whose pieces have the types of their operands for examples. Its graph is called with the operands of the
    entry, then with the value of each of `sizes`, which some piece could not tell from its operands."""

    sizes: list[sympy.Symbol] = field(default_factory=list)


def cut_program(program: Program, entry: str) -> ProgramCut | Refusal:
    """Cut an entry where it calls functions; or say why it cannot be compiled."""
    total = sum(1 for _ in program.entries[entry].calls())
    outlined = outline(program, worth=lambda repeat: repeat.saved >= min(FEW, SMALL * total))
    if not _pays(outlined, outlined.entries[entry]) or _reads_lazily(outlined):
        outlined = inline(outlined)
    return _Cutter(outlined, outlined.entries[entry]).cut()


def _pays(program: Program, entry: Entry) -> bool:
    """Whether calling functions saves enough."""
    sizes = [len(program.functions[str(n.target)].calls()) for n in entry.graph.nodes if n.op == "call_module"]
    called = {str(n.target) for n in entry.graph.nodes if n.op == "call_module"}
    others = sum(not reads_call(n) for n in entry.calls())
    saved = sum(sizes) - sum(len(program.functions[name].calls()) for name in called)
    return saved >= WORTHWHILE * (sum(sizes) + others)


def _reads_lazily(program: Program) -> bool:
    graphs = [e.graph for e in program.entries.values()] + [f.graph for f in program.functions.values()]
    return any(node.target in _LAZY for graph in graphs for node in graph.nodes)


def _literal(node: fx.Node) -> bool:
    """Whether a node's value is a number that is known."""
    return isinstance(node.meta["val"], (bool, int, float))


def _crosses(node: fx.Node) -> bool:
    return isinstance(node.meta["val"], (torch.Tensor, torch.SymInt))


@dataclass
class _Part:
    """A call of a function (`call`), or calls one behind the other; `slots` are what it reads from outside."""

    nodes: list[fx.Node]
    call: fx.Node | None = None
    slots: list[fx.Node] = field(default_factory=list)


class _Cutter:
    def __init__(self, program: Program, entry: Entry) -> None:
        self.program, self.entry = program, entry
        self.found = ProgramCut(fx.Graph(), [], 0)
        self.known: dict[Hashable, int] = {}
        self.outer: dict[fx.Node, fx.Node] = {}
        self.symbols: dict[sympy.Symbol, fx.Node] = {}
        self.calls: dict[str, list[tuple[int, tuple[fx.Node, ...]]]] = {}
        self.refusal: Refusal | None = None

    def cut(self) -> ProgramCut | Refusal:
        graph = self.found.graph
        values = self.entry.output_values
        for value in values:
            if isinstance(value, fx.Node) and not _crosses(value) and not _literal(value):
                return Refusal("a result is neither a tensor nor a whole number", value.name)
        for node in self.entry.placeholders():
            self.outer[node] = graph.placeholder(f"v{len(self.outer)}")
        for symbol, number in self._symbols():
            self.symbols[symbol] = graph.placeholder(f"size_{number}")
        parts = self._parts()
        if self.refusal is not None:
            return self.refusal
        needed = {slot for part in parts for slot in part.slots}
        needed |= {value for value in values if isinstance(value, fx.Node) and not _literal(value)}
        for part in parts:
            self._step(part, needed)
        graph.output(fx.node.map_arg(tuple(values), self._value))
        self._drop_unused_sizes()
        self.found.repeats = [self._repeat(name, called) for name, called in self.calls.items()]
        return self.found

    def _value(self, node: fx.Node) -> Any:
        return node.meta["val"] if _literal(node) else self.outer[node]

    def _symbols(self) -> Iterator[tuple[sympy.Symbol, int]]:
        found = {s for node in self.entry.placeholders() for s in free_symbols(node.meta["val"])}
        for number, symbol in enumerate(sorted(found, key=str)):
            yield symbol, number

    # Parts

    def _parts(self) -> list[_Part]:
        parts: list[_Part] = []
        home: dict[fx.Node, _Part] = {}
        for node in self.entry.graph.nodes:
            if node.op == "call_module":
                parts.append(_Part([], node))
            elif node.op == "call_function" and not reads_call(node):
                source = node.args[0] if node.target is operator.getitem else None
                if isinstance(source, fx.Node) and source in home:  # the parts of a tuple cross, the tuple does not
                    part = home[source]
                else:
                    if not parts or parts[-1].call is not None:
                        parts.append(_Part([]))
                    part = parts[-1]
                part.nodes.append(node)
                home[node] = part
        for part in parts:
            part.slots = self._function_slots(part.call) if part.call is not None else self._stretch_slots(part)
        return parts

    def _function_slots(self, call: fx.Node) -> list[fx.Node]:
        slots = self.program.functions[str(call.target)].slots()
        return [given for slot, given in zip(slots, call.args, strict=True) if not _literal(slot)]  # type: ignore[misc]

    def _stretch_slots(self, part: _Part) -> list[fx.Node]:
        """What a stretch reads, in the order of first use; and before its nodes, what it computes again."""
        own, slots = set(part.nodes), dict[fx.Node, None]()
        again: dict[fx.Node, None] = {}

        def read(node: fx.Node) -> None:
            for operand in node.all_input_nodes:
                if operand in own or operand in again or _literal(operand):
                    continue
                if _crosses(operand):
                    slots[operand] = None
                elif not traits(operand).pure:
                    self.refusal = Refusal("several values of a call cross a cut as one", operand.name)
                else:
                    read(operand)
                    again[operand] = None

        for node in part.nodes:
            read(node)
        part.nodes = [*again, *part.nodes]
        return list(slots)

    # Pieces

    def _step(self, part: _Part, needed: set[fx.Node]) -> None:
        if part.call is not None:
            function = self.program.functions[str(part.call.target)]
            slots = [slot for slot in function.slots() if not _literal(slot)]
            nodes, outputs, results = function.calls(), list(function.results), results_of(part.call)
        else:
            slots, nodes = part.slots, part.nodes
            outputs = results = [node for node in nodes if node in needed and node not in self.outer]
            if not outputs and not any(traits(node).effectful for node in nodes):
                return
        sizes = _unnamed(slots)
        key, graph = _piece(nodes, slots, outputs, len(sizes))
        key = (key, tuple(sizes))
        if key not in self.known:
            self.known[key] = len(self.found.pieces)
            kinds = tuple(type_of(node.meta["val"]) for node in slots)
            examples = (*kinds, *(NumberType("int", symbol) for symbol in sizes))
            self.found.pieces.append(Piece(fx.GraphModule(nn.Module(), graph, "Piece"), examples, len(nodes)))
        operands = (*(self.outer[slot] for slot in part.slots), *(self.symbols[symbol] for symbol in sizes))
        call = self.found.graph.create_node("call_module", f"piece_{self.known[key]}", operands)
        for number, result in enumerate(results):
            if result in needed:
                self.outer[result] = self.found.graph.call_function(operator.getitem, (call, number))
        made = tuple(self.outer.get(result) if result in needed else None for result in results)
        self.found.steps.append(Step(self.known[key], operands, made))
        if part.call is not None:
            self.calls.setdefault(str(part.call.target), []).append((self.found.nodes, operands))
        self.found.nodes += len(nodes)

    def _repeat(self, name: str, calls: list[tuple[int, tuple[fx.Node, ...]]]) -> Repeat:
        """The calls of a function, as the repeat finder would tell them."""
        function = self.program.functions[name]
        position = {node: offset for offset, node in enumerate(function.calls())}
        slots = tuple(zip(*(operands for _, operands in calls), strict=True))
        outputs = tuple(position[result] for result in function.results)
        return Repeat(tuple(start for start, _ in calls), len(position), slots, outputs)

    def _drop_unused_sizes(self) -> None:
        for symbol, node in self.symbols.items():
            if node.users:
                self.found.sizes.append(symbol)
            else:
                self.found.graph.erase_node(node)


def _unnamed(slots: Sequence[fx.Node]) -> list[sympy.Symbol]:
    """The symbols that sizes of operands are made of and no operand is, in a fixed order. A piece is given them:
    nothing tells s of a tensor with 2*s rows, and Inductor's caches hold to guards on what is an operand only."""
    used: set[sympy.Symbol] = set()
    named: set[Any] = set()
    for slot in slots:
        kind = type_of(slot.meta["val"])
        sizes = (*kind.shape, *kind.stride) if isinstance(kind, TensorType) else (getattr(kind, "value", None),)
        named.update(sizes if isinstance(kind, NumberType) else ())
        used |= {symbol for size in sizes if isinstance(size, sympy.Basic) for symbol in size.free_symbols}
    return sorted(used - named, key=str)


def _piece(
    nodes: Sequence[fx.Node], slots: Sequence[fx.Node], outputs: Sequence[fx.Node], more: int
) -> tuple[Hashable, fx.Graph]:
    """A graph of nodes, with names that follow from what it says alone and `more` unused placeholders at the end; and
    what tells it from others."""
    graph = fx.Graph()
    inside: dict[fx.Node, Any] = {slot: graph.placeholder(f"a{k}") for k, slot in enumerate(slots)}
    for number in range(more):
        graph.placeholder(f"a{len(slots) + number}")

    def operand(leaf: fx.Node) -> Any:
        return inside[leaf] if leaf in inside else leaf.meta["val"]

    def said(leaf: fx.Node) -> Hashable:
        found = operand(leaf)
        return found.name if isinstance(found, fx.Node) else (type(found).__name__, repr(found))

    says = []
    for number, node in enumerate(nodes):
        says.append(signature(node, said))
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), operand)
        inside[node] = graph.create_node("call_function", node.target, args, kwargs, name=f"n{number}")
    graph.output(tuple(inside[node] for node in outputs))
    kinds = tuple(layout(slot.meta["val"]) for slot in slots)
    return (tuple(says), kinds, tuple(inside[node].name for node in outputs)), graph
