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

from laconic.ir.data import Data, flat_inputs, running
from laconic.ir.errors import ModelError, UsageError
from laconic.ir.files import place_file, temporary_beside
from laconic.ir.interpret import Interpreter, Tap
from laconic.ir.metrics.base import Metric
from laconic.ir.program import Program
from laconic.ir.quality import named_results
from laconic.ir.signature import content_key
from laconic.ir.statistics.base import Statistic, Statistics, Sums, add, finite
from laconic.ir.statistics.rows import Masks, Rows, shape_of

log = logging.getLogger(__name__)

#: Bytes that the sums of one run over the data may take.
MEMORY = 2 << 30
_SAVE_EVERY = 20.0  # seconds

#: What kept runs look like; those of another number are not read.
_FORMAT = 2

Progress = Callable[[int, int], None]


def calibrate(
    program: Program,
    data: Data,
    wanted: Sequence[Statistic],
    *,
    loss: Metric | None = None,
    memory: int = MEMORY,
    folder: Path | None = None,
    progress: Progress = lambda done, total: None,
) -> Statistics:
    """Gather statistics of a program's entry `forward` on data.

    `loss` is a metric that has a gradient, for statistics of gradients. `folder` is where runs are kept: the same
    question is answered from there, and one that was interrupted goes on. `progress` is called with the number of
    batches done and of all.

    Raises UsageError for data without batches, or that the model does not take; ModelError for a value that is not
    finite.
    """
    if not len(data):
        raise UsageError(f"{data.name} is empty", hint="calibrate on at least one sample")
    wanted = list({statistic.key: statistic for statistic in wanted}.values())
    if loss is None and any(statistic.gradient for statistic in wanted):
        raise UsageError("statistics of gradients need a loss", hint="name a metric that has one, such as nats")
    groups = _groups(program, wanted, memory)
    kept = None if folder is None else folder / digest(program, data, loss)
    share = _share(len(data))
    if not share:
        raise UsageError(
            f"{data.name} has {len(data)} batches for {_process()[1]} processes", hint="start fewer, or smaller batches"
        )
    found: dict[str, Sums] = {}
    for number, group in enumerate(groups):
        run = _GroupRun(program, data, group, loss, share, None if kept is None else kept / _file(group))
        found |= run.sums(partial(_told, progress, number * len(share), len(groups) * len(share)))
    _refuse_too_short(program, data, wanted, found)
    return Statistics(found, wanted)


def _told(progress: Progress, before: int, total: int, done: int) -> None:
    progress(before + done, total)


def _refuse_too_short(program: Program, data: Data, wanted: Sequence[Statistic], found: dict[str, Sums]) -> None:
    shapes = _shapes(program)
    for statistic in wanted:
        rows = int(found[statistic.key]["rows"])
        least = statistic.least_rows([shapes[name] for name in statistic.nodes])
        if rows < least:
            raise UsageError(
                f"{data.name} is too short: {type(statistic).__name__} of %{statistic.nodes[0]} needs {least} rows",
                why=f"it has {rows}",
                hint="calibrate on more text, or more samples",
            )


def digest(program: Program, data: Data, loss: Metric | None) -> str:
    """What runs are kept under: the program with its weights, the data, the loss, and this process's share. What is
    asked names the files there."""
    found = hashlib.sha256(f"{_FORMAT} {torch.__version__} {program}".encode())
    for name, weight in sorted(program.weights.items()):
        found.update(name.encode())
        found.update(content_key(weight.value))
    found.update(data.digest.encode())
    rank, world = _process()
    found.update(f"{rank} of {world}, {loss and (type(loss).__qualname__, loss.name)}".encode())
    return found.hexdigest()


def _file(group: Sequence[Statistic]) -> str:
    asked = hashlib.sha256("\n".join(statistic.key for statistic in group).encode())
    return f"{asked.hexdigest()[:32]}.safetensors"


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
    shapes = _shapes(program)
    order = {name: k for k, name in enumerate(shapes)}
    groups: list[list[Statistic]] = []
    room = 0
    for statistic in sorted(wanted, key=lambda s: (s.gradient, max(order[name] for name in s.nodes))):
        size = 8 * statistic.size([shapes[name] for name in statistic.nodes])
        if not groups or size > room or groups[-1][0].gradient != statistic.gradient:
            groups.append([])
            room = memory
        groups[-1].append(statistic)
        room -= size
    return groups


def _shapes(program: Program) -> dict[str, tuple[Any, ...]]:
    """The sizes of each node's value, in the order of the graph."""
    return {node.name: shape_of(node.meta["val"]) for node in program.forward.graph.nodes if "val" in node.meta}


class _GroupRun:
    """One run over the data. What is gathered so far is kept in one file, with how far it has come."""

    def __init__(
        self,
        program: Program,
        data: Data,
        group: Sequence[Statistic],
        loss: Metric | None,
        share: range,
        path: Path | None,
    ) -> None:
        self.program, self.data, self.group, self.loss, self.share, self.path = program, data, group, loss, share, path
        self.found: dict[str, Sums] = {statistic.key: {} for statistic in group}
        self.done = self._kept = 0
        self._whole = True
        self._masks: Masks | None = None
        self._more: dict[str, Sums] = {}
        self._seen: dict[str, torch.Tensor] = {}
        shapes = _shapes(program)
        self._shapes = {statistic.key: shapes[statistic.nodes[0]] for statistic in group}
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
        batch, place = self.data.batch(k), self.data.place(k)
        inputs = flat_inputs(self.program, batch, place)
        self._masks, self._more, self._seen = Masks(self.program, batch), {}, {}
        with running(place):
            outcome = self._interpreter(inputs, gradients=bool(self._interpreter.entry.outputs))
        if self.loss is not None and self.group[0].gradient:
            results = named_results(self._interpreter.entry, outcome.results)
            self._differentiate(self.loss.loss(results, batch))
        for statistic in self.group:
            if not finite(self._more[statistic.key]):
                raise _not_finite(self.program, inputs, place, statistic)
        self._whole = False  # an interrupt from here on leaves what must not be kept
        for statistic in self.group:
            add(self.found[statistic.key], self._more[statistic.key], statistic.maxima)
        self.done += 1
        self._whole = True

    def _gather(self, statistic: Statistic) -> Callable[..., None]:
        def see(*values: torch.Tensor) -> None:
            self._more[statistic.key] = statistic.sums(values, self._rows(statistic))

        return see

    def _rows(self, statistic: Statistic) -> Rows:
        assert self._masks is not None
        return self._masks.rows(self._shapes[statistic.key], statistic.positions)

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
            values = [gradients[name] for name in statistic.nodes]
            self._more[statistic.key] = statistic.sums(values, self._rows(statistic))

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
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(self.path, "pt") as file:
                done = int(file.metadata()["done"])
                for name in file.keys():  # noqa: SIM118
                    number, _, sum_name = name.partition(".")
                    self.found[self.group[int(number)].key][sum_name] = file.get_tensor(name)
        except (SafetensorError, OSError, KeyError, TypeError, ValueError, IndexError) as problem:
            log.warning("%s cannot be read and is gathered anew: %s", self.path, problem)
            self.found = {statistic.key: {} for statistic in self.group}
            return
        self.done = self._kept = done
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


def _not_finite(program: Program, inputs: list[torch.Tensor], batch: str, statistic: Statistic) -> ModelError:
    """An error that names the first value that is not finite: NaN or greater than the dtype holds (masks hold -inf).
    What stands behind the statistic's own values is none of its business."""
    first: list[str] = []

    def look(name: str) -> Callable[[Any], None]:
        def see(value: Any) -> None:
            if not first and isinstance(value, torch.Tensor) and value.is_floating_point():
                bad = bool(torch.isnan(value).any() or torch.isposinf(value).any())
                first.extend([name] if bad else [])

        return see

    nodes = {node.name: node for node in program.forward.graph.nodes if node.op in ("placeholder", "call_function")}
    names = [name for name, node in nodes.items() if isinstance(node.meta.get("val"), torch.Tensor)]
    if not statistic.gradient:
        names = names[: 1 + max(names.index(name) for name in statistic.nodes)]
    taps = [Tap((name,), look(name)) for name in names]
    Interpreter(program, taps, results=False)(inputs)
    if first:
        return ModelError(f"{batch} makes values that are not finite", where=program.describe(nodes[first[0]]))
    kind, node = type(statistic).__name__, nodes[statistic.nodes[0]]
    what = "the gradient of the loss is not finite" if statistic.gradient else "its sums overflow"
    return ModelError(f"{kind} of {batch} is not finite", where=program.describe(node), why=what)
