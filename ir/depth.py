"""The one rewriter for depth: branches and blocks are skipped, or pointed at another block's weights, in all entries.

    %a = add(%x, attention(norm(%x)))         block 2 skipped: who read %b reads %x;
    %b = add(%a, mlp(norm(%a)))               block 2 like 1: it reads block 1's rows

A branch stands at one place of a residual stream, the same in every entry that has the stream: that its branches read
the same rows of the weight table is what shows it. (Where keys of a source are cached, one entry reads fewer.) What
nobody reads any more goes: calls, rows, and the states that only a skipped branch kept, with their updates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

from torch import fx

from laconic.ir.errors import UsageError
from laconic.ir.listing import SlotKind
from laconic.ir.program import Alias, Entry, Kind, Program, Role
from laconic.ir.propagate import propagate
from laconic.ir.rewrite import dead_nodes, drop_weight, drop_weights, used_rows, weight_node
from laconic.ir.structure import Branch, BranchKind, Stream, find_structure
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


@dataclass
class _Stream:
    """A residual stream: its number in each entry that has it, and the kinds of its branches with the rows that they
    read, but for states."""

    homes: dict[str, int]
    kinds: list[BranchKind]
    reads: list[frozenset[str]]

    def is_also(self, other: _Stream) -> bool:
        """Whether another entry's stream is this one: branch by branch, one reads all that the other does."""
        pairs = zip(self.reads, other.reads, strict=False)
        return self.kinds == other.kinds and all(a <= b or b <= a for a, b in pairs)


class Depth:
    """The branches and blocks of a Program, which must not change while this is in use.

    `units` are those of all streams of all entries, a stream that several entries have once; `blocks` those of runs in
    the first entry that has the stream. Raises UsageError if entries have streams that are alike in part only.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.structures = {name: found for name, found in find_structure(program).items() if found.streams}
        self._rows = {name: _read_rows(entry) for name, entry in program.entries.items()}
        self._streams: list[_Stream] = []
        for name, found in self.structures.items():
            for s, stream in enumerate(found.streams):
                self._add(name, s, stream)
        self.units = list(self._units())
        self._runs = [
            (name, run)
            for name, found in self.structures.items()
            for run in found.runs
            if next(iter(self._streams[self._number(name, run.stream)].homes)) == name
        ]
        self.blocks = list(self._blocks())

    def _add(self, name: str, s: int, stream: Stream) -> None:
        """Take in stream `s` of an entry: one that is known from others, or a new one."""
        own = _Stream({name: s}, [b.kind for b in stream.branches], [self._reads(name, b) for b in stream.branches])
        others = [known for known in self._streams if name not in known.homes]
        for known in others:
            if known.is_also(own):
                known.homes[name] = s
                known.reads = [a | b for a, b in zip(known.reads, own.reads, strict=True)]
                return
        for known in others:
            if frozenset().union(*known.reads) & frozenset().union(*own.reads):
                raise UsageError(
                    f"the entries {next(iter(known.homes))!r} and {name!r} have other branches",
                    why=f"{len(known.reads)} and {len(own.reads)}, or with other weights",
                    hint="capture all entries of the same model",
                )
        self._streams.append(own)

    def _reads(self, name: str, branch: Branch) -> frozenset[str]:
        """The rows that a branch of an entry reads, but for states."""
        rows = _rows_of(branch, self._rows[name])
        return frozenset(row for row in rows if self.program.weights[row].kind is not Kind.STATE)

    def _number(self, name: str, s: int) -> int:
        """Which of all streams an entry's stream is."""
        return next(k for k, stream in enumerate(self._streams) if stream.homes.get(name) == s)

    def branches(self, stream: int, place: int) -> dict[str, Branch]:
        """The branch at a place of a stream in each entry that has it."""
        homes = self._streams[stream].homes
        return {name: self.structures[name].streams[s].branches[place] for name, s in homes.items()}

    def reads(self, unit: Unit) -> frozenset[str]:
        """The rows that a branch reads in any entry, whoever else does, but for states."""
        return self._streams[unit.stream].reads[unit.place]

    def _units(self) -> Iterator[Unit]:
        """The branches of all streams with the rows, states among them, that each reads and no other does."""
        read: dict[tuple[int, int], set[str]] = {}
        readers: Counter[str] = Counter()
        for number, stream in enumerate(self._streams):
            for place in range(len(stream.kinds)):
                found = self.branches(number, place)
                rows = {row for name, branch in found.items() for row in _rows_of(branch, self._rows[name])}
                read[number, place] = rows
                readers.update(rows)
        for (number, place), rows in read.items():
            own = frozenset(row for row in rows if readers[row] == 1)
            yield Unit(number, place, self._streams[number].kinds[place], own)

    def _blocks(self) -> Iterator[Block]:
        at = {(unit.stream, unit.place): unit for unit in self.units}
        for number, (name, run) in enumerate(self._runs):
            stream = self._number(name, run.stream)
            for k in range(run.count):
                first = run.first + k * run.period
                yield Block(number, k, tuple(at[stream, first + j] for j in range(run.period)))

    def skip(self, units: Iterable[Unit], into: Program | None = None) -> Program:
        """A Program without these branches: each adds nothing to its stream. What stands behind the addition (the norm
        of a post-norm model) stays. `into`, if given, is a clone of the program, which is changed.

        Raises UsageError if a branch's inner values are used elsewhere too.
        """
        chosen = {(unit.stream, unit.place) for unit in units}
        return self._without(chosen, lambda branch: (branch.add, branch.v), into or self.program.clone())

    def skip_blocks(self, blocks: Iterable[Block], into: Program | None = None) -> Program:
        """A Program without these blocks: each gives what it is given, norms behind its additions gone too. `into`, if
        given, is a clone of the program, which is changed.

        Raises UsageError if a block's inner values are used elsewhere too.
        """
        chosen = {(unit.stream, unit.place) for block in blocks for unit in block.units}
        return self._without(chosen, lambda branch: (branch.out, branch.v), into or self.program.clone())

    def refuse(self, units: Collection[Unit]) -> None:
        """Raise UsageError if these branches, all of a block or one alone, cannot be skipped, and say why."""
        chosen = {(unit.stream, unit.place) for unit in units}
        gone = self._states_only_of(chosen)
        for stream, place in sorted(chosen):
            for name, branch in self.branches(stream, place).items():
                _refuse_exits(self.program, self.program.entries[name], branch, gone)
                _held_alike(branch.add if len(chosen) == 1 else branch.out, branch.v)

    def _without(
        self,
        chosen: Collection[tuple[int, int]],
        ends: Callable[[Branch], tuple[fx.Node, fx.Node]],
        made: Program,
    ) -> Program:
        gone = self._states_only_of(chosen)
        used = used_rows(self.program)
        for name in self.structures:
            entry = made.entries[name]
            nodes = {node.name: node for node in entry.graph.nodes}
            dead = set(map(str, dead_nodes(entry)))
            for stream, place in sorted(chosen, reverse=True):  # what a later one leads to may go too
                branch = self.branches(stream, place).get(name)
                if branch is None:
                    continue
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
        units = [unit for unit in self.units if (unit.stream, unit.place) in chosen]
        inside = {name: self._inside(name, units) for name in self.program.entries}
        states = [row for unit in units for row in unit.rows if self.program.weights[row].kind is Kind.STATE]
        rows = {name: entry.weight_nodes() for name, entry in self.program.entries.items()}
        return [
            state
            for state in sorted(states)
            if all(inside[name].issuperset(rows[name][state].users) for name in rows if state in rows[name])
        ]

    def _inside(self, name: str, units: Collection[Unit]) -> set[fx.Node]:
        """The calls of an entry that serve these branches alone: their own, and those that lead only to them or to the
        states that they alone read, as a source's keys, which are cached before any branch reads them."""
        entry = self.program.entries[name]
        states = {row for unit in units for row in unit.rows if self.program.weights[row].kind is Kind.STATE}
        other = {
            value
            for output, value in zip(entry.outputs, entry.output_values, strict=True)
            if output.role is not Role.UPDATE or output.name not in states
        }
        branches = [self.branches(unit.stream, unit.place).get(name) for unit in units]
        found = {node for branch in branches if branch is not None for node in branch.nodes}
        for node in reversed(entry.graph.nodes):
            serves = node.op == "call_function" and node.users and node not in other
            if serves and all(user in found or user.op == "output" for user in node.users):
                found.add(node)
        return found

    def repoint(self, block: Block, donor: Block, keep: Collection[str] = (), into: Program | None = None) -> Program:
        """A Program in which one block reads another's rows, but for states and the rows to `keep`. Names of rows that
        nobody reads any more lead to the donor's. `into`, if given, is a clone of the program, or what this made of
        one, which is changed.

        Raises UsageError if the blocks are not of one run, or read other things than weights.
        """
        pairs = {row: other for row, other in self.pairs(block, donor).items() if row not in keep}
        made = into or self.program.clone()
        used = used_rows(made)
        for name in self.structures:
            entry = made.entries[name]
            inside = {node.name for node in self._inside(name, block.units)}
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

    def pairs(self, block: Block, donor: Block) -> dict[str, str]:
        """The rows that a block reads, each with the donor's in its place, slot by slot of the run that has both; rows
        that both read, and states, are not among them.

        Raises UsageError if the blocks are not of one run, or read other things than weights.
        """
        if block.run != donor.run:
            raise UsageError(
                f"block {block.number} of run {block.run} and block {donor.number} of run {donor.run} are not alike",
                hint="a donor is a block of the same run",
            )
        if (why := self.apart(block, donor)) is not None:
            raise UsageError(f"block {block.number} cannot do with the weights of block {donor.number}", why=why)
        return {
            str(own.meta["name"]): str(other.meta["name"])
            for own, other in self._bound(block, donor)
            if own.op == "placeholder" and own.meta["kind"] not in (Kind.STATE, Kind.INPUT)
        }

    def apart(self, block: Block, donor: Block) -> str | None:
        """In what two blocks of a run differ beside their weights and states: a mask of their own, say; or None."""
        for own, other in self._bound(block, donor):
            weights = [n.op == "placeholder" and n.meta["kind"] != Kind.INPUT for n in (own, other)]
            if not all(weights):
                return f"it reads %{own.name} where the other one reads %{other.name}"
        return None

    def _bound(self, block: Block, donor: Block) -> Iterator[tuple[fx.Node, fx.Node]]:
        """What the slots that are not the blocks' own stream are bound to in both, where that differs."""
        _, run = self._runs[block.run]
        for slot in run.slots(SlotKind.PRIVATE):
            own, other = run.bound(slot, block.number), run.bound(slot, donor.number)
            if own is not other:
                yield own, other


def _read_rows(entry: Entry) -> Mapping[fx.Node, str]:
    return {node: name for name, node in entry.weight_nodes().items()}


def _rows_of(branch: Branch, rows: Mapping[fx.Node, str]) -> set[str]:
    return {rows[operand] for node in branch.nodes for operand in node.all_input_nodes if operand in rows}


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
