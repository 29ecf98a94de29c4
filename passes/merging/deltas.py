"""Operators on what each member changed of a base that all have in common."""

from __future__ import annotations

import torch

from laconic.ir.errors import UsageError
from laconic.passes.merging import Members


def ties(members: Members, density: float = 0.2, scale: float = 1.0) -> torch.Tensor:
    """Keep the greatest `density` of each delta; of what is kept, average what has the sign of the greater sum.

    Yadav et al. 2023, "TIES-Merging", arXiv:2306.01708.
    """
    deltas, base = members.deltas("ties")
    kept = torch.stack([_greatest(delta, density) for delta in deltas])
    sign = torch.where(kept.sum(0) < 0, -1.0, 1.0)
    agrees = (kept * sign > 0).double() * members.shares().reshape(-1, *[1] * base.dim())
    total = agrees.sum(0)
    return base + scale * (kept * agrees).sum(0) / torch.where(total > 0, total, 1.0)


def dare(members: Members, drop: float = 0.9, scale: float = 1.0) -> torch.Tensor:
    """Zero each element of each delta with probability `drop`, scale the others up by as much, and average. For small
    deltas (2e-3 and less); the draws are those of the members' seed.

    Yu et al. 2024, "Language Models are Super Mario", arXiv:2311.03099.
    """
    if not 0 <= drop < 1:
        raise UsageError(f"dare cannot drop a share of {drop}", hint="0 or more, and less than 1")
    deltas, base = members.deltas("dare")
    draw = torch.Generator().manual_seed(members.seed)
    kept = (torch.rand(deltas.shape, generator=draw, dtype=torch.float64) >= drop) / (1 - drop)
    return base + scale * torch.einsum("m,m...->...", members.shares(), deltas * kept)


def breadcrumbs(members: Members, density: float = 0.09, top: float = 0.01, scale: float = 0.4) -> torch.Tensor:
    """Of each delta leave out the greatest `top` and the least, and keep `density`; add up what is left.

    Davari and Belilovsky 2024, "Model Breadcrumbs", arXiv:2312.06795.
    """
    deltas, base = members.deltas("breadcrumbs")
    kept = []
    for delta in deltas:
        order = delta.abs().flatten().argsort(stable=True)
        stop = len(order) - int(top * len(order))
        start = max(0, stop - round(density * len(order)))
        mask = torch.zeros(len(order), dtype=torch.float64)
        mask[order[start:stop]] = 1.0
        kept.append(delta * mask.reshape(delta.shape))
    return base + scale * torch.stack(kept).sum(0)


def pcb(members: Members, ratio: float = 0.1, scale: float = 1.2) -> torch.Tensor:
    """Balance what competes: within a member by size, between members by agreement. The `ratio` of greatest scores
    counts, each by how far it stands out.

    Du et al. 2024, "Parameter Competition Balancing for Model Merging", arXiv:2410.02396.
    """
    deltas, base = members.deltas("pcb")
    flat = deltas.flatten(1)
    size = flat.abs()
    low, high = (_quantile(size, share) for share in (1e-4, 1 - 1e-4))
    clipped = flat.sign() * size.clamp(low, high)
    within = torch.exp(len(flat) * _ranged(clipped.abs()).square())
    between = torch.tanh(clipped * clipped.sum(0))
    score = within * between
    score = _ranged(score.clamp(min=_quantile(score, 1 - ratio)))
    found = (score * clipped).sum(0) / score.sum(0).clamp(min=1e-12)
    return base + scale * found.reshape(base.shape)


def _greatest(delta: torch.Tensor, density: float) -> torch.Tensor:
    """The delta with all but its greatest `density` set to zero; of equals the first stay."""
    count = max(1, round(density * delta.numel()))
    order = delta.abs().flatten().argsort(descending=True, stable=True)
    mask = torch.zeros(delta.numel(), dtype=torch.float64)
    mask[order[:count]] = 1.0
    return delta * mask.reshape(delta.shape)


def _quantile(rows: torch.Tensor, share: float) -> torch.Tensor:
    """The value that `share` of each row is not above, (rows, 1)."""
    k = min(rows.shape[1], max(1, round(share * rows.shape[1])))
    return rows.kthvalue(k, dim=1, keepdim=True).values


def _ranged(rows: torch.Tensor) -> torch.Tensor:
    """Each row from 0 to 1; a row of equals is all zeros."""
    low, high = rows.amin(1, keepdim=True), rows.amax(1, keepdim=True)
    return (rows - low) / torch.where(high > low, high - low, 1.0)
