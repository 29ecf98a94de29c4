"""Muon: momentum whose matrices are made orthogonal before each step, scaled by shape as in Jordan et al. 2024,
"Muon: An optimizer for hidden layers in neural networks"; weights decay as in Liu et al. 2025 (arXiv:2502.16982).

torch's own takes matrices only, one at a time; here a stack of experts is as many matrices, and matrices of one shape
are made orthogonal together, in a few batched products.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

_QUINTIC = (3.4445, -4.7750, 2.0315)


def orthogonalized(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: singular values go to about 1 by a Newton-Schulz iteration.

    `matrices` (n, rows, cols); computed in bfloat16.
    """
    a, b, c = _QUINTIC
    x = matrices.bfloat16()
    tall = x.shape[1] > x.shape[2]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    turned: torch.Tensor = x.mT if tall else x
    return turned.to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """For weights of two axes (rows, cols), or of three: (n, rows, cols) are n matrices.

    `momentum` may be changed between steps, in the groups, as `lr` may.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.05
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            by_shape: dict[tuple[int, ...], list[nn.Parameter]] = {}
            for weight in group["params"]:
                if weight.grad is not None:
                    by_shape.setdefault(tuple(weight.shape[-2:]), []).append(weight)
            for (rows, cols), weights in by_shape.items():
                moved = [self._momentum(weight, group["momentum"]).reshape(-1, rows, cols) for weight in weights]
                straight = orthogonalized(torch.cat(moved))
                rate = group["lr"] * max(1.0, rows / cols) ** 0.5
                for weight, step in zip(weights, torch.split(straight, [len(m) for m in moved]), strict=True):
                    weight.mul_(1 - group["lr"] * group["weight_decay"])
                    weight.add_(step.reshape(weight.shape), alpha=-rate)

    def _momentum(self, weight: nn.Parameter, momentum: float) -> torch.Tensor:
        """Nesterov's: the gradient and the running mean of gradients, this one included."""
        assert weight.grad is not None
        mean = self.state[weight].setdefault("mean", torch.zeros_like(weight))
        mean.lerp_(weight.grad, 1 - momentum)
        return weight.grad.lerp(mean, momentum)
