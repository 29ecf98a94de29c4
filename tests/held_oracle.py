"""What positions hold, as claimed, beside what is computed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from laconic.ir.axes import analyse
from laconic.ir.axes.held import Holding
from laconic.ir.inputs import cases
from laconic.ir.interpret import Interpreter, Tap
from laconic.ir.program import Program


def planted(program: Program, share: float = 0.3, seed: int = 0) -> Program:
    """The program with zeros at some positions of each axis of each weight, and equal numbers in some biases."""
    generator = torch.Generator().manual_seed(seed)
    for weight in program.weights.values():
        value = weight.value.detach()
        for axis, size in enumerate(value.shape):
            gone = (torch.rand(size, generator=generator) < share).nonzero().flatten()
            value.index_fill_(axis, gone, 0.0 if value.dim() > 1 or len(gone) % 2 else 0.5)
    return program


def claims(program: Program) -> dict[tuple[str, int | None], Any]:
    """What is held along each axis of each call."""
    holding, found = Holding(analyse(program)), {}
    for node in program.forward.calls():
        value = node.meta["val"]
        for axis in (None, *range(value.dim())) if isinstance(value, torch.Tensor) else ():
            held = holding.of(node, axis)
            if held:
                found[node.name, axis] = held
    return found


def computed(program: Program, names: set[str]) -> list[dict[str, torch.Tensor]]:
    """The values of calls on several inputs."""
    found = []
    for case in cases(program, program.forward, 4):
        seen: dict[str, torch.Tensor] = {}
        Interpreter(program, [Tap((name,), keep(name, seen)) for name in sorted(names)], results=False)(case.inputs)
        found.append(seen)
    return found


def keep(name: str, seen: dict[str, torch.Tensor]) -> Callable[[torch.Tensor], None]:
    return lambda value: seen.update({name: value.clone()})


def held_true(program: Program) -> int:
    """Compare every claim with what is computed; how many there were."""
    found = claims(program)
    for values in computed(program, {name for name, _ in found}):
        for (name, axis), held in found.items():
            value = values[name]
            rows = value.reshape(1, -1) if axis is None else value.movedim(axis, 0).reshape(value.shape[axis], -1)
            expected = held.value[:, None].expand_as(rows)[held.known]
            torch.testing.assert_close(rows[held.known], expected, rtol=1e-5, atol=1e-6, msg=f"%{name} along {axis}")
    return len(found)
