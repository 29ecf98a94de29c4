"""What channels hold: sums by channel, and products of channels, of a value or of the loss's gradient by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic.ir.statistics.base import Statistic, Sums, width_of
from laconic.ir.statistics.rows import Rows


@dataclass(frozen=True)
class Moments(Statistic):
    """For each channel of a value: `total`, `squares`, `absolute` and `greatest` of |x|, (width,); `rows`, (). Of the
    channels `columns` (start, stop) alone, if they are named."""

    node: str
    columns: tuple[int, int] | None = None

    maxima: ClassVar[frozenset[str]] = frozenset({"greatest"})

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.node,)

    def sums(self, values: Sequence[torch.Tensor], rows: Rows) -> Sums:
        x = rows.flat(self._wide(values[0])).double()
        x = x if self.columns is None else x[:, slice(*self.columns)]
        absolute = x.abs()
        return {
            "rows": torch.tensor(len(x)),
            "total": x.sum(0),
            "squares": x.square().sum(0),
            "absolute": absolute.sum(0),
            "greatest": absolute.amax(0) if len(x) else absolute.new_zeros(x.shape[1]),
        }

    def _wide(self, value: torch.Tensor) -> torch.Tensor:
        return value

    def size(self, shapes: Sequence[tuple[Any, ...]]) -> int:
        start, stop = self.columns or (0, width_of(shapes[0]))
        return 1 + 4 * (stop - start)


@dataclass(frozen=True)
class HeadMoments(Moments):
    """The same of a value (samples, heads, positions, width): a row is that of all heads side by side."""

    positions: ClassVar[int] = 2

    def _wide(self, value: torch.Tensor) -> torch.Tensor:
        return value.transpose(1, 2).flatten(2)

    def size(self, shapes: Sequence[tuple[Any, ...]]) -> int:
        return 1 + 4 * int(shapes[0][1]) * width_of(shapes[0])


@dataclass(frozen=True)
class Covariance(Statistic):
    """Products of channels over the rows: `products` x^T x, (width, width), `total` (width,) and `rows` ().

    What second-order pruning, whitening and quantisation ask of a layer's input.
    """

    node: str

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.node,)

    def sums(self, values: Sequence[torch.Tensor], rows: Rows) -> Sums:
        x = rows.flat(values[0]).float()
        return {"rows": torch.tensor(len(x)), "total": x.sum(0, dtype=torch.float64), "products": x.T @ x}

    def size(self, shapes: Sequence[tuple[Any, ...]]) -> int:
        width = width_of(shapes[0])
        return 1 + width + width * width

    def least_rows(self, shapes: Sequence[tuple[Any, ...]]) -> int:
        """As many as there are channels, or the products cannot be told apart from those of fewer."""
        return width_of(shapes[0])


@dataclass(frozen=True)
class GradientCovariance(Covariance):
    """The same of the gradient of the summed loss by a value: with the covariance of a layer's input, its K-FAC
    factors. Martens and Grosse 2015 (arXiv:1503.05671)."""

    gradient: ClassVar[bool] = True
