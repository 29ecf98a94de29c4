"""What the analysis finds: a label for every axis, and the numbers in the graph that spell their sizes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from torch import fx

from laconic.ir.axes.dims import Dim, Factor, Pin, factors, fresh, join, pin
from laconic.ir.program import Program
from laconic.ir.types import TensorType, TupleType, ValueType

#: The dims of a value, one an axis.
Label: TypeAlias = tuple[Dim, ...]
#: The way to a number in a call: ("args", 1, 0), ("kwargs", "size", 0).
Place: TypeAlias = tuple[Any, ...]


@dataclass(frozen=True)
class Several:
    """The labels of a call with several results; None where there is no tensor."""

    parts: tuple[Label | None, ...]


def flat(label: Label | Several | None) -> list[Label]:
    """The labels of one value, or of each value of several."""
    if label is None:
        return []
    return [part for part in label.parts if part is not None] if isinstance(label, Several) else [label]


@dataclass(frozen=True)
class Literal:
    """A number in a call that is `times * size of dim + plus`."""

    node: fx.Node
    place: Place
    dim: Dim
    times: int = 1
    plus: int = 0


@dataclass(frozen=True)
class Resplit:
    """A call that cuts an axis into parts of equal size, and the parts: once they differ it must name their sizes."""

    node: fx.Node
    axis: int
    parts: tuple[Dim, ...]


@dataclass(frozen=True)
class Gather:
    """A call that makes one of all positions of an axis: a sum of products, a softmax, a maximum.

    A position may be left out if one of the operands (value, axis) holds the `neutral` element of that there, whatever
    the inputs are. With `bias`, the name of an argument, it may too if the first one holds another constant there, and
    what that adds goes into the bias.
    """

    node: fx.Node
    dim: Dim
    operands: tuple[tuple[fx.Node, int], ...]
    neutral: float = 0.0
    bias: str | None = None


@dataclass(frozen=True)
class Domain:
    """What integers count: positions of an axis. `origin` is the arange that made them, if one did."""

    dim: Dim
    origin: fx.Node | None = None


@dataclass
class Axes:
    """The labels of a program, which must not change while they are in use.

    `rows` are those of the weight table, one for all entries. Axes end in `gathers`, and in calls that take some of
    their positions and leave the others alone (`choosing`); all else keeps positions apart. `arranged` are the axes in
    the order of integers, with what these count, and where that was made; `ties` tells by what values may be equal.
    `counted` holds the aranges whose values are used as numbers, and where; `indexing` those that choose positions.
    `scales` are the attention calls whose scale is the default, and the axis that it comes from; `squeezes` the calls
    that leave out axes of one position, and which. `unknown` are the calls without a rule, with the reason; `misfits`
    those at which axes did not align.
    """

    program: Program
    labels: dict[fx.Node, Label | Several | None] = field(default_factory=dict)
    rows: dict[str, Label] = field(default_factory=dict)
    literals: list[Literal] = field(default_factory=list)
    resplits: list[Resplit] = field(default_factory=list)
    scales: list[tuple[fx.Node, Dim]] = field(default_factory=list)
    gathers: list[Gather] = field(default_factory=list)
    choosing: dict[fx.Node, list[Dim]] = field(default_factory=dict)
    arranged: list[tuple[Dim, Domain, fx.Node]] = field(default_factory=list)
    domains: dict[tuple[fx.Node, int | None], Domain] = field(default_factory=dict)
    ties: dict[fx.Node, str | None] = field(default_factory=dict)
    counted: dict[fx.Node, fx.Node] = field(default_factory=dict)
    indexing: dict[fx.Node, fx.Node] = field(default_factory=dict)
    squeezes: list[tuple[fx.Node, list[int]]] = field(default_factory=list)
    unknown: dict[fx.Node, str] = field(default_factory=dict)
    misfits: list[fx.Node] = field(default_factory=list)

    def join(self, a: Dim, b: Dim, node: fx.Node) -> None:
        if not join(a, b, node):
            self.misfits.append(node)

    def observe(self, domain: Domain | None, node: fx.Node, reason: str) -> None:
        """Integers that count positions are used as numbers."""
        if domain is not None and domain.origin is not None:
            self.counted.setdefault(domain.origin, node)
        elif domain is not None:
            pin(domain.dim, Pin.OBSERVED, reason, node)

    def factors_of(self, value: fx.Node) -> Iterator[Factor]:
        """The factors in the labels of a value, each as often as it stands there."""
        return (f for label in flat(self.labels.get(value)) for dim in label for f in factors(dim))

    def fresh_like(self, kind: ValueType | None) -> Label | Several | None:
        """New axes for values of this type."""
        if isinstance(kind, TensorType):
            return tuple(map(fresh, kind.shape))
        if isinstance(kind, TupleType):
            parts = [self.fresh_like(part) for part in kind.parts]
            return Several(tuple(None if isinstance(part, Several) else part for part in parts))
        return None
