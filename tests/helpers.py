"""What several tests need: bitwise comparison of their own, program text with seeded tensors, copies apart."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from laconic.ir.parse import parse_program
from laconic.ir.program import Program
from laconic.ir.types import TensorType
from laconic.ir.verify import verify
from laconic.passes.base import Pass
from laconic.passes.manager import PassManager, Run
from laconic.passes.pipeline import parse_pipeline


def bits(value: Any) -> Any:
    """A result down to its bits: what two equal results agree in, -0.0 and NaN payloads told apart."""
    if isinstance(value, torch.Tensor):
        return (
            value.dtype,
            tuple(value.shape),
            value.detach().clone(memory_format=torch.contiguous_format).numpy().tobytes(),
        )
    if isinstance(value, dict):
        return {key: bits(child) for key, child in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value).__name__, [bits(child) for child in value]
    return type(value).__name__, repr(value)


def tensors_in(value: Any) -> list[torch.Tensor]:
    """The tensors of a nest, left to right."""
    if isinstance(value, torch.Tensor):
        return [value]
    children = value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ()
    return [t for child in children for t in tensors_in(child)]


def apart(program: Program) -> Program:
    """A copy whose weights and states live in memory of their own (shared among each other as before)."""
    values = copy.deepcopy({name: w.value for name, w in program.weights.items()})
    clone = program.clone()
    clone.weights = {name: replace(w, value=values[name]) for name, w in program.weights.items()}
    return clone


def own_values(program: Program) -> Callable[[str, TensorType], torch.Tensor]:
    """A lookup for `parse_program` that gives a program's own tensors."""
    return lambda name, kind: program.weights[name].value


def seeded(**given: torch.Tensor) -> Callable[[str, TensorType], torch.Tensor]:
    """A lookup that gives `given` rows, and for others numbers that differ from name to name."""

    def lookup(name: str, kind: TensorType) -> torch.Tensor:
        if name in given:
            return given[name]
        generator = torch.Generator().manual_seed(sum(ord(c) << (7 * k) for k, c in enumerate(name[:4])))
        shape = [int(n) for n in kind.shape]
        if kind.dtype.is_floating_point:
            return torch.randn(shape, generator=generator, dtype=kind.dtype)
        return torch.randint(0, 2 if kind.dtype == torch.bool else 5, shape, generator=generator).to(kind.dtype)

    return lookup


def parse(text: str, **given: torch.Tensor) -> Program:
    """A program from its text (header and indentation added), verified, with seeded weights."""
    lines = "\n".join(line.strip() for line in text.strip().splitlines())
    program = parse_program(f"laconic program 1\n{lines}\n", seeded(**given), "test")
    verify(program)
    return program


def optimize(program: Program, pipeline: str | list[Pass]) -> Run:
    """Run a pipeline with every check on."""
    return PassManager(parse_pipeline(pipeline) if isinstance(pipeline, str) else pipeline).run(program)


def fires(text: str, pipeline: str, **given: torch.Tensor) -> tuple[Program, Program, str]:
    """Run one pass that must fire: bit-equal, named in the ledger, idempotent. Before, after, and the reason given."""
    program = parse(text, **given)
    run = optimize(program, pipeline)
    row = run.ledger.rows[-1]
    assert row.modified, f"{row.spec} did not fire: {row.reason}"
    assert row.spec == pipeline
    assert row.after.max_abs == 0.0
    again = optimize(run.program, pipeline).ledger.rows[-1]
    assert not again.modified
    assert again.reason
    return program, run.program, row.reason


def stays(text: str, pipeline: str, **given: torch.Tensor) -> str:
    """Run one pass that must not fire, and must say why. The reason."""
    program = parse(text, **given)
    before = str(program)
    run = optimize(program, pipeline)
    row = run.ledger.rows[-1]
    assert not row.modified, f"{row.spec} fired: {row.reason}\n{run.program}"
    assert row.reason
    assert run.program is program
    assert str(program) == before
    return row.reason


def ops(program: Program) -> list[str]:
    """The ops of the entry `forward`, in order, by name."""
    return [str(node.target) for node in program.forward.calls()]


def sampled(values: Iterable[Any], every: int) -> list[Any]:
    """Parameters for a test, of which all but each so manieth run in the slow tier."""
    return [v if not k % every else pytest.param(v, marks=pytest.mark.slow) for k, v in enumerate(values)]


def eager(module: nn.Module, inputs: list[torch.Tensor], seed: int = 7) -> Any:
    """A module's results, states, inputs and RNG state after one call on copies of everything, as bits."""
    mine, given = copy.deepcopy(module), [t.clone() for t in inputs]
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        results = mine(*given)
        drawn = torch.get_rng_state()
    return bits((results, dict(mine.named_buffers()), given, drawn))
