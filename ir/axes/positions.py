"""What a request makes of an axis: which old positions stand where, and how many there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

import sympy
import torch

from laconic.ir.axes.dims import Dim, Factor, factors, parts_of, resolve, size_of
from laconic.ir.axes.labels import Axes
from laconic.ir.moves import RowMoves
from laconic.ir.types import Size

#: For each factor that changes, the old positions that it holds afterwards, in their new order.
Kept: TypeAlias = Mapping[Factor, Sequence[int]]


def touches(dim: Dim, kept: Kept) -> bool:
    """Whether a request changes an axis."""
    return any(factor in kept for factor in factors(dim))


def new_size(dim: Dim, kept: Kept) -> Size:
    """The size of an axis after a request."""
    found: Size = 1
    for atom in resolve(dim):
        if isinstance(atom, Factor):
            found = found * (len(kept[atom]) if atom in kept else atom.size)
        else:
            sizes = [new_size(part, kept) for part in parts_of(atom)]
            found = found * sum(sizes[1:], sizes[0])
    if isinstance(found, sympy.Expr):
        found = sympy.expand(found)
        return int(found) if found.is_Integer else found
    return found


def old_positions(dim: Dim, kept: Kept) -> torch.Tensor:
    """The old positions along an axis, in their new order; (new size,) int64. The axis must be static."""
    found = torch.zeros(1, dtype=torch.int64)
    for atom in resolve(dim):
        size = atom.size
        assert isinstance(size, int)
        if isinstance(atom, Factor):
            own = torch.tensor(list(kept[atom]), dtype=torch.int64) if atom in kept else torch.arange(size)
        else:
            pieces, offset = [], 0
            for part in parts_of(atom):
                pieces.append(offset + old_positions(part, kept))
                offset += size_of(part)
            own = torch.cat(pieces)
        found = (found[:, None] * size + own).flatten()
    return found


def row_moves(axes: Axes, kept: Kept) -> dict[str, RowMoves]:
    """What becomes of the rows of the weight table that a request changes."""
    return {
        name: tuple(old_positions(dim, kept) if touches(dim, kept) else None for dim in label)
        for name, label in axes.rows.items()
        if any(touches(dim, kept) for dim in label)
    }


def coordinates(dim: Dim, factor: Factor) -> list[torch.Tensor]:
    """Where the positions of an axis stand along a factor, -1 where they do not: (size,) for each time that it stands
    there. The axis must be static."""
    found, right = [], size_of(dim)
    everywhere = torch.arange(right)
    for atom in resolve(dim):
        size = atom.size
        right //= size
        local = everywhere // right % size
        if atom is factor:
            found.append(local)
        elif not isinstance(atom, Factor):
            offset = 0
            for part in parts_of(atom):
                for own in coordinates(part, factor):
                    along = torch.full((size,), -1)
                    along[offset : offset + len(own)] = own
                    found.append(along[local])
                offset += size_of(part)
    return found
