"""The table itself, which the families of rules fill."""

from __future__ import annotations

from laconic.ir.axes.call import Rule
from laconic.ir.axes.table import Table

rule: Table[Rule] = Table()
