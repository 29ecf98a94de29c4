"""What compiling costs, and whether gradients are right: measured on a model whose answers are known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from laconic import compiling
from laconic.cli.main import run
from laconic.compiling import Timed, cost, layers, spawn
from laconic.ir.errors import UsageError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(5))
        self.branches = nn.ModuleList([nn.Linear(8, 8), nn.Tanh()])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    torch.compiler.reset()


def call(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(torch.linspace(-1, 1, 24).reshape(3, 8))
    return found


def test_layers_are_the_elements_of_lists_of_one_class() -> None:
    model = Deep()
    assert layers(model) == list(model.blocks)
    nested = nn.ModuleList([nn.Sequential(nn.ModuleList([nn.Tanh(), nn.Tanh()])), nn.Sequential(nn.Tanh())])
    assert layers(nn.Sequential(nested)) == list(nested)
    with pytest.raises(UsageError, match="no list of layers"):
        layers(nn.Linear(2, 2))


def test_the_cost_of_our_backend() -> None:
    found = cost(Deep(), call, "compiled", training=True)
    assert found["gradients_right"]
    assert found["gradient_error"] < 1e-5
    assert found["output_error"] < 1e-5
    assert 0 < found["backend_cpu_seconds"] < found["cpu_seconds"]
    assert found["stats"]["rolled"] == 1


def test_a_wrong_gradient_is_found_and_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def way(module: Any) -> Any:
        module.blocks[3].up.weight.register_hook(lambda gradient: gradient * 1.5)
        return module, Timed(lambda graph, examples: graph)

    monkeypatch.setitem(compiling.WAYS, "wrong", way)
    found = cost(Deep(), call, "wrong", training=True)
    assert not found["gradients_right"]
    assert found["gradient_error_at"] == "blocks.3.up.weight"
    assert found["gradient_error"] == pytest.approx(0.5)


def test_what_a_process_said_when_it_failed() -> None:
    with pytest.raises(RuntimeError, match="no such thing"):
        spawn([sys.executable, "-c", "raise SystemExit('no such thing')"])
    assert spawn([sys.executable, "-c", "print('noise'); print('{\"a\": 1}')"]) == {"a": 1}


@pytest.mark.slow
def test_bench_tells_which_gradients_are_right(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    source = Path(__file__).read_text()
    classes = source[source.index("class Block") : source.index("@pytest.fixture")]
    (tmp_path / "deep.py").write_text(
        f"import torch\nfrom torch import nn\n\n{classes}\ndef model():\n    return Deep(), (torch.randn(3, 8),)\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    ways = "compiled,inductor,regional,nested-region"
    line = ["bench", "deep:model", "--against", ways, "--repeats", "6", "--threads", "1", "-q"]
    assert run([*line, "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert set(found["ratio"]) == set(found["compile"]) == set(ways.split(","))
    right = {way: row["training"]["gradients_right"] for way, row in found["compile"].items()}
    assert right | {"nested-region": None} == dict.fromkeys(["compiled", "inductor", "regional"], True) | {
        "nested-region": None
    }
    for row in found["compile"].values():
        assert row["inference"]["output_error"] < 1e-5
        assert row["inference"]["cpu_seconds"] > 0
