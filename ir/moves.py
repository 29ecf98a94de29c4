"""Where positions of rows went: what a rewrite along axes makes of tensors, and of names for parts of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TypeAlias

import torch

from laconic.ir.program import Alias

#: For each axis of a row, the old positions that it holds now, in their order, (new size,) int64; None: as it was.
RowMoves: TypeAlias = tuple[torch.Tensor | None, ...]
#: The rows of which positions moved.
Moves: TypeAlias = Mapping[str, RowMoves]


def moved(value: torch.Tensor, moves: RowMoves) -> torch.Tensor:
    """A tensor with its positions where they went."""
    for axis, positions in enumerate(moves):
        if positions is not None:
            value = value.index_select(axis, positions.to(value.device))
    return value


def moved_alias(alias: Alias, moves: RowMoves) -> Alias:
    """The name of a part of a row whose positions moved: where it lies now; nowhere if it is not in one piece."""
    windows = []
    for window, positions in zip((alias.rows, alias.columns), (*moves, None, None), strict=False):
        found = _moved_window(window, positions)
        if found is None and window is not None:
            return Alias(None)
        windows.append(found)
    return replace(alias, rows=windows[0], columns=windows[1])


def _moved_window(window: tuple[int, int] | None, positions: torch.Tensor | None) -> tuple[int, int] | None:
    if window is None or positions is None:
        return window
    inside = [k for k, old in enumerate(positions.tolist()) if window[0] <= old < window[1]]
    whole = inside == list(range(inside[0], inside[-1] + 1)) if inside else False
    return (inside[0], inside[-1] + 1) if whole else None
