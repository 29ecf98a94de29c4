"""What is to be decided when layers are dropped: which units there are, how many of each class go, and how states of
them are judged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from laconic.ir.depth import Block, Depth, Unit
from laconic.ir.errors import UsageError
from laconic.ir.gated import Gate, Instead, Setting, scaled_by
from laconic.ir.score import Scorer
from laconic.ir.types import nbytes
from laconic.passes.allocate import Class, Space, State, going
from laconic.passes.deciding import ENTRY, Task


@dataclass(frozen=True)
class Layer:
    """What may be dropped: a block, or one branch. What comes out of it, at node `out` of `forward`, is then what goes
    in, `v`. Layers of one `kind` cost the same."""

    name: str
    kind: str
    site: int
    v: str
    out: str
    units: tuple[Unit, ...]
    block: Block | None = None

    @property
    def gate(self) -> Gate:
        return Gate(self.name, self.out, beside=self.v)


@dataclass(frozen=True)
class DropTask(Task):
    """Layers, and which states (1: dropped) are legal. `steps` are those of training; `repair`: whether a short
    search mends what it leads to."""

    layers: tuple[Layer, ...]
    legal: Space
    steps: int
    repair: bool = True

    @property
    def space(self) -> Space:
        return self.legal

    @cached_property
    def scorer(self) -> Scorer:
        return self.data.scorer(self.program, [layer.gate for layer in self.layers])

    def candidate(self, state: State) -> dict[str, Setting]:
        """What the gates do in a state."""
        return {layer.name: Instead(layer.v) for layer, level in zip(self.layers, state, strict=True) if level}

    def fitness(self, state: State, batches: Sequence[int]) -> float:
        return self.scorer(self.candidate(state), batches)

    def loses(self, state: State, factors: Mapping[int, float] | None = None) -> float:
        """What a state loses where layers that stay scale what they add."""
        scaled = {self.layers[k].name: scaled_by(factor) for k, factor in (factors or {}).items()}
        return self.scorer(self.candidate(state) | scaled, self.judged)


@dataclass(frozen=True)
class Choice:
    """A method's decision: the state; what each layer was rated, where it rates layers; by what factor each that stays
    scales what it adds, where it trained that."""

    state: State
    scores: tuple[float, ...] = ()
    factors: dict[int, float] = field(default_factory=dict)


def blocks_of(depth: Depth) -> list[Layer]:
    """The blocks of all runs, those of one run alike."""
    return [
        _layer(depth, f"block {block.number}", f"blocks of run {block.run}", block.units, block)
        for block in depth.blocks
        if ENTRY in depth.branches(block.units[0].stream, block.units[0].place)
    ]


def branches_of(depth: Depth) -> list[Layer]:
    """The branches of all streams; those that hold the same and as many bytes are alike."""
    found = []
    for unit in depth.units:
        if ENTRY in depth.branches(unit.stream, unit.place):
            size = sum(nbytes(depth.program.weights[row].value) for row in unit.rows)
            kind = f"{unit.kind} of stream {unit.stream}, {size} bytes"
            found.append(_layer(depth, f"{unit.kind} {unit.place}", kind, (unit,)))
    return found


def _layer(depth: Depth, name: str, kind: str, units: tuple[Unit, ...], block: Block | None = None) -> Layer:
    first, last = (depth.branches(unit.stream, unit.place)[ENTRY] for unit in (units[0], units[-1]))
    stream = units[0].stream
    name = f"{name} of stream {stream}" if stream or (block and block.run) else name
    site = first.add.meta.get("site", -1)
    return Layer(name, kind, site, first.v.name, (last.out if block else last.add).name, units, block)


def space_of(depth: Depth, layers: Sequence[Layer], keep: float, protect: int) -> Space:
    """The states that drop (1 - keep) of each kind of layer, rounded, and none of the first and last `protect` of it,
    nor any of which something inside is used elsewhere.

    Raises UsageError if so many cannot go.
    """
    kinds: dict[str, list[int]] = {}
    for k, layer in enumerate(layers):
        kinds.setdefault(layer.kind, []).append(k)
    classes = []
    for kind, units in kinds.items():
        budget = going(keep, len(units))
        inner = units[protect : len(units) - protect]
        locked = {unit: why for unit in inner if (why := _locked(depth, layers[unit]))} if budget else {}
        free = tuple(unit for unit in inner if unit not in locked)
        if budget > len(free) or budget == len(units):
            reasons = [f"the first and last {protect} stay"] if protect else []
            reasons += [f"{layers[unit].name} cannot go: {why}" for unit, why in list(locked.items())[:1]]
            raise UsageError(
                f"{budget} of {len(units)} {kind} cannot be dropped",
                why="; ".join(reasons) or "one at least stays",
                hint="keep more, or protect less",
            )
        if budget:
            classes.append(Class(free, budget))
    return Space(len(layers), tuple(classes))


def _locked(depth: Depth, layer: Layer) -> str:
    """Why a layer cannot be dropped, or nothing."""
    try:
        depth.refuse(layer.units)
    except UsageError as problem:
        return problem.why or problem.what
    return ""
