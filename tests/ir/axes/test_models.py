"""Axes of real architectures: all that is free may be permuted, all that is not pinned may be left out."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import nn

from architectures import ARCHITECTURES, EIGHT
from axes_oracles import Tried, try_permutations, try_shrinks, zeroed
from laconic.ir.axes import Axes, analyse, factors, free, row_factors
from laconic.ir.axes.dead import dead_positions
from laconic.ir.capture import capture_module
from laconic.ir.program import Program

FAST = ("vit",)
NAMES = [*ARCHITECTURES, *(name for name in EIGHT if name not in ARCHITECTURES)]


@pytest.fixture(
    scope="module", params=[name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def subject(request: pytest.FixtureRequest) -> tuple[str, Program]:
    torch.manual_seed(0)
    case: Any = ARCHITECTURES.get(request.param) or EIGHT[request.param]
    module, inputs, axes = case()
    _alive(module)
    return request.param, capture_module(module, (), inputs, axes, check=False)


def _alive(module: nn.Module) -> None:
    """Numbers as after training: biases, norms and statistics that do something."""
    with torch.no_grad():
        for name, weight in module.named_parameters():
            if weight.ndim < 2:
                weight.add_(torch.randn_like(weight) / 4)
            elif "embed" in name or "position" in name:
                weight.copy_(torch.randn_like(weight))
            else:
                weight.mul_(6)


def permutable(axes: Axes) -> Counter[int]:
    return Counter(f.size for f in row_factors(axes) if free(f))


def test_permuted_programs_compute_the_same(subject: tuple[str, Program]) -> None:
    name, program = subject
    axes, tried = try_permutations(program)
    assert not axes.unknown
    assert not axes.misfits
    _held(tried)
    if name == "llama":  # per layer: pairs of heads, head groups, values' width, hidden units; rotary pairs; the stream
        assert permutable(axes) == {2: 4, 8: 2, 64: 2, 4: 2, 32: 1}
    if name == "vit":  # per layer: heads, the width of keys and of values, hidden units
        assert permutable(axes) == {4: 2, 8: 4, 64: 2}


def test_shrunk_programs_compute_what_masked_ones_do(subject: tuple[str, Program]) -> None:
    _, tried = try_shrinks(subject[1])
    _held(tried)


def test_planted_zeros_are_found_and_nothing_else(subject: tuple[str, Program]) -> None:
    """Half of each axis without a pin is zero in all weights: that half is dead, and nothing is where it is not so."""
    _, program = subject
    axes = analyse(program)
    assert dead_positions(axes).kept == {}
    expected, masked = {}, program
    for k, factor in enumerate(row_factors(axes)):
        if (
            not factor.pins
            and isinstance(factor.size, int)
            and any(factor in set(factors(g.dim)) for g in axes.gathers)
        ):
            keep = sorted(torch.randperm(factor.size, generator=torch.Generator().manual_seed(k)).tolist()[::2])
            twin = list(row_factors(now := analyse(masked)))[k]
            masked, expected[k] = zeroed(now, twin, keep), keep
    again = analyse(masked)
    found = dead_positions(again).kept
    assert {k: found[factor] for k, factor in enumerate(row_factors(again)) if factor in found} == expected
    assert expected


def _held(tried: list[Tried]) -> None:
    assert tried
    assert max(trial.moved for trial in tried) < 1e-10
    assert sum(not trial.void for trial in tried) >= 0.8 * len(tried)
