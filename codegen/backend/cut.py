"""The cut: a graph as calls of pieces, each distinct piece once.

    %a = linear(%x, %w0)                      piece 0 (%s0, %s1) { %a = linear(%s0, %s1)  %b = relu(%a)  return %b }
    %b = relu(%a)                     ->
    %c = linear(%b, %w1)                      %b = piece 0 (%x, %w0)
    %d = relu(%c)                             %d = piece 0 (%b, %w1)

Pieces stand one behind the other in the order of the graph, so effects and random draws keep theirs. What stands
between repeats is a piece too. A piece takes everything as an operand, weights included, and enters what was on around
its calls (autocast, no_grad) by itself.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from laconic.ir.dynamo import Reading, Refusal, Scope, memory, value_of
from laconic.ir.listing import Operand, Repeat
from laconic.ir.program import copy_graph
from laconic.ir.torch_private import LEAVING, expression, is_unbacked, own_symbol
from laconic.ir.torch_traits import held, written

#: Share of the nodes that need not be compiled, below which cutting is not worth its calls.
WORTHWHILE = 0.15
#: A repeat that saves fewer nodes than this, and a smaller share of the graph, costs more than it saves: around it
#: there are two pieces more to compile and to call.
FEW, SMALL = 16, 0.05


@dataclass(frozen=True)
class Piece:
    """What is compiled once: a graph with a placeholder for each slot and a tuple of outputs. `examples` are the fake
    values of the slots, where it stands first."""

    graph: fx.GraphModule
    examples: tuple[Any, ...]
    nodes: int


@dataclass(frozen=True)
class Step:
    """A call of a piece: what its slots are bound to, and the node that each of its outputs is; None if that output is
    not used here."""

    piece: int
    operands: tuple[fx.Node, ...]
    results: tuple[fx.Node | None, ...]


@dataclass
class Cut:
    """A graph as steps. `final_grad` is what recording of gradients is set to at the end, None to leave it alone."""

    graph: fx.Graph
    repeats: list[Repeat]
    nodes: int
    pieces: list[Piece] = field(default_factory=list)
    steps: list[Step] = field(default_factory=list)
    final_grad: bool | None = None

    @property
    def compiled(self) -> int:
        """How many calls are compiled."""
        return sum(piece.nodes for piece in self.pieces)


def cut(graph: fx.Graph, reading: Reading, every: list[Repeat]) -> Cut | Refusal:
    """Cut a graph at those of its repeats that are worth it; or say why not."""
    total = len(reading.nodes)
    if not every:
        return Refusal("no repeated run")
    repeats = [r for r in every if r.saved >= min(FEW, SMALL * total)]
    if sum(r.saved for r in repeats) < WORTHWHILE * total:
        return Refusal("too little is repeated")
    found = Cut(graph, repeats, total)
    if reading.final.grad != reading.base.grad:
        found.final_grad = reading.final.grad
    known: dict[Hashable, tuple[int, list[fx.Node]]] = {}
    sizes = _sizes(graph)
    for stretch in _stretches(repeats, reading):
        crossing = [stretch.start + offset for offset in stretch.outputs]
        if not reading.listing.uncut.isdisjoint(crossing):
            name = next(reading.nodes[p].name for p in crossing if p in reading.listing.uncut)
            return Refusal("a value that is no tensor crosses a cut", name)
        slots = [reading.operand(operand) for operand in stretch.bound]
        if stretch.key not in known:
            calls = range(stretch.start, stretch.stop)
            unnamed = _unnamed(slots, [reading.nodes[p] for p in calls])
            lost = [symbol for symbol in unnamed if symbol not in sizes and not is_unbacked(symbol)]
            if lost:
                return Refusal(f"no input says how large {lost[0]} is")
            extra = [sizes[symbol] for symbol in unnamed if symbol in sizes]
            known[stretch.key] = len(found.pieces), extra
            found.pieces.append(_piece(reading, calls, slots + extra, crossing))
        piece, extra = known[stretch.key]
        used = reading.listing.outputs(stretch.start, stretch.stop - stretch.start)
        results = tuple(reading.nodes[stretch.start + k] if k in used else None for k in stretch.outputs)
        found.steps.append(Step(piece, (*slots, *extra), results))
    return _writes_across(found, reading) or found


def _sizes(graph: fx.Graph) -> dict[Any, fx.Node]:
    """The inputs that are symbolic sizes, by their symbols."""
    values = {node: value_of(node) for node in graph.nodes if node.op == "placeholder"}
    return {own_symbol(value): node for node, value in values.items() if isinstance(value, torch.SymInt)}


def _unnamed(slots: list[fx.Node], calls: list[fx.Node]) -> list[sympy.Symbol]:
    """The symbols that sizes in a piece are made of and no operand is, in a fixed order. The piece needs them: of a
    tensor with 2*s rows, an operand or what a backward is given, nothing tells s."""
    expressions = {e for node in (*slots, *calls) for e in _expressions(value_of(node))}
    used = {s for e in expressions if isinstance(e, sympy.Basic) and not e.is_Symbol for s in e.free_symbols}
    named = {own_symbol(value_of(slot)) for slot in slots if isinstance(value_of(slot), torch.SymInt)}
    return sorted(used - named, key=str)


def _expressions(value: Any) -> Iterator[Any]:
    """The sizes and strides in a value."""
    if isinstance(value, torch.Tensor):
        yield from map(expression, (*value.shape, *value.stride()))
    elif isinstance(value, torch.SymInt):
        yield expression(value)
    elif isinstance(value, (list, tuple)):
        for part in value:
            yield from _expressions(part)


def _writes_across(found: Cut, reading: Reading) -> Refusal | None:
    """Why a write in place would go wrong once the graph is cut, if one would.

    Autograd refuses a write into what another piece may have saved. And two values that leave the pieces do not share
    memory that was made inside one; memory that came in from outside is shared as ever.
    """
    writes = {position: targets for position, node in enumerate(reading.nodes) if (targets := written(node))}
    if not writes:
        return None
    outside = {memory(node) for node in found.graph.nodes if node.op in ("placeholder", "get_attr")}
    crossing: dict[int | None, set[fx.Node]] = {}
    for step in found.steps:
        for result in step.results:
            if result is not None:
                crossing.setdefault(memory(result), set()).add(result)
    home = _homes(found)
    for position, targets in writes.items():
        node = reading.nodes[position]
        for where in {memory(target) for target in targets} - {None}:
            gradients = any(memory(slot) == where and value_of(slot).requires_grad for slot in home[position].operands)
            if gradients and reading.recording:
                return Refusal("a value that requires gradients is written in place", node.name)
            if where not in outside and len(crossing.get(where, ())) > 1:
                return Refusal("a value that is written in place leaves its piece in two views", node.name)
    return None


def _homes(found: Cut) -> list[Step]:
    """The step of each call."""
    return [step for step in found.steps for _ in range(found.pieces[step.piece].nodes)]


@dataclass(frozen=True)
class _Stretch:
    """Calls from `start` to `stop`: the offsets of what others use, what it says, and what its slots are bound to."""

    start: int
    stop: int
    outputs: tuple[int, ...]
    key: Hashable
    bound: tuple[Operand, ...]


def _stretches(repeats: list[Repeat], reading: Reading) -> Iterator[_Stretch]:
    """The graph in order: repeats, and what stands between them."""
    starting = {start: (repeat, k) for repeat in repeats for k, start in enumerate(repeat.starts)}
    listing, position = reading.listing, 0
    for start in [*sorted(starting), len(reading.nodes)]:
        if position < start:
            outputs = tuple(sorted(listing.outputs(position, start - position)))
            says, bound = listing.block(position, start - position)
            yield _Stretch(position, start, outputs, (says, outputs), bound)
        if start in starting:
            repeat, k = starting[start]
            position = start + repeat.period
            outputs = _worth_their_gradient(repeat, start, listing.outputs(start, repeat.period), reading)
            bound = tuple(slot[k] for slot in repeat.slots)
            yield _Stretch(start, position, outputs, (id(repeat), outputs), bound)


def _worth_their_gradient(repeat: Repeat, start: int, used: set[int], reading: Reading) -> tuple[int, ...]:
    """The outputs of a block; without those that are not used here, if an operand gets gradients through them alone: it
    would get zeros in place of none, which an optimizer with weight decay takes for a step."""
    kept = tuple(offset for offset in repeat.outputs if offset in used)
    if not reading.recording or len(kept) == len(repeat.outputs):
        return repeat.outputs
    reached = _gradients(range(start, start + repeat.period), reading)
    if reached is None:
        unused = (reading.nodes[start + offset] for offset in repeat.outputs if offset not in used)
        return kept if any(_requires_gradients(node) for node in unused) else repeat.outputs
    of_used = set().union(*(reached[offset] for offset in kept))
    return repeat.outputs if all(reached[offset] <= of_used for offset in repeat.outputs) else kept


def _gradients(positions: range, reading: Reading) -> list[set[fx.Node]] | None:
    """For each of these calls, the values from outside that its gradients flow to; None where that is not told by who
    reads whom: where a call writes, or is given a graph."""
    found: dict[fx.Node, set[fx.Node]] = {}
    for position in positions:
        node = reading.nodes[position]
        if written(node) or any(isinstance(held(leaf), nn.Module) for leaf in node.all_input_nodes):
            return None
        sources = [found.get(leaf, {leaf}) for leaf in node.all_input_nodes if _requires_gradients(leaf)]
        found[node] = set().union(*sources) if _requires_gradients(node) else set()
    return list(found.values())


def _requires_gradients(node: fx.Node) -> bool:
    leaves = pytree.tree_leaves(value_of(node))
    return any(isinstance(leaf, torch.Tensor) and leaf.requires_grad for leaf in leaves)


def _piece(reading: Reading, positions: range, slots: list[fx.Node], outputs: list[int]) -> Piece:
    graph = fx.Graph()
    inside: dict[fx.Node, fx.Node] = {}
    for number, slot in enumerate(slots):
        inside[slot] = graph.placeholder(f"a{number}")
        inside[slot].meta["example_value"] = value_of(slot)
    bodies: dict[str, Any] = {}

    def operand(leaf: fx.Node) -> fx.Node:
        if leaf not in inside:  # a graph that a higher-order op is given
            inside[leaf] = graph.node_copy(leaf)
            bodies[str(leaf.target)] = held(leaf)
        return inside[leaf]

    scopes = _Scopes(graph, reading.base)
    for position in positions:
        scopes.change(reading.scopes[position])
        inside[reading.nodes[position]] = _copy(graph, reading.nodes[position], operand)
    scopes.change(reading.base)
    graph.output(tuple(inside[reading.nodes[position]] for position in outputs))
    return Piece(_holding(graph, bodies), tuple(value_of(slot) for slot in slots), len(positions))


def _copy(graph: fx.Graph, node: fx.Node, operand: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """A copy of a call, named by what it calls: Inductor's caches go by names, and are to hold a piece for wherever it
    stands."""
    args, kwargs = fx.node.map_arg(node.args, operand), fx.node.map_arg(node.kwargs, operand)
    copy = graph.create_node(node.op, node.target, args, kwargs, type_expr=node.type)
    copy.meta = node.meta.copy()
    return copy


def _holding(graph: fx.Graph, bodies: dict[str, Any]) -> fx.GraphModule:
    root = nn.Module()
    for target, body in bodies.items():
        *path, last = target.split(".")
        holder = root
        for name in path:
            if not hasattr(holder, name):
                holder.add_module(name, nn.Module())
            holder = getattr(holder, name)
        own = fx.GraphModule(body, copy_graph(body.graph))  # what compiles a piece may change it
        own.meta = body.meta.copy()
        setattr(holder, last, own)
    return fx.GraphModule(root, graph, "Piece")


class _Scopes:
    """The scope at the end of a graph that is being written."""

    def __init__(self, graph: fx.Graph, base: Scope) -> None:
        self.graph, self.now = graph, base
        self.open: list[fx.Node] = []

    def change(self, wanted: Scope) -> None:
        kept = 0
        for mine, other in zip(self.now.entered, wanted.entered, strict=False):
            if mine != other:
                break
            kept += 1
        while len(self.open) > kept:
            entering = self.open.pop()
            self.graph.call_function(LEAVING[entering.target], (entering,))
        for function, arguments in wanted.entered[kept:]:
            self.open.append(self.graph.call_function(function, arguments))
        if wanted.grad != self.now.grad:
            self.graph.call_function(torch._C._set_grad_enabled, (wanted.grad,))
        self.now = wanted
