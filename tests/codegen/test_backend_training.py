"""Training under the backend: gradients of each parameter, buffers and draws, against eager."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compiled import WIDTH, Block, Stack, agree, check, compiled, drawn, made, outcome, rolled, same


def test_a_step() -> None:
    done = check(made(Stack), drawn(grad=True), fullgraph=True)
    assert done["compiled"] < 0.5 * done["nodes"]


def test_two_forwards_then_two_backwards() -> None:
    model = made(Stack)
    other = copy.deepcopy(model)
    call = compiled(model)
    gradients = []
    for each, run in ((model, call), (other, other)):
        first, second = run(drawn(seed=5)), run(drawn(seed=6))
        first.backward(drawn(*first.shape, seed=7))
        second.backward(drawn(*second.shape, seed=8))
        gradients.append({name: weight.grad for name, weight in each.named_parameters()})
    for name, wanted in gradients[1].items():
        same(gradients[0][name], wanted, 1e-5, name)
    rolled(4)


@pytest.mark.slow
def test_a_second_backward_through_the_same_graph(no_caches: None) -> None:
    """Both count. Once a backward was compiled for one use of what was saved, it takes no other: as with Inductor."""

    def twice(call: Any, model: nn.Module) -> dict[str, Any]:
        x = drawn(grad=True)
        result = call(x)
        for _ in range(2):
            result.sum().backward(retain_graph=True)
        return {**{name: weight.grad for name, weight in model.named_parameters()}, "x": x.grad}

    model = made(Stack)
    other = copy.deepcopy(model)
    call = compiled(model)
    found, wanted = twice(call, model), twice(other, other)
    for name, value in wanted.items():
        same(found[name], value, 1e-5, name)
    rolled(4)
    said = []
    for backend in ("laconic", "inductor"):
        torch._dynamo.reset()
        call = torch.compile(model, backend=backend)
        call(drawn(grad=True)).sum().backward()
        with pytest.raises(RuntimeError, match="donated buffers") as raised:
            twice(call, model)
        said.append(str(raised.value))
    assert said[0] == said[1]


class Dropped(Block):
    """A block that drops, and tells what: it returns a mask beside the stream."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mask = self.drop(torch.ones_like(x))
        return x + self.branch(x) * mask, mask


class DroppedStack(Stack):
    def __init__(self) -> None:
        super().__init__(Dropped)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
        masks = []
        for block in self.blocks:
            x, mask = block(x)
            masks.append(mask)
        return self.head(x), masks


def test_dropout_draws_a_mask_for_each_block_and_call() -> None:
    model = made(DroppedStack).double()
    call = compiled(model)
    x = drawn(64, WIDTH, grad=True, dtype=torch.float64)
    masks = [mask for _ in range(2) for mask in call(x)[1]]
    for number, mask in enumerate(masks):
        assert set(mask.unique().tolist()) == {0.0, 2.0}
        for other in masks[:number]:
            assert 0.4 < (mask == other).double().mean().item() < 0.6
    direction = drawn(64, WIDTH, seed=9, dtype=torch.float64)

    def loss(step: float) -> torch.Tensor:
        torch.manual_seed(11)
        return call(x + step * direction)[0].square().sum()

    slope = torch.autograd.grad(loss(0.0), x)[0].mul(direction).sum()
    wanted = (loss(1e-5) - loss(-1e-5)) / 2e-5
    assert slope.item() == pytest.approx(wanted.item(), rel=1e-6)
    rolled(4)


def test_dropout_with_eagers_draws() -> None:
    model = made(DroppedStack)
    other = copy.deepcopy(model)
    call = compiled(model, inductor={"fallback_random": True})
    for seed in range(3):
        found, wanted = outcome(call, model, [drawn()], seed=seed), outcome(other, other, [drawn()], seed=seed)
        agree(found, wanted)
        for mine, eager in zip(found.results[1:], wanted.results[1:], strict=True):
            assert torch.equal(mine, eager)
    rolled(4)


class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.linear = nn.BatchNorm1d(WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + torch.tanh(self.linear(self.norm(x)))


@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_batch_norm_keeps_its_statistics(training: bool) -> None:
    model = made(lambda: Stack(Normed)).train(training)
    before = {name: value.clone() for name, value in model.named_buffers()}
    check(model, drawn(8, WIDTH), calls=3)
    moved = [not torch.equal(value, before[name]) for name, value in model.named_buffers()]
    assert all(moved) if training else not any(moved)


@torch.library.custom_op("laconic_test::remember", mutates_args=("store",))
def remember(store: torch.Tensor, x: torch.Tensor) -> None:
    store.mul_(0.5).add_(x.mean(0))


@remember.register_fake
def _remember(store: torch.Tensor, x: torch.Tensor) -> None:
    return None


class Remembering(Block):
    """A custom op writes into one buffer, and another one counts."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("store", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        remember(self.store, x.detach())
        self.calls += 1
        return x + self.branch(x + self.store)


@pytest.mark.parametrize("grad", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_a_custom_op_that_writes_and_a_counter(grad: bool) -> None:
    model = made(lambda: Stack(Remembering))
    check(model, drawn(), calls=3, grad=grad)
    assert all(block.calls.item() == 3 for block in model.blocks)  # type: ignore[union-attr, operator]


def tied() -> nn.Module:
    """Pairs of blocks share a matrix, and a pair shares all."""
    model = Stack(count=6)
    for first, second in ((0, 3), (1, 4)):
        model.blocks[second].up.weight = model.blocks[first].up.weight  # type: ignore[union-attr]
    model.blocks[5] = model.blocks[2]
    return model


class Within(Block):
    """A block that says one matrix twice."""

    def __init__(self) -> None:
        super().__init__()
        self.down.weight = nn.Parameter(self.up.weight.detach().T.clone())

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        x = F.linear(self.norm(x), self.down.weight.T)
        return F.linear(F.gelu(x), self.down.weight, self.down.bias)


class FiveTimes(Stack):
    def __init__(self) -> None:
        super().__init__(count=1)

    def forward(self, x: torch.Tensor) -> Any:
        for _ in range(5):
            x = self.blocks[0](x)
        return self.head(x)


@pytest.mark.parametrize(
    ("model", "repeats"), [(tied, 5), (lambda: Stack(Within), 4), (FiveTimes, 4)], ids=["across", "within", "five"]
)
def test_tied_weights(model: Any, repeats: int) -> None:
    done = check(made(model), drawn(grad=True), repeats=repeats)
    assert done["pieces"] <= 3


class Shared(Stack):
    """Every block reads the input too."""

    def forward(self, x: torch.Tensor) -> Any:
        h = x
        for block in self.blocks:
            h = block(h) * torch.sigmoid(x)
        return self.head(h)


@pytest.mark.slow
def test_an_input_that_all_blocks_read() -> None:
    check(made(Shared), drawn(grad=True))


class TwoStreams(nn.Module):
    """Blocks on two streams, of which the head reads one: the last block's other stream goes nowhere."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))
        self.second = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(5))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x * 0.5
        for first, second in zip(self.first, self.second, strict=True):
            both = torch.sin(x + y)
            x, y = x + torch.tanh(first(both)), y + torch.sigmoid(second(both))
        return x


def test_what_nothing_depends_on_has_no_gradient() -> None:
    """None, as in eager, and not zero: weight decay would take zero for a step."""
    model = made(TwoStreams)
    done = check(model, drawn())
    assert model.second[-1].weight.grad is None
    assert done["pieces"] < done["steps"]


class ByTurns(TwoStreams):
    """Of the last block's two streams one goes nowhere, but by the other."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.sin(x)
        y = x * 0.5
        for first, second in zip(self.first, self.second, strict=True):
            x = x + torch.tanh(first(y))
            y = y + torch.sigmoid(second(x))
        return torch.cos(y)


def test_what_has_gradients_anyway_shares_a_piece() -> None:
    done = check(made(ByTurns), drawn(grad=True), repeats=5)
    assert done["pieces"] == 3, "what stands before, the block, and what stands behind"


def test_half_of_the_model_is_frozen() -> None:
    model = made(lambda: Stack(count=8))
    for block in model.blocks[:4]:  # type: ignore[index]
        block.requires_grad_(False)
    done = check(model, drawn(), repeats=3)
    assert sorted(count for _, count, _, _ in done["each"][0]["repeats"]) >= [3, 4], "two runs"
    assert all(w.grad is None for w in model.blocks[:4].parameters())  # type: ignore[index]


class Stretch(Stack):
    """Gradients are not recorded in the first half."""

    def forward(self, x: torch.Tensor) -> Any:
        with torch.no_grad():
            for block in self.blocks[:4]:  # type: ignore[index]
                x = block(x)
        for block in self.blocks[4:]:  # type: ignore[index]
            x = block(x)
        return self.head(x)


class Unrecorded(Block):
    """Gradients are not recorded in part of a block."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            scale = self.branch(x).sigmoid()
        return x + self.branch(x) * scale


@pytest.mark.parametrize("model", [lambda: Stretch(count=8), lambda: Stack(Unrecorded)], ids=["stretch", "inside"])
def test_no_grad_in_the_model(model: Any) -> None:
    check(made(model), drawn(grad=True), repeats=3)


class InPlace(nn.Module):
    """A block that saves no value that it writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.add_(self.down(torch.tanh(self.up(torch.tanh(x)))))


class InPlaceStack(Stack):
    def __init__(self) -> None:
        super().__init__(InPlace)

    def forward(self, x: torch.Tensor) -> Any:
        return super().forward(x * 1.0)


@pytest.mark.parametrize("grad", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_the_residual_stream_is_updated_in_place(grad: bool) -> None:
    """Cut as it stands, autograd would refuse it in training: what was inside a graph is an operand of a piece."""
    done = check(made(InPlaceStack), drawn(grad=True), grad=grad)
    assert done["each"][0]["out_of_place"] == 5


def test_saved_tensors_hooks() -> None:
    def packed(model: nn.Module) -> Any:
        def call(x: torch.Tensor) -> Any:
            with torch.autograd.graph.saved_tensors_hooks(lambda t: (t * 1.0, t.dtype), lambda kept: kept[0]):
                return model(x)

        return call

    model = made(Stack)
    other = copy.deepcopy(model)
    call = compiled(model)
    agree(outcome(packed(call), model, [drawn()]), outcome(packed(other), other, [drawn()]))
    rolled(4)


def test_hooks_of_tensors_and_backwards() -> None:
    seen: dict[str, list[Any]] = {"mine": [], "eager": []}
    model = made(Stack)
    other = copy.deepcopy(model)
    outcomes = []
    for name, each in (("mine", model), ("eager", other)):
        weight: Any = each.blocks[2].up.weight  # type: ignore[union-attr]
        weight.register_hook(lambda grad: grad * 3.0)
        weight.register_post_accumulate_grad_hook(lambda p, name=name: seen[name].append(p.grad.clone()))
        each.register_full_backward_hook(lambda module, given, out, name=name: seen[name].append(out[0].clone()))
        call = compiled(each) if name == "mine" else each
        outcomes.append(outcome(call, each, [drawn(grad=True)]))
    agree(*outcomes)
    assert len(seen["mine"]) == len(seen["eager"]) == 2
    for found, wanted in zip(seen["mine"], seen["eager"], strict=True):
        same(found, wanted, 1e-5)
    rolled(4)
