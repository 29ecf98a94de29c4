"""Blocks: which branches of a stream say the same, and the shortest period in which they recur.

A branch's nodes are put in an order that follows from its wiring alone (operands first, from the end back), so that
isomorphic branches are listed alike wherever passes put their calls. What only one branch reads, though it is not
computed from the stream (keys of a cross attention, a mask made anew in each layer), belongs to the branch if the like
branches have it too: T5's shared position bias, computed in the first layer, does not.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from torch import fx

from laconic.ir.listing import Listing, Repeat, list_nodes
from laconic.ir.repeats import find_repeats
from laconic.ir.signature import Interner, signature
from laconic.ir.structure.reading import Reading
from laconic.ir.structure.records import BlockRun, Branch
from laconic.ir.structure.streams import Step
from laconic.ir.types import TensorType, TupleType, type_of


def make_branches(reading: Reading, streams: list[list[Step]]) -> list[list[Branch]]:
    """Steps as branches that share no node; a branch inside another (nested residuals) keeps its own."""
    owner: dict[fx.Node, Step] = {}
    steps = [step for chain in streams for step in chain]
    for step in sorted(steps, key=lambda s: len(s.inside)):
        for node in (*step.inside, *step.tail):
            owner.setdefault(node, step)
    own: dict[int, set[fx.Node]] = {id(step): set() for step in steps}
    for node, step in owner.items():
        own[id(step)].add(node)
    _absorb(reading, [(step, own[id(step)]) for step in steps], set(owner))
    return [[_branch(reading, step, own[id(step)]) for step in chain] for chain in streams]


def find_runs(reading: Reading, streams: list[list[Branch]]) -> list[BlockRun]:
    """The runs of isomorphic blocks in each stream."""
    return [run for k, branches in enumerate(streams) for run in _runs(reading, k, branches)]


def _branch(reading: Reading, step: Step, own: set[fx.Node]) -> Branch:
    nodes = tuple(_ordered(step, own))
    inner = set(nodes) - {step.add, *step.tail}
    exits = tuple(n for n in nodes if n in inner and any(u not in own for u in n.users))
    return Branch(step.v, step.add, step.out, nodes, exits)


def _ordered(step: Step, own: set[fx.Node]) -> list[fx.Node]:
    """A branch's own nodes, operands before users, in the order of operands from its end back."""
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    waiting: list[tuple[fx.Node, bool]] = [(step.out, False)]
    while waiting:
        node, done = waiting.pop()
        if done:
            if node in own:
                found.append(node)
        elif node not in seen and (node in own or node in step.inside):
            seen.add(node)
            waiting.append((node, True))
            waiting += [(n, False) for n in reversed(node.all_input_nodes)]
    return found


def _describe(node: fx.Node) -> Hashable:
    """The type of a value but for strides, which follow from where it was computed."""

    def plain(kind: Any) -> Hashable:
        if isinstance(kind, TensorType):
            return (str(kind.dtype), tuple(map(str, kind.shape)), kind.device)
        return tuple(plain(p) for p in kind.parts) if isinstance(kind, TupleType) else kind

    return plain(type_of(node.meta["val"]))


def _says(node: fx.Node) -> Hashable:
    return signature(node, lambda leaf: "%"), _describe(node)


# What belongs to a branch though it is not computed from the stream


def _absorb(reading: Reading, branches: list[tuple[Step, set[fx.Node]]], taken: set[fx.Node]) -> None:
    """Give each branch the calls that it alone uses, as far as all branches that say the same have them."""
    classes: dict[Hashable, list[tuple[set[fx.Node], list[fx.Node]]]] = {}
    for step, own in branches:
        nodes = _ordered(step, own)
        wiring, slots = list_nodes(nodes, describe=_describe).block(0, len(nodes))
        outer = [slot for slot in slots if isinstance(slot, fx.Node)]
        classes.setdefault((wiring, tuple(map(_says, nodes))), []).append((own, outer))
    kept = {v for v in reading.entry.output_values if isinstance(v, fx.Node)}
    carried = {step.v for step, _ in branches} | kept
    for members in classes.values():
        for bound in zip(*(outer for _, outer in members), strict=True):
            _absorb_slot([own for own, _ in members], list(bound), taken, carried)


def _absorb_slot(owns: list[set[fx.Node]], bound: list[fx.Node], taken: set[fx.Node], carried: set[fx.Node]) -> None:
    """Absorb what one slot is bound to in each branch, and then what that reads."""
    waiting = [bound]
    while waiting:
        nodes = waiting.pop()
        fits = len(set(nodes)) == len(nodes) and all(
            n.op == "call_function" and n not in taken and n not in carried and all(u in own for u in n.users)
            for n, own in zip(nodes, owns, strict=True)
        )
        if not fits or len({_says(n) for n in nodes}) != 1:
            continue
        for node, own in zip(nodes, owns, strict=True):
            own.add(node)
            taken.add(node)
        waiting += [list(operands) for operands in zip(*(n.all_input_nodes for n in nodes), strict=True)]


# Periods


def _runs(reading: Reading, stream: int, branches: Sequence[Branch]) -> list[BlockRun]:
    kept = {v for v in reading.entry.output_values if isinstance(v, fx.Node)}
    order = [node for branch in branches for node in branch.nodes]
    starts = [0]
    for branch in branches:
        starts.append(starts[-1] + len(branch.nodes))
    listing = list_nodes(order, kept, _describe)
    letter = Interner()
    word = [letter(listing.block(a, b - a)[0]) for a, b in pairwise(starts)]
    found = []
    for rough in find_repeats(Listing(word, [()] * len(word), lambda operand: None)):
        if rough.contiguous:
            found += _strict(listing, order, starts, stream, rough)
    return found


def _strict(
    listing: Listing, order: Sequence[fx.Node], starts: Sequence[int], stream: int, rough: Repeat
) -> list[BlockRun]:
    """The maximal runs of blocks that are wired alike, in a run of like branches."""
    firsts = list(rough.starts)
    spans = [(starts[first], starts[first + rough.period]) for first in firsts]
    keys = [listing.block(a, b - a)[0] for a, b in spans]
    found, begin = [], 0
    for k in range(1, len(keys) + 1):
        if k < len(keys) and keys[k] == keys[begin]:
            continue
        if k - begin >= 2:
            (start, stop), count = spans[begin], k - begin
            inner = order[start : spans[k - 1][1]]
            record = listing.record([a for a, _ in spans[begin:k]], stop - start)
            if record is not None:
                found.append(
                    BlockRun(stream, firsts[begin], rough.period, count, tuple(inner), _from(record, start, order))
                )
        begin = k
    return found


def _from(record: Repeat, start: int, order: Sequence[fx.Node]) -> Repeat:
    """A record of positions in the whole stream as one of positions in the run; what lies before is an outer node."""
    slots = tuple(
        tuple((order[o] if o < start else o - start) if isinstance(o, int) else o for o in bound)
        for bound in record.slots
    )
    return replace(record, starts=tuple(s - start for s in record.starts), slots=slots)
