"""`options={"freeze": True}`: passes may look at weights, and a weight that changes is an error. Without it, a weight
may change at any time."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laconic
from compiled import WIDTH, Stack, drawn, made, same
from laconic.codegen import stats
from laconic.codegen.backend import freeze
from laconic.codegen.backend.options import Options
from laconic.ir.errors import ModelError, UsageError
from laconic.passes.cse import Cse
from laconic.passes.dce import Dce
from laconic.passes.dedup import Dedup
from laconic.passes.simplify import Simplify

FROZEN: dict[str, Any] = {"freeze": True, "strict": True}


class Small(nn.Module):
    """Two layers that hold the same values, and buffers: one that is read and one that is written."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 6)
        self.second.weight.data.copy_(self.first.weight.data)
        self.register_buffer("scale", torch.linspace(1, 2, 6))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor, cache: torch.Tensor) -> torch.Tensor:
        self.calls.add_(1)
        y = torch.relu(self.first(x)) * self.scale
        cache.copy_(y)
        return self.second(y) + self.calls


def built() -> Small:
    torch.manual_seed(0)
    return Small().eval()


def compiled(model: nn.Module, **options: Any) -> Any:
    return torch.compile(model, backend="laconic", options=options or FROZEN)


def call(model: Any, rows: int = 3, seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    cache = torch.zeros(rows, 6)
    with torch.no_grad():
        return model(drawn(rows, 6, seed=seed), cache), cache


def agree(mine: Any, eager: Any, rows: int = 3) -> None:
    for found, wanted in zip(call(mine, rows), call(eager, rows), strict=True):
        same(found, wanted, 1e-5)


# What changes a weight, so that autograd sees it or not


def step(model: Small) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()


def replaced(model: Small) -> None:
    model.first.weight = nn.Parameter(torch.ones(6, 6))


def tied(model: Small) -> None:
    model.first.bias = model.second.bias


def loaded(model: Small) -> None:
    model.load_state_dict({name: value + 0.25 for name, value in model.state_dict().items()})


def buffer(model: Small) -> None:
    model.scale.mul_(3)


def moved(model: Small) -> None:
    model.first.weight.data = torch.ones(6, 6)


def copied(model: Small) -> None:
    model.second.weight.data.copy_(torch.ones(6, 6))


def through_numpy(model: Small) -> None:
    model.scale.numpy()[:] = 5.0


SEEN = [step, replaced, tied, loaded, buffer, moved]
UNSEEN = [copied, through_numpy]


@pytest.mark.slow
def test_without_freeze_weights_may_change_at_any_time() -> None:
    model, eager = built(), built()
    mine = compiled(model, strict=True)
    agree(mine, eager)
    for change in [*SEEN, *UNSEEN]:
        for changed in (model, eager):
            change(changed)
        agree(mine, eager)
    assert not stats()["fallbacks"]


@pytest.mark.parametrize("change", SEEN, ids=lambda change: change.__name__)
def test_a_change_that_autograd_sees_is_an_error(change: Callable[[Small], None]) -> None:
    model = built()
    mine = compiled(model)
    agree(mine, built())
    change(model)
    for _ in range(2):
        with pytest.raises(
            UsageError, match=r"the weight '(first|second|scale).* since the model was compiled"
        ) as raised:
            call(mine)
    assert "freeze" in str(raised.value)
    assert "torch._dynamo.reset()" in str(raised.value)
    torch._dynamo.reset()
    eager = built()
    change(eager)
    with torch.no_grad():
        eager.calls.copy_(model.calls)
    agree(mine, eager)


@pytest.mark.parametrize("change", UNSEEN, ids=lambda change: change.__name__)
def test_what_autograd_does_not_see_is_found_by_contents(change: Callable[[Small], None]) -> None:
    unseen, checked = built(), built()
    mine, held = compiled(unseen), compiled(checked, freeze="checked", strict=True)
    agree(mine, built())
    agree(held, built())
    change(unseen)
    change(checked)
    call(mine)  # as documented: no error
    with pytest.raises(UsageError, match="holds other values"):
        call(held)


def test_the_pipeline_runs_on_the_whole_graph_with_its_weights() -> None:
    agree(compiled(built()), built())
    done = stats()
    assert done["graphs"] == 1
    assert done["each"][0]["rewritten"]["dedup"] > 0
    assert set(done["seconds"]) >= {"capture", "passes", "pieces"}
    with pytest.raises(UsageError, match="looks at the values of weights"):
        Options.of({"pipeline": "dedup"})
    assert Options.of({"pipeline": "dedup", "freeze": True}).pipeline == "dedup"


def test_repeats_are_compiled_once_at_every_size() -> None:
    model = made(Stack).eval()
    eager, mine = copy.deepcopy(model), torch.compile(model, backend="laconic", dynamic=True, options=FROZEN)
    with torch.no_grad():
        for rows in (3, 8, 5):
            same(mine(drawn(rows, 12)), eager(drawn(rows, 12)), 1e-5)
    done = stats()
    assert (done["graphs"], done["rolled"]) == (1, 1)
    assert done["each"][0]["repeats"][0][1] == 5


def test_a_number_that_changes_is_compiled_anew() -> None:
    """Dynamo takes numbers of a module as arguments where sizes are dynamic."""
    model = nn.LayerNorm(6)
    mine = torch.compile(model, backend="laconic", dynamic=True, options=FROZEN)
    with torch.no_grad():
        for graphs, model.eps in enumerate((0.25, 1.0, 1.0)):
            same(mine(drawn(3, 6)), nn.functional.layer_norm(drawn(3, 6), (6,), eps=model.eps), 1e-5)
            assert stats()["graphs"] == min(graphs + 1, 2)


def test_another_model_of_the_class_is_frozen_by_itself() -> None:
    """Dynamo would serve both by what it compiled for one."""
    for seed in range(3):
        model = built()
        with torch.no_grad():
            model.first.weight.add_(seed)
        agree(compiled(model), copy.deepcopy(model))
    assert stats()["graphs"] == 3


def test_what_the_graph_writes_into_is_no_weight() -> None:
    model, eager = built(), built()
    mine = compiled(model)
    for _ in range(3):
        agree(mine, eager)
    assert model.calls == eager.calls == 3


def test_it_is_for_inference() -> None:
    mine = compiled(built())
    with pytest.raises(Exception, match="'freeze' is for inference") as raised:
        mine(drawn(3, 6), torch.zeros(3, 6))
    assert isinstance(raised.value.inner_exception, UsageError)


def test_a_step_that_fails_leaves_the_graph_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("a fault of ours")

    for name in ("hold_weights", "capture_module"):
        monkeypatch.setattr(freeze, name, broken)
        model, eager = built(), built()
        mine = compiled(model, freeze=True)
        agree(mine, eager)
        for changed in (model, eager):
            step(changed)
        agree(mine, eager)
        with pytest.raises(Exception, match="a fault of ours"):
            call(compiled(built()))
        monkeypatch.undo()
        torch._dynamo.reset()
    assert stats()["fallbacks"] == {"RuntimeError: a fault of ours": 2}


def test_what_cannot_be_frozen_is_refused() -> None:
    """An input that is written into shares memory with another: the program would not see it."""

    def both(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        x.add_(1)
        return y * 2

    store = torch.arange(8.0)
    mine = torch.compile(both, backend="laconic", options={"freeze": True})
    with torch.no_grad():
        assert mine(store[:4], store[2:6]).tolist() == [6.0, 8.0, 8.0, 10.0]
    assert list(stats()["fallbacks"]) == ["not frozen: an input is written into that shares memory with another"]


# Plans that were made offline


class Wordy(Stack):
    """Blocks with a constant to fold behind each, and a head that is said twice."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x) + torch.zeros(WIDTH)
        return self.head(x) + self.head(x)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("planned") / "out"
    return laconic.optimize(made(Wordy).eval(), inputs={"x": drawn()}).save(folder)


def test_a_plan_is_done_again_and_nothing_is_decided(planned: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def decides(*_: Any) -> Any:
        raise AssertionError("a pass decides again")

    for item in (Simplify, Dedup, Cse, Dce):
        monkeypatch.setattr(item, "plan", decides)
    model = made(Wordy).eval()
    with torch.no_grad():
        same(compiled(model, plan=planned, strict=True)(drawn()), model(drawn()), 1e-5)
    ledger = json.loads((planned / "ledger.json").read_text())
    done = {row["name"]: row["actions"] for row in ledger["passes"]}
    assert stats()["each"][0]["rewritten"] == done
    assert (done["simplify"], done["cse"]) == (5, 1)


def test_a_plan_freezes(planned: Path) -> None:
    model = made(Wordy).eval()
    mine = compiled(model, plan=planned, strict=True)
    with torch.no_grad():
        mine(drawn())
        model.head.weight.mul_(2)
        with pytest.raises(UsageError, match=r"head\.weight.* was written into"):
            mine(drawn())


def test_the_plan_of_another_program(planned: Path) -> None:
    model = made(Stack).eval()
    with torch.no_grad():
        same(compiled(model, plan=planned)(drawn()), model(drawn()), 1e-5)
        (why,) = stats()["fallbacks"]
        assert "the pass 'simplify' failed: the program has no 'zeros_" in why
        torch._dynamo.reset()
        with pytest.raises(Exception, match="the program has no 'zeros_"):
            compiled(model, plan=planned, strict=True)(drawn())


def test_what_does_not_go_with_a_plan(planned: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="leave out 'pipeline'"):
        Options.of({"plan": planned, "pipeline": "cse"})
    with pytest.raises(UsageError, match="weights that do not change"):
        Options.of({"plan": planned, "freeze": False})
    with pytest.raises(ModelError, match="no plans"):
        Options.of({"plan": tmp_path})
    assert Options.of({"plan": planned, "freeze": "checked"}).checked


def test_weights_of_inference_mode_are_refused() -> None:
    with torch.inference_mode():
        mine = compiled(built(), freeze=True)
        mine(drawn(3, 6), torch.zeros(3, 6))
        assert list(stats()["fallbacks"]) == ["not frozen: a weight was made under torch.inference_mode"]


@pytest.mark.parametrize("value", ["always", 2, 1, None])
def test_options_that_there_are_not(value: Any) -> None:
    with pytest.raises(UsageError, match="freeze"):
        Options.of({"freeze": value})
