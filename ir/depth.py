"""The one rewriter for depth: branches and blocks are skipped, or pointed at another block's weights, in all entries.

    %a = add(%x, attention(norm(%x)))         block 2 skipped: who read %b reads %x;
    %b = add(%a, mlp(norm(%a)))               block 2 like 1: it reads block 1's rows

A branch stands at one place of a residual stream, the same in every entry that says the stream: that it reads the same
rows of the weight table everywhere is what shows it. What nobody reads any more goes: calls, rows, and the states that
only a skipped branch kept, with their updates.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from laconic.ir.errors import UsageError
from laconic.ir.program import Alias, Entry, Kind, Program, Role
from laconic.ir.propagate import propagate
from laconic.ir.rewrite import dead_nodes, drop_weight, drop_weights, used_rows, weight_node
from laconic.ir.structure import Branch, BranchKind, EntryStructure, find_structure
from laconic.ir.types import TensorType, same_size, type_of


@dataclass(frozen=True)
class Unit:
    """A branch of a residual stream: which stream, which place in it, what it holds, and the rows that it alone reads,
    states among them."""

    stream: int
    place: int
    kind: BranchKind
    rows: frozenset[str]


@dataclass(frozen=True)
class Block:
    """Consecutive branches that recur: block `number` of run `run`."""

    run: int
    number: int
    units: tuple[Unit, ...]

    @property
    def rows(self) -> frozenset[str]:
        return frozenset().union(*(unit.rows for unit in self.units))


class Depth:
    """The branches and blocks of a Program, which must not change while this is in use.

    `units` are those that every entry with a residual stream says alike; `blocks` those of runs in the first entry.
    Raises UsageError if entries say different streams.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.structures = {name: found for name, found in find_structure(program).items() if found.streams}
        self._rows = {name: _read_rows(entry) for name, entry in program.entries.items()}
        listed = {name: list(self._units(name, found)) for name, found in self.structures.items()}
        first = next(iter(listed), None)
        self.units: list[Unit] = listed[first] if first else []
        for name, units in listed.items():
            if [_weights(program, unit) for unit in units] != [_weights(program, unit) for unit in self.units]:
                raise UsageError(
                    f"the entries {first!r} and {name!r} have other branches",
                    why=f"{len(self.units)} and {len(units)}, or with other weights",
                    hint="capture all entries of the same model",
                )
        states = [frozenset().union(*(units[k].rows for units in listed.values())) for k in range(len(self.units))]
        self.units = [Unit(u.stream, u.place, u.kind, rows) for u, rows in zip(self.units, states, strict=True)]
        self.blocks = list(self._blocks(self.structures[first])) if first else []

    def _units(self, name: str, found: EntryStructure) -> Iterator[Unit]:
        """The branches of an entry with the rows that each reads and no other does."""
        readers: dict[str, set[tuple[int, int]]] = {}
        branches = [(s, k, b) for s, stream in enumerate(found.streams) for k, b in enumerate(stream.branches)]
        for s, k, branch in branches:
            for row in _rows_of(branch, self._rows[name]):
                readers.setdefault(row, set()).add((s, k))
        for s, k, branch in branches:
            own = (row for row in _rows_of(branch, self._rows[name]) if readers[row] == {(s, k)})
            yield Unit(s, k, branch.kind, frozenset(own))

    def _blocks(self, found: EntryStructure) -> Iterator[Block]:
        at = {(unit.stream, unit.place): unit for unit in self.units}
        for number, run in enumerate(found.runs):
            for k in range(run.count):
                first = run.first + k * run.period
                yield Block(number, k, tuple(at[run.stream, first + j] for j in range(run.period)))

    def skip(self, units: Iterable[Unit]) -> Program:
        """A Program without these branches: each adds nothing to its stream. What stands behind the addition (the norm
        of a post-norm model) stays.

        Raises UsageError if a branch's inner values are used elsewhere too.
        """
        chosen = {(unit.stream, unit.place) for unit in units}
        return self._without(chosen, lambda branch: (branch.add, branch.v))

    def skip_blocks(self, blocks: Iterable[Block]) -> Program:
        """A Program without these blocks: each gives what it is given, norms behind its additions gone too.

        Raises UsageError if a block's inner values are used elsewhere too.
        """
        chosen = {(unit.stream, unit.place) for block in blocks for unit in block.units}
        return self._without(chosen, lambda branch: (branch.out, branch.v))

    def _without(
        self, chosen: Collection[tuple[int, int]], ends: Callable[[Branch], tuple[fx.Node, fx.Node]]
    ) -> Program:
        made = self.program.clone()
        gone = self._states_only_of(chosen)
        used = used_rows(self.program)
        for name, found in self.structures.items():
            entry = made.entries[name]
            nodes = {node.name: node for node in entry.graph.nodes}
            dead = set(map(str, dead_nodes(entry)))
            for stream, place in sorted(chosen, reverse=True):  # what a later one leads to may go too
                branch = found.streams[stream].branches[place]
                _refuse_exits(self.program, self.program.entries[name], branch, gone)
                old, new = (nodes[node.name] for node in ends(branch))
                _held_alike(old, new)
                changed = list(old.users)
                old.replace_all_uses_with(new)
                propagate(made, entry.graph, [n for n in changed if n.op == "call_function"])
            _drop_updates(entry, gone)
            for node in dead_nodes(entry):
                if node.name not in dead:
                    entry.graph.erase_node(node)
        for state in gone:
            drop_weight(made, state, Alias(None))
        left = set(used) - used_rows(made) - set(gone)
        drop_weights(made, {row: Alias(None) for row in sorted(left) if made.weights[row].kind is not Kind.STATE})
        return made

    def _states_only_of(self, chosen: Collection[tuple[int, int]]) -> list[str]:
        """The states that these branches alone read and update, in every entry."""
        rows = {row for unit in self.units if (unit.stream, unit.place) in chosen for row in unit.rows}
        states = [row for row in rows if self.program.weights[row].kind is Kind.STATE]
        held: list[str] = []
        for state in sorted(states):
            users: set[tuple[str, fx.Node]] = set()
            inside: set[tuple[str, fx.Node]] = set()
            for name, found in self.structures.items():
                node = self.program.entries[name].weight_nodes().get(state)
                users |= {(name, user) for user in (node.users if node is not None else ())}
                inside |= {(name, n) for s, k in chosen for n in found.streams[s].branches[k].nodes}
            if users <= inside:
                held.append(state)
        return held

    def repoint(self, block: Block, donor: Block, keep: Collection[str] = ()) -> Program:
        """A Program in which one block reads another's rows, but for states and the rows to `keep`. Names of rows that
        nobody reads any more lead to the donor's.

        Raises UsageError if the blocks are not of one run.
        """
        if block.run != donor.run:
            raise UsageError(
                f"block {block.number} of run {block.run} and block {donor.number} of run {donor.run} are not alike",
                hint="a donor is a block of the same run",
            )
        pairs = self._pairs(block, donor, keep)
        made, used = self.program.clone(), used_rows(self.program)
        for name, found in self.structures.items():
            entry = made.entries[name]
            inside = {n.name for unit in block.units for n in found.streams[unit.stream].branches[unit.place].nodes}
            rows = entry.weight_nodes()
            for row, other in pairs.items():
                if row not in rows:
                    continue
                new = weight_node(made, entry, other, rows)
                for user in [n for n in rows[row].users if n.name in inside]:
                    user.replace_input_with(rows[row], new)
        left = set(used) - used_rows(made)
        drop_weights(made, {row: Alias(other) for row, other in pairs.items() if row in left})
        return made

    def _pairs(self, block: Block, donor: Block, keep: Collection[str]) -> dict[str, str]:
        """The rows of a block, each with the donor's in its place, slot by slot of the run that has both."""
        found = next(iter(self.structures.values()))
        run = found.runs[block.run]
        pairs: dict[str, str] = {}
        for slot in range(len(run.repeat.slots)):
            own, other = run.bound(slot, block.number), run.bound(slot, donor.number)
            if own is other or own.op != "placeholder" or other.op != "placeholder":
                continue
            name, theirs = str(own.meta["name"]), str(other.meta["name"])
            if self.program.weights[name].kind is not Kind.STATE and name not in keep:
                pairs[name] = theirs
        return pairs


def _read_rows(entry: Entry) -> Mapping[fx.Node, str]:
    return {node: name for name, node in entry.weight_nodes().items()}


def _rows_of(branch: Branch, rows: Mapping[fx.Node, str]) -> set[str]:
    return {rows[operand] for node in branch.nodes for operand in node.all_input_nodes if operand in rows}


def _weights(program: Program, unit: Unit) -> tuple[int, int, frozenset[str]]:
    """What two entries must agree in: where a branch stands, and its rows but for states."""
    return unit.stream, unit.place, frozenset(r for r in unit.rows if program.weights[r].kind is not Kind.STATE)


def _refuse_exits(program: Program, entry: Entry, branch: Branch, gone: Collection[str]) -> None:
    """Raise UsageError if a branch makes something that is used elsewhere, other than updates of states that go."""
    updates = {
        value
        for output, value in zip(entry.outputs, entry.output_values, strict=True)
        if output.role is Role.UPDATE and output.name in gone
    }
    for node in branch.exits:
        outside = [user for user in node.users if user not in branch.nodes and user.op != "output"]
        if outside or node not in updates:
            raise UsageError(
                f"the branch at %{branch.add.name} of entry {entry.name!r} cannot be skipped",
                where=program.describe(node),
                why=f"%{node.name} in it is used by %{outside[0].name}" if outside else f"%{node.name} is a result",
            )


def _drop_updates(entry: Entry, gone: Collection[str]) -> None:
    pairs = list(zip(entry.outputs, entry.output_values, strict=True))
    kept = [(output, value) for output, value in pairs if output.name not in gone or output.role is not Role.UPDATE]
    entry.outputs = [output for output, _ in kept]
    entry.output_node.args = (tuple(value for _, value in kept),)


def _held_alike(old: fx.Node, new: fx.Node) -> None:
    """Raise UsageError unless one value may stand for another: strides alone may differ."""
    a, b = (type_of(node.meta["val"]) for node in (old, new))
    assert isinstance(a, TensorType)
    assert isinstance(b, TensorType)
    if a.dtype != b.dtype or len(a.shape) != len(b.shape) or not all(map(same_size, a.shape, b.shape)):
        raise UsageError(f"%{old.name} and what goes into its branch, %{new.name}, are not of one type")
