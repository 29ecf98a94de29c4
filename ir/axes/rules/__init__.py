"""What each op says of the axes of what it takes and returns: the table that the analysis asks.

A rule is a function of a `laconic.ir.axes.call.Call` that returns the labels of the result. It joins axes that are the
same, pins those whose positions matter, and records which numbers of the call spell sizes. Anyone may add one for an op
of his own, beside the op's fake: `rule("mylib.my_op")(function)`.
"""

from __future__ import annotations

from importlib import import_module

from laconic.ir.axes.rules.table import rule

__all__ = ["rule"]

for _family in ("pointwise", "views", "parts", "products", "norms", "indexing", "reductions", "space"):
    import_module(f"laconic.ir.axes.rules.{_family}")
