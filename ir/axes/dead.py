"""Positions that may be left out and nothing changes: the zero certificate.

A position may go where everything that gathers over its axis holds the neutral element of that there: zero under a
sum of products, -inf under a softmax or where the greatest are chosen. A constant may go too, where what it adds is
another constant and has a bias to go to. What feeds only positions that go is itself of no use, so this is asked again
until nothing is added.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import fx

from laconic.ir.axes.dims import MASKED, Dim, Factor, factors, size_of
from laconic.ir.axes.held import Holding
from laconic.ir.axes.labels import Axes, Gather, flat
from laconic.ir.axes.positions import coordinates, old_positions
from laconic.ir.axes.rewriter import row_factors
from laconic.ir.program import Kind
from laconic.ir.traits import argument


@dataclass(frozen=True)
class Fold:
    """What a gather's first operand holds at the positions of its axis where it is constant, 0 elsewhere: (size,)."""

    gather: Gather
    constants: torch.Tensor


@dataclass(frozen=True)
class Dead:
    """For each factor with dead positions: the positions that stay, the constants that go with the dead ones, and what
    gathers over it."""

    kept: dict[Factor, list[int]]
    folds: dict[Factor, list[Fold]]
    ends: dict[Factor, list[Gather]]


def dead_positions(axes: Axes, *, constants: bool = True) -> Dead:
    """The positions of a program's axes that may be left out: no result moves but by rounding. Without `constants`,
    only those that need no bias to take what they add.

    Axes are left alone if the caller sees them, if their size enters values, if position matters. One position stays.
    """
    ends = _ends(axes)
    kept: dict[Factor, list[int]] = {}
    while True:
        asked = _Question(axes, Holding(axes, kept), kept, constants)
        alive = {factor: asked.alive(factor, gathers) for factor, gathers in ends.items()}
        now = {factor: positions for factor, positions in alive.items() if len(positions) < factor.size}
        if now == kept:
            return Dead(kept, {factor: asked.folds(ends[factor]) for factor in kept}, ends)
        kept = now


def _ends(axes: Axes) -> dict[Factor, list[Gather]]:
    """The factors that may be asked about, each with all that gathers over it."""
    ends: dict[Factor, list[Gather]] = defaultdict(list)
    lost: set[Factor] = set()
    over: dict[fx.Node, set[Factor]] = defaultdict(set)
    for gather in axes.gathers:
        for factor in dict.fromkeys(factors(gather.dim)):
            ends[factor].append(gather)
            over[gather.node].add(factor)
    for entry in axes.program.entries.values():
        for node in entry.calls():
            if not isinstance(node.target, torch._ops.OpOverload):
                continue
            chosen = (f for dim in axes.choosing.get(node, ()) for f in factors(dim))
            stays = over[node].union(axes.factors_of(node), chosen)
            lost |= {f for value in node.all_input_nodes for f in axes.factors_of(value)} - stays
    return {
        factor: ends[factor]
        for factor in row_factors(axes)
        if factor in ends and factor not in lost and isinstance(factor.size, int) and MASKED.issuperset(factor.pins)
    }


#: Ops whose results are never below zero, those above it wherever they are not masked, and ops that keep that.
_POSITIVE = frozenset({"softmax", "_softmax", "_safe_softmax", "sigmoid", "exp", "softplus"})
_NEVER_NEGATIVE = _POSITIVE | {"relu", "abs", "square"}
_COPIES = frozenset({"_to_copy", "to", "clone", "reshape", "view", "transpose", "permute", "squeeze", "unsqueeze"})
#: Which of them make zeros as good as masked, for what takes the greatest value, and for what says where it is too.
_ZERO_IS_LEAST = {"amax": _NEVER_NEGATIVE, "max": _NEVER_NEGATIVE, "argmax": _POSITIVE, "topk": _POSITIVE}


def _zero_is_least(gather: Gather, value: fx.Node) -> bool:
    """Whether a gather takes zeros after all else: it takes the greatest, and the others are above zero. Shares of a
    softmax that are zero to rounding do not count."""
    target = gather.node.target
    if gather.neutral != -math.inf or not isinstance(target, torch._ops.OpOverload):
        return False
    taken = target._schema.name.partition("::")[2]
    least = _POSITIVE if target is torch.ops.aten.max.dim else _ZERO_IS_LEAST.get(taken, frozenset())
    while isinstance(value.target, torch._ops.OpOverload):
        name = value.target._schema.name.partition("::")[2]
        if name not in _COPIES:
            return name in least
        value = value.args[0]  # type: ignore[assignment]
    return False


#: An operand's axis, and the positions of it that a gather does not need.
_Mask = tuple[fx.Node, int, torch.Tensor]


@dataclass(frozen=True)
class _Question:
    """Which positions are needed, given what is known to go already."""

    axes: Axes
    holding: Holding
    kept: Mapping[Factor, list[int]]
    constants: bool

    def alive(self, factor: Factor, gathers: list[Gather]) -> list[int]:
        """The positions of a factor that some gather needs; at least one, and as many as are to be chosen."""
        alive = torch.zeros(int(factor.size), dtype=torch.bool)
        least = 1
        for gather in gathers:
            needed = torch.ones(int(factor.size), dtype=torch.bool)
            for masks in self._spared(gather):
                needed &= self._seen(factor, masks)
            alive |= needed
            if gather.node.target is torch.ops.aten.topk.default:
                least = max(least, int(argument(gather.node, "k")))
        spare = (~alive).nonzero().flatten()
        alive[spare[: max(least - int(alive.sum()), 0)]] = True
        return alive.nonzero().flatten().tolist()

    def _spared(self, gather: Gather) -> list[list[_Mask]]:
        """The positions of its operands' axes that a gather does not need. Those of one size are one axis, and told
        together."""
        by_size: dict[int, list[_Mask]] = defaultdict(list)
        for k, (value, axis) in enumerate(gather.operands):
            held = self.holding.of(value, axis)
            if not held:
                continue
            mask = held.at(gather.neutral)
            if _zero_is_least(gather, value):
                mask = mask | held.at(0)
            if k == 0 and self._foldable(gather):
                mask = mask | (held.known & torch.isfinite(held.value))
            by_size[len(mask)].append((value, axis, mask))
        return list(by_size.values())

    def _seen(self, factor: Factor, masks: list[_Mask]) -> torch.Tensor:
        """The positions of a factor of which something is needed: (size of the factor,) bool."""
        dim = self._dim(*masks[0][:2])
        needed = ~torch.stack([mask for _, _, mask in masks]).any(0) & self._stays(dim)
        seen = torch.zeros(int(factor.size), dtype=torch.bool)
        occurrences = coordinates(dim, factor)
        for own in occurrences:
            seen[own[needed & (own >= 0)]] = True
        return seen if occurrences else ~seen

    def _dim(self, value: fx.Node, axis: int) -> Dim:
        return flat(self.axes.labels[value])[0][axis]

    def _stays(self, dim: Dim) -> torch.Tensor:
        """The positions of an axis that stay: (size,) bool."""
        stays = torch.zeros(size_of(dim), dtype=torch.bool)
        stays[old_positions(dim, self.kept)] = True
        return stays

    def _foldable(self, gather: Gather) -> bool:
        """Whether constants of its first operand add constants to its result, and it has a bias for them."""
        if not self.constants or gather.bias is None or self.holding.weight(gather.operands[1][0]) is None:
            return False
        bias = argument(gather.node, gather.bias)
        fixed = bias is None or (bias.op == "placeholder" and bias.meta["kind"] not in (Kind.INPUT, Kind.STATE))
        return fixed and (bias is None or bias.meta["val"].dim() == 1)

    def folds(self, gathers: list[Gather]) -> list[Fold]:
        """The constants, at positions that go, that would be missing."""
        found = []
        for gather in filter(self._foldable, gathers):
            value, axis = gather.operands[0]
            held = self.holding.of(value, axis)
            if held:
                gone = held.known & ~self._stays(self._dim(value, axis))
                constants = torch.where(gone & torch.isfinite(held.value), held.value, 0)
                found += [Fold(gather, constants)] if bool(constants.any()) else []
        return found
