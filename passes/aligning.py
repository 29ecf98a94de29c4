"""Units of one block put in the order of another's like ones, so that what is merged or subtracted belongs together.

    rows of @up of block 2:  a' c' b'        of block 1:  a b c        order of block 2:  0, 2, 1

Hidden units, heads, experts may stand in any order as long as all weights of a block that have them agree: which order
is nearest to the other block's is a linear assignment for each such axis, and one after another until none gets nearer.
A block in another order computes the same but for rounding.

Ainsworth et al. 2023, "Git Re-Basin", arXiv:2209.04836, its weight matching.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from scipy.optimize import linear_sum_assignment

from laconic.ir.axes import Axes, Dim, Factor, factors, free
from laconic.ir.axes.positions import coordinates, old_positions

_SWEEPS = 100
_NEARER = 1e-12


@dataclass(frozen=True)
class Matching:
    """The old position of each unit in its new place, for each axis that is put in order; and the inner products of the
    rows with the other block's, after each assignment."""

    orders: dict[Factor, list[int]]
    objective: tuple[float, ...]


def match(axes: Axes, own: Collection[str], rows: Mapping[str, str]) -> Matching:
    """Orders of all axes that only a block's `own` rows have, so that each of `rows`, which are among them, is nearest
    to the one that it is paired with. Two that are paired have the same axes."""
    units = _units(axes, own)
    orders = {factor: list(range(int(factor.size))) for factor in units}
    told = [_objective(axes, rows, orders)]
    for _ in range(_SWEEPS):
        before = told[-1]
        for factor in units:
            gain = _gain(axes, rows, factor, orders)
            places, positions = linear_sum_assignment(gain.numpy(), maximize=True)
            if float(gain[places, positions].sum()) > float(gain.diagonal().sum()) + _NEARER:
                orders[factor] = [orders[factor][k] for k in positions]
                told.append(_objective(axes, rows, orders))
        if told[-1] <= before + _NEARER * max(1.0, abs(before)):
            break
    moved = {factor: order for factor, order in orders.items() if order != sorted(order)}
    return Matching(moved, tuple(told))


def _units(axes: Axes, rows: Collection[str]) -> list[Factor]:
    """The free axes that these rows have, and no other row."""
    inside: dict[Factor, bool] = {}
    for name, label in axes.rows.items():
        for dim in label:
            for factor in factors(dim):
                inside[factor] = inside.get(factor, True) and name in rows
    fixed = {f for label in axes.rows.values() for dim in label for f in factors(dim) if not isinstance(f.size, int)}
    return [factor for factor, own in inside.items() if own and factor not in fixed and free(factor)]


def _ordered(axes: Axes, name: str, orders: Mapping[Factor, list[int]]) -> torch.Tensor:
    """A row with its units in their new order, float64."""
    value = axes.program.weights[name].value.detach().double()
    for axis, dim in enumerate(axes.rows[name]):
        if any(factor in orders for factor in factors(dim)):
            value = value.index_select(axis, old_positions(dim, orders))
    return value


def _objective(axes: Axes, rows: Mapping[str, str], orders: Mapping[Factor, list[int]]) -> float:
    held = axes.program.weights
    pairs = ((_ordered(axes, name, orders), held[other].value.detach().double()) for name, other in rows.items())
    return sum(float((own * theirs).sum()) for own, theirs in pairs)


def _gain(axes: Axes, rows: Mapping[str, str], factor: Factor, orders: Mapping[Factor, list[int]]) -> torch.Tensor:
    """Inner products of what stands at each place of the other block (rows) with each unit as ordered (columns)."""
    size = int(factor.size)
    gain = torch.zeros(size, size, dtype=torch.float64)
    for name, other in rows.items():
        for axis, dim in enumerate(axes.rows[name]):
            if factor not in factors(dim):
                continue
            own = _ordered(axes, name, orders)
            theirs = axes.program.weights[other].value.detach().double()
            for a, b in zip(_by_unit(own, axis, dim, factor), _by_unit(theirs, axis, dim, factor), strict=True):
                gain += b @ a.T
    return gain


def _by_unit(value: torch.Tensor, axis: int, dim: Dim, factor: Factor) -> list[torch.Tensor]:
    """What stands at each position of a factor along one axis, (positions, numbers), for each time it stands there."""
    found = []
    moved = value.movedim(axis, 0)
    for places in coordinates(dim, factor):
        order = torch.argsort(places, stable=True)[int((places < 0).sum()) :]
        found.append(moved[order].reshape(int(factor.size), -1))
    return found
