"""permute-units: put the units of every free axis in order, the heaviest first.

    row norms of @up:  0.2  3.1  1.7        rows of @up, of its bias, columns of @down:  1, 2, 0

Channels, heads, experts, or whatever else an axis counts: its positions may stand in any order, as long as all weights
and states that have the axis agree. In order, a prefix is what matters most, small units lie side by side, and what is
cut off, sliced or packed is cut off in one piece.

The key of a position is a norm of all that weights hold there: `l2`, `l1`, or the largest element (`max`). Equal keys
keep their order, and an axis that is in order stays as it is. Sums are rounded in another order: the contract is
`tolerance`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from laconic.ir.axes import Axes, Factor, analyse, factors, free, row_factors
from laconic.ir.axes.alike import alike
from laconic.ir.axes.classes import first_calls
from laconic.ir.axes.positions import coordinates
from laconic.ir.calibration import Calibration
from laconic.ir.program import Kind, Program
from laconic.passes.axes import AxesPass, class_action
from laconic.passes.base import Plan


@dataclass(frozen=True)
class PermuteUnits(AxesPass):
    """`by`: the norm that is a unit's key."""

    by: Literal["l2", "l1", "max"] = "l2"

    name: ClassVar[str] = "permute-units"
    summary: ClassVar[str] = "put channels, heads and experts in the order of their norms, the heaviest first"

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        axes = analyse(program)
        where = first_calls(axes)
        tied = alike(axes)
        units = [f for f in row_factors(axes) if free(f) and isinstance(f.size, int) and f in where and f not in tied]
        actions = []
        for factor, keys in _keys(axes, units, self.by).items():
            order = torch.argsort(keys, descending=True, stable=True).tolist()
            if order != sorted(order):
                actions.append(class_action(axes, factor, order, "order", where[factor]))
        reason = "the units of every free axis are in order" if units else "no axis of a weight is free"
        return Plan(self.spec, tuple(actions), reason=reason)

    def said(self, plan: Plan) -> str:
        return f"{len(plan.actions)} axes put in order of their units' {self.by} norms"


def _keys(axes: Axes, units: list[Factor], by: str) -> dict[Factor, torch.Tensor]:
    """The keys of each factor's positions: (size,) float32, so that sums in another order give the same."""
    found = {factor: torch.zeros(int(factor.size), dtype=torch.float64) for factor in units}
    for name, label in axes.rows.items():
        weight = axes.program.weights[name]
        value = weight.value.detach()
        if weight.kind is Kind.STATE or not value.is_floating_point() or value.device.type == "meta":
            continue
        for axis, dim in enumerate(label):
            own = [factor for factor in dict.fromkeys(factors(dim)) if factor in found]
            if own:
                rows = _norms(value.movedim(axis, 0).reshape(value.shape[axis], -1), by)
                for factor in own:
                    for places in coordinates(dim, factor):
                        there = places >= 0
                        how = "amax" if by == "max" else "sum"
                        found[factor].scatter_reduce_(0, places[there], rows[there], how)
    return {factor: keys.float() for factor, keys in found.items()}


def _norms(rows: torch.Tensor, by: str) -> torch.Tensor:
    """What each row adds to the key of its position, (rows,) float64; squares for l2."""
    if by == "max":
        return rows.abs().amax(1).double()
    return (rows.double().square() if by == "l2" else rows.double().abs()).sum(1)
