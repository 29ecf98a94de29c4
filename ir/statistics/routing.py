"""What routers do: how often each expert is chosen, with whom, how surely, and whose logits go together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from laconic.ir.statistics.base import Statistic, Sums
from laconic.ir.statistics.rows import Rows


@dataclass(frozen=True)
class Routing(Statistic):
    """Of a router with `experts` outputs: `counts` (experts,) of rows that chose each, `pairs` (experts, experts) of
    rows that chose both, `scores` and `logits` (experts,), sums of softmax (or sigmoid) and of logits, `products`
    (experts, experts) of logits, and `rows` ().

    `router` is the node of the logits, `chosen` that of the indices, (rows, k).
    """

    router: str
    chosen: str
    experts: int
    sigmoid: bool = False

    @property
    def nodes(self) -> tuple[str, ...]:
        return (self.router, self.chosen)

    def sums(self, values: Sequence[torch.Tensor], rows: Rows) -> Sums:
        logits, chosen = rows.flat(values[0]).float(), rows.flat(values[1])
        hits = F.one_hot(chosen, self.experts).sum(1).double()
        scores = logits.sigmoid() if self.sigmoid else logits.softmax(-1)
        return {
            "rows": torch.tensor(len(logits)),
            "counts": hits.sum(0),
            "pairs": hits.T @ hits,
            "scores": scores.sum(0, dtype=torch.float64),
            "logits": logits.sum(0, dtype=torch.float64),
            "products": logits.double().T @ logits.double(),
        }

    def size(self, shapes: Sequence[tuple[Any, ...]]) -> int:
        return 1 + 3 * self.experts + 2 * self.experts**2
