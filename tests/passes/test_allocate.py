"""The allocator: legal states, and engines against brute force."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence

import pytest

from laconic.ir.errors import UsageError
from laconic.passes.allocate import (
    Class,
    Evolution,
    Fitness,
    Found,
    Space,
    Stage,
    State,
    evolve,
    exhaustive,
    greedy,
    settled,
)

SPACES = [
    Space(6, (Class((0, 1, 2, 3, 4, 5), 2),)),
    Space(7, (Class((0, 2, 4), 1), Class((1, 3, 5), 2))),
    Space(4, (Class((0, 1, 2, 3), 5, top=3),)),
    Space(3, (Class((0, 1, 2), 0),)),
    Space(3, (Class((0, 1, 2), 3),)),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_states_are_all_that_are_legal(space: Space) -> None:
    states = list(space.states())
    assert len(states) == len(set(states)) == space.size()
    assert all(map(space.legal, states))
    draw = random.Random(0)
    assert {space.draw(draw) for _ in range(2000)} == set(states)


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_a_swap_keeps_to_the_budget(space: Space) -> None:
    draw = random.Random(1)
    for state in list(space.states())[:20]:
        others = {space.swapped(state, draw) for _ in range(200)}
        assert all(map(space.legal, others))
        assert state not in others or space.size() == 1
        for other in others - {state}:
            assert sum(abs(a - b) for a, b in zip(state, other, strict=True)) == 2


def test_what_is_not_legal() -> None:
    space = Space(4, (Class((0, 1, 2), 1),))
    for state in ((1, 1, 0, 0), (0, 0, 0, 1), (0, 0, 0, 0), (2, 0, 0, 0), (1, 0, 0)):
        assert not space.legal(state)
    with pytest.raises(UsageError, match="4 levels cannot be spent on 3 units"):
        Space(3, (Class((0, 1, 2), 4),))


def rugged(seed: int, count: int) -> dict[int, float]:
    """Damage of single units and of pairs: dropping two may hurt less than either, so errors do not add up."""
    draw = random.Random(seed)
    damage = {1 << k: draw.random() for k in range(count)}
    damage |= {1 << a | 1 << b: draw.gauss(0.0, 0.6) for a in range(count) for b in range(a)}
    return damage


def fitness(damage: dict[int, float], noise: float = 0.0) -> Fitness:
    def judge(state: State, batches: Sequence[int]) -> float:
        dropped = sum(1 << k for k, level in enumerate(state) if level)
        loss = sum(value for units, value in damage.items() if units & dropped == units)
        errors = [random.Random(f"{dropped} {k}").gauss(0.0, noise) for k in batches]
        return loss + sum(errors) / len(batches)

    return judge


@pytest.mark.parametrize("seed", range(8))
def test_evolution_finds_what_brute_force_finds(seed: int) -> None:
    space, damage = Space(10, (Class(tuple(range(10)), 4),)), rugged(seed, 10)
    judge = fitness(damage)
    best = exhaustive(space, judge, range(1))
    found = evolve(space, judge, 1, Evolution(16, stages=(Stage(2, 1), Stage(1, 1))), seed=seed)
    assert best.fitness == min(judge(state, [0]) for state in space.states())
    assert found.state == best.state
    assert space.legal(greedy(space, judge, range(1)).state)


def test_errors_that_do_not_add_up_mislead_greed_but_not_evolution() -> None:
    misled = 0
    for seed in range(8):
        space, judge = Space(10, (Class(tuple(range(10)), 4),)), fitness(rugged(seed, 10))
        best = exhaustive(space, judge, range(1))
        misled += greedy(space, judge, range(1)).fitness > best.fitness
    assert misled >= 2


def test_every_state_that_is_judged_keeps_to_the_budget_and_the_parent_is_never_worse() -> None:
    space = Space(12, (Class((0, 2, 4, 6, 8, 10), 3), Class((1, 3, 5, 7, 9, 11), 2)))
    judge, seen, last = fitness(rugged(3, 12), noise=0.2), [], []

    def watched(state: State, batches: Sequence[int]) -> float:
        assert space.legal(state)
        seen.append((state, tuple(batches)))
        return judge(state, batches)

    settings = Evolution(6, offspring=8, initial=16)
    found = evolve(space, watched, 24, settings, seed=5, progress=lambda k, n: last.append(k))
    assert last == [1, 2, 3, 4, 5, 6]
    assert found.judged == sum(len(batches) for _, batches in seen)
    final = [batches for _, batches in seen if len(batches) == 16]
    assert len(set(final)) > 1, "each sieve draws its own batches"
    rivals = {state for state, batches in seen if batches == final[-1]}
    assert found.fitness == min(judge(state, final[-1]) for state in rivals)
    assert evolve(space, watched, 24, settings, seed=5).state == found.state


def test_one_state_and_classes_without_a_swap() -> None:
    """All dropped or none: there is nothing to swap, and nobody waits for it."""
    full = Space(3, (Class((0, 1, 2), 3),))
    assert evolve(full, lambda state, batches: 0.0, 4, Evolution(5)).state == (1, 1, 1)
    mixed = Space(5, (Class((0, 1), 2), Class((2, 3, 4), 1)))
    assert evolve(mixed, lambda state, batches: float(state[3]), 4, Evolution(5)).state[3] == 0


def test_what_is_no_number_is_worst() -> None:
    space = Space(4, (Class((0, 1, 2, 3), 1),))

    def judge(state: State, batches: Sequence[int]) -> float:
        return math.nan if state[0] else float(state[2] + 2 * state[3])

    assert evolve(space, judge, 2, Evolution(3)).state == (0, 1, 0, 0)
    assert exhaustive(space, judge, range(2)).state == (0, 1, 0, 0)
    assert greedy(space, judge, range(2)).state == (0, 1, 0, 0)


def test_a_good_start_is_taken() -> None:
    space = Space(30, (Class(tuple(range(30)), 15),))
    start = tuple(k % 2 for k in range(30))
    found = evolve(
        space, lambda state, batches: float(state != start), 2, Evolution(1, offspring=2, initial=2), start=[start]
    )
    assert found.state == start


@pytest.mark.parametrize("seed", range(4))
def test_settled_where_no_swap_helps(seed: int) -> None:
    space = Space(12, (Class((0, 2, 4, 6, 8, 10), 3), Class((1, 3, 5, 7, 9, 11), 2)))
    judge, seen = fitness(rugged(seed, 12)), []

    def watched(state: State, batches: Sequence[int]) -> float:
        seen.append(state)
        return judge(state, batches)

    first = Found(space.draw(random.Random(seed)), math.inf, 1000)
    found = settled(space, watched, first, range(2))
    assert all(space.legal(state) for state in seen)
    assert found.judged == first.judged + 2 * len(seen)
    assert found.state != first.state
    assert found.fitness == judge(found.state, range(2)) < judge(first.state, range(2))
    near = space.neighbours(found.state)
    assert len(set(near)) == 3 * 3 + 2 * 4
    assert found.fitness <= min(judge(state, range(2)) for state in near)
    assert settled(space, judge, found, range(2)).state == found.state


def test_settling_takes_no_more_than_searching_did() -> None:
    space = Space(6, (Class(tuple(range(6)), 3),))
    first = Found((1, 1, 1, 0, 0, 0), 1.0, judged=9 * 4 - 1)

    def unasked(state: State, batches: Sequence[int]) -> float:
        raise AssertionError("judged")

    assert settled(space, unasked, first, range(4)) == first
    alone = Found((1, 1), 1.0, judged=100)
    assert settled(Space(2, (Class((0, 1), 2),)), unasked, alone, range(4)) == alone
