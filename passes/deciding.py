"""What passes that decide over units of a model share: a space of states, each judged by how far predictions move."""

from __future__ import annotations

import math
import random
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from laconic.ir.calibration import Calibration
from laconic.ir.depth import Block, Depth
from laconic.ir.errors import UsageError
from laconic.ir.program import Kind, Program
from laconic.ir.score import Scorer
from laconic.ir.statistics.rows import shape_of
from laconic.passes.allocate import Evolution, Found, Progress, Space, Stage, State, evolve, exhaustive, greedy, settled

#: Tokens that candidates are sieved on, and that the survivors are judged on.
_SIEVE, _FINAL = 2048, 32768
#: States beyond which nobody wants to wait for all of them.
_MOST = 20_000

#: The entry that decisions are made on.
ENTRY = "forward"


def is_matrix(program: Program, row: str) -> bool:
    """Whether a row is what decisions over weights are about: a floating-point parameter of two axes or more."""
    weight = program.weights[row]
    return weight.kind is Kind.PARAMETER and weight.value.is_floating_point() and weight.value.dim() >= 2


def refuse_quantised(program: Program, rows: Iterable[str]) -> None:
    """Raise UsageError if matrices among these rows are quantised: their scales alone are no weights to decide over."""
    for row in sorted(rows):
        value = program.weights[row].value
        if value.dim() >= 2 and value.element_size() == 1 and value.dtype != torch.bool:
            raise UsageError(
                "these weights are quantised", why=f"{row!r} is {value.dtype}", hint="decide this before quantising"
            )


def place_of(depth: Depth, block: Block) -> fx.Node:
    """The first addition of a block in `forward`, which stands for it where one call must."""
    unit = block.units[0]
    return depth.branches(unit.stream, unit.place)[ENTRY].add


def placed(depth: Depth, block: Block) -> dict[str, Any]:
    """Where a block stands, as actions of plans say it."""
    node = place_of(depth, block)
    name = f"block {block.number}" + (f" of run {block.run}" if block.run else "")
    return {"layer": name, "entry": ENTRY, "node": node.name, "site": node.meta.get("site", -1)}


@dataclass(frozen=True)
class Task(ABC):
    """A decision over units of a program's depth: what a method is given. `generations` is how long to search, 0 for
    k (n - k) / 1.5 where k of n units are chosen."""

    program: Program
    depth: Depth
    calibration: Calibration | None
    generations: int

    @property
    @abstractmethod
    def space(self) -> Space:
        """The states that keep to the budget."""

    @property
    @abstractmethod
    def scorer(self) -> Scorer:
        """The divergence from the program as it is, by gates."""

    @abstractmethod
    def fitness(self, state: State, batches: Sequence[int]) -> float:
        """What a state loses on these batches."""

    @property
    def data(self) -> Calibration:
        """What is decided on; a method that asks for it belongs to a pass that says that it needs it."""
        assert self.calibration is not None
        return self.calibration

    def progress(self, what: str) -> Progress:
        return self.data.progress(what)

    def batches(self, tokens: int) -> int:
        """How many batches hold about so many tokens; of images, of their patches."""
        each = [count * self._positions() for count in self.scorer.tokens]
        if not sum(each):
            raise UsageError(f"{self.data.data.name} has no position that counts", why="all of it is masked")
        return min(len(each), max(1, math.ceil(tokens * len(each) / sum(each))))

    def _positions(self) -> int:
        """How many places of a stream what is counted once in a batch takes: a sample without a mask takes all."""
        if self.data.data.batch(0).mask is not None:
            return 1
        starts = (stream.start for stream in self.depth.structures[ENTRY].streams)
        shapes = [shape_of(start.meta["val"]) for start in starts]
        return max((shape[1] for shape in shapes if len(shape) == 3 and isinstance(shape[1], int)), default=1)

    def least(self, scores: Sequence[float]) -> State:
        """The state that chooses the units of each class with the least scores; of equals the first."""
        levels = [0] * self.space.count
        for one in self.space.classes:
            for unit in sorted(one.units, key=lambda u: (scores[u], u))[: one.budget]:
                levels[unit] = 1
        return tuple(levels)

    @property
    def judged(self) -> list[int]:
        """The batches that whole states are judged on where not all of them take part, spread over the data."""
        total, count = len(self.scorer.tokens), self.batches(_FINAL)
        return [k * total // count for k in range(count)]

    def searched(self, what: str, start: Sequence[State] = ()) -> State:
        """The state that evolution finds, settled by swaps that help; the best of all where trying all takes less.

        Sieberling et al. 2024, "EvoPress", arXiv:2410.14649.
        """
        free = [(one.budget, len(one.units)) for one in self.space.classes]
        generations = self.generations or max(1, round(sum(k * (n - k) for k, n in free) / 1.5))
        settings = self._staged(Evolution(generations))
        if self.space.size() <= min(_MOST, settings.judgements(len(start)) // len(self.judged)):
            return self.best(what)
        told, rounds = self.progress(what), settings.generations + 1
        found = self._evolved(start, settings, lambda done, _: told(done, rounds))
        state = settled(self.space, self.fitness, found, self.judged).state
        told(rounds, rounds)
        return state

    def mended(self, what: str, state: State) -> State:
        """What a few generations make of a state."""
        generations = self.generations or max(2, round(sum(len(one.units) for one in self.space.classes) / 4))
        return self._evolved([state], self._staged(Evolution(generations, initial=0)), self.progress(what)).state

    def _staged(self, settings: Evolution) -> Evolution:
        return replace(settings, stages=(Stage(2, self.batches(_SIEVE)), Stage(1, len(self.judged))))

    def _evolved(self, start: Sequence[State], settings: Evolution, progress: Progress) -> Found:
        count, seed = len(self.scorer.tokens), self.data.seed
        return evolve(self.space, self.fitness, count, settings, seed=seed, start=start, progress=progress)

    def best(self, what: str) -> State:
        """The best of all states. Raises UsageError if there are too many."""
        if self.space.size() > _MOST:
            raise UsageError(f"there are {self.space.size()} states to try", hint="method=search")
        return exhaustive(self.space, self.fitness, self.judged, progress=self.progress(what)).state

    def descended(self) -> State:
        """Unit by unit, each time the one that hurts least."""
        return greedy(self.space, self.fitness, self.judged).state

    def drawn(self) -> State:
        """A state at random, by the seed."""
        return self.space.draw(random.Random(self.data.seed))
