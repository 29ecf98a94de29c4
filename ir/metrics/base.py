"""What a metric is: for each position of each sample a sum and a weight, so that its value is a ratio of sums.

So batches of any size give the same figure, two models are compared sample by sample, and intervals are drawn over
what samples belong to (documents, digits), not over tokens, which are not independent.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.ir.data import Batch
from laconic.ir.errors import UsageError

#: Results of an entry by name, and what gives them for inputs by name.
Results = Mapping[str, torch.Tensor]
Run = Callable[[dict[str, torch.Tensor]], Results]


@dataclass(frozen=True)
class Parts:
    """What a batch contributes: `sums` and `weights`, (samples, positions) float64; one position where a figure is of
    the whole sample."""

    sums: torch.Tensor
    weights: torch.Tensor


class Metric(ABC):
    """A figure of a model on data; third parties add theirs by the entry point group `laconic.metrics`."""

    name: ClassVar[str]
    #: Whether more is better.
    higher: ClassVar[bool] = False
    #: Whether results are compared with those of another model.
    reference: ClassVar[bool] = False
    #: Whether it runs the models itself, by `parts_of_runs`, rather than reading their results.
    runs: ClassVar[bool] = False

    @abstractmethod
    def parts(self, results: Results, batch: Batch, reference: Results | None) -> Parts:
        """Of each position of a batch. Raises UsageError if the results or the batch are not of this metric's kind."""

    def parts_of_runs(self, run: Run, batch: Batch, reference: Run | None) -> Parts:
        """The same for a metric that `runs`: `run` and `reference` give a model's results for inputs by name."""
        raise NotImplementedError

    def value(self, ratio: float) -> float:
        """The figure, from the sum of `sums` over the sum of `weights`."""
        return ratio

    def loss(self, results: Results, batch: Batch) -> torch.Tensor:
        """What gradients are taken of: the sum over a batch. Raises UsageError for a metric without one."""
        raise UsageError(f"{self.name} has no gradient", hint="name a metric that has one, such as nats")


def logits_of(results: Results, metric: str) -> torch.Tensor:
    """The result `logits`, or the only one. Raises UsageError."""
    if "logits" in results:
        return results["logits"]
    if len(results) == 1:
        return next(iter(results.values()))
    raise UsageError(f"{metric} reads the result `logits`", why=f"the model returns {', '.join(results)}")
