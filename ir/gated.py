"""A program's `forward` with gates: places at which candidates differ, put into the graph once.

    %12 = gate(%11)             open: who reads %12 reads %11; a factor scales it; `Instead("%3")` skips to %3

A search asks what a model loses if it drops this block or that expert. None of that needs a program of its own, and
little of it needs a whole run: what nobody reads, such as a block that is skipped, is not computed, and what one
candidate computes as another did, all that lies before the first gate in which they differ, is remembered where
residual branches end. A value is known by what it is computed from: by node and operands, down to inputs and weights.
"""

from __future__ import annotations

import struct
from collections import Counter, OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import fx

from laconic.ir.errors import UsageError, did_you_mean
from laconic.ir.program import Kind, Program
from laconic.ir.run import Outcome, declared_weights, outcome
from laconic.ir.structure import entry_structure
from laconic.ir.traits import traits


@dataclass(frozen=True)
class Instead:
    """The setting of a gate by which those who read its value read that of the node named `node`, as its own readers
    see it. That stands before the gate, or both are placeholders."""

    node: str


#: What a gate does to its value: a factor (0 drops it, a tensor drops parts), another value in its place, or any
#: function of it and, where the gate has one, of what lies beside it.
Setting = float | torch.Tensor | Instead | Callable[..., torch.Tensor]
Candidate = Mapping[str, Setting]


@dataclass(frozen=True)
class Gate:
    """A place at which candidates differ: the value of the node named `node`, a weight's too, as all who read it see
    it. `beside` names a node that stands before it, such as what goes into the block that it comes out of."""

    name: str
    node: str
    beside: str = ""


def scaled_by(factor: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The setting of a gate on what comes out of a layer, beside what goes into it, that scales what the layer adds."""
    return lambda value, before: before + factor * (value - before)


def replaced_by(value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The setting of a gate on a weight by which its readers are given what no row holds."""
    return lambda given: value


_CIRCLE = "gates lead to each other in a circle"


class Memo:
    """Values by key; beyond `room` bytes those asked for longest ago are given up."""

    def __init__(self, room: int) -> None:
        self._values: OrderedDict[Any, torch.Tensor] = OrderedDict()
        self._room, self._held = room, 0

    def __contains__(self, key: Any) -> bool:
        return key in self._values

    def get(self, key: Any) -> torch.Tensor:
        self._values.move_to_end(key)
        return self._values[key]

    def put(self, key: Any, value: torch.Tensor) -> None:
        size = value.untyped_storage().nbytes()
        if size <= self._room and key not in self._values:
            self._values[key] = value
            self._held += size
            while self._held > self._room:
                _, gone = self._values.popitem(last=False)
                self._held -= gone.untyped_storage().nbytes()


@dataclass(frozen=True)
class Told:
    """What a candidate makes of the graph: its nodes, each behind what it reads; the node whose value is read for each;
    what gates do that do anything; and by what each value, and all that is returned, is known (not at all, if a
    function or a tensor of the candidate's own, or chance, had a part in it)."""

    nodes: Sequence[fx.Node]
    read: Mapping[fx.Node, fx.Node]
    acts: Mapping[fx.Node, Callable[..., torch.Tensor]]
    keys: Mapping[fx.Node, bytes | None]
    key: bytes | None


class Gated:
    """A program's `forward` with gates, run on flat inputs without gradients. Gates at one place act one behind the
    other. Weights must not be written while values are remembered.

    Raises UsageError for two gates of one name, and for a place that is none.
    """

    def __init__(self, program: Program, gates: Sequence[Gate]) -> None:
        _check(program, gates)
        self.entry = program.forward.clone()
        self._weights = declared_weights(program)
        self._positions = {declared.name: k for k, declared in enumerate(self.entry.inputs)}
        self._places, self._gates = _with_gates(self.entry.graph, gates)
        self._nodes = [node for node in self.entry.graph.nodes if node.op != "output"]
        self._operands = {node: tuple(node.all_input_nodes) for node in self.entry.graph.nodes}
        self._numbers = {node: k for k, node in enumerate(self._nodes)}
        self._unknown = {node for node in self._nodes if traits(node).random}
        ends = {b.add.name for stream in entry_structure(program, program.forward).streams for b in stream.branches}
        self._kept = _alive(self._nodes, ends)

    def __call__(self, candidate: Candidate, inputs: list[torch.Tensor]) -> Outcome:
        """The outcome with these gates set, all others open. Raises UsageError for an unknown gate, and for gates that
        lead to what stands behind them."""
        return self.run(self.told(candidate), inputs)

    def told(self, candidate: Candidate) -> Told:
        """What a candidate says, to be run on any inputs. Raises UsageError as a call does."""
        for name in candidate:
            if name not in self._gates:
                raise UsageError(f"there is no gate {name!r}", hint=did_you_mean(name, list(self._gates)))
        leads, acts = dict[fx.Node, fx.Node](), dict[fx.Node, Callable[..., torch.Tensor]]()
        unknown, said = set(self._unknown), {node: struct.pack("q", k) for node, k in self._numbers.items()}
        for name, gate in self._gates.items():
            setting = candidate.get(name)
            if isinstance(setting, Instead):
                leads[gate] = self._target(name, setting)
            elif setting is None:
                leads[gate] = self._operands[gate][0]
            else:
                acts[gate] = setting if callable(setting) else _times(setting)
                if isinstance(setting, (int, float)):
                    said[gate] += f"{type(setting).__name__} {setting!r}".encode()
                else:
                    unknown.add(gate)
        read = {node: _end(node, leads) for node in self._nodes}
        nodes = self._ordered(read, leads)
        keys = dict[fx.Node, bytes | None]()

        def key(node: fx.Node) -> bytes | None:
            known = [keys[read[operand]] for operand in self._operands[node]]
            parts = [part for part in known if part is not None]
            if node in unknown or len(parts) < len(known):
                return None
            return blake2b(said.get(node, b"") + b"".join(parts), digest_size=16).digest()

        for node in nodes:
            keys[node] = key(node)
        return Told(nodes, read, acts, keys, key(self.entry.output_node))

    def _ordered(self, read: Mapping[fx.Node, fx.Node], leads: Mapping[fx.Node, fx.Node]) -> list[fx.Node]:
        """The nodes that do anything, each behind what it reads: gates on weights, which may read each other, by turns.
        Raises UsageError where they do so in a circle."""
        found, open_ = dict.fromkeys(node for node in self._nodes if node.op == "placeholder"), set[fx.Node]()

        def visit(gate: fx.Node) -> None:
            if gate not in found:
                if gate in open_:
                    raise UsageError(_CIRCLE)
                open_.add(gate)
                for operand in self._operands[gate]:
                    visit(read[operand])
                found[gate] = None

        for gate in self._gates.values():
            if gate not in leads and _place(gate).op == "placeholder":
                visit(gate)
        return list(found | dict.fromkeys(node for node in self._nodes if node not in leads))

    def _target(self, name: str, setting: Instead) -> fx.Node:
        gate, target = self._gates[name], self._places.get(setting.node)
        if target is None:
            raise UsageError(f"there is no node {setting.node!r} for the gate {name!r} to lead to")
        weights = [_place(node).op == "placeholder" for node in (gate, target)]
        if target is gate or not (all(weights) or self._numbers[target] < self._numbers[gate]):
            raise UsageError(f"the gate {name!r} leads to {setting.node!r}, which stands behind it")
        return target

    def run(self, told: Told, inputs: list[torch.Tensor], memo: Memo | None = None, batch: int = 0) -> Outcome:
        """The outcome. With a memo, what it knows of this batch is not computed, and it learns what lies where branches
        end; the inputs of a batch are the same each time."""
        values, reads = dict[fx.Node, Any](), Counter[fx.Node]()
        output, read = self.entry.output_node, told.read

        def release(node: fx.Node) -> None:
            for operand in self._operands[node]:
                reads[read[operand]] -= 1
                if not reads[read[operand]]:
                    values.pop(read[operand], None)

        reads.update(read[operand] for operand in self._operands[output])
        for node in reversed(told.nodes):
            if not reads[node]:
                continue
            if memo is not None and (batch, told.keys[node]) in memo:
                values[node] = memo.get((batch, told.keys[node]))
            else:
                reads.update(read[operand] for operand in self._operands[node])
        with torch.no_grad():
            for node in told.nodes:
                if reads[node] and node not in values:
                    values[node] = self._computed(node, told, inputs, values)
                    release(node)
                    if memo is not None and node in self._kept and told.keys[node] is not None:
                        memo.put((batch, told.keys[node]), values[node])
            found: Any = fx.map_arg(output.args[0], lambda operand: values[read[operand]])
        return outcome(self.entry, found)

    def _computed(self, node: fx.Node, told: Told, inputs: list[torch.Tensor], values: Mapping[fx.Node, Any]) -> Any:
        if node.op == "placeholder":
            name = node.meta["name"]
            return inputs[self._positions[name]] if node.meta["kind"] == Kind.INPUT else self._weights[name]
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda operand: values[told.read[operand]])
        function: Any = told.acts.get(node, node.target)
        return function(*args, **kwargs)


def _check(program: Program, gates: Sequence[Gate]) -> None:
    order = {node.name: k for k, node in enumerate(program.forward.graph.nodes)}
    named = Counter(gate.name for gate in gates)
    for gate in gates:
        if named[gate.name] > 1:
            raise UsageError(f"two gates are named {gate.name!r}")
        for node in (gate.node, gate.beside or gate.node):
            if node not in order:
                raise UsageError(
                    f"there is no node {node!r} for the gate {gate.name!r}", hint=did_you_mean(node, list(order))
                )
        if gate.beside and order[gate.beside] >= order[gate.node]:
            raise UsageError(f"{gate.beside!r} does not stand before {gate.node!r}, at the gate {gate.name!r}")


def _with_gates(graph: fx.Graph, gates: Sequence[Gate]) -> tuple[dict[str, fx.Node], dict[str, fx.Node]]:
    """Put gates into a graph. Returns what is read of each node, by its name, and the gates by theirs."""
    places = {node.name: node for node in graph.nodes}
    nodes, last = dict(places), [node for node in graph.nodes if node.op == "placeholder"][-1:]
    found = dict[str, fx.Node]()
    for gate in gates:
        end = places[gate.node]
        with graph.inserting_after(last[0] if end.op == "placeholder" else end):
            found[gate.name] = places[gate.node] = graph.call_function(_gate, (end,))
    own = set(found.values())
    for name, end in places.items():
        if end is not nodes[name]:
            nodes[name].replace_all_uses_with(end, delete_user_cb=lambda user: user not in own)
    for gate in gates:
        if gate.beside:
            found[gate.name].args = (*found[gate.name].args, places[gate.beside])
    return places, found


def _gate(value: torch.Tensor, *beside: torch.Tensor) -> torch.Tensor:
    """An open gate."""
    return value


def _place(node: fx.Node) -> fx.Node:
    """The node on which a gate stands, or the node itself."""
    while node.target is _gate:
        node = node.args[0]  # type: ignore[assignment]
    return node


def _times(factor: float | torch.Tensor) -> Callable[..., torch.Tensor]:
    return lambda value, *beside: value * factor


def _end(node: fx.Node, leads: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """Where a chain of gates leads. Raises UsageError for one that comes back."""
    seen = {node}
    while node in leads:
        node = leads[node]
        if node in seen:
            raise UsageError(_CIRCLE)
        seen.add(node)
    return node


def _alive(nodes: Sequence[fx.Node], ends: set[str]) -> set[fx.Node]:
    """Tensors that are needed behind one of these nodes and were computed up to it; it too."""
    order = {node: k for k, node in enumerate(nodes)}
    last = {node: max((order.get(user, len(order)) for user in node.users), default=-1) for node in nodes}
    places = [order[node] for node in nodes if node.name in ends]
    tensors = (n for n in nodes if n.op != "placeholder" and isinstance(n.meta.get("val"), torch.Tensor))
    return {node for node in tensors if any(order[node] <= place < last[node] for place in places)}
