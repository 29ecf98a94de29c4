"""What each op says of the axes of what it takes and returns: the table that the analysis asks.

A rule is a function of a `laconic.ir.axes.call.Call` that returns the labels of the result. It joins axes that are the
same, pins those whose positions matter, and records which numbers of the call spell sizes. Anyone may add one for an op
of his own, beside the op's fake: `rule("mylib.my_op")(function)`.
"""

from __future__ import annotations

from importlib import import_module

import torch

from laconic.ir.axes.call import Rule
from laconic.ir.axes.rules.table import POINTWISE, RULES, rule

__all__ = ["RULES", "rule", "rule_of"]

for _family in ("pointwise", "views", "parts", "products", "norms", "indexing", "reductions", "space"):
    import_module(f"laconic.ir.axes.rules.{_family}")


def rule_of(op: torch._ops.OpOverload) -> Rule | None:
    """The rule of an op, by its full name, else by its name without overload, else by its being pointwise."""
    name = op._schema.name.replace("::", ".")
    found = RULES.get(f"{name}.{op._overloadname}") or RULES.get(name)
    if found is None and torch.Tag.pointwise in op.tags:
        return RULES[POINTWISE]
    return found
