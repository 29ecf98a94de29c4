"""An ordered list of nodes as the repeat finder sees it, and the blocks that it says several times."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cached_property
from itertools import pairwise
from typing import Any

from torch import fx

from laconic.ir.signature import Interner, signature
from laconic.ir.types import TupleType, type_of

#: What a node reads: the position of a node of the listing, or any other value, as something hashable but no int.
Operand = Hashable


class SlotKind(StrEnum):
    """What a slot of a repeat is bound to."""

    INVARIANT = "invariant"  # the same value in every repeat
    CARRIED = "carried"  # what the repeat before made
    PRIVATE = "private"  # a value of its own in each repeat


@dataclass(frozen=True)
class Repeat:
    """A block of `period` nodes that stands at each of `starts`.

    `slots[slot][repeat]` is what the slot is bound to in that repeat, slots in the order of first use; `outputs` are
    the offsets of nodes that are used outside their own repeat, in any of them.
    """

    starts: tuple[int, ...]
    period: int
    slots: tuple[tuple[Operand, ...], ...]
    outputs: tuple[int, ...]

    @property
    def count(self) -> int:
        return len(self.starts)

    @property
    def saved(self) -> int:
        """Nodes that need not be said again."""
        return (self.count - 1) * self.period

    @property
    def contiguous(self) -> bool:
        """Whether the repeats form a run, one behind the other."""
        return all(b - a == self.period for a, b in pairwise(self.starts))

    def positions(self, repeat: int) -> range:
        return range(self.starts[repeat], self.starts[repeat] + self.period)

    @cached_property
    def kinds(self) -> tuple[SlotKind, ...]:
        """What each slot is bound to over the repeats."""
        return tuple(self._kind(bound) for bound in self.slots)

    def _kind(self, bound: tuple[Operand, ...]) -> SlotKind:
        if len(set(bound)) == 1:
            return SlotKind.INVARIANT
        made_before = all(isinstance(o, int) and o in self.positions(k) for k, o in enumerate(bound[1:]))
        offsets = {o - start for o, start in zip(bound[1:], self.starts, strict=False) if isinstance(o, int)}
        return SlotKind.CARRIED if made_before and len(offsets) == 1 else SlotKind.PRIVATE


@dataclass
class Listing:
    """An ordered list of nodes as the finder sees it.

    `operands[i]` are what node i reads, in order: an int is the position of an earlier node. `kind` tells the type of
    an operand, so far as two blocks must agree in it; `kept` are the positions that the graph returns, `uncut` those
    whose value may not leave a block (a tuple, for which its parts cross). `together` tells what several operands have
    in common, so far as two blocks must agree in it: which of them share memory.
    """

    signatures: Sequence[int]
    operands: Sequence[tuple[Operand, ...]]
    kind: Callable[[Operand], Hashable]
    kept: frozenset[int] = frozenset()
    uncut: frozenset[int] = frozenset()
    together: Callable[[Sequence[Operand]], Hashable] = lambda slots: None
    users: list[list[int]] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.users = [[] for _ in self.signatures]
        for position, read in enumerate(self.operands):
            for operand in read:
                if isinstance(operand, int):
                    self.users[operand].append(position)

    def last_use(self, position: int) -> int:
        return max(self.users[position], default=position)

    def block(self, start: int, period: int) -> tuple[Hashable, tuple[Operand, ...]]:
        """What a block says, apart from what its slots are bound to; and what they are bound to."""
        slots: dict[Operand, int] = {}
        wiring = []
        for position in range(start, start + period):
            for operand in self.operands[position]:
                inside = isinstance(operand, int) and operand >= start
                wiring.append(operand - start if inside else -1 - slots.setdefault(operand, len(slots)))  # type: ignore[operator]
        says = tuple(self.signatures[start : start + period])
        kinds = tuple(self.kind(operand) for operand in slots)
        return (says, tuple(wiring), kinds, self.together(tuple(slots))), tuple(slots)

    def outputs(self, start: int, period: int) -> set[int]:
        """Offsets of a block's nodes that are used behind it or returned."""
        stop = start + period
        return {
            position - start
            for position in range(start, stop)
            if position in self.kept or any(user >= stop for user in self.users[position])
        }

    def record(self, starts: Sequence[int], period: int) -> Repeat | None:
        """The blocks at `starts`, which say the same, as a Repeat; None if a value leaves one that may not."""
        bound = [self.block(start, period)[1] for start in starts]
        outputs: set[int] = set()
        for start in starts:
            outputs |= self.outputs(start, period)
        crossing = {start + offset for start in starts for offset in outputs}.union(*bound)
        if not self.uncut.isdisjoint(crossing):
            return None
        return Repeat(tuple(starts), period, tuple(zip(*bound, strict=True)), tuple(sorted(outputs)))


def list_nodes(
    nodes: Sequence[fx.Node],
    returned: Iterable[Any] = (),
    describe: Callable[[fx.Node], Hashable] = lambda node: type_of(node.meta["val"]),
    also: Callable[[fx.Node], Hashable] = lambda node: None,
) -> Listing:
    """Calls of a Program, in any topological order, as a Listing; its outside operands are nodes.

    `returned` are the operands of the output node. `describe` is the type of a value; `also` whatever else two nodes
    must agree in.
    """
    position = {node: k for k, node in enumerate(nodes)}
    number = Interner()
    signatures, operands = [], []
    for node in nodes:
        read: list[fx.Node] = []
        signatures.append(number((signature(node, read.append), describe(node), also(node))))
        operands.append(tuple(position.get(leaf, leaf) for leaf in read))

    def kind(operand: Operand) -> Hashable:
        node = nodes[operand] if isinstance(operand, int) else operand
        assert isinstance(node, fx.Node)
        return describe(node)

    return Listing(
        signatures,
        operands,
        kind,
        kept=frozenset(position[v] for v in returned if v in position),
        uncut=frozenset(k for k, node in enumerate(nodes) if isinstance(type_of(node.meta["val"]), TupleType)),
    )
