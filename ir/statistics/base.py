"""What a statistic is: sums (or maxima) over the rows of some values.

A row is what one position of one sample has: a token's vector. Since every statistic is a sum, one loop gathers all of
them: batch after batch, with padding left out, interrupted and resumed, spread over processes that add up in the end.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic.ir.statistics.rows import Rows

Sums = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Statistic(ABC):
    """One thing to be known about some values. Equal statistics are gathered once.

    Subclasses are frozen dataclasses whose fields are names of nodes and plain options: `key` says them all.
    """

    #: Names of sums that are maxima: they are joined by the greater, not added.
    maxima: ClassVar[frozenset[str]] = frozenset()
    #: The axis of the first node's value along which positions lie, unless it is flat.
    positions: ClassVar[int] = 1
    #: Whether gradients of the loss by the values are looked at, rather than the values.
    gradient: ClassVar[bool] = False

    @property
    @abstractmethod
    def nodes(self) -> tuple[str, ...]:
        """The nodes whose values it is about."""

    @abstractmethod
    def sums(self, values: Sequence[torch.Tensor], rows: Rows) -> Sums:
        """What a batch adds: tensors of the same shapes for every batch."""

    @abstractmethod
    def size(self, shapes: Sequence[tuple[Any, ...]]) -> int:
        """How many numbers its sums hold, from the shapes of its values (sizes, or expressions of them)."""

    def least_rows(self, shapes: Sequence[tuple[Any, ...]]) -> int:
        """How many rows it takes for its sums to say anything."""
        return 1

    @property
    def key(self) -> str:
        return repr(self)


def add(into: Sums, more: Sums, maxima: frozenset[str]) -> None:
    """Join a batch's sums to those of the batches before, in float64."""
    for name, value in more.items():
        wide = value.detach().to("cpu", torch.float64)
        if name not in into:
            into[name] = wide.clone()
        elif name in maxima:
            torch.maximum(into[name], wide, out=into[name])
        else:
            into[name] += wide


def width_of(shape: tuple[Any, ...]) -> int:
    """The last size of a value, which is fixed wherever statistics are gathered by channel."""
    return int(shape[-1])


class Statistics(Mapping[Statistic, Sums]):
    """What was gathered: for each statistic its sums, float64.

    Reading a statistic that was not asked for raises KeyError.
    """

    def __init__(self, found: Mapping[str, Sums], asked: Sequence[Statistic]) -> None:
        self._found, self._asked = dict(found), {statistic.key: statistic for statistic in asked}

    def __getitem__(self, statistic: Statistic) -> Sums:
        return self._found[statistic.key]

    def mean(self, statistic: Statistic, name: str) -> torch.Tensor:
        """A sum divided by the number of rows, float64."""
        sums = self[statistic]
        return sums[name] / sums["rows"]

    def __iter__(self) -> Any:
        return iter(self._asked.values())

    def __len__(self) -> int:
        return len(self._asked)


def finite(sums: Sums) -> bool:
    return all(bool(torch.isfinite(value).all()) for value in sums.values())
