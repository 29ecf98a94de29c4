"""Rules by op: one table for what an op says of axes, another for what positions hold whatever the inputs are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

import torch

#: What stands for every op that torch says is pointwise.
POINTWISE = "pointwise"

R = TypeVar("R")


class Table(Generic[R]):
    """Rules by the names of ops. It is the decorator too that puts one in: `@rule("aten.linear", "aten.max.dim")`."""

    def __init__(self) -> None:
        self.rules: dict[str, R] = {}

    def __call__(self, *names: str) -> Callable[[R], R]:
        """Register a rule for ops by name: `aten.linear` for all overloads, `aten.max.dim` for one.

        Raises ValueError for a name that has one.
        """

        def register(function: R) -> R:
            for name in names:
                if name in self.rules:
                    raise ValueError(f"{name} has a rule already")
                self.rules[name] = function
            return function

        return register

    def of(self, op: torch._ops.OpOverload) -> R | None:
        """The rule of an op, by its full name, else by its name without overload, else by its being pointwise."""
        name = op._schema.name.replace("::", ".")
        found = self.rules.get(f"{name}.{op._overloadname}") or self.rules.get(name)
        if found is None and torch.Tag.pointwise in op.tags:
            return self.rules.get(POINTWISE)
        return found
