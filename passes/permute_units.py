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
from typing import Any, ClassVar, Literal

import torch
from torch import fx

from laconic.ir.axes import Axes, Factor, analyse, factors, free, row_factors
from laconic.ir.axes.classes import first_calls
from laconic.ir.axes.dims import Pin
from laconic.ir.axes.held import Holding
from laconic.ir.axes.positions import coordinates
from laconic.ir.program import Kind, Program
from laconic.passes.axes import AxesPass, class_action
from laconic.passes.base import Plan

aten = torch.ops.aten


@dataclass(frozen=True)
class PermuteUnits(AxesPass):
    """`by`: the norm that is a unit's key."""

    by: Literal["l2", "l1", "max"] = "l2"

    name: ClassVar[str] = "permute-units"
    summary: ClassVar[str] = "put channels, heads and experts in the order of their norms, the heaviest first"

    def plan(self, program: Program, statistics: Any = None, score: Any = None) -> Plan:
        axes = analyse(program)
        where = first_calls(axes)
        alike = _alike(axes)
        units = [f for f in row_factors(axes) if free(f) and isinstance(f.size, int) and f in where and f not in alike]
        actions = []
        for factor, keys in _keys(axes, units, self.by).items():
            order = torch.argsort(keys, descending=True, stable=True).tolist()
            if order != sorted(order):
                actions.append(class_action(axes, factor, order, "order", where[factor]))
        reason = "the units of every free axis are in order" if units else "no axis of a weight is free"
        return Plan(self.spec, tuple(actions), reason=reason)

    def said(self, plan: Plan) -> str:
        return f"{len(plan.actions)} axes put in order of their units' {self.by} norms"


def _alike(axes: Axes) -> set[Factor]:
    """The factors along which the first of several greatest is chosen, whatever the inputs are: a router of zeros."""
    holding, found = Holding(axes), set[Factor]()
    for gather in axes.gathers:
        own = [factor for factor in factors(gather.dim) if Pin.TOPK in factor.pins]
        held = holding.of(*gather.operands[0]) if own else None
        known = held.value[held.known & ~held.at(gather.neutral)] if held else torch.zeros(0)
        if own and (len(set(known.tolist())) < len(known) or _like_rows(axes, gather.operands[0][0])):
            found.update(own)
    return found


_COPIES = frozenset({aten._to_copy.default, aten.reshape.default, aten.softmax.int, aten._softmax.default})
_COPIES |= {aten.sigmoid.default, aten.log_softmax.int, aten.clone.default}


def _like_rows(axes: Axes, value: fx.Node) -> bool:
    """Whether values are products with a weight of which two rows are the same: what one gives the other does too."""
    while value.target in _COPIES:
        value = value.args[0]  # type: ignore[assignment]
    if value.target is aten.linear.default:
        turned, parts = False, [value.args[1], *value.args[2:]]
    elif value.target in (aten.mm.default, aten.matmul.default):
        turned, parts = True, [value.args[1]]
    else:
        return False
    if isinstance(parts[0], fx.Node) and parts[0].target in (aten.t.default, aten.transpose.int):
        turned, parts[0] = not turned, parts[0].args[0]
    rows = [axes.program.weights[p.meta["name"]].value for p in parts if isinstance(p, fx.Node) and _is_weight(p)]
    if len(rows) != len([p for p in parts if p is not None]) or rows[0].dim() != 2 or rows[0].device.type == "meta":
        return False
    matrix = rows[0].detach().t() if turned else rows[0].detach()
    matrix = torch.cat([matrix, *(row.detach()[:, None] for row in rows[1:])], 1)
    return len({tuple(row) for row in matrix.tolist()}) < len(matrix)


def _is_weight(node: fx.Node) -> bool:
    return node.op == "placeholder" and node.meta["kind"] not in (Kind.INPUT, Kind.STATE)


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
