"""What channels hold: sums by channel, and products of channels, of a value or of the loss's gradient by it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic.ir.statistics.base import Rows, Statistic, Sums, width_of


@dataclass(frozen=True)
class Moments(Statistic):
    """For each channel of a value: `total`, `squares`, `absolute` and `greatest` of |x|, (width,); `rows`, ()."""

    node: str

    maxima: ClassVar[frozenset[str]] = frozenset({"greatest"})

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.node,)

    def sums(self, values: Sequence[torch.Tensor], rows: Rows) -> Sums:
        x = rows.flat(values[0]).double()
        absolute = x.abs()
        return {
            "rows": torch.tensor(len(x)),
            "total": x.sum(0),
            "squares": x.square().sum(0),
            "absolute": absolute.sum(0),
            "greatest": absolute.amax(0) if len(x) else absolute.new_zeros(x.shape[1]),
        }

    def size(self, shapes: Sequence[tuple[Any, ...]]) -> int:
        return 1 + 4 * width_of(shapes[0])


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
