"""Where attention goes: how spread it is, and how much of it falls on the first token, on oneself, and how far back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic.ir.statistics.base import Statistic, Sums, add
from laconic.ir.statistics.rows import Rows

#: Distances between query and key are counted by their power of two: 0, 1, 2-3, 4-7, ...
DISTANCES = 16


@dataclass(frozen=True)
class Attended(Statistic):
    """The rows of an attention's softmax, by head: `entropy` in nats, `greatest` weight, `first`, the weight on the
    first key that is not padding, `own`, that on the query itself, and `distance` (heads, 16), that on keys so many
    positions away by powers of two; all else (heads,); `rows` ().

    Either `weights` is the node of the softmax, (samples, heads, queries, keys), or `q` and `k` are those of a fused
    attention, (samples, heads, positions, width), with `scale`, and `mask` (added, or True where allowed) or `causal`.
    With `sink` the last of the softmax's columns is no key: it is left out.
    """

    weights: str = ""
    q: str = ""
    k: str = ""
    mask: str = ""
    scale: float = 1.0
    causal: bool = False
    sink: bool = False

    positions: ClassVar[int] = 2

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weights, self.q, self.k, self.mask) if name)

    def sums(self, values: Sequence[torch.Tensor], rows: Rows) -> Sums:
        named = dict(zip([n for n in ("weights", "q", "k", "mask") if getattr(self, n)], values, strict=True))
        samples = len(values[0])
        found: Sums = {}
        for k in range(samples):  # one by one: a batch's weights may not fit
            own = {name: value[k : k + 1] if len(value) == samples else value for name, value in named.items()}
            more = self._of_sample(self._weights(own)[0], None if rows.mask is None else rows.mask[k])
            add(found, more, self.maxima)
        return found

    def _of_sample(self, p: torch.Tensor, mask: torch.Tensor | None) -> Sums:
        """`p` (heads, queries, keys); `mask` (queries,) bool."""
        p = p[..., :-1] if self.sink else p
        heads, queries, keys = p.shape
        counted = torch.ones(queries, dtype=torch.bool) if mask is None else mask
        start = int(counted.long().argmax()) if keys == queries else 0
        p = p[:, counted].double()
        away = ((torch.arange(queries) + keys - queries)[counted, None] - torch.arange(keys)).abs()
        bucket = torch.where(away == 0, 0, 1 + away.clamp(min=1).log2().floor().long()).clamp(max=DISTANCES - 1)
        distance = torch.zeros(heads, int(counted.sum()), DISTANCES, dtype=torch.float64)
        distance.scatter_add_(2, bucket.expand(heads, -1, -1), p)
        return {
            "rows": counted.sum(),
            "entropy": -torch.special.xlogy(p, p).sum((1, 2)),
            "greatest": p.amax(-1).sum(1),
            "first": p[:, :, start].sum(1),
            "own": distance[:, :, 0].sum(1),
            "distance": distance.sum(1),
        }

    def _weights(self, given: dict[str, torch.Tensor]) -> torch.Tensor:
        if "weights" in given:
            return given["weights"].float()
        q, k = given["q"].float(), given["k"].float()
        if k.shape[1] != q.shape[1]:
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        scores = q @ k.mT * self.scale
        if self.causal:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(later, -math.inf)
        if "mask" in given:
            mask = given["mask"]
            scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask.float()
        return scores.softmax(-1).nan_to_num(0.0)

    def size(self, shapes: Sequence[tuple[Any, ...]]) -> int:
        heads = int(shapes[0][1])
        return 1 + heads * (4 + DISTANCES)
