"""The classes of a program's axes in words: what an axis counts, what has it, what may be done to it and why not.

What an axis counts is read off the sites that structure finds (`laconic.ir.structure`) and the ops that gather over it;
names are never read.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from torch import fx

from laconic.ir.axes.dims import SOFT, Dim, Factor, Pin, Why, factors
from laconic.ir.axes.labels import Axes, flat
from laconic.ir.axes.rewriter import free, row_factors
from laconic.ir.program import Kind
from laconic.ir.structure import Attention, EntryStructure, Moe, find_structure
from laconic.ir.types import Size


@dataclass(frozen=True)
class AxisClass:
    """Axes that are one: `what` they count, the rows of the weight table that have it (weights and states), how many
    numbers in the graphs spell it, what pins it, and the call at which it is first seen."""

    factor: Factor
    what: str
    weights: tuple[str, ...]
    states: tuple[str, ...]
    literals: int
    pins: tuple[tuple[Pin, Why], ...]
    first: fx.Node | None

    @property
    def size(self) -> Size:
        return self.factor.size

    @property
    def permutable(self) -> bool:
        """Whether its positions may stand in any order."""
        return free(self.factor) and isinstance(self.size, int)

    @property
    def shrinkable(self) -> bool:
        """Whether positions may be left out, as if they were zero."""
        return not self.pins and isinstance(self.size, int)


@dataclass(frozen=True)
class Coverage:
    """How much of a program is understood. `calls` of which `known` have a rule; `axes` of rows of the weight table, of
    which `free` hold only what may be permuted and `pinned` are held by each kind of hard pin; `elements` of weights,
    of which `movable` have at least one free axis."""

    calls: int
    known: int
    axes: int
    free: int
    pinned: dict[Pin, int]
    elements: int
    movable: int
    misfits: int


def classes(axes: Axes) -> list[AxisClass]:
    """All classes that some row of the weight table has, in the order of the table."""
    what, first, literals = _what(axes), first_calls(axes), _literals(axes)
    members: dict[Factor, list[str]] = {}
    for name, label in axes.rows.items():
        for factor in dict.fromkeys(f for dim in label for f in factors(dim)):
            members.setdefault(factor, []).append(name)
    table = axes.program.weights
    return [
        AxisClass(
            factor,
            what.get(factor) or _by_pins(factor) if factor in first else "an axis of a weight that nothing reads",
            tuple(name for name in members[factor] if table[name].kind is not Kind.STATE),
            tuple(name for name in members[factor] if table[name].kind is Kind.STATE),
            literals[factor],
            tuple(factor.pins.items()),
            first.get(factor),
        )
        for factor in row_factors(axes)
    ]


def coverage(axes: Axes) -> Coverage:
    """How much of a program the analysis understands."""
    calls = sum(1 for entry in axes.program.entries.values() for _ in entry.calls())
    pinned: Counter[Pin] = Counter()
    free_axes = all_axes = elements = movable = 0
    for name, label in axes.rows.items():
        value = axes.program.weights[name].value
        own = [dim for dim in label if dim]
        moves = [any(free(f) for f in factors(dim)) for dim in own]
        all_axes += len(own)
        free_axes += sum(all(free(f) for f in factors(dim)) for dim in own)
        pinned.update(kind for dim in own for kind in {k for f in factors(dim) for k in f.pins if k not in SOFT})
        elements += value.numel()
        movable += value.numel() if any(moves) else 0
    known = calls - len(axes.unknown)
    return Coverage(calls, known, all_axes, free_axes, dict(pinned), elements, movable, len(axes.misfits))


def first_calls(axes: Axes) -> dict[Factor, fx.Node]:
    """The first call that takes each factor."""
    found: dict[Factor, fx.Node] = {}
    for node in axes.labels:
        for value in node.all_input_nodes:
            for factor in axes.factors_of(value):
                found.setdefault(factor, node)
    return found


def _literals(axes: Axes) -> Counter[Factor]:
    found: Counter[Factor] = Counter()
    for literal in axes.literals:
        found.update(set(factors(literal.dim)))
    for split in axes.resplits:
        found.update({f for part in split.parts for f in factors(part)})
    return found


# What they count


def _what(axes: Axes) -> dict[Factor, str]:
    found: dict[Factor, str] = {}

    def say(dim: Dim, what: str) -> None:
        for factor in factors(dim):
            found.setdefault(factor, what)

    over = {gather.node: gather.dim for gather in axes.gathers}
    for structure in find_structure(axes.program).values():
        for attention in structure.attentions:
            _attention(axes, attention, over, say)
        for mlp in structure.mlps:
            say(over.get(mlp.down.node, ()), "hidden units")
        for moe in structure.moes:
            _experts(axes, moe, say)
        _streams(axes, structure, say)
    for gather in axes.gathers:
        if "conv" in str(gather.node.target):
            say(gather.dim, "channels")
    return found


_Say = Callable[[Dim, str], None]


def _attention(axes: Axes, site: Attention, over: dict[fx.Node, Dim], say: _Say) -> None:
    """What leaves attention is heads of values; what else its queries have is the width that they share with keys."""
    if site.o is None:
        return
    leaving = list(factors(over.get(site.o.node, ())))
    if leaving and leaving[-1].size == site.value_dim:
        say((leaving.pop(),), "width of values")
    shared = site.kv_heads < site.heads
    for k, factor in enumerate(leaving):
        groups = shared and k == 0 and factor.size == site.kv_heads
        say((factor,), "groups of heads" if groups else "heads of a group" if shared else "heads")
    for projection in (site.q, site.k):
        if projection is not None:
            label = flat(axes.labels[projection.node])[0]
            say(label[-1], "rotary pairs" if site.rotary else "width of queries and keys")


def _experts(axes: Axes, site: Moe, say: _Say) -> None:
    if site.router.weight is not None:
        label = flat(axes.labels[site.router.weight])[0]
        for dim in label:
            if site.experts in [factor.size for factor in factors(dim)] and dim is not label[-1]:
                say(dim, "experts")
    down = flat(axes.labels.get(site.down))[0] if site.down is not None else ()
    if len(down) == 3:
        say(down[-2 if site.transposed else -1], "hidden units of experts")


def _streams(axes: Axes, structure: EntryStructure, say: _Say) -> None:
    """A residual stream's own axis is that along which it is normed: its last, or its channels."""
    for stream in structure.streams:
        dims = flat(axes.labels.get(stream.start))[0]
        image = len(dims) == 4 and not any(norm.kind in ("layer", "rms") for norm in structure.norms)
        if len(dims) > 1:
            say(dims[1] if image else dims[-1], "residual stream")


_BY_PINS = {
    Pin.IO: "an axis that the caller sees",
    Pin.DATA_INDEX: "rows of a table",
    Pin.ORDER: "places in order",
    Pin.OPAQUE: "an axis of an op without a rule",
    Pin.MISALIGNED: "axes that do not align",
}


def _by_pins(factor: Factor) -> str:
    return next((said for kind, said in _BY_PINS.items() if kind in factor.pins), "inner axis")
