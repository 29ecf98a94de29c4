"""What holds the analysis of axes to the truth: a program whose positions were moved computes the same."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import nn

from laconic.ir.axes.analysis import analyse
from laconic.ir.axes.dead import dead_positions
from laconic.ir.axes.dims import Factor, factors
from laconic.ir.axes.labels import Axes
from laconic.ir.axes.positions import Kept, old_positions, row_moves
from laconic.ir.axes.rewriter import free, rewrite, row_factors
from laconic.ir.capture import capture_module
from laconic.ir.inputs import cases
from laconic.ir.moves import Moves
from laconic.ir.precise import evaluate_precise
from laconic.ir.program import Kind, Program
from laconic.ir.verify import verify, verify_rewrite

T = TypeVar("T")

#: A result that moves by less than this share of its greatest value did not react.
SILENT = 1e-6


class Written(nn.Module):
    """A module of named parameters and a function of them. Names that begin with `state` are buffers of zeros."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], function: Callable[..., Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        for name, shape in shapes.items():
            if name.startswith("state"):
                self.register_buffer(name, torch.zeros(shape))
                continue
            self.register_parameter(name, nn.Parameter(torch.randn(*shape, generator=generator) / 2))
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> Any:
        return self.function(self, *inputs)


def captured(
    shapes: Mapping[str, tuple[int, ...]],
    function: Callable[..., Any],
    inputs: Sequence[torch.Tensor],
    axes: Sequence[Any] | None = None,
) -> Program:
    dynamic = None if axes is None else (tuple(axes),)
    return capture_module(Written(shapes, function).eval(), tuple(inputs), {}, dynamic, check=False)


def results(program: Program, moves: Moves | None = None) -> list[torch.Tensor]:
    """All that entries return and update, for the largest of a few drawn inputs, computed in float64; states as `moves`
    would have them."""
    found: list[torch.Tensor] = []
    for entry in program.entries.values():
        drawn = max(cases(program, entry, 4), key=lambda case: sum(t.numel() for t in case.inputs))
        outcome = evaluate_precise(program, entry, drawn.inputs).moved(moves or {})
        found += [value for value in outcome.tensors().values() if isinstance(value, torch.Tensor)]
    return found


def distance(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    worst = 0.0
    for a, b in zip(ours, theirs, strict=True):
        if a.shape != b.shape:
            return float("inf")
        if a.numel():
            scale = float(b.double().abs().max()) or 1.0
            worst = max(worst, float((a.double() - b.double()).abs().max()) / scale)
    return worst


@dataclass(frozen=True)
class Tried:
    """What became of a permutation: how far the results moved, and how far if only one weight had been permuted. Where
    not even that shows, the trial says nothing."""

    factor: Factor
    moved: float
    fault: float

    @property
    def void(self) -> bool:
        return self.fault < SILENT


def permuted(axes: Axes, factor: Factor, generator: torch.Generator) -> list[int]:
    """A permutation of a factor's positions that is not the identity."""
    while True:
        order = torch.randperm(factor.size, generator=generator).tolist()
        if order != sorted(order):
            return order


def try_permutations(program: Program, *, seed: int = 0, most: int = 1000) -> tuple[Axes, list[Tried]]:
    """Permute each free axis by itself, so many at most, and all at once (the last trial)."""
    axes, base = analyse(program), results(program)
    generator = torch.Generator().manual_seed(seed)
    units = [f for f in row_factors(axes) if free(f) and isinstance(f.size, int) and f.size > 1]
    chosen = {f: permuted(axes, f, generator) for f in units}
    found = []
    for factor, order in sample(chosen.items(), most, generator):
        moved = rewrite(axes, {factor: order}, by="test")
        verify(moved)
        verify_rewrite(program, moved)
        found.append(Tried(factor, _gap(moved, axes, {factor: order}, base), _fault(axes, factor, order, base)))
    if chosen:
        found.append(Tried(next(iter(chosen)), _gap(rewrite(axes, chosen, by="test"), axes, chosen, base), 1.0))
    return axes, found


def _gap(made: Program, axes: Axes, kept: Kept, base: list[torch.Tensor]) -> float:
    """How far a rewritten program's results are from those of the program that it was made of."""
    moves = row_moves(axes, kept)
    states = any(axes.program.weights[name].kind is Kind.STATE for name in moves)
    return distance(results(made), results(axes.program, moves) if states else base)


def sample(of: Iterable[T], most: int, generator: torch.Generator) -> list[T]:
    """So many of them at most, in their order."""
    known = list(of)
    return [known[k] for k in sorted(torch.randperm(len(known), generator=generator).tolist()[:most])]


def _fault(axes: Axes, factor: Factor, order: list[int], base: list[torch.Tensor]) -> float:
    """How far the results move if only one weight is permuted, whichever moves them most."""
    worst = 0.0
    for name, label in axes.rows.items():
        own = [k for k, dim in enumerate(label) if factor in set(factors(dim))]
        if not own or worst > SILENT:
            continue
        broken = axes.program.clone()
        value = broken.weights[name].value.detach()
        for k in own:
            value = value.index_select(k, old_positions(label[k], {factor: order}))
        broken.weights[name] = replace(broken.weights[name], value=value)
        worst = max(worst, distance(results(broken), base))
    return worst


def try_shrinks(program: Program, *, seed: int = 0, most: int = 1000, proved: bool = True) -> tuple[Axes, list[Tried]]:
    """Leave out half of each axis that has no pin, so many at most, with all weights zero there before; beside the
    difference from that model, how far zeroing itself moved the results. Unless it need not be `proved`, axes of which
    zeros in weights do not prove that positions may go, as the times that something is repeated, are left out."""
    axes, base = analyse(program), results(program)
    generator = torch.Generator().manual_seed(seed)
    found = []
    for factor in sample((f for f in row_factors(axes) if not f.pins and isinstance(f.size, int)), most, generator):
        keep = sorted(torch.randperm(factor.size, generator=generator).tolist()[: (factor.size + 1) // 2])
        masked = analyse(zeroed(axes, factor, keep))
        twin = next(f for f, own in zip(row_factors(masked), row_factors(axes), strict=True) if own is factor)
        if proved and not set(dead_positions(masked).kept.get(twin, range(factor.size))) <= set(keep):
            continue
        small = rewrite(masked, {twin: keep}, by="test")
        verify(small)
        expected = results(masked.program, row_moves(masked, {twin: keep}))
        found.append(Tried(factor, distance(results(small), expected), distance(results(masked.program), base)))
    return axes, found


def zeroed(axes: Axes, factor: Factor, keep: Sequence[int]) -> Program:
    """The program with zeros in all weights at the positions of a factor that are not kept."""
    made = axes.program.clone()
    for name, label in axes.rows.items():
        value = made.weights[name].value.detach()
        for k, dim in enumerate(label):
            if factor in set(factors(dim)) and value.is_floating_point():
                mask = torch.zeros(value.shape[k])
                mask[old_positions(dim, {factor: keep})] = 1.0
                value = value * mask.reshape([-1 if k == n else 1 for n in range(value.dim())])
        made.weights[name] = replace(made.weights[name], value=value)
    return made
