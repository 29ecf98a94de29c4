"""Metrics of vectors that are to be near to those of their like."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from laconic.ir.data import Batch
from laconic.ir.errors import UsageError
from laconic.ir.metrics.base import Metric, Parts, Results


class Recall(Metric):
    """The share of samples whose nearest neighbour in their batch, by the cosine of their vectors, has the same label.

    So figures are of the batches as they are: data for it keeps together what is to be told apart. A sample that is
    alone in its batch does not count.
    """

    name = "recall@1"
    higher = True

    def parts(self, results: Results, batch: Batch, reference: Results | None) -> Parts:
        vectors, labels = _vectors(results), batch.labels
        if labels is None or labels.shape != vectors.shape[:1]:
            raise UsageError(f"{self.name} needs a label for each sample", hint="give `labels` beside the inputs")
        unit = F.normalize(vectors.double(), dim=1)
        near = (unit @ unit.T).fill_diagonal_(-torch.inf)
        right = (labels[near.argmax(1)] == labels).double()
        right = right.masked_fill(torch.isnan(near).any(1), torch.nan)[:, None]
        return Parts(right, torch.full_like(right, float(len(right) > 1)))


def _vectors(results: Results) -> torch.Tensor:
    found = [value for value in results.values() if value.ndim == 2 and value.is_floating_point()]
    if len(found) != 1:
        said = ", ".join(f"{name} {tuple(value.shape)}" for name, value in results.items())
        raise UsageError("recall@1 reads one vector a sample", why=f"the model returns {said}")
    return found[0]
