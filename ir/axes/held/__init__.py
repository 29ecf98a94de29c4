"""What positions hold whatever the inputs are: which, of each axis of each value, hold one number that no input moves.

    %h = aten.linear(%x, @up, @bias)      row 3 of @up is zero: %h holds bias[3] at position 3 of its last axis
    %a = aten.gelu(%h)                    %a holds gelu(bias[3]) there
    %y = aten.linear(%a, @down)           and what that adds to %y is gelu(bias[3]) * column 3 of @down

A rule is a function of an `Asked` that says what one axis of a result holds; an op without one holds nothing that is
known. Values are taken to be finite, so that zero times anything is zero. Sizes that are not known beforehand are never
looked at: what is found holds for all of them.
"""

from __future__ import annotations

from importlib import import_module

from laconic.ir.axes.held.table import Held, rule
from laconic.ir.axes.held.walk import Holding

__all__ = ["Held", "Holding", "rule"]

for _family in ("elements", "moves", "sums"):
    import_module(f"laconic.ir.axes.held.{_family}")
