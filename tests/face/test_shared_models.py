"""Models that share their weights already: each is recognised, stored once through every export, and outlined."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import laconic
from architectures import albert
from laconic.ir.depth import Depth
from laconic.ir.outline import outline
from laconic.ir.program import Program

WIDTH, DEPTH = 64, 6


class Block(nn.Module):
    def __init__(self, norm: nn.Module | None = None) -> None:
        super().__init__()
        self.norm = norm or nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 128), nn.Linear(128, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return out


class Loop(nn.Module):
    """One block, gone through again and again, as recursive models do."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(DEPTH):
            x = x + self.block(x)
        return x


class Wide(nn.Module):
    """Matrices shared, norms each block's own."""

    def __init__(self) -> None:
        super().__init__()
        first = Block()
        self.blocks = nn.ModuleList([first, *(Block() for _ in range(DEPTH - 1))])
        for block in self.blocks[1:]:
            block.up, block.down = first.up, first.down  # type: ignore[union-attr]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return x


class Every(nn.Module):
    """Subnets that share at equal distances: blocks 0, 2, 4 are one, 1, 3, 5 another."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = nn.ModuleList([Block(), Block()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k in range(DEPTH):
            x = x + self.pair[k % 2](x)
        return x


MODELS: dict[str, Callable[[], tuple[nn.Module, dict[str, Any]]]] = {
    "albert": lambda: albert(DEPTH, WIDTH)[:2],
    **{kind.__name__.lower(): lambda kind=kind: (kind(), {"x": torch.randn(3, WIDTH)}) for kind in (Loop, Wide, Every)},
}


@pytest.fixture(scope="module", params=["loop", "wide", "every", "albert"])
def subject(request: pytest.FixtureRequest) -> tuple[str, nn.Module, dict[str, Any], Program]:
    torch.manual_seed(0)
    module, inputs = MODELS[request.param]()
    return request.param, module.eval(), inputs, laconic.capture(module.eval(), **inputs)


def test_blocks_are_found_and_said_once(subject: tuple[str, nn.Module, dict[str, Any], Program]) -> None:
    _, module, _, program = subject
    assert program.weight_bytes() <= sum(t.nbytes for t in [*module.parameters(), *module.buffers()])
    assert len(Depth(program).blocks) == DEPTH
    outlined = outline(program)
    (called,) = outlined.functions
    calls = [n for n in outlined.forward.graph.nodes if n.op == "call_module" and n.target == called]
    assert len(calls) == DEPTH


def test_every_export_holds_a_weight_once(
    subject: tuple[str, nn.Module, dict[str, Any], Program], tmp_path: Path
) -> None:
    name, module, inputs, program = subject
    held = sum(w.value.nbytes for w in program.weights.values() if w.kind == "parameter")
    result = laconic.optimize(program, "exact")
    result.save(tmp_path / "dir", formats=("onnx", "pt2"))
    assert os.path.getsize(tmp_path / "dir" / "weights.safetensors") < 1.2 * held + 4096
    laconic.export_onnx(program, tmp_path / "f.onnx", functions=True)
    for file in ("dir/model.onnx", "f.onnx"):
        assert os.path.getsize(tmp_path / file) < 1.2 * held + 40_000
    block = 4 * (2 * WIDTH * 128)
    assert DEPTH * block > 1.2 * held + 40_000 or name == "every", "or the bound would say nothing"
    again = laconic.load(tmp_path / "dir")
    with torch.no_grad():
        wanted = module(**inputs)
    found = again(**inputs)
    if name == "albert":
        wanted, found = wanted.last_hidden_state, found["last_hidden_state"]
    assert torch.equal(found, wanted)


def test_there_is_nothing_left_to_share(subject: tuple[str, nn.Module, dict[str, Any], Program]) -> None:
    from laconic.passes.share_layers import ShareLayers

    _, _, _, program = subject
    assert (
        ShareLayers(method="fixed", keep=0.5).plan(program).reason
        == "these blocks have no floating-point matrices of their own"
    )
