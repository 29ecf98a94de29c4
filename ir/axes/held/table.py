"""What a rule is asked, and the table that the families of rules fill."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import fx

from laconic.ir.axes.table import Table
from laconic.ir.traits import argument
from laconic.ir.types import Size, TensorType, same_size, type_of


@dataclass(frozen=True, eq=False)
class Held:
    """Along one axis: at which positions all elements are one number whatever the inputs are, and that number.

    Both are (size of the axis,); `value` has the dtype of what holds it, and says nothing where it is not `known`. Of a
    value as a whole they are (1,).
    """

    known: torch.Tensor
    value: torch.Tensor

    def at(self, number: float) -> torch.Tensor:
        """At which positions it is this number, (size,) bool."""
        return self.known & (self.value == number)

    def __bool__(self) -> bool:
        return bool(self.known.any())

    def __getitem__(self, positions: Any) -> Held:
        return Held(self.known[positions], self.value[positions])

    def spread(self, size: int) -> Held:
        """The same at each of so many positions."""
        return Held(self.known.expand(size), self.value.expand(size))

    @staticmethod
    def everywhere(number: float, size: int, dtype: torch.dtype) -> Held:
        return Held(torch.ones(size, dtype=torch.bool), torch.full((size,), number, dtype=dtype))

    @staticmethod
    def where(known: torch.Tensor, number: float, dtype: torch.dtype) -> Held:
        """One number where it is known."""
        return Held(known, torch.full(known.shape, number, dtype=dtype))


def agreeing(found: Iterable[Held | None]) -> Held | None:
    """Where all hold the same."""
    first, *rest = found
    for other in rest:
        if first is None or other is None:
            return None
        first = Held(first.known & other.known & (first.value == other.value), first.value)
    return first


class Known(Protocol):
    """Where a rule finds out what operands hold."""

    def of(self, value: fx.Node, axis: int | None) -> Held | None: ...
    def weight(self, value: fx.Node) -> torch.Tensor | None: ...


@dataclass(frozen=True)
class Asked:
    """A question to a rule: what does this axis of this result hold? `axis` None asks for the value as a whole; result
    `output` of several."""

    known: Known
    node: fx.Node
    kind: TensorType
    axis: int | None
    output: int = 0

    @property
    def size(self) -> int:
        """How many positions are asked for."""
        return 1 if self.axis is None else int(self.kind.shape[self.axis])

    @property
    def rank(self) -> int:
        return len(self.kind.shape)

    @property
    def op(self) -> str:
        """The name of the op, without namespace and overload."""
        return str(self.node.target._schema.name.partition("::")[2])  # type: ignore[union-attr]

    def given(self, name: str) -> Any:
        return argument(self.node, name)

    @property
    def operand(self) -> fx.Node:
        value = self.node.args[0]
        assert isinstance(value, fx.Node)
        return value

    def shape(self, value: fx.Node) -> tuple[Size, ...]:
        kind = type_of(value.meta["val"])
        assert isinstance(kind, TensorType)
        return kind.shape

    def of(self, value: fx.Node, axis: int | None) -> Held | None:
        """What an operand holds along an axis of its own, or as a whole."""
        if axis is None or same_size(self.shape(value)[axis], 1):
            return self.known.of(value, None)
        return self.known.of(value, axis)

    def aligned(self, value: fx.Node) -> Held | None:
        """What an operand holds along the axis that is asked for, right ends aligned."""
        axis = None if self.axis is None else self.axis - self.rank + len(self.shape(value))
        if axis is None or axis < 0 or same_size(self.shape(value)[axis], 1):
            found = self.known.of(value, None)
            return None if found is None else found.spread(self.size)
        return self.known.of(value, axis)


HeldRule: TypeAlias = Callable[[Asked], "Held | None"]
rule: Table[HeldRule] = Table()
