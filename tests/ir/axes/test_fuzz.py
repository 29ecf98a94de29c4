"""Random programs: what is free is permuted, what has no pin halved; what is held is so, and what is dead goes."""

from __future__ import annotations

import pytest

from axes_fuzz import program_of
from axes_oracles import distance, results, try_permutations, try_shrinks
from held_oracle import held_true, planted
from laconic.passes.dead_units import DeadUnits

FAST, ALL = 4, 150


@pytest.mark.parametrize("seed", [s if s < FAST else pytest.param(s, marks=pytest.mark.slow) for s in range(ALL)])
def test_random_programs(seed: int) -> None:
    program = program_of(seed)
    axes, permuted = try_permutations(program, seed=seed)
    _, halved = try_shrinks(program, seed=seed)
    assert not axes.unknown
    for trial in (*permuted, *halved):
        assert trial.moved < 1e-8
    sparse = planted(program, 0.3, seed)
    held_true(sparse)
    found = DeadUnits().apply(sparse, DeadUnits().plan(sparse))
    assert distance(results(found.program), results(sparse)) < 1e-5  # biases that take constants are float32
