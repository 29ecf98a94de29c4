"""The axes of a program: which axes of which values are the same, which may be moved or left out, and the one rewriter
that does it everywhere at once."""

from __future__ import annotations

from laconic.ir.axes.analysis import analyse
from laconic.ir.axes.dims import Dim, Factor, Pin, factors
from laconic.ir.axes.labels import Axes
from laconic.ir.axes.rewriter import free, refusals, rewrite, row_factors

__all__ = ["Axes", "Dim", "Factor", "Pin", "analyse", "factors", "free", "refusals", "rewrite", "row_factors"]
