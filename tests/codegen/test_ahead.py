"""Calls that only a first block makes: moved in front of it where nobody can tell, else left where they are."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import nn

from cut_eager import EagerPieces
from helpers import bits

COUNT, WIDTH = 5, 4
Shared = Callable[["Layers", torch.Tensor, torch.Tensor], torch.Tensor]


class Layers(nn.Module):
    """Layers that are given a bias, which the first of them makes halfway through."""

    def __init__(self, shared: Shared) -> None:
        super().__init__()
        self.shared = shared
        self.query = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(COUNT))
        self.out = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(COUNT))
        self.table = nn.Parameter(torch.randn(3, WIDTH))
        self.register_buffer("count", torch.zeros(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.sin()
        bias = None
        for query, out in zip(self.query, self.out, strict=True):
            q = query(torch.tanh(x))
            if bias is None:
                bias = self.shared(self, x, q)
            x = x + out(torch.softmax(q + bias, -1))
        return x


def of_table(model: Layers, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return model.table[torch.arange(3).flip(0)].cos()


def of_input(model: Layers, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return x.cos().exp()


def of_block(model: Layers, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return q.cos().exp()


def drawn(model: Layers, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    return torch.dropout(model.table, 0.5, True).cos()


def counting(model: Layers, x: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    model.count.add_(1)
    return model.table + model.count


def outcome(call: Callable[..., torch.Tensor], model: nn.Module, grad: bool) -> object:
    torch.manual_seed(1)
    x = torch.randn(3, WIDTH, requires_grad=True)
    with torch.set_grad_enabled(grad):
        y = call(x)
    gradients = torch.autograd.grad(y.square().sum(), [x, *model.parameters()], allow_unused=True) if grad else ()
    return bits([y, *gradients, *model.buffers(), torch.get_rng_state()])


def first_block_is_one(shared: Shared, grad: bool) -> bool:
    """Whether the first layer is among the repeats. The cut graph's bits are eager's in any case."""
    torch.manual_seed(0)
    model = Layers(shared)
    other, pieces = copy.deepcopy(model), EagerPieces()
    torch._dynamo.reset()
    found = outcome(torch.compile(model, backend=pieces, fullgraph=True), model, grad)
    assert found == outcome(other, other, grad)
    (cut,) = pieces.cuts
    counts = {(repeat.count, repeat.period) for repeat in cut.repeats}
    assert counts in ({(COUNT, 6)}, {(COUNT - 1, 6)})
    return (COUNT, 6) in counts


@pytest.mark.parametrize("grad", [False, True])
def test_what_all_blocks_share_is_made_in_front_of_the_first(grad: bool) -> None:
    assert first_block_is_one(of_table, grad)


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("shared", [of_block, drawn, counting])
def test_what_reads_the_block_or_writes_or_draws_stays(shared: Shared, grad: bool) -> None:
    assert not first_block_is_one(shared, grad)


def test_the_order_in_which_gradients_are_added_up_stays() -> None:
    """Moved, the bias would be the first to read `x`, and the last to give it a gradient."""
    assert first_block_is_one(of_input, False)
    assert not first_block_is_one(of_input, True)
