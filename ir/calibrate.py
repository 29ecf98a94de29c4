"""One calibration run for all who ask: batches through the program, sums of what was asked for.

The run is bounded in memory (what is asked for is gathered in groups whose sums fit), leaves padding out, can be
stopped at any batch and goes on with the same sums, is kept by the hash of model, data and what was asked, and is
spread over the processes of `torch.distributed` where there are several: each takes its share of the batches, and the
sums are added in the end.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import fx

from laconic.ir.data import Batch, Data, flat_inputs
from laconic.ir.errors import ModelError, UsageError
from laconic.ir.files import place_file, temporary_beside
from laconic.ir.interpret import Interpreter, Tap
from laconic.ir.program import Program
from laconic.ir.signature import content_key
from laconic.ir.statistics.base import Rows, Statistic, Statistics, Sums, add, finite
from laconic.ir.types import TensorType, type_of

log = logging.getLogger(__name__)

#: Bytes that the sums of one run over the data may take.
MEMORY = 2 << 30
_SAVE_EVERY = 20.0  # seconds

Progress = Callable[[int, int], None]


Loss = Callable[[list[Any], Batch], torch.Tensor]


def calibrate(
    program: Program,
    data: Data,
    wanted: Sequence[Statistic],
    *,
    loss: Loss | None = None,
    memory: int = MEMORY,
    folder: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Statistics:
    """Gather statistics of a program's entry `forward` on data.

    `loss` gives the summed loss of a batch from the results and the batch, for statistics of gradients. `folder` is
    where runs are kept: the same question is answered from there, and one that was interrupted goes on. `progress` is
    called with the number of batches done and of all.

    Raises UsageError for data without batches, or whose inputs do not fit; ModelError for a value that is not finite.
    """
    if not len(data):
        raise UsageError(f"{data.name} is empty", hint="calibrate on at least one sample")
    wanted = list({statistic.key: statistic for statistic in wanted}.values())
    if loss is None and any(statistic.gradient for statistic in wanted):
        raise UsageError("statistics of gradients need a loss", hint="name a metric that has one, such as nats")
    groups = _groups(program, wanted, memory)
    kept = None if folder is None else folder / digest(program, data, wanted)
    share = _share(len(data))
    if not share:
        raise UsageError(
            f"{data.name} has {len(data)} batches for {_process()[1]} processes", hint="start fewer, or smaller batches"
        )
    found: dict[str, Sums] = {}
    for number, group in enumerate(groups):
        run = _GroupRun(program, data, group, loss, share, None if kept is None else kept / f"{number}.safetensors")
        found |= run.sums(partial(_told, progress, number * len(share), len(groups) * len(share)))
    _refuse_too_short(program, data, wanted, found)
    return Statistics(found, wanted)


def _told(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _refuse_too_short(program: Program, data: Data, wanted: Sequence[Statistic], found: dict[str, Sums]) -> None:
    nodes = {node.name: node for node in program.forward.graph.nodes}
    for statistic in wanted:
        rows, least = (
            int(found[statistic.key]["rows"]),
            statistic.least_rows([_shape(nodes[name]) for name in statistic.nodes]),
        )
        if rows < least:
            raise UsageError(
                f"{data.name} is too short: {type(statistic).__name__} of %{statistic.nodes[0]} needs {least} rows",
                why=f"it has {rows}",
                hint="calibrate on more text, or more samples",
            )


def digest(program: Program, data: Data, wanted: Sequence[Statistic]) -> str:
    """What a run is kept under: the program with its weights, the data, what is asked, and this process's share."""
    found = hashlib.sha256(str(program).encode())
    for name, weight in sorted(program.weights.items()):
        found.update(name.encode())
        found.update(content_key(weight.value))
    found.update(data.digest.encode())
    for statistic in wanted:
        found.update(statistic.key.encode())
    rank, world = _process()
    found.update(f"{rank} of {world}".encode())
    return found.hexdigest()


def _process() -> tuple[int, int]:
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return 0, 1
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _share(count: int) -> range:
    """The batches of this process."""
    rank, world = _process()
    return range(rank, count, world)


def _groups(program: Program, wanted: Sequence[Statistic], memory: int) -> list[list[Statistic]]:
    """What is gathered together, in the order of the graph: layer by layer, as many as fit."""
    nodes = {node.name: node for node in program.forward.graph.nodes}
    order = {name: k for k, name in enumerate(nodes)}
    groups: list[list[Statistic]] = []
    room = 0
    for statistic in sorted(wanted, key=lambda s: (s.gradient, max(order[name] for name in s.nodes))):
        size = 8 * statistic.size([_shape(nodes[name]) for name in statistic.nodes])
        if not groups or size > room or groups[-1][0].gradient != statistic.gradient:
            groups.append([])
            room = memory
        groups[-1].append(statistic)
        room -= size
    return groups


def _shape(node: fx.Node) -> tuple[Any, ...]:
    kind = type_of(node.meta["val"])
    assert isinstance(kind, TensorType)
    return kind.shape


class _GroupRun:
    """One run over the data. What is gathered so far is kept in one file, with how far it has come."""

    def __init__(
        self,
        program: Program,
        data: Data,
        group: Sequence[Statistic],
        loss: Loss | None,
        share: range,
        path: Path | None,
    ) -> None:
        self.program, self.data, self.group, self.loss, self.share, self.path = program, data, group, loss, share, path
        self.found: dict[str, Sums] = {statistic.key: {} for statistic in group}
        self.done = self._kept = 0
        self._whole = True
        self._rows = Rows()
        self._more: dict[str, Sums] = {}
        self._seen: dict[str, torch.Tensor] = {}
        gradient = group[0].gradient
        if gradient:
            taps = [Tap((name,), self._record(name), replaces=True) for name in {n for s in group for n in s.nodes}]
        else:
            taps = [Tap(statistic.nodes, self._gather(statistic)) for statistic in group]
        self._interpreter = Interpreter(program, taps, results=gradient)

    def sums(self, progress: Callable[[int], None]) -> dict[str, Sums]:
        self._restore()
        saved = time.monotonic()
        try:
            while self.done < len(self.share):
                self._step(self.share[self.done])
                progress(self.done)
                if time.monotonic() - saved > _SAVE_EVERY:
                    self._save()
                    saved = time.monotonic()
        finally:
            self._save()
        return {statistic.key: _joined(self.found[statistic.key], statistic.maxima) for statistic in self.group}

    def _step(self, k: int) -> None:
        """Add a batch."""
        batch = self.data.batch(k)
        inputs = flat_inputs(self.program, batch, self.data.place(k))
        self._rows, self._more, self._seen = Rows(batch.mask), {}, {}
        outcome = self._interpreter(inputs, gradients=bool(self._interpreter.entry.outputs))
        if self.loss is not None and self.group[0].gradient:
            self._differentiate(self.loss(outcome.results, batch))
        for statistic in self.group:
            if not finite(self._more[statistic.key]):
                raise _not_finite(self.program, inputs, self.data.place(k))
        self._whole = False  # an interrupt from here on leaves what must not be kept
        for statistic in self.group:
            add(self.found[statistic.key], self._more[statistic.key], statistic.maxima)
        self.done += 1
        self._whole = True

    def _gather(self, statistic: Statistic) -> Callable[..., None]:
        def see(*values: torch.Tensor) -> None:
            self._more[statistic.key] = statistic.sums(values, self._rows)

        return see

    def _record(self, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
        """Remember a value as one that the loss is differentiated by."""

        def see(value: torch.Tensor) -> torch.Tensor:
            value = value if value.requires_grad else value.detach().requires_grad_()
            self._seen[name] = value
            return value

        return see

    def _differentiate(self, loss: torch.Tensor) -> None:
        names = list(self._seen)
        found = torch.autograd.grad(loss, [self._seen[name] for name in names], allow_unused=True)
        gradients = {
            name: torch.zeros_like(self._seen[name]) if gradient is None else gradient
            for name, gradient in zip(names, found, strict=True)
        }
        for statistic in self.group:
            self._more[statistic.key] = statistic.sums([gradients[name] for name in statistic.nodes], self._rows)

    def _save(self) -> None:
        if self.path is None or self.done == self._kept or not self._whole:
            return
        from safetensors.torch import save_file

        tensors = {
            f"{number}.{name}": value
            for number, statistic in enumerate(self.group)
            for name, value in self.found[statistic.key].items()
        }
        with temporary_beside(self.path) as temporary:
            save_file(tensors, temporary, metadata={"done": str(self.done)})
            place_file(temporary, self.path, force=True)
        self._kept = self.done

    def _restore(self) -> None:
        if self.path is None or not self.path.exists():
            return
        from safetensors import safe_open

        with safe_open(self.path, "pt") as file:
            self.done = self._kept = int(file.metadata()["done"])
            for name in file.keys():  # noqa: SIM118
                number, _, sum_name = name.partition(".")
                self.found[self.group[int(number)].key][sum_name] = file.get_tensor(name)
        log.info("%s: going on behind batch %d of %d", self.path, self.done, len(self.share))


def _joined(sums: Sums, maxima: frozenset[str]) -> Sums:
    """The sums of all processes."""
    if _process()[1] > 1:
        for name, value in sums.items():
            shared = value.to("cuda") if torch.distributed.get_backend() == "nccl" else value
            how = torch.distributed.ReduceOp.MAX if name in maxima else torch.distributed.ReduceOp.SUM
            torch.distributed.all_reduce(shared, how)
            sums[name] = shared.cpu()
    return sums


def _not_finite(program: Program, inputs: list[torch.Tensor], batch: str) -> ModelError:
    """An error that names the first value that is not finite, where it was finite before."""
    first: list[str] = []

    def look(name: str) -> Callable[[Any], None]:
        def see(value: Any) -> None:
            bad = isinstance(value, torch.Tensor) and value.is_floating_point() and bool(torch.isnan(value).any())
            if bad and not first:
                first.append(name)

        return see

    nodes = {node.name: node for node in program.forward.graph.nodes if node.op in ("placeholder", "call_function")}
    Interpreter(program, [Tap((name,), look(name)) for name in nodes], results=False)(inputs)
    where = program.describe(nodes[first[0]]) if first else "the gradient of the loss"
    return ModelError(f"{batch} makes values that are not finite", where=where)
