"""What a run costs: how long it takes, and how much memory."""

from __future__ import annotations

import statistics
import time
import weakref
from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from laconic.ir.data import Batch
from laconic.ir.errors import UsageError
from laconic.ir.metrics.base import Metric, Parts, Results, Run

_REPEATS = 3


class _Cost(Metric):
    """A figure of a batch as a whole."""

    runs: ClassVar[bool] = True

    def parts(self, results: Results, batch: Batch, reference: Results | None) -> Parts:
        raise UsageError(f"{self.name} runs the model itself")

    def parts_of_runs(self, run: Run, batch: Batch, reference: Run | None) -> Parts:
        each = torch.full((batch.samples, 1), self.of_batch(run, batch), dtype=torch.float64)
        return Parts(each, torch.ones_like(each))

    @abstractmethod
    def of_batch(self, run: Run, batch: Batch) -> float:
        """What each sample of the batch counts as."""


class Latency(_Cost):
    """Milliseconds per sample, op by op in eager torch: the median of three runs of each batch, behind one that is not
    timed. `laconic bench` times what is compiled."""

    name = "latency"

    def of_batch(self, run: Run, batch: Batch) -> float:
        run(batch.inputs)
        seconds = []
        for _ in range(_REPEATS):
            start = time.perf_counter()
            run(batch.inputs)
            seconds.append(time.perf_counter() - start)
        return 1e3 * statistics.median(seconds) / batch.samples


class Memory(_Cost):
    """Megabytes (10^6 bytes) at the peak of a batch, op by op in eager torch; see `peak_bytes`."""

    name = "memory"

    def of_batch(self, run: Run, batch: Batch) -> float:
        return peak_bytes(lambda: run(batch.inputs)) / 1e6


def peak_bytes(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made during a call take at once. What is there before, as weights and inputs are,
    does not count; what an op uses inside is not seen."""
    alive = _Alive()
    with alive:
        call()
    return alive.peak


class _Alive(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Bytes of the storages that ops make, as long as anybody holds them."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now, self.peak = 0, 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(value.untyped_storage()) for value in _tensors((args, kwargs))}
        results = func(*args, **(kwargs or {}))
        for value in _tensors(results):
            storage = value.untyped_storage()
            if id(storage) not in given and id(storage) not in self._known:
                self._known.add(id(storage))
                self.now += storage.nbytes()
                weakref.finalize(storage, self._freed, id(storage), storage.nbytes())
        self.peak = max(self.peak, self.now)
        return results

    def _freed(self, known: int, size: int) -> None:
        self._known.discard(known)
        self.now -= size


def _tensors(values: Any) -> list[torch.Tensor]:
    return [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, torch.Tensor)]
