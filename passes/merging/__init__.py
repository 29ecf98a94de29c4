"""Merge operators: one tensor for several of one shape, as blocks and experts that are merged share it.

    merge("average", Members((a, b, c)))        (a + b + c) / 3, rounded once

What holds of each: one member is returned as it is, members of equal bytes too; what is no floating-point number is not
averaged; sums are kept in float64. Members of one ancestor (fine-tunes, experts made of one MLP) have deltas worth
keeping apart: `ties`, `dare`, `breadcrumbs` and `pcb` are of these, and need `base`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from laconic.ir.errors import UsageError
from laconic.ir.metrics.differences import bit_equal
from laconic.ir.registry import Registry


@dataclass(frozen=True)
class Members:
    """Tensors to be merged, and what is known of each: `weights`, how much each counts (equally where not given);
    `squares`, the mean squared gradient of each of its elements; `covariances`, the products of the channels of what
    each multiplies, (inputs, inputs) where members are (outputs, inputs). `base` is their ancestor.

    Raises UsageError for members of several shapes or dtypes, for weights that are none, and for no members.
    """

    values: tuple[torch.Tensor, ...]
    weights: tuple[float, ...] = ()
    squares: tuple[torch.Tensor, ...] = ()
    covariances: tuple[torch.Tensor, ...] = ()
    base: torch.Tensor | None = None
    seed: int = field(default=0)

    def __post_init__(self) -> None:
        if not self.values:
            raise UsageError("there is nothing to merge")
        kinds = {(value.dtype, tuple(value.shape)) for value in self.values}
        if len(kinds) > 1:
            said = " and ".join(sorted(f"{dtype} {list(shape)}" for dtype, shape in kinds))
            raise UsageError("tensors of several kinds are not merged", why=said)
        for name in ("weights", "squares", "covariances"):
            given = getattr(self, name)
            if given and len(given) != len(self.values):
                raise UsageError(f"{len(self.values)} members have {len(given)} {name}")
        if self.weights and not (min(self.weights) >= 0 and sum(self.weights) > 0):
            raise UsageError(f"members cannot count {self.weights}", hint="numbers of 0 or more, not all 0")

    def shares(self) -> torch.Tensor:
        """How much each counts, (members,) float64, one in sum."""
        given = self.weights or (1.0,) * len(self.values)
        found = torch.tensor(given, dtype=torch.float64)
        return found / found.sum()

    def wide(self) -> torch.Tensor:
        """The members, (members, ...) float64."""
        return torch.stack([value.detach().double() for value in self.values])

    def deltas(self, operator: str) -> tuple[torch.Tensor, torch.Tensor]:
        """What each member changes of the base, (members, ...), and the base, both float64. Raises UsageError where
        there is no base."""
        if self.base is None:
            raise UsageError(f"{operator} merges what has one ancestor", hint="name the base, or merge by average")
        base = self.base.detach().double()
        return self.wide() - base, base


Operator = Callable[..., torch.Tensor]

OPERATORS = Registry(
    "merge operator",
    "laconic.merges",
    {
        "average": "laconic.passes.merging.operators:average",
        "breadcrumbs": "laconic.passes.merging.deltas:breadcrumbs",
        "dare": "laconic.passes.merging.deltas:dare",
        "fisher": "laconic.passes.merging.operators:fisher",
        "pcb": "laconic.passes.merging.deltas:pcb",
        "regmean": "laconic.passes.merging.operators:regmean",
        "ties": "laconic.passes.merging.deltas:ties",
    },
)


def merge(name: str, members: Members, options: Mapping[str, Any] | None = None) -> torch.Tensor:
    """One tensor for the members, of their dtype. `options` are the operator's.

    Raises UsageError for an unknown operator, for members that it cannot merge, and if what it gives is not finite.
    """
    operator: Operator = OPERATORS.load(name)
    first = members.values[0]
    if all(value is first or bit_equal(value, first) for value in members.values[1:]):
        return first
    if not first.is_floating_point():
        raise UsageError(f"tensors of {first.dtype} are not merged", hint="they are shared where they are equal")
    merged = operator(members, **(options or {})).to(first.dtype)
    if not bool(torch.isfinite(merged).all()):
        raise UsageError(f"merging by {name} gives what is not finite", hint="merge by average")
    return merged
