"""How alike values are: those of several places at one position, and those of one place at several positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from laconic.ir.statistics.base import Statistic, Sums
from laconic.ir.statistics.rows import Rows

#: Cosines above which two tokens of a sample are counted as alike.
CLOSE = (0.8, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class Similarity(Statistic):
    """How alike the values of several nodes are, row by row: sums of `cosine`, `angle` (over pi), `products` (inner
    ones) and `apart` (squared distances), each (nodes, nodes), and `rows` (). `channels` is the axis of a row.

    1 - cosine of what goes into a block and what comes out is its influence (Men et al. 2024, "ShortGPT",
    arXiv:2403.03853); the angle is what Gromov et al. 2024 (arXiv:2403.17887) drop runs of blocks by.
    """

    places: tuple[str, ...]
    channels: int = -1

    @property
    def nodes(self) -> tuple[str, ...]:
        return self.places

    def sums(self, values: Sequence[torch.Tensor], rows: Rows) -> Sums:
        count = len(values)
        flat = [rows.flat(value.movedim(self.channels, -1)).double() for value in values]
        units = [F.normalize(x, dim=-1) for x in flat]
        found = {
            name: torch.zeros(count, count, dtype=torch.float64) for name in ("cosine", "angle", "products", "apart")
        }
        for a in range(count):
            for b in range(a, count):
                # From the chord: near 1 the arc cosine loses half of the digits.
                angle = 2 * ((units[a] - units[b]).norm(dim=-1) / 2).clamp(max=1.0).asin()
                each = {
                    "cosine": (units[a] * units[b]).sum(),
                    "angle": angle.sum() / torch.pi,
                    "products": (flat[a] * flat[b]).sum(),
                    "apart": (flat[a] - flat[b]).square().sum(),
                }
                for name, value in each.items():
                    found[name][a, b] = found[name][b, a] = value
        return {"rows": torch.tensor(len(flat[0]))} | found

    def size(self, shapes: Sequence[tuple[Any, ...]]) -> int:
        return 1 + 4 * len(shapes) ** 2


@dataclass(frozen=True)
class TokenLikeness(Statistic):
    """How alike the tokens of a sample are at one place: `nearest` and `mean` cosine to the others, `close`, how many
    tokens have one of a cosine above each of `CLOSE`, `rows` (). Samples of one token do not count."""

    node: str

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.node,)

    def sums(self, values: Sequence[torch.Tensor], rows: Rows) -> Sums:
        nearest, mean, close, count = 0.0, 0.0, torch.zeros(len(CLOSE), dtype=torch.float64), 0
        for sample in rows.samples(values[0]):
            if len(sample) < 2:
                continue
            units = F.normalize(sample.float(), dim=-1)
            cosines = (units @ units.T).double().fill_diagonal_(-2.0)
            best = cosines.amax(1)
            nearest += float(best.sum())
            mean += float((cosines.sum(1) + 2.0).sum()) / (len(sample) - 1)
            close += torch.stack([(best > level).sum() for level in CLOSE])
            count += len(sample)
        return {
            "rows": torch.tensor(count),
            "nearest": torch.tensor(nearest),
            "mean": torch.tensor(mean),
            "close": close,
        }

    def size(self, shapes: Sequence[tuple[Any, ...]]) -> int:
        return 3 + len(CLOSE)

    def least_rows(self, shapes: Sequence[tuple[Any, ...]]) -> int:
        return 0
