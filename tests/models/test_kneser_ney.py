"""The baseline: probabilities that sum to one, and figures that a plain implementation gives too."""

from __future__ import annotations

from collections import defaultdict

import numpy as np
import pytest

from laconic.models.kneser_ney import KneserNey


def stream(length: int, vocabulary: int, seed: int = 0) -> np.ndarray:
    """Tokens of which some follow others more often."""
    generator = np.random.default_rng(seed)
    tokens = [0]
    for _ in range(length - 1):
        tokens.append((tokens[-1] * 3 + 1) % vocabulary if generator.random() < 0.6 else generator.integers(vocabulary))
    return np.array(tokens, dtype=np.int64)


def by_the_book(used: dict[tuple[int, ...], float]) -> list[float]:
    """Discounts of counts 0, 1, 2 and 3 or more, by how many n-grams occur once, twice, three and four times."""
    n = [sum(1 for count in used.values() if count == k) for k in range(5)]
    y = n[1] / (n[1] + 2 * n[2])
    return [0.0, *(k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3))]


def plain(tokens: list[int], vocabulary: int, order: int, context: list[int]) -> list[float]:
    """Interpolated Kneser-Ney by the book, with dicts."""
    counts: list[dict[tuple[int, ...], float]] = [defaultdict(float) for _ in range(order + 1)]
    for length in range(1, order + 1):
        for k in range(len(tokens) - length + 1):
            counts[length][tuple(tokens[k : k + length])] += 1
    used: list[dict[tuple[int, ...], float]] = [defaultdict(float) for _ in range(order + 1)]
    used[order] = counts[order]
    for length in range(1, order):
        for gram in counts[length + 1]:
            used[length][gram[1:]] += 1
    p = [1 / vocabulary] * vocabulary
    for length in range(1, order + 1):
        prefix = tuple(context[len(context) - length + 1 :]) if length > 1 else ()
        if len(prefix) != length - 1:
            break
        total = sum(count for gram, count in used[length].items() if gram[:-1] == prefix)
        if not total:
            continue
        cut = by_the_book(used[length])
        mass = sum(min(cut[min(int(c), 3)], c) for gram, c in used[length].items() if gram[:-1] == prefix)
        p = [
            (
                max(used[length].get((*prefix, w), 0.0) - cut[min(int(used[length].get((*prefix, w), 0)), 3)], 0.0)
                + mass * p[w]
            )
            / total
            for w in range(vocabulary)
        ]
    return p


@pytest.mark.parametrize("context", [[], [3], [1, 4], [0, 1, 4, 6], [5, 5, 5, 5, 5], [6, 6, 0, 1, 4, 6, 5]])
def test_probabilities_sum_to_one_seen_or_not(context: list[int]) -> None:
    model = KneserNey(stream(3000, 7), 7)
    found = model.distribution(np.array(context, dtype=np.int64))
    assert found.sum() == pytest.approx(1.0, abs=1e-12)
    assert found.min() > 0


@pytest.mark.parametrize("order", [2, 3, 5])
def test_the_same_as_by_the_book(order: int) -> None:
    tokens = np.minimum(np.random.default_rng(3).zipf(1.6, size=1500), 200) - 1  # of which many are rare
    model = KneserNey(tokens, 200, order)
    for context in ([2], [1, 0], [0, 1, 0, 1], [3, 3, 3, 3], [5, 4, 1, 0, 0]):
        wanted = plain(tokens.tolist(), 200, order, context)
        np.testing.assert_allclose(model.distribution(np.array(context)), wanted, atol=1e-12)


def test_a_stream_has_the_probabilities_of_its_contexts() -> None:
    model = KneserNey(stream(2000, 9), 9)
    tokens = stream(60, 9, seed=1)
    found = model.probabilities(tokens)
    for k in (0, 1, 2, 7, 59):
        assert found[k] == pytest.approx(model.distribution(tokens[:k])[tokens[k]])


def test_context_helps() -> None:
    training, held_out = stream(20_000, 30), stream(2000, 30, seed=1)
    nats = [-np.log(KneserNey(training, 30, order).probabilities(held_out)).mean() for order in (1, 2, 5)]
    assert nats[0] > nats[1] + 0.5
    assert nats[2] < nats[0] - 0.5  # a chain of first order: more context only blurs it


def test_other_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match="tokens in"):
        KneserNey(np.array([0, 1, 9, 1, 0, 1]), 5)
    with pytest.raises(ValueError, match="tokens in"):
        KneserNey(np.array([0, 1]), 5)
    with pytest.raises(ValueError, match="not all of 7 known"):
        KneserNey(stream(300, 7), 7).probabilities(np.array([1, 7]))
