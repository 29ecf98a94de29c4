"""A tiny model that says several things twice, as MODEL `examples.twice:model`: what the documentation runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.export import Dim


class Twice(nn.Module):
    """Two equal layers on one input, a multiplication by one, and a layer that is never called."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.spare = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 4)
        self.second.load_state_dict(self.first.state_dict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.first(x)) * 1 + torch.tanh(self.second(x))


def model() -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    """The module, an example call, and the axes that are dynamic."""
    return Twice(), {"x": torch.linspace(-1, 1, 12).reshape(3, 4)}, {"x": {0: Dim("batch")}}
