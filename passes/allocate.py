"""The allocator: spend a budget over units (blocks, branches, groups, experts, bits) where it hurts least.

    levels of six blocks, two of them dropped:   0 1 0 0 1 0        a swap:   0 0 0 1 1 0

A state says how far each unit is compressed. Units of equal cost form a class, and the levels of a class always sum up
to its budget: so each state saves the same, and a step lowers one unit and raises another of its class. What a state
costs in quality is asked of `fitness`, on some samples at a time.

Errors of single units do not add up, and a state of less damage need not hold those of more: so `evolve`, the engine,
judges whole states, and what it found is `settled` by swaps that help. `exhaustive` and `greedy` stand beside it as
what it is measured against.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from laconic.ir.errors import UsageError

#: How far each unit is compressed: 0 leaves it as it is.
State = tuple[int, ...]
#: What a state loses, the less the better, on the batches that are named.
Fitness = Callable[[State, Sequence[int]], float]
Progress = Callable[[int, int], None]


def going(keep: float, count: int) -> int:
    """How many of so many units go if a share of them stays: rounded, halves up."""
    return math.floor((1 - keep) * count + 0.5)


@dataclass(frozen=True)
class Class:
    """Units of equal cost: their numbers, and what their levels, each at most `top`, sum up to."""

    units: tuple[int, ...]
    budget: int
    top: int = 1


@dataclass(frozen=True)
class Space:
    """The legal states of `count` units. Units in no class stay at level 0.

    Raises UsageError for a budget that its class cannot spend.
    """

    count: int
    classes: tuple[Class, ...]

    def __post_init__(self) -> None:
        for one in self.classes:
            if not 0 <= one.budget <= one.top * len(one.units):
                raise UsageError(
                    f"{one.budget} levels cannot be spent on {len(one.units)} units", why=f"each has {one.top} at most"
                )

    def legal(self, state: State) -> bool:
        """Whether a state keeps to the budget."""
        free = {unit for one in self.classes for unit in one.units}
        return (
            len(state) == self.count
            and all(state[k] == 0 for k in range(self.count) if k not in free)
            and all(
                sum(state[u] for u in one.units) == one.budget and all(0 <= state[u] <= one.top for u in one.units)
                for one in self.classes
            )
        )

    def size(self) -> int:
        """How many legal states there are."""
        return math.prod(_ways(len(one.units), one.budget, one.top) for one in self.classes)

    def states(self) -> Iterator[State]:
        """All legal states, in lexicographic order of their classes."""
        for parts in itertools.product(*(list(_spendings(len(o.units), o.budget, o.top)) for o in self.classes)):
            yield self._state(parts)

    def draw(self, random: random.Random) -> State:
        """A legal state at random: levels are given out one by one."""
        parts = []
        for one in self.classes:
            slots = [k for k in range(len(one.units)) for _ in range(one.top)]
            chosen = random.sample(slots, one.budget)
            parts.append(tuple(chosen.count(k) for k in range(len(one.units))))
        return self._state(parts)

    def swapped(self, state: State, random: random.Random) -> State:
        """A state in which one unit is a level lower and another of its class one higher; the same if none can be."""
        movable = [one for one in self.classes if self._swaps(state, one)]
        if not movable:
            return state
        return _moved(state, *random.choice(self._swaps(state, random.choice(movable))))

    def neighbours(self, state: State) -> list[State]:
        """All states that are one swap away."""
        return [_moved(state, lower, higher) for one in self.classes for lower, higher in self._swaps(state, one)]

    def _swaps(self, state: State, one: Class) -> list[tuple[int, int]]:
        lower = [u for u in one.units if state[u] > 0]
        higher = [u for u in one.units if state[u] < one.top]
        return [(a, b) for a in lower for b in higher if a != b]

    def _state(self, parts: Sequence[Sequence[int]]) -> State:
        levels = [0] * self.count
        for one, part in zip(self.classes, parts, strict=True):
            for unit, level in zip(one.units, part, strict=True):
                levels[unit] = level
        return tuple(levels)


def _moved(state: State, lower: int, higher: int) -> State:
    levels = list(state)
    levels[lower] -= 1
    levels[higher] += 1
    return tuple(levels)


def _spendings(units: int, budget: int, top: int) -> Iterator[tuple[int, ...]]:
    if units == 0:
        yield from [()] if budget == 0 else []
        return
    for level in range(max(0, budget - top * (units - 1)), min(top, budget) + 1):
        for rest in _spendings(units - 1, budget - level, top):
            yield (level, *rest)


def _ways(units: int, budget: int, top: int) -> int:
    counts = [1] + [0] * budget
    for _ in range(units):
        counts = [sum(counts[max(0, b - top) : b + 1]) for b in range(budget + 1)]
    return counts[budget]


@dataclass(frozen=True)
class Found:
    """A state, its fitness on the batches that it was last judged on, and how many judgements of a batch it took."""

    state: State
    fitness: float
    judged: int


@dataclass(frozen=True)
class Stage:
    """A sieve: the `survivors` best on `batches` batches go on."""

    survivors: int
    batches: int


@dataclass(frozen=True)
class Evolution:
    """How long and how wide to search: `initial` states drawn at random, then generations of `offspring`, each sieved
    by the stages in turn; the parent joins the last.

    Sieberling et al. 2024, "EvoPress", arXiv:2410.14649.
    """

    generations: int
    offspring: int = 32
    initial: int = 64
    stages: tuple[Stage, ...] = (Stage(2, 1), Stage(1, 16))
    mutations: int = 3

    def judgements(self, starts: int = 0) -> int:
        """How many judgements of a batch it takes at most, from so many states beside those that are drawn."""
        each = 0
        for children in (self.initial + starts, *[self.offspring] * self.generations):
            for sieve, before in zip(self.stages, (None, *self.stages), strict=False):
                each += (before.survivors + 1 if before else children) * sieve.batches
        return each


def _real(value: float) -> float:
    """A fitness that can be compared: what is no number is worse than all."""
    return math.inf if math.isnan(value) else value


class _Judge:
    """Fitness that counts what it was asked."""

    def __init__(self, fitness: Fitness) -> None:
        self._fitness, self.judged = fitness, 0

    def best(self, states: Sequence[State], count: int, batches: Sequence[int]) -> list[tuple[float, State]]:
        """The `count` best, the best first; of equals the first. Those that begin alike are judged one behind the
        other."""
        self.judged += len(states) * len(batches)
        order = sorted(range(len(states)), key=states.__getitem__)
        rated = [(_real(self._fitness(states[k], batches)), k, states[k]) for k in order]
        return [(value, state) for value, _, state in sorted(rated)[:count]]


def evolve(
    space: Space,
    fitness: Fitness,
    batches: int,
    settings: Evolution,
    *,
    seed: int = 0,
    start: Sequence[State] = (),
    progress: Progress = lambda done, total: None,
) -> Found:
    """Elitist evolution at a fixed budget. `batches` is how many there are to judge on: each sieve draws its own.
    States of `start` take part from the beginning.

    The parent is judged again beside its offspring, on the same batches, so it is only ever replaced by what is better
    there.
    """
    draw = random.Random(seed)
    judge = _Judge(fitness)
    if space.size() == 1:
        (only,) = space.states()
        return Found(only, fitness(only, range(batches)), batches)

    def some(count: int) -> list[int]:
        return sorted(draw.sample(range(batches), min(count, batches)))

    first = list(dict.fromkeys([*start, *(space.draw(draw) for _ in range(settings.initial))]))
    survivors = _sieve(judge, first, settings.stages[:-1], some)
    ((value, parent),) = judge.best(survivors, 1, some(settings.stages[-1].batches))
    for generation in range(settings.generations):
        offspring = _offspring(space, parent, settings, draw)
        survivors = _sieve(judge, offspring, settings.stages[:-1], some)
        ((value, parent),) = judge.best([parent, *survivors], 1, some(settings.stages[-1].batches))
        progress(generation + 1, settings.generations)
    return Found(parent, value, judge.judged)


def _sieve(
    judge: _Judge, states: list[State], stages: Sequence[Stage], some: Callable[[int], list[int]]
) -> list[State]:
    for stage in stages:
        states = [state for _, state in judge.best(states, stage.survivors, some(stage.batches))]
    return states


def _offspring(space: Space, parent: State, settings: Evolution, draw: random.Random) -> list[State]:
    """Mutants of a state, no two alike; fewer where there are no more."""
    found: dict[State, None] = {}
    for _ in range(16 * settings.offspring):
        child = parent
        for _ in range(min(draw.randint(1, settings.mutations), draw.randint(1, settings.mutations))):
            child = space.swapped(child, draw)
        if child != parent:
            found.setdefault(child)
        if len(found) == settings.offspring:
            break
    return list(found)


def settled(space: Space, fitness: Fitness, found: Found, batches: Sequence[int]) -> Found:
    """What becomes of a state by swaps, each the best there is, until none is better on these batches. A state stays
    as it is where judging all swaps once would take more than finding it did."""
    near = space.neighbours(found.state)
    if not near or len(near) * len(batches) > found.judged:
        return found
    judge = _Judge(fitness)
    ((value, state),) = judge.best([found.state], 1, batches)
    while True:
        ((least, best),) = judge.best(near, 1, batches)
        if least >= value:
            return Found(state, value, found.judged + judge.judged)
        value, state, near = least, best, space.neighbours(best)


def exhaustive(
    space: Space, fitness: Fitness, batches: Sequence[int], *, progress: Progress = lambda done, total: None
) -> Found:
    """The best of all legal states, on these batches; of equals the first. Those that begin alike come one behind the
    other."""
    total, best = space.size(), None
    for k, state in enumerate(sorted(space.states())):
        value = _real(fitness(state, batches))
        best = min(best or (value, k, state), (value, k, state))
        progress(k + 1, total)
    assert best is not None
    return Found(best[2], best[0], total * len(batches))


def greedy(space: Space, fitness: Fitness, batches: Sequence[int]) -> Found:
    """Level by level, each on the unit where it hurts least then, on these batches."""
    state = tuple([0] * space.count)
    value, judged = _real(fitness(state, batches)), len(batches)
    left = {k: one.budget for k, one in enumerate(space.classes)}
    while any(left.values()):
        rated = []
        for k, one in enumerate(space.classes):
            for unit in one.units if left[k] else ():
                if state[unit] < one.top:
                    raised = (*state[:unit], state[unit] + 1, *state[unit + 1 :])
                    rated.append((_real(fitness(raised, batches)), unit, k, raised))
        judged += len(rated) * len(batches)
        value, _, chosen, state = min(rated)
        left[chosen] -= 1
    return Found(state, value, judged)
