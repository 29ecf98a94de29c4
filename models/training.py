"""One training loop for all recipes: seeded, scheduled by step, resumable at any step, safe to interrupt.

A recipe says what a batch is as a function of the step, so that a run that was stopped goes on with the very batches
it would have had. What is kept between runs is the weights, the optimizers' moments, the recipe's own numbers and the
curve; it is replaced whole, every `SAVE_EVERY` steps and when the run is interrupted.
"""

from __future__ import annotations

import signal
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
from torch import nn

from laconic.ir.errors import ModelError
from laconic.ir.files import place_file, temporary_beside
from laconic.models.muon import Muon

SAVE_EVERY = 250  # steps
_WARM_UP, _MOMENTUM_WARM_UP = 100, 300  # steps
_LAST_RATE = 0.02  # of the full rate, at the last step


class Recipe(ABC):
    """How one model is trained. `numbers` is what a run learns about itself and needs to go on: it is saved."""

    name: ClassVar[str]
    seed: ClassVar[int] = 0
    steps: int
    #: Learning rates of Muon (matrices) and AdamW (everything else).
    rate: float = 0.02
    other_rate: float = 0.003

    def __init__(self) -> None:
        self.numbers: dict[str, float] = {}

    @abstractmethod
    def build(self) -> nn.Module:
        """What is trained, drawn by the global generator: the model as `.model`, and heads that are thrown away."""

    @abstractmethod
    def matrices(self, student: Any) -> list[nn.Parameter]:
        """The weights that Muon moves."""

    @abstractmethod
    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """The batch of a step: a function of the seed, the step and `numbers`."""

    @abstractmethod
    def loss(self, student: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The loss of a batch, and what the curve and `after` want to know. Compiled."""

    @abstractmethod
    def look(self, student: Any) -> dict[str, float]:
        """Figures on the selection split."""

    def after(self, student: Any, step: int, seen: dict[str, torch.Tensor], rate: float) -> None:  # noqa: B027
        """What happens between steps beside the optimizers; `rate` is the schedule's, 1 at its height."""


def schedule(step: int, steps: int) -> float:
    """The share of the full learning rate: a warm-up, constant to the middle, then down in a line."""
    warm = min(1.0, (step + 1) / _WARM_UP)
    left = (steps - step) / (steps / 2)
    return warm * max(_LAST_RATE, min(1.0, left))


@dataclass
class Run:
    """A training run: `curve` has a row per look, with `step`, `seconds` and the recipe's figures.

    `seconds` are those of the processor, all threads together: what a run costs, however often it was stopped and
    whatever else ran beside it.
    """

    recipe: Recipe
    student: nn.Module
    folder: Path
    step: int = 0
    seconds: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        matrices = self.recipe.matrices(self.student)
        own = {id(weight) for weight in matrices}
        others = [w for w in self.student.parameters() if w.requires_grad and id(w) not in own]
        self.muon = Muon(matrices, lr=self.recipe.rate)
        self.adamw = torch.optim.AdamW(
            others, lr=self.recipe.other_rate, betas=(0.9, 0.95), weight_decay=0.0, fused=True
        )

    @property
    def path(self) -> Path:
        return self.folder / "state.pt"

    def save(self) -> None:
        """Replace what is kept, whole."""
        kept = {
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "numbers": self.recipe.numbers,
            "student": self.student.state_dict(),
            "muon": self.muon.state_dict(),
            "adamw": self.adamw.state_dict(),
        }
        with temporary_beside(self.path) as temporary:
            torch.save(kept, temporary)
            place_file(temporary, self.path, force=True)

    def restore(self) -> bool:
        """Go on from what is kept; False if there is nothing. Raises ModelError if it cannot be read."""
        if not self.path.exists():
            return False
        try:
            kept: dict[str, Any] = torch.load(self.path, weights_only=True)
        except Exception as problem:
            why = (str(problem).strip() or type(problem).__name__).splitlines()[0]
            hint = "delete it to train from the beginning"
            raise ModelError(
                "what is kept of this run cannot be read", where=str(self.path), why=why, hint=hint
            ) from problem
        self.step, self.seconds, self.curve = kept["step"], kept["seconds"], kept["curve"]
        self.recipe.numbers = kept["numbers"]
        self.student.load_state_dict(kept["student"])
        self.muon.load_state_dict(kept["muon"])
        self.adamw.load_state_dict(kept["adamw"])
        return True


def start(recipe: Recipe, folder: Path) -> Run:
    """A run of a recipe in a folder: a new one, or the one that was stopped there."""
    torch.manual_seed(recipe.seed)
    run = Run(recipe, recipe.build(), folder)
    run.restore()
    return run


def train(
    run: Run,
    *,
    until: int | None = None,
    look_every: int = 250,
    compiled: bool = True,
    report: Callable[[Run, dict[str, float]], None] = lambda run, seen: None,
) -> bool:
    """Train to the recipe's last step (or `until`). `report` is called after every step.

    Returns False if it was interrupted (SIGINT, SIGTERM): the step was finished and kept, and the same call goes on.
    """
    recipe, student, total = run.recipe, run.student, run.recipe.steps

    def loss(batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        with torch.autocast("cpu", torch.bfloat16, enabled=has_bfloat16()):
            return recipe.loss(student, batch)

    compute = torch.compile(loss, dynamic=False) if compiled else loss
    student.train()
    began = time.process_time() - run.seconds
    with _until_interrupted() as interrupted:
        while run.step < (total if until is None else min(until, total)) and not interrupted:
            rate = schedule(run.step, total)
            value, seen = compute(recipe.batch(run.step))
            value.backward()  # type: ignore[no-untyped-call]
            _step(run, rate)
            recipe.after(student, run.step, seen, rate)
            run.step += 1
            run.seconds = time.process_time() - began
            row = {"loss": float(value.detach())} | {k: float(v) for k, v in seen.items() if v.numel() == 1}
            if run.step % look_every == 0 or run.step == total:
                row |= _look(run)
                run.curve.append({"step": run.step, "seconds": round(run.seconds, 1), **row})
            report(run, row)
            if run.step % SAVE_EVERY == 0:
                run.save()
    run.save()
    return not interrupted


def _step(run: Run, rate: float) -> None:
    for group in run.muon.param_groups:
        group["lr"] = rate * run.recipe.rate
        group["momentum"] = 0.85 + 0.10 * min(1.0, run.step / _MOMENTUM_WARM_UP)
    for group in run.adamw.param_groups:
        group["lr"] = rate * run.recipe.other_rate
    torch.nn.utils.clip_grad_norm_(run.student.parameters(), 1.0)
    for optimizer in (run.muon, run.adamw):
        optimizer.step()
        optimizer.zero_grad()


def _look(run: Run) -> dict[str, float]:
    run.student.eval()
    with torch.no_grad():
        found = run.recipe.look(run.student)
    run.student.train()
    return found


def has_bfloat16() -> bool:
    """Whether this processor multiplies bfloat16 matrices faster than float32 ones."""
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


@contextmanager
def _until_interrupted() -> Iterator[list[int]]:
    """A list that a SIGINT or SIGTERM makes true; a second one is raised as always."""
    caught: list[int] = []
    before: dict[signal.Signals, Any] = {}

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        for each, handler in before.items():
            signal.signal(each, handler)

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
