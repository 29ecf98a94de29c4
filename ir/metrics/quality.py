"""Metrics of predictions: of the next token, or of a class."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F

from laconic.ir.data import Batch
from laconic.ir.errors import UsageError
from laconic.ir.metrics.base import Metric, Parts, Results, logits_of

#: The label of a position that is not predicted.
IGNORED = -100

#: Elements of logits that are looked at together.
_TOGETHER = 1 << 16


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
        return _by_rows(_cross_entropy, logits, labels[..., None]), labels != IGNORED


class Perplexity(Nats):
    """exp of nats per token."""

    name = "ppl"

    def value(self, ratio: float) -> float:
        return math.inf if ratio >= 700 else math.exp(ratio)


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
        ours, theirs = (logits_of(r, self.name) for r in (results, reference))
        if ours.shape != theirs.shape:
            raise UsageError(
                f"{self.name} cannot compare logits of shapes {tuple(ours.shape)} and {tuple(theirs.shape)}"
            )
        if ours.ndim == 2 and batch.labels is not None and batch.labels.ndim == 2:
            ours, theirs = (_side_by_side(logits, batch.labels, self.name) for logits in (ours, theirs))
        return _over_positions(_by_rows(_divergence, ours, theirs), batch)


class Cosine(Metric):
    """The mean cosine of the angle between a sample's results and the other model's: 1 for equal ones."""

    name = "cosine"
    higher = True
    reference: ClassVar[bool] = True

    def parts(self, results: Results, batch: Batch, reference: Results | None) -> Parts:
        assert reference is not None
        pairs = [
            (value, reference.get(name))
            for name, value in results.items()
            if value.is_floating_point() and value.ndim and len(value) == batch.samples
        ]
        if not pairs or any(other is None or other.shape != value.shape for value, other in pairs):
            said = [", ".join(f"{k} {tuple(v.shape)}" for k, v in r.items()) for r in (results, reference)]
            raise UsageError("cosine compares results of the same names and shapes", why=" against ".join(said))
        sums = [_cosine(_kept(value, batch), _kept(other, batch)) for value, other in pairs if other is not None]
        each = torch.stack(sums).mean(0)[:, None]
        return Parts(each, torch.ones_like(each))


def _by_rows(each: Callable[..., torch.Tensor], logits: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    """A figure of each row of logits, (..., classes), and of what stands beside it; without the last axis. Some rows at
    a time: in float64 all of them fall out of the processor's caches, which takes five times as long."""
    rows = max(1, _TOGETHER // max(1, logits.shape[-1]))
    parts = [torch.split(value.flatten(0, -2), rows) for value in (logits, *others)]
    return torch.cat([each(*part) for part in zip(*parts, strict=True)]).reshape(logits.shape[:-1])


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.double(), labels[:, 0], ignore_index=IGNORED, reduction="none")


def _divergence(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    ours, theirs = (logits.double().log_softmax(-1) for logits in (ours, theirs))
    probability = theirs.exp()
    return (probability * (theirs - ours)).masked_fill(probability == 0, 0.0).sum(-1)


def _kept(value: torch.Tensor, batch: Batch) -> torch.Tensor:
    """A result by sample, (samples, numbers) float64, padding as zeros."""
    if batch.mask is not None and value.shape[:2] == batch.mask.shape:
        value = value.masked_fill(~batch.mask.reshape(*batch.mask.shape, *[1] * (value.ndim - 2)), 0.0)
    return value.double().flatten(1)


def _cosine(ours: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
    """Of each sample; 1 where both are zero."""
    both = (ours == 0).all(1) & (theirs == 0).all(1)
    return F.cosine_similarity(ours, theirs, dim=1, eps=1e-300).masked_fill(both, 1.0)


def aligned(results: Results, batch: Batch, metric: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits (samples, positions, classes) and labels (samples, positions): those of the batch, or the next token.

    Raises UsageError if there is neither, or if their shapes do not fit.
    """
    logits, labels = logits_of(results, metric), batch.labels
    if labels is None:
        labels = _next_tokens(batch, metric)
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise UsageError(f"{metric} needs labels that are whole numbers", why=f"they are {labels.dtype}")
    if logits.ndim == 2:
        logits = _side_by_side(logits, labels, metric)
    labels = labels.reshape(len(labels), -1).long()
    if logits.ndim != 3 or logits.shape[:2] != labels.shape:
        raise UsageError(
            f"{metric} cannot compare logits of shape {tuple(logits.shape)} with labels of shape {tuple(labels.shape)}"
        )
    if batch.mask is not None and batch.mask.shape == labels.shape:
        labels = labels.masked_fill(~batch.mask, IGNORED)
    wrong = labels[(labels != IGNORED) & ((labels < 0) | (labels >= logits.shape[-1]))]
    if len(wrong):
        raise UsageError(
            f"{metric} has labels of 0 to {logits.shape[-1] - 1}, not {int(wrong[0])}",
            hint=f"{IGNORED} marks what is not predicted",
        )
    return logits, labels


def _side_by_side(logits: torch.Tensor, labels: torch.Tensor, metric: str) -> torch.Tensor:
    """Logits (samples, classes) of one prediction a sample, or of as many side by side as there are labels."""
    several = labels.shape[1] if labels.ndim == 2 else 1
    if logits.shape[1] % several:
        raise UsageError(
            f"{metric} cannot compare {logits.shape[1]} logits a sample with {several} labels",
            hint="this model predicts no tokens: give `labels` beside the inputs" if labels.ndim == 2 else "",
        )
    return logits.reshape(len(logits), several, -1)


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
