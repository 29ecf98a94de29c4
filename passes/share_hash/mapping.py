"""Where weights stand in an array that is smaller than they are: RandomFold, by address arithmetic alone.

    element i of all weights, side by side:   turn c = i // slots, step o = i mod slots
    it is   scale * sign(c, o) * array[(h(c) + o) mod slots]      h(c) = ((a0 c + a1 c^2 + a2) mod P) mod slots

Each turn is the whole array, rotated: every slot serves as many elements as any other, give or take one, and an array
that is as large as the weights holds each element in a slot of its own. A weight is at most two pieces of the array for
each turn that it touches, so no index is ever stored or computed for each element.

"STABLE-RPS" (randomised parameter sharing whose mapping and gradients are mended), after Desai et al. 2023, ROAST.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch

_PRIME = 2038074743
#: Signs recur with this period, from another place in each turn.
_SIGNS = 8191


@dataclass(frozen=True)
class RandomFold:
    """`total` elements in `slots` slots, by the seed."""

    total: int
    slots: int
    seed: int = 0

    @cached_property
    def _constants(self) -> tuple[int, ...]:
        draw = random.Random(self.seed)
        return tuple(draw.randrange(1, _PRIME, 2) for _ in range(6))

    def start(self, turn: int) -> int:
        """By how much a turn is rotated."""
        a, b, c, *_ = self._constants
        return (a * turn + b * turn * turn + c) % _PRIME % self.slots

    def pieces(self, first: int, count: int) -> Iterator[tuple[int, int]]:
        """The slots of `count` elements from `first` on, in order: start and length of each piece."""
        for _, _, start, length in self._runs(first, count):
            yield start, length

    def _runs(self, first: int, count: int) -> Iterator[tuple[int, int, int, int]]:
        """The same with turn and step."""
        while count:
            turn, step = divmod(first, self.slots)
            start = (self.start(turn) + step) % self.slots
            length = min(count, self.slots - step, self.slots - start)
            yield turn, step, start, length
            first, count = first + length, count - length

    @cached_property
    def table(self) -> torch.Tensor:
        """The signs of one period, (8191,) float32."""
        draw = random.Random(self.seed + 1)
        return torch.tensor([1.0 if draw.getrandbits(1) else -1.0 for _ in range(_SIGNS)])

    def periods(self, first: int, count: int) -> Iterator[tuple[int, int, int]]:
        """The parts of the table of signs, one behind the other, that `count` elements from `first` on have: start,
        stop and how often. Few, however many elements there are."""
        *_, a, b, c = self._constants
        for turn, step, _, length in self._runs(first, count):
            begin = ((a * turn + b * turn * turn + c) % _PRIME + step) % _SIGNS
            if begin:
                taken = min(length, _SIGNS - begin)
                yield begin, begin + taken, 1
                length -= taken
            if length >= _SIGNS:
                yield 0, _SIGNS, length // _SIGNS
            if length % _SIGNS:
                yield 0, length % _SIGNS, 1

    def signs(self, table: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """The signs of `count` elements from `first` on, (count,), from the table of one period."""
        parts = [table[start:stop].repeat(times) for start, stop, times in self.periods(first, count)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def expand(self, array: torch.Tensor, table: torch.Tensor, first: int, count: int) -> torch.Tensor:
        """`count` elements from `first` on, (count,), with their signs."""
        parts = [array[start : start + length] for start, length in self.pieces(first, count)]
        values = parts[0] if len(parts) == 1 else torch.cat(parts)
        return values * self.signs(table, first, count).to(array.dtype)

    def collect(self, into: torch.Tensor, values: torch.Tensor, first: int) -> None:
        """Add values of the elements from `first` on, (count,), to the slots that they stand in."""
        done = 0
        for start, length in self.pieces(first, len(values)):
            into[start : start + length] += values[done : done + length]
            done += length
