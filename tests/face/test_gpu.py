"""On a GPU: the exact preset keeps every bit there too."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import laconic
from laconic.ir.metrics.differences import bit_equal

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


def test_exact_preset_keeps_every_bit() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 8)).cuda().eval()
    shapes = ({0: torch.export.Dim("batch")},)
    result = laconic.optimize(module, inputs=(torch.randn(3, 32, device="cuda"),), dynamic_shapes=shapes)
    for batch in (1, 4, 9):
        x = torch.randn(batch, 32, device="cuda")
        with torch.no_grad():
            assert bit_equal(result.model(x), module(x))
