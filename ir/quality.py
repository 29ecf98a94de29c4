"""A program's figures on data: metrics batch by batch, with intervals over what the samples belong to."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from laconic.ir.data import Batch, Data, flat_inputs, running
from laconic.ir.errors import UsageError
from laconic.ir.interpret import Interpreter
from laconic.ir.metrics.base import Metric, Parts, Results
from laconic.ir.program import Entry, Program, Role

_DRAWS = 2000
_LEVEL = 0.95
#: How many counts of units are drawn at a time.
_TOGETHER = 1 << 20


@dataclass(frozen=True)
class Figure:
    """A metric of a model, with the interval that holds 95 % of its bootstrap draws."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Units:
    """A metric's sums and weights by unit, (units,) float64: what intervals are drawn from."""

    names: tuple[str, ...]
    sums: NDArray[np.float64]
    weights: NDArray[np.float64]


def named_results(entry: Entry, results: Sequence[Any]) -> Results:
    """Flat results by name; what is no tensor is left out."""
    names = [output.name for output in entry.outputs if output.role is Role.RESULT]
    return {name: value for name, value in zip(names, results, strict=True) if isinstance(value, torch.Tensor)}


def measure(
    programs: Sequence[Program],
    data: Data,
    metrics: Sequence[Metric],
    *,
    reference: Program | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[dict[str, Units]]:
    """Each metric of each program's `forward` by unit. The programs take turns, batch by batch, so that what is timed
    is timed side by side. Metrics that compare are of the first program alone, with the results of `reference`.

    Raises UsageError for a metric that compares where there is nothing to compare with, for data without batches, and
    for inputs that do not fit.
    """
    for metric in metrics:
        if metric.reference and reference is None:
            raise UsageError(f"{metric.name} compares two models", hint="add --against MODEL2")
    if not len(data):
        raise UsageError(f"{data.name} is empty", hint="evaluate on at least one sample")
    measured = {id(program): _Measured(program) for program in [*programs, *([reference] if reference else [])]}
    other = measured[id(reference)] if reference is not None else None
    turns = [measured[id(program)] for program in programs]
    sums: list[dict[str, dict[str, list[float]]]] = [
        {metric.name: {} for metric in metrics if not (metric.reference and n)} for n in range(len(turns))
    ]
    for k in range(len(data)):
        batch = data.batch(k)
        for each in measured.values():
            own = each is turns[0]
            each.take(batch, data.place(k) if own else f"{data.place(k)}, given to the model that is compared with")
        for found, each in list(zip(sums, turns, strict=True))[:: -1 if k % 2 else 1]:
            for metric in metrics:
                if metric.name in found:
                    _collect(found[metric.name], _parts(metric, each, other, batch), batch, k)
        progress(k + 1, len(data))
    for found in sums:
        empty = [name for name, by_unit in found.items() if not by_unit]
        if empty:
            raise UsageError(f"{empty[0]} finds nothing to measure on {data.name}", hint="longer samples, or labels")
    return [{name: _units(by_unit) for name, by_unit in found.items()} for found in sums]


class _Measured:
    """A program that is measured; it computes the results of a batch once, if anybody asks."""

    def __init__(self, program: Program) -> None:
        self._program, self._interpreter = program, Interpreter(program, [])
        self._batch: Batch | None = None
        self._place = ""
        self._results: Results | None = None

    def take(self, batch: Batch, place: str) -> None:
        """Go on to a batch. Raises UsageError if the program does not take it."""
        flat_inputs(self._program, batch, place)
        self._batch, self._place, self._results = batch, place, None

    def run(self, inputs: dict[str, torch.Tensor]) -> Results:
        """The results of `forward` by name, for inputs by name."""
        flat = flat_inputs(self._program, Batch(inputs), self._place)
        with running(self._place):
            return named_results(self._interpreter.entry, self._interpreter(flat).results)

    def results(self) -> Results:
        """Those of the batch."""
        if self._results is None:
            assert self._batch is not None
            self._results = self.run(self._batch.inputs)
        return self._results


def _parts(metric: Metric, ours: _Measured, reference: _Measured | None, batch: Batch) -> Parts:
    theirs = reference if metric.reference else None
    if metric.runs:
        return metric.parts_of_runs(ours.run, batch, theirs.run if theirs else None)
    return metric.parts(ours.results(), batch, theirs.results() if theirs else None)


def _collect(found: dict[str, list[float]], part: Parts, batch: Batch, k: int) -> None:
    sums, weights = part.sums, part.weights
    if batch.label_units is not None and batch.label_units.shape == sums.shape:
        units = [str(unit) for unit in batch.label_units.flatten().tolist()]
    else:
        units = list(batch.units or (f"{k}.{sample}" for sample in range(batch.samples)))
        sums, weights = sums.sum(1), weights.sum(1)
    for unit, total, weight in zip(units, sums.flatten().tolist(), weights.flatten().tolist(), strict=True):
        if weight:
            into = found.setdefault(unit, [0.0, 0.0])
            into[0] += total
            into[1] += weight


def _units(by_unit: Mapping[str, list[float]]) -> Units:
    names = sorted(by_unit)  # what is drawn does not depend on who came first
    pairs = np.array([by_unit[name] for name in names], dtype=np.float64).reshape(-1, 2)
    return Units(tuple(names), pairs[:, 0], pairs[:, 1])


def figure(metric: Metric, units: Units, *, seed: int = 0) -> Figure:
    """The metric over all units, and its interval."""
    drawn = _drawn(np.stack([units.sums, units.weights], 1), seed)
    (value,) = _values(metric, units.sums.sum(keepdims=True), units.weights.sum(keepdims=True))
    return Figure(float(value), *_interval(_values(metric, drawn[:, 0], drawn[:, 1])))


def difference(metric: Metric, ours: Units, theirs: Units, *, seed: int = 0) -> Figure:
    """Ours minus theirs, drawing the same units for both. Raises UsageError if they are not of the same units."""
    if ours.names != theirs.names:
        raise UsageError("two models were measured on different samples")
    drawn = _drawn(np.stack([ours.sums, ours.weights, theirs.sums, theirs.weights], 1), seed)
    a, b = (_values(metric, drawn[:, k], drawn[:, k + 1]) for k in (0, 2))
    whole = [_values(metric, u.sums.sum(keepdims=True), u.weights.sum(keepdims=True))[0] for u in (ours, theirs)]
    return Figure(float(whole[0] - whole[1]), *_interval(a - b))


def _drawn(columns: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Sums over as many units as there are (units, columns), drawn with replacement: (draws, columns)."""
    generator, units = np.random.default_rng(seed), len(columns)
    share, step = np.full(units, 1 / units), max(1, _TOGETHER // units)
    sizes = [min(step, _DRAWS - start) for start in range(0, _DRAWS, step)]
    return np.concatenate([generator.multinomial(units, share, size=size) @ columns for size in sizes])


def _values(metric: Metric, sums: NDArray[np.float64], weights: NDArray[np.float64]) -> NDArray[np.float64]:
    with np.errstate(invalid="ignore", divide="ignore"):
        ratios = sums / weights
    return np.array([metric.value(float(ratio)) for ratio in ratios])


def _interval(drawn: NDArray[np.float64]) -> tuple[float, float]:
    edge = 100 * (1 - _LEVEL) / 2
    kept = drawn[np.isfinite(drawn)]
    low, high = np.percentile(kept, [edge, 100 - edge]) if len(kept) else (np.nan, np.nan)
    return float(low), float(high)
