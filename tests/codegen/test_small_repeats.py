"""Which repeats are worth a piece of their own."""

from __future__ import annotations

import torch
from torch import nn

from cut_eager import EagerPieces


class Stacked(nn.Module):
    """`count` blocks of six calls behind three pairs of calls that say the same."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.up = nn.ModuleList(nn.Linear(4, 8) for _ in range(count))
        self.down = nn.ModuleList(nn.Linear(8, 4) for _ in range(count))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(3):
            x = (x * 2).sin()
        for up, down in zip(self.up, self.down, strict=True):
            x = x + down(torch.relu(up(torch.tanh(x))).abs())
        return x


def repeats(model: nn.Module) -> tuple[list[tuple[int, int]], int]:
    pieces = EagerPieces()
    torch._dynamo.reset()
    x = torch.randn(3, 4)
    with torch.no_grad():
        assert torch.equal(torch.compile(model, backend=pieces)(x), model(x))
    (found,) = pieces.cuts
    return [(repeat.count, repeat.period) for repeat in found.repeats], len(found.pieces)


def test_a_repeat_that_saves_next_to_nothing_is_no_piece_of_its_own() -> None:
    found, pieces = repeats(Stacked(20))
    assert found == [(20, 6)]
    assert pieces == 2  # what stands in front, and the block


def test_what_is_little_beside_a_large_graph_may_be_much_of_a_small_one() -> None:
    found, _ = repeats(Stacked(2))
    assert (3, 2) in found
