"""Metrics of predictions: of the next token, or of a class."""

from __future__ import annotations

import math
from typing import ClassVar

import torch
import torch.nn.functional as F

from laconic.ir.data import Batch
from laconic.ir.errors import UsageError
from laconic.ir.metrics.base import Metric, Parts, Results, logits_of

#: The label of a position that is not predicted.
IGNORED = -100


class Nats(Metric):
    """Nats per token: the mean of -log p of each label."""

    name = "nats"

    def parts(self, results: Results, batch: Batch, reference: Results | None) -> Parts:
        nats, counted = self._nats(results, batch)
        return Parts(nats, counted.double())

    def loss(self, results: Results, batch: Batch) -> torch.Tensor:
        return self._nats(results, batch)[0].sum()

    def _nats(self, results: Results, batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        logits, labels = aligned(results, batch, self.name)
        flat = F.cross_entropy(logits.flatten(0, 1).double(), labels.flatten(), ignore_index=IGNORED, reduction="none")
        return flat.reshape(labels.shape), labels != IGNORED


class Perplexity(Nats):
    """exp of nats per token."""

    name = "ppl"

    def value(self, ratio: float) -> float:
        return math.exp(ratio) if ratio < 700 else math.inf


class Accuracy(Metric):
    """The share of labels that are the likeliest prediction."""

    name = "top1"
    higher = True

    def parts(self, results: Results, batch: Batch, reference: Results | None) -> Parts:
        logits, labels = aligned(results, batch, self.name)
        counted = labels != IGNORED
        right = (logits.argmax(-1) == labels) & counted
        return Parts(right.double(), counted.double())


class Divergence(Metric):
    """Nats per position: the Kullback-Leibler divergence of what the model predicts from what the other one does."""

    name = "kl"
    reference: ClassVar[bool] = True

    def parts(self, results: Results, batch: Batch, reference: Results | None) -> Parts:
        assert reference is not None
        ours, theirs = (logits_of(r, self.name).double().log_softmax(-1) for r in (results, reference))
        each = (theirs.exp() * (theirs - ours)).nan_to_num(0.0).sum(-1)
        return _over_positions(each, batch)


class Cosine(Metric):
    """The mean cosine of the angle between a sample's results and the other model's: 1 for equal ones."""

    name = "cosine"
    higher = True
    reference: ClassVar[bool] = True

    def parts(self, results: Results, batch: Batch, reference: Results | None) -> Parts:
        assert reference is not None
        sums = [
            F.cosine_similarity(value.double().flatten(1), reference[name].double().flatten(1), dim=1)
            for name, value in results.items()
            if value.is_floating_point() and len(value) == batch.samples
        ]
        each = torch.stack(sums).mean(0)[:, None]
        return Parts(each, torch.ones_like(each))


def aligned(results: Results, batch: Batch, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (samples, positions, classes) and labels (samples, positions): those of the batch, or the next token.

    Raises UsageError if there is neither, or if their shapes do not fit.
    """
    logits, labels = logits_of(results, metric), batch.labels
    if labels is None:
        labels = _next_tokens(batch, metric)
    if logits.ndim == 2:  # one class a sample, or several side by side
        logits = logits.reshape(len(logits), labels.shape[1] if labels.ndim == 2 else 1, -1)
    labels = labels.reshape(len(labels), -1)
    if logits.shape[:2] != labels.shape:
        raise UsageError(
            f"{metric} cannot compare logits of shape {tuple(logits.shape)} with labels of shape {tuple(labels.shape)}"
        )
    return logits, labels


def _next_tokens(batch: Batch, metric: str) -> torch.Tensor:
    ids = batch.inputs.get("input_ids")
    if ids is None:
        raise UsageError(f"{metric} needs labels", hint="give `labels` beside the inputs")
    following = torch.full_like(ids, IGNORED)
    following[:, :-1] = ids[:, 1:]
    if batch.mask is not None:
        following[:, :-1][~batch.mask[:, 1:]] = IGNORED
        following[~batch.mask] = IGNORED
    return following


def _over_positions(each: torch.Tensor, batch: Batch) -> Parts:
    """A figure of every position (samples, positions) or sample, those that count."""
    each = each.reshape(len(each), -1)
    counted = torch.ones_like(each, dtype=torch.bool)
    if batch.mask is not None and batch.mask.shape == each.shape:
        counted = batch.mask
    return Parts(each * counted, counted.double())
