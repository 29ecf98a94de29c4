"""What decisions are made on: calibration data, and what there is to be known from it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from laconic.ir.calibrate import Progress, calibrate
from laconic.ir.data import Data
from laconic.ir.errors import UsageError
from laconic.ir.gated import Gate
from laconic.ir.metrics.base import Metric
from laconic.ir.metrics.registry import load as load_metric
from laconic.ir.program import Program
from laconic.ir.score import Scorer
from laconic.ir.statistics.base import Statistic, Statistics


def _silent(what: str) -> Progress:
    return lambda done, total: None


@dataclass(frozen=True)
class Calibration:
    """Data that a pass decides on. `seed` is that of all that is drawn at random; `folder` keeps what was gathered;
    `progress`, given what is being done, returns what is told how much of it is. `original` is the program that a
    pipeline began with, where it is one of several passes that decide. Raises UsageError for data without batches."""

    data: Data
    seed: int = 0
    folder: Path | None = None
    progress: Callable[[str], Progress] = _silent
    original: Program | None = None

    def __post_init__(self) -> None:
        if not len(self.data):
            raise UsageError(f"{self.data.name} is empty", hint="decide on at least one sample")

    def statistics(self, program: Program, wanted: Sequence[Statistic], loss: Metric | None = None) -> Statistics:
        """Statistics of a program's `forward`. Raises what `calibrate` raises."""
        told = self.progress(f"calibrating on {self.data.name}")
        return calibrate(program, self.data, wanted, loss=loss, folder=self.folder, progress=told)

    def scorer(self, program: Program, gates: Sequence[Gate], metric: str = "kl") -> Scorer:
        """What candidates are judged by. Raises UsageError for an unknown metric."""
        return Scorer(program, gates, self.data, load_metric(metric))
