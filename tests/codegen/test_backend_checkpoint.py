"""Activation checkpointing and marked regions in training under the backend."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from compiled import WIDTH, Block, Stack, check, compiled, drawn, made, rolled

_costly_calls: list[int] = []


@torch.library.custom_op("laconic_test::costly", mutates_args=())
def costly(x: torch.Tensor) -> torch.Tensor:
    _costly_calls.append(1)
    return x.sin()


@costly.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


costly.register_autograd(
    lambda ctx, g: g * ctx.saved_tensors[0].cos(),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(inputs[0]),
)


def save_what_is_costly(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    costly_op = torch.ops.laconic_test.costly.default
    return CheckpointPolicy.MUST_SAVE if op == costly_op else CheckpointPolicy.PREFER_RECOMPUTE


CONTEXTS = partial(create_selective_checkpoint_contexts, save_what_is_costly)


class Costly(Block):
    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.ops.laconic_test.costly(self.up(self.norm(x))).exp())


class Selective(Stack):
    def __init__(self) -> None:
        super().__init__(Costly)

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False, context_fn=CONTEXTS)
        return self.head(x)


@pytest.mark.slow
def test_a_checkpoint_saves_what_its_policy_says() -> None:
    model = made(Selective)
    call = compiled(model)
    call(drawn()).sum().backward()
    _costly_calls.clear()
    call(drawn()).sum().backward()
    assert len(_costly_calls) == 5
    rolled(4)


class Checkpointed(Stack):
    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return self.head(x)


def test_activation_checkpointing() -> None:
    check(made(Checkpointed), drawn(grad=True))


@torch.compiler.nested_compile_region
def region(block: nn.Module, x: torch.Tensor) -> Any:
    return block(x)


class Region(nn.Module):
    """A region that the user marked to be compiled once, in a block of more."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.scale = Block(), nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(region(self.inner, x * self.scale)) + x


def test_regions_that_the_user_marked() -> None:
    check(made(lambda: Stack(Region)), drawn(grad=True))
