"""Figures with intervals: of sums, over units, the same for any batch size."""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from architectures import llama
from laconic.data.named import ListedData
from laconic.ir.capture import capture_module
from laconic.ir.data import Batch, refuse_overlap
from laconic.ir.errors import UsageError
from laconic.ir.metrics.base import Metric, Parts, Results
from laconic.ir.metrics.costs import Latency, Memory
from laconic.ir.metrics.generation import Agreement
from laconic.ir.metrics.quality import Accuracy, Cosine, Divergence, Nats, Perplexity
from laconic.ir.metrics.registry import METRICS, load
from laconic.ir.metrics.retrieval import Recall
from laconic.ir.program import Program
from laconic.ir.quality import Units, difference, figure, measure
from sequences import Ragged


@pytest.fixture(scope="module")
def subject() -> tuple[Any, Program]:
    torch.manual_seed(0)
    model, inputs, axes = llama(2)
    return model.eval(), capture_module(model, (), inputs, axes)


def test_nats_and_top1_are_those_of_each_sequence_alone(subject: tuple[Any, Program]) -> None:
    model, program = subject
    data = Ragged(lengths=(5, 9, 2, 7), rows=3)
    (found,) = measure([program], data, [Nats(), Perplexity(), Accuracy()])
    nats, right = [], []
    for ids in data.sequences:
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1]
        nats.append(F.cross_entropy(logits, ids[1:], reduction="none"))
        right.append(logits.argmax(-1) == ids[1:])
    value = float(torch.cat(nats).mean())
    assert figure(Nats(), found["nats"]).value == pytest.approx(value, rel=1e-5)
    assert figure(Perplexity(), found["ppl"]).value == pytest.approx(math.exp(value), rel=1e-5)
    assert figure(Accuracy(), found["top1"]).value == pytest.approx(float(torch.cat(right).double().mean()))
    assert found["nats"].names == ("0", "1", "2", "3")
    assert found["nats"].weights.tolist() == [4, 8, 1, 6]


def test_comparing_a_model_with_itself(subject: tuple[Any, Program]) -> None:
    _, program = subject
    (found,) = measure([program], Ragged(), [Divergence(), Cosine()], reference=program)
    assert figure(Divergence(), found["kl"]).value == 0.0
    assert figure(Cosine(), found["cosine"]).value == pytest.approx(1.0)
    with pytest.raises(UsageError, match="kl compares two models"):
        measure([program], Ragged(), [Divergence()])


def test_two_programs_are_measured_in_one_run(subject: tuple[Any, Program]) -> None:
    _, program = subject
    other = capture_module(*_shallow())
    ours, theirs = measure([program, other], Ragged(), [Nats(), Divergence()], reference=other)
    assert set(theirs) == {"nats"}
    assert figure(Divergence(), ours["kl"]).value > 0
    for found, each in ((ours, program), (theirs, other)):
        (alone,) = measure([each], Ragged(), [Nats()])
        assert found["nats"].sums.tolist() == alone["nats"].sums.tolist()


def _shallow() -> Any:
    torch.manual_seed(1)
    model, inputs, axes = llama(1)
    return model.eval(), (), inputs, axes


class Doubled(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = [x + k for k in range(3)]  # three at once
        return (held[0] + held[1]).add_(held[2]).view(-1)[:1]  # and their sum


def test_memory_is_what_is_alive_at_once() -> None:
    x = torch.zeros(4, 1000)
    program = capture_module(Doubled(), (x,), {}, None)
    (found,) = measure([program], ListedData("x", [Batch({"x": x})]), [Memory()])
    assert figure(Memory(), found["memory"]).value == pytest.approx(4 * x.nbytes / 1e6)


class Slept(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return slept(x)


@torch.library.custom_op("laconic_tests::slept", mutates_args=())
def slept(x: torch.Tensor) -> torch.Tensor:
    time.sleep(0.02)
    return x.clone()


@slept.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


def test_latency_is_per_sample_and_paired() -> None:
    x = torch.zeros(4, 10)
    slow, fast = (capture_module(module, (x,), {}, None) for module in (Slept(), Doubled()))
    ours, theirs = measure([slow, fast], ListedData("x", [Batch({"x": x})] * 3), [Latency()])
    assert 5.0 <= figure(Latency(), ours["latency"]).value < 50.0
    gap = difference(Latency(), ours["latency"], theirs["latency"])
    assert 3.0 < gap.low <= gap.value <= gap.high


def test_divergence_is_that_of_the_definition() -> None:
    ours, theirs = torch.randn(2, 3, 5), torch.randn(2, 3, 5)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    parts = Divergence().parts({"logits": ours}, Batch({"x": ours}, mask), {"logits": theirs})
    p, q = theirs.double().softmax(-1), ours.double().softmax(-1)
    torch.testing.assert_close(parts.sums, (p * (p / q).log()).sum(-1) * mask)
    assert parts.weights.sum() == 3


def test_labels_of_one_class_or_several() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0], [3.0, 0.0, 0.0]])
    one = Accuracy().parts({"logits": logits}, Batch({"x": logits}, labels=torch.tensor([1, 2])), None)
    assert one.sums.tolist() == [[1.0], [0.0]]
    several = Accuracy().parts(
        {"y": logits.repeat(1, 2)}, Batch({"x": logits}, labels=torch.tensor([[1, 1], [0, 2]])), None
    )
    assert several.sums.tolist() == [[1.0, 1.0], [1.0, 0.0]]
    with pytest.raises(UsageError, match="cannot compare logits"):
        Accuracy().parts({"logits": torch.zeros(2, 3, 4)}, Batch({"x": logits}, labels=torch.zeros(2, 5).long()), None)
    with pytest.raises(UsageError, match="needs labels"):
        Accuracy().parts({"logits": logits}, Batch({"x": logits}), None)


def test_what_is_not_a_number_is_not_good() -> None:
    """A NaN is told as one, by every metric, and an impossible token is no NaN."""
    logits, nan = torch.randn(2, 3, 5), torch.full((2, 3, 5), torch.nan)
    batch = Batch({"input_ids": torch.zeros(2, 3, dtype=torch.int64)})
    for metric in (Divergence(), Cosine(), Nats(), Perplexity()):
        parts = metric.parts({"logits": nan}, batch, {"logits": logits})
        assert math.isnan(metric.value(float(parts.sums.sum() / parts.weights.sum()))), metric.name
    never = logits.clone()
    never[..., 2] = -torch.inf
    parts = Divergence().parts({"logits": logits}, batch, {"logits": never})
    assert bool(torch.isfinite(parts.sums).all())
    vectors = Batch({"x": torch.zeros(3, 4)}, labels=torch.tensor([0, 0, 1]))
    assert bool(torch.isnan(Recall().parts({"y": torch.full((3, 4), torch.nan)}, vectors, None).sums).all())


def test_a_mask_holds_beside_labels_and_for_whole_samples() -> None:
    logits, other = torch.randn(2, 4, 5), torch.randn(2, 4, 5)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    labels = torch.tensor([[1, 2, 3, 4], [0, 1, 2, 3]])
    parts = Nats().parts({"logits": logits}, Batch({"x": logits}, mask, labels), None)
    wanted = F.cross_entropy(logits[mask].double(), labels[mask], reduction="sum")
    assert float(parts.sums.sum()) == pytest.approx(float(wanted))
    assert parts.weights.sum() == 5
    changed = logits.clone()
    changed[~mask] = 100.0
    one, two = (Cosine().parts({"y": y}, Batch({"x": logits}, mask), {"y": other}) for y in (logits, changed))
    assert torch.equal(one.sums, two.sums)
    zero = torch.zeros(2, 3)
    assert Cosine().parts({"y": zero}, Batch({"x": zero}), {"y": zero}).sums.tolist() == [[1.0], [1.0]]


def test_divergence_of_predictions_side_by_side() -> None:
    """A constant added to the logits of one of several predictions changes nothing."""
    theirs = torch.randn(3, 8)
    ours = theirs + torch.tensor([0.0] * 4 + [3.0] * 4)
    found = Divergence().parts({"y": ours}, Batch({"x": ours}, labels=torch.zeros(3, 2).long()), {"y": theirs})
    assert found.weights.sum() == 6
    assert float(found.sums.abs().max()) < 1e-6


def test_recall_counts_no_sample_that_is_alone() -> None:
    vectors = torch.tensor([[1.0, 0.0], [0.9, 0.1], [0.0, 1.0]])
    together = Recall().parts({"y": vectors}, Batch({"x": vectors}, labels=torch.tensor([7, 7, 8])), None)
    assert together.sums.tolist() == [[1.0], [1.0], [0.0]]
    alone = Recall().parts({"y": vectors[:1]}, Batch({"x": vectors[:1]}, labels=torch.tensor([7])), None)
    assert alone.weights.tolist() == [[0.0]]


@pytest.mark.parametrize(
    ("labels", "said"),
    [
        (torch.tensor([[0, 5]]), "labels of 0 to 4, not 5"),
        (torch.tensor([[0, -1]]), "labels of 0 to 4, not -1"),
        (torch.tensor([[0.5, 1.0]]), "whole numbers"),
    ],
)
def test_labels_that_are_none(labels: torch.Tensor, said: str) -> None:
    logits = torch.randn(1, 2, 5)
    with pytest.raises(UsageError, match=said):
        Accuracy().parts({"logits": logits}, Batch({"x": logits}, labels=labels), None)


def test_results_that_cannot_be_compared() -> None:
    x = torch.randn(2, 3)
    with pytest.raises(UsageError, match="same names and shapes"):
        Cosine().parts({"a": x}, Batch({"x": x}), {"b": x})
    with pytest.raises(UsageError, match="shapes"):
        Divergence().parts({"a": x}, Batch({"x": x}), {"a": x[:, :2]})


def test_nothing_to_measure_is_told(subject: tuple[Any, Program]) -> None:
    with pytest.raises(UsageError, match="generation finds nothing to measure"):
        measure([subject[1]], Ragged(), [Agreement()], reference=subject[1])


def test_many_units_are_drawn_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = np.random.default_rng(2)
    units = Units(tuple(map(str, range(50))), generator.normal(size=50), np.ones(50))
    whole = figure(Nats(), units)
    monkeypatch.setattr("laconic.ir.quality._TOGETHER", 700)
    parts = figure(Nats(), units)
    assert (parts.low, parts.high) == pytest.approx((whole.low, whole.high), rel=1e-12)


def test_intervals_hold_the_truth_about_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        weights = generator.integers(5, 50, size=40).astype(float)
        sums = weights * 2.0 + generator.normal(size=40) * weights
        found = figure(Nats(), Units(tuple(map(str, range(40))), sums, weights))
        held += found.low <= 2.0 <= found.high
    assert 0.88 < held / 300 < 0.98


def test_a_paired_difference_is_narrower_than_two_intervals() -> None:
    generator = np.random.default_rng(1)
    names, weights = tuple(map(str, range(60))), np.ones(60)
    shared = generator.normal(size=60)
    ours, theirs = (Units(names, shared + generator.normal(size=60) * 0.05 - shift, weights) for shift in (0.1, 0.0))
    found = difference(Nats(), ours, theirs)
    assert found.high < 0
    assert found.low < -0.1 < found.high
    assert found.high - found.low < 0.2 * (figure(Nats(), ours).high - figure(Nats(), ours).low)
    with pytest.raises(UsageError, match="different samples"):
        difference(Nats(), ours, Units(names[1:], shared[1:], weights[1:]))


def test_metrics_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    assert {type(load(name)).name for name in METRICS.names()} == set(METRICS.names())
    with pytest.raises(UsageError, match="no metric 'nat'") as caught:
        load("nat")
    assert "'nats'" in caught.value.hint

    class Positive(Metric):
        name = "positive"

        def parts(self, results: Results, batch: Batch, reference: Results | None) -> Parts:
            each = (results["logits"] > 0).double().mean((1, 2))[:, None]
            return Parts(each, torch.ones_like(each))

    monkeypatch.setitem(METRICS.table, "mine", "laconic.ir.metrics.quality:Nats")
    with pytest.raises(UsageError, match="'mine' calls itself 'nats'"):
        load("mine")
    monkeypatch.setitem(METRICS.table, "none", "laconic.ir.metrics.quality:IGNORED")
    with pytest.raises(UsageError, match="no class derived from"):
        load("none")
    monkeypatch.setattr("laconic.ir.metrics.quality.Positive", Positive, raising=False)
    monkeypatch.setitem(METRICS.table, "positive", "laconic.ir.metrics.quality:Positive")
    torch.manual_seed(0)
    model, inputs, axes = llama(2)
    (found,) = measure([capture_module(model.eval(), (), inputs, axes)], Ragged(), [load("positive")])
    assert 0.2 < figure(load("positive"), found["positive"]).value < 0.8


def test_what_decisions_were_made_on_does_not_judge_them() -> None:
    refuse_overlap(Ragged(seed=1), Ragged(seed=2))
    with pytest.raises(UsageError, match="overlaps the calibration set") as caught:
        refuse_overlap(Ragged(seed=1), Ragged(lengths=(3, 3), seed=1))
    assert "2 of its 4 samples" in caught.value.why
