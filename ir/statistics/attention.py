"""Where attention goes: how spread it is, and how much of it falls on the first token, on oneself, and how far back."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from laconic.ir.statistics.base import Rows, Statistic, Sums

#: Distances between query and key are counted by their power of two: 0, 1, 2-3, 4-7, ...
DISTANCES = 16


@dataclass(frozen=True)
class Attended(Statistic):
    """The rows of an attention's softmax, by head: `entropy` in nats, `greatest` weight, `first`, the weight on the
    first key, `own`, that on the query itself, and `distance` (heads, 16), that on keys so many positions away by
    powers of two; all else (heads,); `rows` ().

    Either `weights` is the node of the softmax, (samples, heads, queries, keys), or `q` and `k` are those of a fused
    attention, (samples, heads, positions, width), with `scale`, and `mask` (added, or True where allowed) or `causal`.
    """

    weights: str = ""
    q: str = ""
    k: str = ""
    mask: str = ""
    scale: float = 1.0
    causal: bool = False

    @property
    def nodes(self) -> tuple[str, ...]:
        return tuple(name for name in (self.weights, self.q, self.k, self.mask) if name)

    def sums(self, values: Sequence[torch.Tensor], rows: Rows) -> Sums:
        p = self._weights(
            dict(zip([n for n in ("weights", "q", "k", "mask") if getattr(self, n)], values, strict=True))
        )
        samples, heads, queries, keys = p.shape
        counted = torch.ones(samples, queries, dtype=torch.bool) if rows.mask is None else rows.mask
        if counted.shape != (samples, queries):
            rows.flat(p.transpose(1, 2))  # says why
        p = p.transpose(1, 2)[counted].double()  # (rows, heads, keys)
        position = (torch.arange(queries) + keys - queries).expand(samples, -1)[counted]
        away = (position[:, None] - torch.arange(keys)).abs()
        bucket = torch.where(away == 0, 0, 1 + away.clamp(min=1).log2().floor().long()).clamp(max=DISTANCES - 1)
        distance = torch.zeros(len(p), heads, DISTANCES, dtype=torch.float64)
        distance.scatter_add_(2, bucket[:, None].expand(-1, heads, -1), p)
        return {
            "rows": torch.tensor(len(p)),
            "entropy": -torch.special.xlogy(p, p).sum(-1).sum(0),
            "greatest": p.amax(-1).sum(0),
            "first": p[:, :, 0].sum(0),
            "own": distance[:, :, 0].sum(0),
            "distance": distance.sum(0),
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
