"""The table itself, which the families of rules fill."""

from __future__ import annotations

from collections.abc import Callable

from laconic.ir.axes.call import Rule

#: What stands for every op that torch says is pointwise.
POINTWISE = "pointwise"
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register a rule for ops by name: `aten.linear` for all overloads, `aten.max.dim` for one.

    Raises ValueError for a name that has one.
    """

    def register(function: Rule) -> Rule:
        for name in names:
            if name in RULES:
                raise ValueError(f"{name} has a rule already")
            RULES[name] = function
        return function

    return register
