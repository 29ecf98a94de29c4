"""What the backend did: a record for each graph that Dynamo handed over."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass
class GraphRecord:
    """One graph. `repeats` are (period, count, slots, outputs); `refused` says why it was compiled whole, `fallback`
    what went wrong with a step of ours. `calls` and `compiled` are counts of calls in the graph and of those compiled;
    `seconds` are wall-clock seconds by stage, without what is compiled at the first backward."""

    nodes: int = 0
    compiled: int = 0
    pieces: int = 0
    steps: int = 0
    repeats: list[tuple[int, int, int, int]] = field(default_factory=list)
    refused: str = ""
    fallback: str = ""
    out_of_place: int = 0
    copies: int = 0
    channels_last: int = 0
    rewritten: dict[str, int] = field(default_factory=dict)
    unboxed: int = 0
    kernels: int = 0
    units: int = 0
    seconds: dict[str, float] = field(default_factory=dict)
    cache_hits: dict[str, int] = field(default_factory=dict)

    @property
    def rolled(self) -> bool:
        """Whether repeated blocks were compiled once."""
        return self.pieces > 0

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        start = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] = self.seconds.get(stage, 0.0) + time.perf_counter() - start


_records: list[GraphRecord] = []
_said: set[str] = set()


def new_record() -> GraphRecord:
    _records.append(GraphRecord())
    return _records[-1]


def stats() -> dict[str, Any]:
    """What the backend did in this process: sums over all graphs, and under "each" a record for each of them.

    `graphs`, those that were `rolled`, those `refused` by reason, `fallbacks` by reason; `pieces` compiled and `steps`
    (calls of them); `nodes` (calls in the graphs) and those `compiled`; seconds by stage.
    """
    seconds: dict[str, float] = {}
    for record in _records:
        for stage, spent in record.seconds.items():
            seconds[stage] = seconds.get(stage, 0.0) + spent
    return {
        "graphs": len(_records),
        "rolled": sum(record.rolled for record in _records),
        "refused": _count(record.refused for record in _records),
        "fallbacks": _count(record.fallback for record in _records),
        **{what: sum(getattr(r, what) for r in _records) for what in ("pieces", "steps", "nodes", "compiled")},
        "seconds": seconds,
        "each": [asdict(record) | {"rolled": record.rolled} for record in _records],
    }


def forget(record: GraphRecord) -> None:
    """Leave out a graph that Dynamo takes back."""
    _records[:] = [other for other in _records if other is not record]


def first_time(what: str) -> bool:
    """Whether something happens for the first time."""
    known = what in _said
    _said.add(what)
    return not known


def reset_stats() -> None:
    """Forget what was done and said so far."""
    _records.clear()
    _said.clear()


def _count(reasons: Iterator[str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for reason in filter(None, reasons):
        counts[reason] = counts.get(reason, 0) + 1
    return counts
