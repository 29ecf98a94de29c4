"""Operators that weigh members against each other: by number, by element, by direction."""

from __future__ import annotations

import torch

from laconic.ir.errors import UsageError
from laconic.passes.merging import Members


def average(members: Members) -> torch.Tensor:
    """sum w_i W_i / sum w_i."""
    shares = members.shares()
    return torch.einsum("m,m...->...", shares, members.wide())


def fisher(members: Members) -> torch.Tensor:
    """sum w_i F_i W_i / sum w_i F_i, element by element; F_i, scaled to one norm for all members, is the mean squared
    gradient. Where no member has any it is the average.

    Matena and Raffel 2022, "Merging Models with Fisher-Weighted Averaging", arXiv:2111.09832.
    """
    if not members.squares:
        raise UsageError("fisher weighs by squared gradients", hint="give them, or merge by average")
    plain = average(members)
    each = torch.stack([square.double() / square.double().norm().clamp(min=1e-300) for square in members.squares])
    each = each + 1e-6 * each.amax()
    weighed = torch.einsum("m,m...->m...", members.shares(), each)
    total = weighed.sum(0)
    found = (weighed * members.wide()).sum(0) / total
    return torch.where(total > 0, found, plain)


def regmean(members: Members, shrink: float = 0.9) -> torch.Tensor:
    """(sum w_i W_i H_i) (sum w_i H_i)^-1 for members (outputs, inputs): of all matrices the one whose products with the
    members' own inputs are nearest to theirs. Off the diagonal H_i is scaled by `shrink`, so that few rows do not
    mislead.

    Jin et al. 2023, "Dataless Knowledge Fusion by Merging Weights of Language Models", arXiv:2212.09849.
    """
    if not members.covariances or members.values[0].dim() != 2:
        raise UsageError("regmean weighs matrices by the covariances of their inputs", hint="merge others by average")
    products = torch.stack([given.double() for given in members.covariances])
    diagonal = torch.diag_embed(products.diagonal(dim1=-2, dim2=-1))
    products = shrink * products + (1 - shrink) * diagonal
    shares = members.shares()
    total = torch.einsum("m,mij->ij", shares, products)
    floor = 1e-6 * float(total.diagonal().mean()) or 1.0
    eye = torch.eye(len(total), dtype=torch.float64)
    # Where nothing comes in all are as good: the floor leaves the average there.
    moved = torch.einsum("m,moi,mij->oj", shares, members.wide(), products) + floor * average(members)
    found: torch.Tensor = torch.linalg.solve(total + floor * eye, moved, left=False)
    return found
