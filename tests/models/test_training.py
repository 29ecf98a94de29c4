"""The training loop: schedules by step, and runs that are stopped and go on as if they had not been."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from laconic.models.muon import Muon, orthogonalized
from laconic.models.training import Recipe, Run, schedule, start, train


class Small(Recipe):
    """A matrix that learns to turn vectors."""

    name = "small"
    steps = 12

    def build(self) -> nn.Module:
        return nn.ModuleDict({"model": nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6))})

    def matrices(self, student: Any) -> list[nn.Parameter]:
        return [weight for weight in student.parameters() if weight.ndim == 2]

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        return {"x": torch.randn(16, 6, generator=torch.Generator().manual_seed(step))}

    def loss(self, student: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        wanted = batch["x"].roll(1, 1).tanh()
        return (student["model"](batch["x"]) - wanted).square().mean(), {"level": torch.tensor(1.0)}

    def after(self, student: Any, step: int, seen: dict[str, torch.Tensor], rate: float) -> None:
        self.numbers = {"sum": self.numbers.get("sum", 0.0) + float(seen["level"])}

    def look(self, student: Any) -> dict[str, float]:
        return {"selection": float(self.loss(student, self.batch(-1))[0])}


def weights(run: Run) -> list[torch.Tensor]:
    return [weight.detach().clone() for weight in run.student.parameters()]


def test_a_stopped_run_goes_on_with_the_same_bits(tmp_path: Path) -> None:
    whole = start(Small(), tmp_path / "whole")
    assert train(whole, look_every=4, compiled=False)
    for until in (5, 7, None):
        part = start(Small(), tmp_path / "parts")
        assert train(part, until=until, look_every=4, compiled=False)
    assert part.step == whole.step == 12
    assert all(map(torch.equal, weights(part), weights(whole)))
    assert part.recipe.numbers == whole.recipe.numbers == {"sum": 12.0}
    assert [row["step"] for row in part.curve] == [4, 8, 12]
    assert [row["selection"] for row in part.curve] == [row["selection"] for row in whole.curve]


def test_an_interrupt_finishes_the_step_and_keeps_it(tmp_path: Path) -> None:
    def stop(run: Run, row: dict[str, float]) -> None:
        if run.step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    before = signal.getsignal(signal.SIGINT)
    run = start(Small(), tmp_path)
    assert not train(run, compiled=False, report=stop)
    assert run.step == 3
    again = start(Small(), tmp_path)
    assert again.step == 3
    assert all(map(torch.equal, weights(again), weights(run)))
    assert signal.getsignal(signal.SIGINT) is before


def test_it_learns(tmp_path: Path) -> None:
    recipe = Small()
    recipe.steps = 300
    run = start(recipe, tmp_path)
    train(run, look_every=50, compiled=False)
    assert run.curve[-1]["selection"] < 0.1 * run.curve[0]["selection"]


def test_the_schedule_is_of_steps() -> None:
    assert schedule(0, 1000) == pytest.approx(0.01)
    assert schedule(100, 1000) == schedule(500, 1000) == 1.0
    assert schedule(750, 1000) == pytest.approx(0.5)
    assert schedule(999, 1000) == pytest.approx(0.02)


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 16, 4), (2, 4, 16)])
def test_orthogonalized(shape: tuple[int, ...]) -> None:
    found = orthogonalized(torch.randn(shape, generator=torch.Generator().manual_seed(0)), steps=5)
    values = torch.linalg.svdvals(found.float())
    assert float(values.min()) > 0.3
    assert float(values.max()) < 1.4


def test_a_stack_of_experts_is_as_many_matrices() -> None:
    torch.manual_seed(0)
    stacked = nn.Parameter(torch.randn(3, 5, 4))
    apart = [nn.Parameter(matrix.clone()) for matrix in stacked.detach()]
    gradient = torch.randn(3, 5, 4)
    stacked.grad = gradient.clone()
    for weight, own in zip(apart, gradient, strict=True):
        weight.grad = own.clone()
    Muon([stacked]).step()
    Muon(apart).step()
    torch.testing.assert_close(torch.stack([w.detach() for w in apart]), stacked.detach(), atol=1e-3, rtol=1e-2)
