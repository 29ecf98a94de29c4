"""Which node of one graph is which of another: what a diff needs so that one change shows as one.

Nodes are matched in order by what they say and where they come from, from the strictest key to the loosest: the
longest common subsequence of keys first, then what lies between its members by the next key. What is left is matched,
wherever it stands, if it computes the same from the inputs on.

A node that is gone may have others stand in for it, and a new one may come between a value and all that read it. If
every matched reader of a value now reads one other value instead, and either the old one is gone or the other is new,
that is one substitution, and the readers did not change.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, field

from torch import fx

from laconic.ir.program import Entry, Kind, Program
from laconic.ir.signature import Interner, signature, skeleton
from laconic.ir.traits import op_name
from laconic.ir.types import value_text

Key = Callable[[Program, fx.Node], Hashable]


@dataclass
class Alignment:
    """`partner` leads from nodes of the first graph (placeholders too) to those of the second; `stands_in` to what all
    readers of a node read instead; `changed` are the matched calls that say something else or have another type."""

    partner: dict[fx.Node, fx.Node]
    stands_in: dict[fx.Node, fx.Node] = field(default_factory=dict)
    changed: list[tuple[fx.Node, fx.Node]] = field(default_factory=list)

    def now(self, node: fx.Node) -> fx.Node | None:
        """What the readers of a node are expected to read."""
        return self.stands_in.get(node, self.partner.get(node))


def align(before: Program, after: Program, name: str) -> Alignment:
    """Match the nodes of the entry `name` of both programs."""
    old, new = before.entries[name], after.entries[name]
    found = Alignment(_placeholders(old, new))
    _match(before, after, list(old.calls()), list(new.calls()), (_stays, _says, _place), found.partner)
    _match_moved(old, new, found.partner)
    _substitute(old, new, found)
    for a, b in found.partner.items():
        if a.op == "call_function" and not _same(before, after, a, b, found):
            found.changed.append((a, b))
    return found


def _placeholders(old: Entry, new: Entry) -> dict[fx.Node, fx.Node]:
    """Rows and inputs by name."""
    named = {(n.meta["kind"] == Kind.INPUT, n.meta["name"]): n for n in new.placeholders()}
    keys = {n: (n.meta["kind"] == Kind.INPUT, n.meta["name"]) for n in old.placeholders()}
    return {node: named[key] for node, key in keys.items() if key in named}


def _leaf(node: fx.Node) -> Hashable:
    return ("value",) if node.op != "placeholder" else (node.meta["kind"] == Kind.INPUT, node.meta["name"])


def _site(program: Program, node: fx.Node) -> Hashable:
    """Module and source line: ids are one capture's own."""
    return program.site(node)


def _stays(program: Program, node: fx.Node) -> Hashable:
    return (_site(program, node), signature(node, _leaf))


def _says(program: Program, node: fx.Node) -> Hashable:
    return signature(node, _leaf)


def _place(program: Program, node: fx.Node) -> Hashable:
    return (_site(program, node), op_name(node.target))


def _match(
    before: Program,
    after: Program,
    old: Sequence[fx.Node],
    new: Sequence[fx.Node],
    keys: Sequence[Key],
    partner: dict[fx.Node, fx.Node],
) -> None:
    """Match two stretches by the first key, and what lies between the matches by the others."""
    if not old or not new or not keys:
        return
    intern = Interner()
    a = [intern(keys[0](before, node)) for node in old]
    b = [intern(keys[0](after, node)) for node in new]
    at, to = 0, 0
    for i, j in [*common_subsequence(a, b), (len(a), len(b))]:
        _match(before, after, old[at:i], new[to:j], keys[1:], partner)
        at, to = i + 1, j + 1
        if i < len(a):
            partner[old[i]] = new[j]


def common_subsequence(a: Sequence[int], b: Sequence[int]) -> list[tuple[int, int]]:
    """The longest common subsequence, as pairs of positions in rising order.

    Bit-parallel: after each symbol of `b` the zeros of `row` mark where in `a` the length grows by one (Hyyro, "Bit-
    parallel LCS-length computation revisited", 2004). Time and memory are len(a) x len(b) bits; equal ends are cut off.
    """
    start = _common_start(a, b)
    rest = _common_start(a[start:][::-1], b[start:][::-1])
    inner_a, inner_b = a[start : len(a) - rest], b[start : len(b) - rest]
    where: dict[int, int] = {}
    for k, symbol in enumerate(inner_a):
        where[symbol] = where.get(symbol, 0) | 1 << k
    row = every = (1 << len(inner_a)) - 1
    rows = []
    for symbol in inner_b:
        grown = row & where.get(symbol, 0)
        row = ((row + grown) | (row - grown)) & every
        rows.append(row)
    i, j = len(inner_a), len(inner_b)
    pairs = [(len(a) - k, len(b) - k) for k in range(1, rest + 1)]
    while i and j:
        if rows[j - 1] >> (i - 1) & 1:
            i -= 1
            continue
        j -= 1
        if not j or rows[j - 1] >> (i - 1) & 1:
            i -= 1
            pairs.append((start + i, start + j))
    return [(k, k) for k in range(start)] + pairs[::-1]


def _common_start(a: Sequence[int], b: Sequence[int]) -> int:
    return next((k for k, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _match_moved(old: Entry, new: Entry, partner: dict[fx.Node, fx.Node]) -> None:
    """Match what is left by the whole computation behind it: a functional graph has no other order."""
    intern = Interner()
    numbers: dict[fx.Node, int] = {}
    for entry in (old, new):
        for node in entry.graph.nodes:
            if node.op != "output":
                key = _leaf(node) if node.op == "placeholder" else signature(node, lambda n: numbers[n])
                numbers[node] = intern(key)
    taken = set(partner.values())
    free: dict[int, list[fx.Node]] = {}
    for node in new.calls():
        if node not in taken:
            free.setdefault(numbers[node], []).append(node)
    for node in old.calls():
        if node not in partner and free.get(numbers[node]):
            partner[node] = free[numbers[node]].pop(0)


def _operands(node: fx.Node) -> tuple[Hashable, list[fx.Node]]:
    """A call apart from its operands, and those in order."""
    operands: list[fx.Node] = []

    def leaf(operand: fx.Node) -> Hashable:
        operands.append(operand)
        return ("value",)

    return (op_name(node.target), skeleton(node.args, leaf), skeleton(node.kwargs, leaf)), operands


def _substitute(old: Entry, new: Entry, found: Alignment) -> None:
    read: dict[fx.Node, set[fx.Node]] = {}
    for x, y in _reads(old, new, found.partner):
        read.setdefault(x, set()).add(y)
    present = set(found.partner.values())
    for x, values in read.items():
        if len(values) == 1:
            (y,) = values
            if y is not found.partner.get(x) and (x not in found.partner or y not in present):
                found.stands_in[x] = y


def _reads(old: Entry, new: Entry, partner: dict[fx.Node, fx.Node]) -> Iterator[tuple[fx.Node, fx.Node]]:
    """What matched calls and outputs read in the one graph and, at the same place, in the other."""
    for a, b in partner.items():
        if a.op == "call_function" and a.target is b.target:
            ours, theirs = _operands(a)[1], _operands(b)[1]
            if len(ours) == len(theirs):
                yield from zip(ours, theirs, strict=True)
    values = {str(o): v for o, v in zip(new.outputs, new.output_values, strict=True)}
    for output, x in zip(old.outputs, old.output_values, strict=True):
        y = values.get(str(output))
        if isinstance(x, fx.Node) and isinstance(y, fx.Node):
            yield x, y


def _same(before: Program, after: Program, a: fx.Node, b: fx.Node, found: Alignment) -> bool:
    (says, ours), (now_says, theirs) = _operands(a), _operands(b)
    return (
        says == now_says
        and all(found.now(x) is y for x, y in zip(ours, theirs, strict=True))
        and value_text(a.meta.get("val"), before.names) == value_text(b.meta.get("val"), after.names)
    )
