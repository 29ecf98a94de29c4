"""The training loop of healing: seeded, scheduled by step, kept on disk, going on where it was stopped."""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from laconic.ir.calibrate import digest
from laconic.ir.calibration import Calibration
from laconic.ir.data import Batch, flat_inputs, running
from laconic.ir.depth import Depth
from laconic.ir.errors import UsageError
from laconic.ir.files import place_file, temporary_beside
from laconic.ir.interpret import Interpreter, Tap
from laconic.ir.metrics.base import Results
from laconic.ir.metrics.registry import load as load_metric
from laconic.ir.program import Program
from laconic.ir.quality import named_results

log = logging.getLogger(__name__)

_WARM_UP, _LAST_RATE = 0.05, 0.05  # of the steps; of the full rate, at the last step
_SAVE_EVERY = 30.0  # seconds
_FORMAT = 1


@dataclass(frozen=True)
class Settings:
    """How healing is done; see the options of `Heal`."""

    steps: int
    rate: float
    loss: str
    tail: int
    weight: float
    lora: int

    def share(self, step: int) -> float:
        """The share of the full rate: a warm-up, then down along a cosine."""
        warm = min(1.0, (step + 1) / max(1.0, _WARM_UP * self.steps))
        turn = torch.cos(torch.tensor(torch.pi * step / self.steps, dtype=torch.float64))
        return warm * (_LAST_RATE + (1 - _LAST_RATE) * 0.5 * (1 + float(turn)))


@dataclass
class _Leaf:
    """What is trained: a row's values in float32 (or, of a matrix that moves in few directions, two narrow factors),
    read in `places` calls. `value` is what its readers see."""

    row: str
    places: int
    was: torch.Tensor
    parts: list[torch.Tensor] = field(default_factory=list)

    def value(self) -> torch.Tensor:
        if len(self.parts) == 1:
            return self.parts[0].to(self.was.dtype)
        return (self.was.float() + self.parts[0] @ self.parts[1]).to(self.was.dtype)


class Healing:
    """A run of training. `rows` are trained, `widened` move in `settings.lora` directions; `original` teaches."""

    def __init__(
        self,
        original: Program,
        program: Program,
        rows: Mapping[str, int],
        widened: Sequence[str],
        calibration: Calibration,
        settings: Settings,
    ) -> None:
        self._program, self._original, self._calibration, self._settings = program, original, calibration, settings
        self._leaves = [self._leaf(row, places) for row, places in rows.items()]
        self._leaves += [self._leaf(row, 1, widened=True) for row in widened]
        nodes = program.forward.weight_nodes()
        pairs = list(
            zip(*(_ends(p)[-settings.tail :] if settings.tail else [] for p in (program, original)), strict=False)
        )
        self._seen: dict[str, torch.Tensor] = {}
        self._student = Interpreter(
            program,
            [Tap((nodes[leaf.row].name,), _given(leaf), replaces=True) for leaf in self._leaves]
            + [Tap((ours,), self._note(f"{k}")) for k, (ours, _) in enumerate(pairs)],
        )
        self._teacher = Interpreter(original, [Tap((t,), self._note(f"{k}*")) for k, (_, t) in enumerate(pairs)])
        self._tail = len(pairs)
        groups = [{"params": leaf.parts, "lr": 0.0, "places": leaf.places} for leaf in self._leaves]
        self._optimizer = torch.optim.AdamW(groups, lr=settings.rate, betas=(0.9, 0.95), weight_decay=0.0)
        self._step = 0

    def _leaf(self, row: str, places: int, *, widened: bool = False) -> _Leaf:
        was = self._program.weights[row].value.detach()
        leaf = _Leaf(row, places, was)
        if widened:
            draw = torch.Generator().manual_seed(self._calibration.seed)
            inner = torch.randn(self._settings.lora, was.shape[1], generator=draw) / was.shape[1] ** 0.5
            parts = [torch.zeros(was.shape[0], self._settings.lora), inner]
        else:
            parts = [was.float().clone()]
        leaf.parts = [part.requires_grad_() for part in parts]
        return leaf

    def _note(self, name: str) -> Callable[[torch.Tensor], None]:
        def see(value: torch.Tensor) -> None:
            self._seen[name] = value

        return see

    def run(self) -> dict[str, torch.Tensor]:
        """Train, and return what the rows hold then, of their dtypes."""
        path = self._path()
        self._restore(path)
        told, data = self._calibration.progress("healing"), self._calibration.data
        draw = torch.Generator().manual_seed(self._calibration.seed)
        order = torch.cat(
            [torch.randperm(len(data), generator=draw) for _ in range(-(-self._settings.steps // len(data)))]
        )
        saved = time.monotonic()
        try:
            while self._step < self._settings.steps:
                self._train(int(order[self._step]))
                told(self._step, self._settings.steps)
                if time.monotonic() - saved > _SAVE_EVERY:
                    self._save(path)
                    saved = time.monotonic()
        finally:
            self._save(path)
        return {leaf.row: leaf.value().detach() for leaf in self._leaves}

    def _train(self, k: int) -> None:
        data = self._calibration.data
        batch, place = data.batch(k), data.place(k)
        loss = self._loss(batch, place)
        if not bool(torch.isfinite(loss)):
            raise UsageError(f"healing diverged at step {self._step + 1}", where=place, hint="a smaller rate")
        for group in self._optimizer.param_groups:
            group["lr"] = self._settings.rate * self._settings.share(self._step) / group["places"]
        parts = [part for leaf in self._leaves for part in leaf.parts]
        # Not `backward`: gradients of all else, which is the model's own, are none of our business.
        for part, gradient in zip(parts, torch.autograd.grad(loss, parts, allow_unused=True), strict=True):
            part.grad = gradient
        torch.nn.utils.clip_grad_norm_(parts, 1.0)
        self._optimizer.step()
        self._step += 1

    def _loss(self, batch: Batch, place: str) -> torch.Tensor:
        self._seen = {}
        with running(place):
            reference = self._results(self._teacher, self._original, batch, place, gradients=False)
            results = self._results(self._student, self._program, batch, place, gradients=True)
        if self._settings.loss == "nats":
            metric = load_metric("nats")
            count = float(metric.parts({k: v.detach() for k, v in results.items()}, batch, None).weights.sum())
            loss = metric.loss(results, batch) / max(1.0, count)
        else:
            parts = load_metric("kl").parts(results, batch, reference)
            loss = parts.sums.sum() / parts.weights.sum()
        for j in range(self._tail):
            ours, theirs = self._seen[f"{j}"].float(), self._seen[f"{j}*"].float()
            apart = (ours - theirs).square().sum() / theirs.square().sum().clamp(min=1e-30)
            loss = loss + self._settings.weight / self._tail * apart
        return loss

    def _results(self, run: Interpreter, program: Program, batch: Batch, place: str, *, gradients: bool) -> Results:
        return named_results(run.entry, run(flat_inputs(program, batch, place), gradients=gradients).results)

    def _path(self) -> Path | None:
        """Where this run is kept: under all that it depends on."""
        folder = self._calibration.folder
        if folder is None:
            return None
        said = hashlib.sha256(f"{_FORMAT} {digest(self._program, self._calibration.data, None)}".encode())
        said.update(digest(self._original, self._calibration.data, None).encode())
        rows = [(leaf.row, leaf.places, len(leaf.parts)) for leaf in self._leaves]
        said.update(f"{self._settings} {self._calibration.seed} {rows}".encode())
        return folder / f"heal-{said.hexdigest()[:32]}.safetensors"

    def _tensors(self) -> dict[str, torch.Tensor]:
        """All that a run is, beside its step."""
        found = {}
        for k, leaf in enumerate(self._leaves):
            for j, part in enumerate(leaf.parts):
                found[f"{k}.{j}.value"] = part.detach()
                for name, value in self._optimizer.state.get(part, {}).items():
                    found[f"{k}.{j}.{name}"] = value
        return found

    def _save(self, path: Path | None) -> None:
        if path is None or not self._step:
            return
        from safetensors.torch import save_file

        with temporary_beside(path) as temporary:
            save_file({k: v.contiguous() for k, v in self._tensors().items()}, temporary, {"step": str(self._step)})
            place_file(temporary, path, force=True)

    def _restore(self, path: Path | None) -> None:
        if path is None or not path.exists():
            return
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "pt") as file:
                step, held = int(file.metadata()["step"]), {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            values = [[held[f"{k}.{j}.value"] for j in range(len(leaf.parts))] for k, leaf in enumerate(self._leaves)]
        except (SafetensorError, OSError, KeyError, TypeError, ValueError) as problem:
            log.warning("%s cannot be read, and healing starts anew: %s", path, problem)
            return
        for k, leaf in enumerate(self._leaves):
            for j, part in enumerate(leaf.parts):
                part.data.copy_(values[k][j])
                state = {n.rpartition(".")[2]: v for n, v in held.items() if n.startswith(f"{k}.{j}.")}
                state.pop("value")
                self._optimizer.state[part] = dict(state)
        self._step = step
        log.info("%s: going on behind step %d of %d", path, step, self._settings.steps)


def _given(leaf: _Leaf) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda value: leaf.value()


def _ends(program: Program) -> list[str]:
    """What comes out of each block of `forward`, in the order of the graph."""
    depth = Depth(program)
    last = [depth.branches(block.units[-1].stream, block.units[-1].place) for block in depth.blocks]
    return [found["forward"].out.name for found in last if "forward" in found]
