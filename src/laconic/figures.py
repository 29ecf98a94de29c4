"""Figures of models on data, with intervals, and the paired difference of two."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from laconic.ir.data import Data, refuse_overlap
from laconic.ir.metrics.base import Metric
from laconic.ir.program import Program
from laconic.ir.quality import difference, figure, measure

log = logging.getLogger(__name__)

Progress = Callable[[int, int], None]


def figures(
    program: Program,
    against: Program | None,
    data: Data,
    metrics: Sequence[Metric],
    *,
    seed: int = 0,
    progress: Progress = lambda done, total: None,
) -> list[dict[str, Any]]:
    """A row per metric: `metric`, `value`, `low` and `high` (95 % of bootstrap draws over documents, digits or
    samples), `units` (how many there are); with another model also its own figures, `against`, and `difference`, ours
    minus theirs on the same draws. What compares two models has no figure of the other.

    Raises UsageError for a metric that compares where there is nothing to compare with, and for data that a model does
    not take.
    """
    _log_use(data)
    programs = [program] if against is None else [program, against]
    ours, *others = measure(programs, data, metrics, reference=against, progress=progress)
    theirs = others[0] if others else {}
    rows = []
    for metric in metrics:
        found = ours[metric.name]
        row: dict[str, Any] = {"metric": metric.name, "higher_is_better": metric.higher, "units": len(found.names)}
        row |= asdict(figure(metric, found, seed=seed))
        if metric.name in theirs:
            row["against"] = asdict(figure(metric, theirs[metric.name], seed=seed))
            row["difference"] = asdict(difference(metric, found, theirs[metric.name], seed=seed))
        rows.append(row)
    return rows


def _log_use(data: Data) -> None:
    if data.name.endswith(":test"):
        log.warning("%s is a test split: tune on the selection split", data.name)


class Judge:
    """The metrics of any version of a program on data, by name: what the ledger tells after each pass.

    `original` gives the results that some metrics compare with. Raises UsageError if the data overlaps the calibration
    set that decisions are made on.
    """

    def __init__(
        self,
        original: Program,
        data: Data,
        metrics: Sequence[Metric],
        *,
        calibration: Data | None = None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        if calibration is not None:
            refuse_overlap(data, calibration)
        _log_use(data)
        self.metrics, self._original, self._data, self._progress = metrics, original, data, progress

    def __call__(self, program: Program) -> dict[str, float]:
        (found,) = measure([program], self._data, self.metrics, reference=self._original, progress=self._progress)
        return {metric.name: figure(metric, found[metric.name]).value for metric in self.metrics}

    def drop(self, before: Mapping[str, float], after: Mapping[str, float]) -> float:
        """By how much the first metric is worse than before; negative if it is better."""
        first = self.metrics[0]
        change = after[first.name] - before[first.name]
        return -change if first.higher else change
