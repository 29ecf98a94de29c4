"""Modified Kneser-Ney: what a language model without context must be beaten by before anything measured on it counts.

Chen and Goodman 1999, "An empirical study of smoothing techniques for language modeling" (Computer Speech & Language
13): interpolated, three discounts an order, continuation counts below the top order, uniform at the bottom. The
vocabulary is open to every token, so probabilities sum to one for each context, seen or not.

Everything is sorting: an n-gram's number is the rank of `number(prefix) * vocabulary + token` among those of its order,
so counting an order is one `np.unique` and looking it up one `searchsorted`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

_Ints = NDArray[np.int64]
_Floats = NDArray[np.float64]


@dataclass(frozen=True)
class _Order:
    """The n-grams of one length. `keys` are sorted; `counts` and `suffixes` are per n-gram, `totals` and `masses`
    (what discounting took away) per prefix."""

    keys: _Ints
    counts: _Floats
    totals: _Floats
    masses: _Floats
    discounts: _Floats


class KneserNey:
    """An n-gram model of a token stream.

    `tokens` (length,) are int64 in [0, vocabulary); `order` is n, 5 for 5-grams. Raises ValueError for a stream that
    is shorter than `order` or has other tokens.
    """

    def __init__(self, tokens: _Ints, vocabulary: int, order: int = 5) -> None:
        if len(tokens) < order or tokens.min() < 0 or tokens.max() >= vocabulary:
            raise ValueError(f"{len(tokens)} tokens in [{tokens.min(initial=0)}, {tokens.max(initial=0)}]")
        self.vocabulary, self.order = vocabulary, order
        self._orders: list[_Order] = []
        grams: list[tuple[_Ints, _Ints, _Ints, _Ints]] = []  # keys, prefixes, counts and suffixes of each length
        numbers = np.zeros(len(tokens) + 1, dtype=np.int64)  # of the n-gram that ends before each position
        for length in range(1, order + 1):
            # numbers[k] is that of the tokens [k, k + length - 1); the last has no token behind it.
            keys, first, numbers_now, counts = np.unique(
                numbers[:-1] * vocabulary + tokens[length - 1 :],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            suffixes = numbers[first + 1] if length > 1 else np.zeros(len(keys), dtype=np.int64)
            grams.append((keys, numbers[:-1][first], counts, suffixes))
            numbers = numbers_now
        for length, (keys, prefixes, counts, _) in enumerate(grams, start=1):
            # Below the top, an n-gram counts once for each token that has come before it.
            used = counts if length == order else np.bincount(grams[length][3], minlength=len(keys))
            prefix_count = 1 if length == 1 else len(grams[length - 2][0])
            self._orders.append(_discounted(keys, prefixes, used, prefix_count))

    def probabilities(self, tokens: _Ints) -> _Floats:
        """p(token | all before it in the stream), (length,) for a stream (length,). Raises ValueError for other tokens
        than those of the vocabulary."""
        if len(tokens) and (tokens.min() < 0 or tokens.max() >= self.vocabulary):
            raise ValueError(f"tokens in [{tokens.min()}, {tokens.max()}], not all of {self.vocabulary} known")
        return self._interpolated(self._contexts(tokens), tokens)

    def distribution(self, context: _Ints) -> _Floats:
        """p(token | context) for every token, (vocabulary,); of the context the last `order` - 1 tokens count."""
        last = [numbers[-1:] for numbers in self._contexts(np.append(context, 0))]
        every = np.arange(self.vocabulary)
        return self._interpolated([np.repeat(number, self.vocabulary) for number in last], every)

    def _contexts(self, tokens: _Ints) -> list[_Ints]:
        """For each length 0 .. order - 1, the number of the n-gram that ends before each position; -1 if unseen."""
        found: list[_Ints] = [np.zeros(len(tokens), dtype=np.int64)]
        for order in self._orders[:-1]:
            ending = _lookup(order.keys, found[-1], tokens, self.vocabulary)  # at each position
            found.append(np.append(-1, ending[:-1]))
        return found

    def _interpolated(self, contexts: list[_Ints], tokens: _Ints) -> _Floats:
        p = np.full(len(tokens), 1.0 / self.vocabulary)
        for order, context in zip(self._orders, contexts, strict=True):
            at = np.maximum(context, 0)
            known = (context >= 0) & (order.totals[at] > 0)
            gram = _lookup(order.keys, context, tokens, self.vocabulary)
            count = np.where(gram >= 0, order.counts[np.maximum(gram, 0)], 0.0)
            total = np.where(known, order.totals[at], 1.0)
            kept = np.maximum(count - order.discounts[np.minimum(count, 3).astype(np.int64)], 0.0)
            p = np.where(known, (kept + order.masses[at] * p) / total, p)
        return p


def _lookup(keys: _Ints, prefixes: _Ints, tokens: _Ints, vocabulary: int) -> _Ints:
    """The numbers of the n-grams prefix + token; -1 where there is none."""
    wanted = prefixes * vocabulary + tokens
    at = np.minimum(np.searchsorted(keys, wanted), len(keys) - 1)
    return np.where((prefixes >= 0) & (keys[at] == wanted), at, -1)


def _discounted(keys: _Ints, prefixes: _Ints, counts: Any, prefix_count: int) -> _Order:
    occurring = [int(np.count_nonzero(counts == k)) for k in range(1, 5)]
    n1, n2, n3, n4 = (float(max(n, 1)) for n in occurring)
    y = n1 / (n1 + 2 * n2)
    raw = [0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    # On tiny streams the estimates leave their range; a discount takes no more than the count, and something.
    discounts = np.array([0.0, *(min(max(d, 0.05), k) for k, d in enumerate(raw[1:], start=1))])
    counts = counts.astype(np.float64)
    taken = np.minimum(discounts[np.minimum(counts, 3).astype(np.int64)], counts)
    return _Order(
        keys=keys,
        counts=counts,
        totals=np.bincount(prefixes, weights=counts, minlength=prefix_count).astype(np.float64),
        masses=np.bincount(prefixes, weights=taken, minlength=prefix_count).astype(np.float64),
        discounts=discounts,
    )
