"""Positions that are alike whatever the inputs are, along axes of which the greatest are chosen: there the first of
them is taken, as by a router of zeros, or one with two equal rows, and another order would choose others."""

from __future__ import annotations

import torch
from torch import fx

from laconic.ir.axes.dims import Factor, Pin, factors
from laconic.ir.axes.held import Holding
from laconic.ir.axes.labels import Axes

aten = torch.ops.aten

#: Between a product and what is chosen by it.
_PASSED = frozenset(
    {
        *(aten._to_copy.default, aten.reshape.default, aten.clone.default, aten.sigmoid.default),
        *(aten.softmax.int, aten._softmax.default, aten.log_softmax.int),
    }
)


def alike(axes: Axes) -> set[Factor]:
    """The factors along which several positions hold the same, and the greatest are chosen."""
    holding, found = Holding(axes), set[Factor]()
    for gather in axes.gathers:
        own = [factor for factor in factors(gather.dim) if Pin.TOPK in factor.pins]
        if not own:
            continue
        value, axis = gather.operands[0]
        held = holding.of(value, axis)
        known = held.value[held.known & ~held.at(gather.neutral)].tolist() if held else []
        if len(set(known)) < len(known) or _of_equal_rows(holding, value):
            found.update(own)
    return found


def _of_equal_rows(holding: Holding, value: fx.Node) -> bool:
    """Whether values are products with a weight of which two rows are the same, their biases too."""
    while value.target in _PASSED:
        value = value.args[0]  # type: ignore[assignment]
    if value.target not in (aten.linear.default, aten.mm.default, aten.matmul.default):
        return False
    by_columns = value.target is not aten.linear.default
    matrix, *biases = (node for node in value.args[1:] if isinstance(node, fx.Node))
    if matrix.target in (aten.t.default, aten.transpose.int):
        by_columns, matrix = not by_columns, matrix.args[0]  # type: ignore[assignment]
    weights = [holding.weight(node) for node in (matrix, *biases)]
    rows, *more = weights
    if rows is None or rows.dim() != 2 or rows.device.type == "meta" or None in more:
        return False
    columns = [rows.t() if by_columns else rows, *(bias[:, None] for bias in more if bias is not None)]
    together = torch.cat(columns, 1).tolist()
    return len(set(map(tuple, together))) < len(together)
