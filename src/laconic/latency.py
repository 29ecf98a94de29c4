"""Latency of several ways to compute the same: timed by turns, so that what disturbs one disturbs all, and compared in
pairs of calls of the same turn."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from laconic.ir.program import Program
from laconic.ir.run import Runnable
from laconic.ir.tree import fill

#: From inputs of its own, which it may write into, to the call that is timed.
Way = Callable[[list[torch.Tensor]], Callable[[], Any]]

WARMUP = 3


@dataclass(frozen=True)
class Spread:
    """Median and quartiles."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Raises ValueError for no values."""
        if len(values) == 1:
            return cls(values[0], values[0], values[0])
        low, middle, high = statistics.quantiles(values, n=4, method="inclusive")
        return cls(middle, low, high)


@dataclass(frozen=True)
class Interval:
    """A median, and an interval that holds the true one with probability `confidence`."""

    median: float
    low: float
    high: float
    confidence: float

    @classmethod
    def of(cls, values: Sequence[float], confidence: float = 0.95) -> Interval:
        """From order statistics: of n independent values, the number below the true median is binomial(n, 1/2),
        whatever their distribution. The narrowest such interval that is symmetric in rank and reaches `confidence`, or
        the whole range, with its own confidence, where n is too small. Raises ValueError for no values."""
        ordered = sorted(values)
        n = len(ordered)
        if not n:
            raise ValueError("no values")
        outside, rank = 1 / 2**n, 0  # the chance that at most `rank` of n values lie below the median
        while 2 * (wider := outside + math.comb(n, rank + 1) / 2**n) <= 1 - confidence:
            outside, rank = wider, rank + 1
        return cls(statistics.median(ordered), ordered[rank], ordered[n - 1 - rank], 1 - 2 * outside)


def by_turns(
    ways: Mapping[str, Way], inputs: Callable[[], list[torch.Tensor]], repeats: int, warmup: int = WARMUP
) -> dict[str, list[float]]:
    """Seconds of `repeats` calls of each way, none with gradients; the order rotates from turn to turn. `inputs` gives
    fresh ones, outside what is timed; the first `warmup` turns do not count."""
    names = list(ways)
    times: dict[str, list[float]] = {name: [] for name in names}
    with torch.no_grad(), _collector_off():
        for turn in range(warmup + repeats):
            for k in range(len(names)):
                name = names[(turn + k) % len(names)]
                call = ways[name](inputs())
                start = time.perf_counter()
                call()
                seconds = time.perf_counter() - start
                if turn >= warmup:
                    times[name].append(seconds)
    return times


def program_way(program: Program) -> Way:
    """The program in eager torch."""
    model = Runnable(program)

    def prepare(inputs: list[torch.Tensor]) -> Callable[[], Any]:
        arguments = {name: fill(tree, inputs) for name, tree in program.forward.arguments.items()}
        return lambda: model(**arguments)

    return prepare


def ratios(times: Mapping[str, Sequence[float]], of: str, to: str) -> list[float]:
    """What a call of the one way took over what a call of the other took, turn by turn."""
    return [a / b for a, b in zip(times[of], times[to], strict=True)]


@contextmanager
def _collector_off() -> Iterator[None]:
    """Python's garbage collector strikes when it likes."""
    was = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()
