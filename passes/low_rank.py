"""Low-rank corrections of products with a weight: what a matrix that stands for another one misses, in few numbers.

    %y = linear(%x, @w)          ->      %y = linear(%x, @w);  %h = linear(%x, @a);  %z = linear(%h, @b);  add(%y, %z)

Which numbers is decided by the inputs: of all corrections of a rank, `whitened` gives the one whose products with them
are nearest to the missing ones. Liu et al. 2024, "EoRA", arXiv:2410.21271.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from laconic.ir.errors import UsageError
from laconic.ir.memory import row_major
from laconic.ir.program import Entry, Program
from laconic.ir.rewrite import add_constant, insert_call, weight_node
from laconic.ir.statistics.base import Sums
from laconic.passes.products import Product, product

aten = torch.ops.aten

#: Directions of less energy than this, relative to the greatest, count as having so much.
_FLOOR = 1e-6
#: Below so many rows for each channel the products of channels are not trusted alone, and damped by this share.
_ROWS, _DAMPING = 4, 1e-2


@dataclass(frozen=True)
class Correction:
    """`outer` (outputs, rank) times `inner` (rank, inputs), and how much of the missing products it leaves, from 0 for
    nothing to 1 for all."""

    outer: torch.Tensor
    inner: torch.Tensor
    left: float


def whitened(missing: torch.Tensor, products: torch.Tensor, rows: int, rank: int) -> Correction:
    """The correction of a matrix (outputs, inputs) by which `missing` is missing, given the `products` of the channels
    of its inputs, (inputs, inputs), summed over `rows`. All is computed in float64."""
    energy, directions = torch.linalg.eigh(_damped(products.double(), rows))
    energy = energy.clamp(min=max(float(energy[-1]) * _FLOOR, 1e-300))
    spread = directions * energy.sqrt()
    left, values, right = torch.linalg.svd(missing.double() @ spread, full_matrices=False)
    rank = min(rank, len(values))
    roots = values[:rank].sqrt()
    inner = (roots[:, None] * right[:rank]) @ (directions / energy.sqrt()).T
    whole = float(values.square().sum())
    kept = float(values[rank:].square().sum()) / whole if whole else 0.0
    return Correction(left[:, :rank] * roots, inner, kept**0.5)


def correction_of(use: Product, missing: torch.Tensor, sums: Sums, rank: int, dtype: torch.dtype) -> Correction:
    """The correction of a product's matrix, as it is stored, by which `missing` is missing; `sums` are those of the
    covariance of what it multiplies. The factors are of `dtype`."""
    made = whitened(missing if use.outputs_first else missing.T, sums["products"], int(sums["rows"]), rank)
    return Correction(row_major(made.outer.to(dtype)), row_major(made.inner.to(dtype)), made.left)


def _damped(products: torch.Tensor, rows: int) -> torch.Tensor:
    if rows >= _ROWS * len(products):
        return products
    mean = float(products.diagonal().mean()) or 1.0
    return products + _DAMPING * mean * torch.eye(len(products), dtype=products.dtype)


def add_correction(
    program: Program, entry: Entry, node: fx.Node, name: str, correction: tuple[torch.Tensor, torch.Tensor], *, by: str
) -> tuple[str, str]:
    """Add a correction (outer, inner) to what a product with a row gives. Returns the names of the two rows that hold
    it, made of `name` unless they are there already; they have the dtype that the tensors have.

    Raises UsageError if the call is no product of a matrix.
    """
    use = product(entry, node)
    if use is None or not use.matrix:
        raise UsageError(f"%{node.name} is no product with a matrix", where=program.describe(node))
    rows = []
    for part, value in zip(("outer", "inner"), correction, strict=True):
        row = f"{name}_{part}"
        held = program.weights.get(row)
        rows.append(
            row if held is not None and held.value is value else add_constant(program, row, value, trainable=True)
        )
    outer, inner = (weight_node(program, entry, row) for row in rows)
    following: fx.Node = node.next
    narrow = insert_call(program, entry, following, aten.linear.default, (use.data, inner), like=node, by=by)
    wide = insert_call(program, entry, following, aten.linear.default, (narrow, outer), like=node, by=by)
    total = insert_call(program, entry, following, aten.add.Tensor, (node, wide), like=node, by=by)
    node.replace_all_uses_with(total, delete_user_cb=lambda user: user is not total)
    return rows[0], rows[1]
