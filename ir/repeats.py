"""The repeat finder: blocks that a graph says several times, over any ordered list of nodes.

Structure, outlining, ONNX functions and the compile backend all ask here; they differ in what a node's signature holds,
in the order of the nodes, and in where they like a block to begin (`cut_cost`).

A *run* is a stretch of isomorphic blocks one behind the other. Candidates come from signatures alone, which ignore
wiring: a distance at which short sequences of signatures recur is a period, and a stretch in which each node has the
signature of the one a period before it is a run. Each candidate is then checked strictly: two blocks are the same only
if every operand is the same offset inside the block or the same slot, and the slots hold values of the same kind. Where
no run covers most of the graph (blocks with others between them), equal pieces are looked for wherever they stand.
Time is linear in the number of nodes.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import pairwise

from laconic.ir.listing import Listing, Repeat
from laconic.ir.signature import Interner

_GRAM = 4  # signatures in a row that tell a place from others
_PERIODS = 8  # candidates kept
_PHASES = 3  # places to begin a block that are checked strictly
_MULTIPLES = (1, 2, 3, 4)  # blocks that differ by turns, though their signatures do not
_WINDOW, _SMALLEST = 12, 5  # of pieces that do not stand side by side, in nodes
_COVERED, _WORTHWHILE = 0.55, 0.15  # share of nodes in runs below which such pieces are looked for, and what they save


def find_repeats(listing: Listing, cut_cost: Callable[[int], float] | None = None) -> list[Repeat]:
    """The repeats of a listing, in order of their first node; no two share a node.

    `cut_cost(position)` says how little one likes a block to begin at a node; by default the number of values that
    are alive there. More repeats come first in any case.

    Source: tandem repeats by k-gram distances; the strict check makes any candidate right.
    """
    runs = _find_runs(listing, cut_cost)
    total = len(listing.signatures)
    if sum(r.count * r.period for r in runs) < _COVERED * total:
        scattered = _find_scattered(listing)
        if sum(r.saved for r in scattered) >= sum(r.saved for r in runs) + _WORTHWHILE * total:
            runs = scattered
    return sorted(runs, key=lambda r: r.starts)


# Runs


def _find_runs(listing: Listing, cut_cost: Callable[[int], float] | None) -> list[Repeat]:
    """Runs, those that save most first; what one takes, others may not have."""
    waiting: list[tuple[int, int, int, int]] = []

    def offer(start: int, stop: int, period: int) -> None:
        if stop - start >= 2 * period:
            saved = ((stop - start) // period - 1) * period
            heapq.heappush(waiting, (-saved, period, start, stop))

    for period in _periods(listing.signatures, _GRAM) or _periods(listing.signatures, 1):
        for start, stop in _stretches(listing.signatures, period):
            offer(start, stop, period)
    taken = bytearray(len(listing.signatures))
    found: list[Repeat] = []
    while waiting:
        _, period, start, stop = heapq.heappop(waiting)
        free = list(_free(taken, start, stop))
        if free != [(start, stop)]:
            for part in free:
                offer(*part, period)
            continue
        runs = _cut(listing, start, stop, period, cut_cost)
        for run in runs:
            first, last = run.starts[0], run.starts[-1] + run.period
            taken[first:last] = b"\1" * (last - first)
        found += runs
    return found


def _periods(signatures: Sequence[int], gram: int) -> list[int]:
    """Distances at which sequences of `gram` signatures recur often enough to be a period."""
    last: dict[tuple[int, ...], int] = {}
    seen: Counter[int] = Counter()
    for position in range(len(signatures) - gram + 1):
        key = tuple(signatures[position : position + gram])
        if key in last:
            seen[position - last[key]] += 1
        last[key] = position
    likely = [(-times, distance) for distance, times in seen.items() if times >= distance / 2]
    return [distance for _, distance in sorted(likely)[:_PERIODS]]


def _stretches(signatures: Sequence[int], period: int) -> Iterator[tuple[int, int]]:
    """Maximal (start, stop) in which each node has the signature of the one a period before it."""
    begun = None
    for position in range(period, len(signatures) + 1):
        same = position < len(signatures) and signatures[position] == signatures[position - period]
        if same and begun is None:
            begun = position
        elif not same and begun is not None:
            yield begun - period, position
            begun = None


def _free(taken: bytearray, start: int, stop: int) -> Iterator[tuple[int, int]]:
    """The parts of (start, stop) that nothing has taken."""
    position = start
    while (begin := taken.find(0, position, stop)) >= 0:
        end = taken.find(1, begin, stop)
        position = stop if end < 0 else end
        yield begin, position


def _cut(listing: Listing, start: int, stop: int, period: int, cut_cost: Callable[[int], float] | None) -> list[Repeat]:
    """The best way to cut a stretch into blocks that pass the strict check."""
    best: list[Repeat] = []
    for begin in _phases(listing, start, stop, period, cut_cost):
        for multiple in _MULTIPLES:
            found = list(_equal_blocks(listing, begin, stop, period * multiple))
            if _worth(found) > _worth(best):
                best = found
            if sum(r.count * r.period for r in found) + period > stop - begin:
                break  # blocks that differ by turns are not there to be found
    return best


def _worth(runs: Iterable[Repeat]) -> int:
    return sum(run.saved for run in runs)


def _phases(listing: Listing, start: int, stop: int, period: int, cut_cost: Callable[[int], float] | None) -> list[int]:
    """Where the first block may begin, the best places first."""
    live = _live(listing, start, period)
    choices = []
    for phase in range(period):
        count = (stop - start - phase) // period
        if count < 2 or live[phase] == float("inf"):
            continue
        place = start + phase + period  # a cut between two blocks
        choices.append((-count, cut_cost(place) if cut_cost else live[phase], phase))
    return [start + phase for _, _, phase in sorted(choices)[:_PHASES]]


def _live(listing: Listing, start: int, period: int) -> list[float]:
    """How many values of one period cross the cut in front of each of its nodes; inf where one does that may not.

    What is alive for longer than a period crosses every cut and does not tell them apart.
    """
    change = [0.0] * (period + 1)
    barred = [False] * (period + 1)
    for position in range(start, start + 2 * period):
        last = min(listing.last_use(position), position + period)
        low, high = max(position + 1, start + period), min(last, start + 2 * period - 1)
        if low <= high:
            change[low - start - period] += 1
            change[high - start - period + 1] -= 1
            if position in listing.uncut:
                for cut in range(low, high + 1):
                    barred[cut - start - period] = True
    live, alive = [], 0.0
    for phase in range(period):
        alive += change[phase]
        live.append(float("inf") if barred[phase] else alive)
    return live


def _equal_blocks(listing: Listing, begin: int, stop: int, period: int) -> Iterator[Repeat]:
    """Maximal runs of blocks from `begin` on that pass the strict check."""
    starts = list(range(begin, stop - period + 1, period))
    keys = [listing.block(start, period)[0] for start in starts]
    first = 0
    for position in range(1, len(starts) + 1):
        if position < len(starts) and keys[position] == keys[first]:
            continue
        if position - first >= 2:
            found = listing.record(starts[first:position], period)
            if found is not None:
                yield found
        first = position


# Equal pieces wherever they stand


def _find_scattered(listing: Listing) -> list[Repeat]:
    """Pieces between places where few values are alive, said more than once anywhere in the listing."""
    bounds = _quiet_places(listing)
    pieces = list(pairwise(bounds))
    while True:
        keys = Interner()
        word = [keys(listing.block(start, stop - start)[0]) for start, stop in pieces]
        merged = _merge(pieces, word)
        if len(merged) == len(pieces):
            break
        pieces = merged
    groups: dict[int, list[tuple[int, int]]] = {}
    for letter, piece in zip(word, pieces, strict=True):
        groups.setdefault(letter, []).append(piece)
    records = [
        listing.record([start for start, _ in group], group[0][1] - group[0][0])
        for group in groups.values()
        if len(group) > 1
    ]
    return [record for record in records if record is not None]


def _quiet_places(listing: Listing) -> list[int]:
    """Cuts at local minima of the number of values alive, the two ends included."""
    total = len(listing.signatures)
    change, barred = [0] * (total + 1), [0] * (total + 1)
    for position in range(total):
        last = listing.last_use(position)
        change[min(position + 1, total)] += 1
        change[min(last + 1, total)] -= 1
        if position in listing.uncut and last > position:
            barred[position + 1] += 1
            barred[min(last + 1, total)] -= 1
    live: list[float] = []
    alive = closed = 0
    for position in range(total):
        alive, closed = alive + change[position], closed + barred[position]
        live.append(float("inf") if closed else alive)
    bounds = [0]
    for cut in range(1, total):
        window = live[max(1, cut - _WINDOW // 2) : cut + _WINDOW // 2 + 1]
        low = live[cut] < float("inf") and live[cut] == min(window)
        if low and cut - bounds[-1] >= _SMALLEST and total - cut >= _SMALLEST:
            bounds.append(cut)
    return [*bounds, total]


def _merge(pieces: list[tuple[int, int]], word: list[int]) -> list[tuple[int, int]]:
    """Join neighbours that occur only together, and neighbours that occur once."""
    times = Counter(word)
    followers: dict[int, set[int]] = {}
    leaders: dict[int, set[int]] = {}
    for a, b in pairwise(word):
        followers.setdefault(a, set()).add(b)
        leaders.setdefault(b, set()).add(a)

    def together(a: int, b: int) -> bool:
        return times[a] == times[b] and a != b and followers[a] == {b} and leaders[b] == {a}

    joined: list[tuple[int, int]] = []
    position = 0
    while position < len(word):
        start, stop = pieces[position]
        if position + 1 < len(word) and together(word[position], word[position + 1]):
            stop = pieces[position + 1][1]
            position += 1
        joined.append((start, stop))
        position += 1
    return joined
