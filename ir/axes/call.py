"""A call as its rule sees it: what it takes and returns, and what a rule may say of the axes of both."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any, TypeAlias

from torch import fx

from laconic.ir.axes.dims import Dim, Pin, fresh, pin, size_of
from laconic.ir.axes.labels import Axes, Domain, Gather, Label, Literal, Place, Resplit, Several, flat
from laconic.ir.traits import argument
from laconic.ir.types import Size, TensorType, TupleType, same_size, type_of

Rule: TypeAlias = Callable[["Call"], "Label | Several | None"]


class Call:
    """A call on its way into the labels of its program."""

    def __init__(self, axes: Axes, node: fx.Node) -> None:
        self.axes, self.node = axes, node
        self.type = type_of(node.meta["val"])
        self.asked: set[fx.Node] = set()

    # What it takes and returns

    def given(self, name: str) -> Any:
        """An argument by its name in the schema, its default if it is not given."""
        return argument(self.node, name)

    def takes(self, name: str) -> bool:
        """Whether the op has an argument of this name; overloads differ."""
        schema: Any = self.node.target._schema  # type: ignore[union-attr]
        return any(declared.name == name for declared in schema.arguments)

    @property
    def operand(self) -> fx.Node:
        """Its first operand."""
        value = self.node.args[0]
        assert isinstance(value, fx.Node)
        return value

    def place(self, name: str, *more: int) -> Place | None:
        """Where an argument stands in the node; None if it is not given."""
        schema: Any = self.node.target._schema  # type: ignore[union-attr]
        position = next(k for k, declared in enumerate(schema.arguments) if declared.name == name)
        if position < len(self.node.args):
            return ("args", position, *more)
        return ("kwargs", name, *more) if name in self.node.kwargs else None

    def dims(self, value: fx.Node) -> list[Dim]:
        """The labels of an operand's axes."""
        label = self.axes.labels[value]
        assert isinstance(label, tuple)
        return list(label)

    def sizes(self, value: fx.Node) -> tuple[Size, ...]:
        kind = type_of(value.meta["val"])
        assert isinstance(kind, TensorType)
        return kind.shape

    def domain(self, value: fx.Node) -> Domain | None:
        """What an operand's integers count, if that is known. A rule that asks says itself what becomes of them."""
        self.asked.add(value)
        return self.axes.domains.get((value, None))

    @property
    def shape(self) -> tuple[Size, ...]:
        """The sizes of its one result."""
        assert isinstance(self.type, TensorType)
        return self.type.shape

    @property
    def shapes(self) -> list[tuple[Size, ...]]:
        """The sizes of each of its results."""
        assert isinstance(self.type, TupleType)
        return [part.shape if isinstance(part, TensorType) else () for part in self.type.parts]

    # What its rule says

    def join(self, a: Dim, b: Dim) -> None:
        self.axes.join(a, b, self.node)

    def pin(self, dims: Iterable[Dim], kind: Pin, reason: str) -> None:
        for dim in dims:
            pin(dim, kind, reason, self.node)

    def literal(self, place: Place | None, dim: Dim, times: int = 1, plus: int = 0) -> None:
        """A number among the arguments spells `times` * the size of an axis `plus` something."""
        if place is not None and dim:
            self.axes.literals.append(Literal(self.node, place, dim, times, plus))

    def spells(self, name: str, dims: Sequence[Dim]) -> None:
        """A list of sizes among the arguments, one an axis; -1 stays as it is."""
        for k, (said, dim) in enumerate(zip(self.given(name), dims, strict=True)):
            if not (isinstance(said, int) and said == -1):
                self.literal(self.place(name, k), dim)

    def resplit(self, axis: int, parts: Sequence[Dim]) -> None:
        self.axes.resplits.append(Resplit(self.node, axis, tuple(parts)))

    def gathers(self, dim: Dim, *operands: tuple[fx.Node, int], neutral: float = 0.0, bias: str | None = None) -> None:
        """It makes one of all positions of an axis: see `Gather`."""
        counted = tuple((value, axis % len(self.dims(value))) for value, axis in operands)
        self.axes.gathers.append(Gather(self.node, dim, counted, neutral, bias))

    def chooses(self, dim: Dim) -> None:
        """It takes some positions of an axis and leaves the others alone."""
        self.axes.choosing.setdefault(self.node, []).append(dim)

    def arranges(self, size: Size, by: Domain | None) -> Dim:
        """A new axis, in the order of values: of what they count, if they count positions."""
        (dim,) = self.fresh([size], Pin.ARRANGED, "in the order of values")
        if by is not None and by.origin is None:
            self.axes.arranged.append((dim, by, self.node))
        return dim

    def ignores(self, value: fx.Node) -> None:
        """An operand's shape is all that it takes of it."""
        self.asked.add(value)

    def observe_others(self) -> None:
        """Whatever counts positions, and its rule did not ask about, is used as numbers."""
        for value in self.node.all_input_nodes:
            if value not in self.asked:
                self.observe(value)

    def observe(self, value: Any, reason: str = "its positions are used as numbers") -> None:
        """An operand's integers are used for something else than choosing positions."""
        if isinstance(value, fx.Node):
            self.axes.observe(self.domain(value), self.node, reason)

    def counts(self, dim: Dim, *, output: int | None = None, origin: fx.Node | None = None) -> None:
        """The integers of its result, or of that result of it, are positions of an axis."""
        self.axes.domains[self.node, output] = Domain(dim, origin)

    def counts_as(self, value: fx.Node, *, output: int | None = None) -> None:
        """Its result counts what an operand counts."""
        domain = self.domain(value)
        if domain is not None:
            self.axes.domains[self.node, output] = domain

    def indexed(self, dim: Dim, index: fx.Node) -> None:
        """Integers choose positions of an axis: of the one that they count, or of who knows which."""
        domain = self.domain(index)
        if domain is not None and same_size(size_of(domain.dim), size_of(dim)):
            self.join(domain.dim, dim)
            self.chooses(dim)
            if domain.origin is not None:
                self.axes.indexing.setdefault(domain.origin, self.node)
            return
        self.observe(index, "its positions index an axis of another size")
        self.pin([dim], Pin.DATA_INDEX, "chosen by values that are known at run time only")

    def without(self, dims: Sequence[Dim], axes: Collection[int]) -> Label:
        """What a reduction over these axes leaves: nothing of them, or with `keepdim` axes of size 1."""
        keep = self.takes("keepdim") and self.given("keepdim")
        return tuple(() if k in axes else dim for k, dim in enumerate(dims) if keep or k not in axes)

    def opaque(self, reason: str) -> Label | Several | None:
        """No freedom for any axis that it takes or returns."""
        self.axes.unknown.setdefault(self.node, reason)
        for value in self.node.all_input_nodes:
            self.observe(value, reason)
            for label in flat(self.axes.labels.get(value)):
                self.pin(label, Pin.OPAQUE, reason)
        found = self.axes.fresh_like(self.type)
        for label in flat(found):
            self.pin(label, Pin.OPAQUE, reason)
        return found

    def fresh(self, sizes: Iterable[Size], kind: Pin | None = None, reason: str = "") -> Label:
        """New axes, pinned if a kind is given."""
        found = tuple(map(fresh, sizes))
        if kind is not None:
            self.pin(found, kind, reason)
        return found
