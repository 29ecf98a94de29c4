"""What tests of the torch.compile backend share: small models, one call of a model with its gradients, and what the
backend says it did."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from helpers import tensors_in
from laconic.codegen import stats

WIDTH = 12


class Block(nn.Module):
    """A residual MLP block."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def branch(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(self.norm(x))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(x)


class Stack(nn.Module):
    """Blocks one behind the other, and a head."""

    def __init__(self, block: Callable[[], nn.Module] = Block, count: int = 5, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(block() for _ in range(count))
        self.head = nn.Linear(width, 4)

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def drawn(*shape: int, seed: int = 1, grad: bool = False, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*(shape or (3, WIDTH)), generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def made(model: Callable[[], nn.Module], seed: int = 0) -> nn.Module:
    """A model with weights of its seed, none of which is a plain zero or one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        found = model()
        with torch.no_grad():
            for weight in found.parameters():
                weight.add_(torch.randn_like(weight) * 0.05)
    return found


def compiled(model: Any, *, fullgraph: bool = False, dynamic: bool | None = None, **options: Any) -> Any:
    """The model under the backend, with which whatever goes another way than asked for is an error."""
    return torch.compile(
        model, backend="laconic", fullgraph=fullgraph, dynamic=dynamic, options={"strict": True, **options}
    )


@dataclass
class Outcome:
    """All that one call of a model, and its backward, leave behind."""

    results: list[torch.Tensor]
    gradients: dict[str, torch.Tensor | None]
    buffers: dict[str, torch.Tensor]
    inputs: list[torch.Tensor]

    def named(self) -> dict[str, torch.Tensor | None]:
        return {
            **{f"result {k}": value for k, value in enumerate(self.results)},
            **{f"gradient of {name}": value for name, value in self.gradients.items()},
            **{f"buffer {name}": value for name, value in self.buffers.items()},
            **{f"input {k}": value for k, value in enumerate(self.inputs)},
        }


def outcome(
    call: Callable[..., Any], model: nn.Module, inputs: Sequence[torch.Tensor], *, grad: bool = True, seed: int = 3
) -> Outcome:
    """Call on copies of the inputs, and go back from all results at once, each with a gradient of its own."""
    given = [t.detach().clone().requires_grad_(t.requires_grad) for t in inputs]
    model.zero_grad()
    with torch.random.fork_rng(devices=[]), torch.set_grad_enabled(grad):
        torch.manual_seed(seed)
        results = tensors_in(call(*given))
        ends = [r for r in results if r.requires_grad]
        if ends:
            torch.autograd.backward(ends, [drawn(*r.shape, seed=k, dtype=r.dtype) for k, r in enumerate(ends)])
    gradients = {name: weight.grad for name, weight in model.named_parameters(remove_duplicate=False)}
    gradients |= {f"input {k}": t.grad for k, t in enumerate(given)}
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    detached = [r.detach() for r in results]
    return Outcome(detached, gradients, buffers, [t.detach() for t in given])


def agree(found: Outcome, wanted: Outcome, tolerance: float = 1e-5) -> None:
    """Each tensor by itself: its form, and its values within a share of its own maximum. A global norm hides one wrong
    layer."""
    mine, other = found.named(), wanted.named()
    assert mine.keys() == other.keys()
    for name, value in other.items():
        same(mine[name], value, tolerance, name)


def same(found: torch.Tensor | None, wanted: torch.Tensor | None, tolerance: float, name: str = "") -> None:
    assert (found is None) == (wanted is None), name
    if found is None or wanted is None:
        return
    assert (found.dtype, found.shape, found.stride()) == (wanted.dtype, wanted.shape, wanted.stride()), name
    if wanted.numel():
        off = (found.double() - wanted.double()).abs().max().item()
        assert off <= tolerance * wanted.double().abs().max().item(), f"{name} is off by {off}"


def check(
    model: nn.Module,
    *inputs: torch.Tensor,
    repeats: int = 4,
    calls: int = 1,
    grad: bool = True,
    tolerance: float = 1e-5,
    wrap: Callable[[nn.Module], Callable[..., Any]] = lambda model: model,
    **how: Any,
) -> dict[str, Any]:
    """Compile a model and hold some calls to eager's; the graph must have been rolled, into one block for at least
    `repeats` of them. What the backend counted. `wrap` says how a model is called, in both."""
    other = copy.deepcopy(model)
    mine, eager = compiled(wrap(model), **how), wrap(other)
    for number in range(calls):
        found = outcome(mine, model, inputs, grad=grad, seed=number)
        agree(found, outcome(eager, other, inputs, grad=grad, seed=number), tolerance)
    return rolled(repeats)


def python(*arguments: str, **environment: str) -> subprocess.Popen[str]:
    """A Python process that finds this folder and the package."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), str(tests.parent / "src")])
    return subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": path, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said(process: subprocess.Popen[str], code: int = 0) -> str:
    """What a process said, once it has ended as it should."""
    text, _ = process.communicate(timeout=600)
    assert process.returncode == code, text
    return text


def rolled(repeats: int, graphs: int = 1) -> dict[str, Any]:
    """What the backend counted; it must have rolled every graph, and each into a block said at least so often."""
    done = stats()
    assert (done["graphs"], done["rolled"]) == (graphs, graphs), done
    assert not done["refused"], done
    assert not done["fallbacks"], done
    for each in done["each"]:
        assert max(count for _, count, _, _ in each["repeats"]) >= repeats, each["repeats"]
        assert each["pieces"] < each["steps"]
        assert not each["unboxed"]
    return done
