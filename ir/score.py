"""Judging candidates without rewriting: a metric as a function of what gates do (`gated.py`)."""

from __future__ import annotations

from collections.abc import Sequence

from laconic.ir.data import Data, flat_inputs
from laconic.ir.errors import UsageError
from laconic.ir.gated import Candidate, Gate, Gated, Memo, Told
from laconic.ir.metrics.base import Metric, Results
from laconic.ir.program import Program
from laconic.ir.quality import named_results

#: Bytes of results to compare with that are kept in memory, and of what candidates have in common; what is beyond is
#: computed again each time.
_RESULTS, _COMMON = 1 << 30, 1 << 30
#: Figures that are remembered.
_FIGURES = 200_000


class Scorer:
    """A metric of a program's `forward` on data, as a function of what its gates do.

    The data, what candidates have in common, and for a metric that compares the results of the program with all gates
    open, are kept in memory. Candidates that begin alike cost least one after the other.

    Raises UsageError for a metric that runs the model itself, and what `Gated` raises.
    """

    def __init__(self, program: Program, gates: Sequence[Gate], data: Data, metric: Metric) -> None:
        if metric.runs:
            raise UsageError(f"{metric.name} runs the model itself", hint="score by a metric of its results")
        self._metric, self._run = metric, Gated(program, gates)
        batches = [data.batch(k) for k in range(len(data))]
        self._batches = [(b, flat_inputs(program, b, data.place(k))) for k, b in enumerate(batches)]
        self._open: dict[int, Results] = {}
        self._room, self._memo = _RESULTS, Memo(_COMMON)
        self._known: dict[tuple[bytes, int], tuple[float, float]] = {}

    @property
    def tokens(self) -> list[int]:
        """How many positions count in each batch."""
        return [batch.tokens for batch, _ in self._batches]

    def __call__(self, candidate: Candidate, batches: Sequence[int] | None = None) -> float:
        """The metric with these gates set, all others open, on all batches or those that are named. Raises UsageError
        for an unknown gate."""
        told, total, weight = self._run.told(candidate), 0.0, 0.0
        for k in range(len(self._batches)) if batches is None else batches:
            sums, weights = self._parts(told, k)
            total, weight = total + sums, weight + weights
        return self._metric.value(total / weight)

    def _parts(self, told: Told, k: int) -> tuple[float, float]:
        """The metric's sum on batch k, and that of its weights; what was judged before is known."""
        if told.key is not None and (told.key, k) in self._known:
            return self._known[told.key, k]
        reference = self._reference(k) if self._metric.reference else None
        part = self._metric.parts(self._results(told, k), self._batches[k][0], reference)
        found = float(part.sums.sum()), float(part.weights.sum())
        if told.key is not None:
            self._known[told.key, k] = found
            if len(self._known) > _FIGURES:
                del self._known[next(iter(self._known))]
        return found

    def _reference(self, k: int) -> Results:
        """The results of batch k with all gates open."""
        found = self._open.get(k)
        if found is None:
            found = self._results(self._run.told({}), k)
            size = sum(value.nbytes for value in found.values())
            if size <= self._room:
                self._open[k], self._room = found, self._room - size
        return found

    def _results(self, told: Told, k: int) -> Results:
        outcome = self._run.run(told, self._batches[k][1], self._memo, k)
        return named_results(self._run.entry, outcome.results)
