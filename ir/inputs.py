"""Inputs for checks: drawn at several sizes of every dynamic axis, from the ranges seen at capture.

Each number is drawn uniformly between the least and the greatest value of the example. A binary integer input is drawn
as ones followed by zeros along its last axis, never all zeros: what a padding mask looks like.
"""

from __future__ import annotations

from dataclasses import dataclass

import sympy
import torch

from laconic.ir.program import Entry, Input, Program
from laconic.ir.types import TensorType, type_of


@dataclass(frozen=True)
class Case:
    """Flat inputs of an entry and the sizes they have, by display name. `given`: the user's own, not drawn."""

    inputs: list[torch.Tensor]
    sizes: dict[str, int]
    given: bool = False

    def clone(self) -> list[torch.Tensor]:
        return [t.clone() for t in self.inputs]

    def __str__(self) -> str:
        sizes = ", ".join(f"{k}={v}" for k, v in self.sizes.items()) or "fixed sizes"
        return f"{'given' if self.given else 'drawn'} inputs ({sizes})"


def observed(name: str, example: torch.Tensor) -> Input:
    """An input with the range of its example; what is not finite does not count."""
    values = example.detach()
    if values.is_complex():
        values = torch.view_as_real(values)
    values = values[torch.isfinite(values)] if values.is_floating_point() else values
    if not values.numel():
        return Input(name, 0.0 if example.is_floating_point() else 0, 1.0 if example.is_floating_point() else 1)
    return Input(name, values.min().item(), values.max().item())


def draw(program: Program, entry: Entry, sizes: dict[str, int], seed: int) -> Case:
    """Inputs with the given sizes (by display name; the example's where not given)."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {s.name: sizes.get(s.name, s.hint) for s in program.symbols.values()}
    values = {sympy.Symbol(key, positive=True, integer=True): chosen[s.name] for key, s in program.symbols.items()}
    by_name = {symbol.name: number for symbol, number in values.items()}
    inputs = []
    for declared, node in zip(entry.inputs, entry.input_nodes(), strict=True):
        kind = type_of(node.meta["val"])
        assert isinstance(kind, TensorType)
        shape = [_size(s, by_name) for s in kind.shape]
        tensor = _values(declared, kind.dtype, shape, generator).to(kind.device)
        if not kind.contiguous:
            strided = torch.empty_strided(
                shape, [_size(s, by_name) for s in kind.stride], dtype=kind.dtype, device=kind.device
            )
            tensor = strided.copy_(tensor)
        inputs.append(tensor)
    return Case(inputs, chosen)


def _size(size: int | sympy.Expr, values: dict[str, int]) -> int:
    if isinstance(size, int):
        return size
    return int(size.xreplace({s: sympy.Integer(values[s.name]) for s in size.free_symbols}))


def _values(declared: Input, dtype: torch.dtype, shape: list[int], generator: torch.Generator) -> torch.Tensor:
    low, high = declared.low, declared.high
    if dtype.is_floating_point or dtype.is_complex:
        real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
        drawn = torch.rand([*shape, 2] if dtype.is_complex else shape, generator=generator, dtype=real)
        drawn = drawn * (high - low) + low
        return (torch.view_as_complex(drawn) if dtype.is_complex else drawn).to(dtype)
    if (low, high) == (0, 1) and shape and 0 not in shape:
        kept = torch.randint(1, shape[-1] + 1, [*shape[:-1], 1], generator=generator)
        return (torch.arange(shape[-1]) < kept).to(dtype)
    return torch.randint(int(low), int(high) + 1, shape, generator=generator).to(dtype)


def size_choices(program: Program, count: int) -> list[dict[str, int]]:
    """`count` different choices of all dynamic sizes: the smallest, then sizes around the example's, within range."""
    choices: list[dict[str, int]] = []
    for k in range(count):
        choice = {}
        for position, symbol in enumerate(program.symbols.values()):
            steps = [
                symbol.low,
                symbol.hint + 1 + position,
                symbol.hint,
                2 * symbol.hint + 1 + position,
                5,
                8,
            ]
            size = max(1, symbol.low, steps[k % len(steps)] + k // len(steps))
            choice[symbol.name] = size if symbol.high is None else min(size, symbol.high)
        if choice not in choices:
            choices.append(choice)
    return choices


def cases(program: Program, entry: Entry, count: int = 3, seed: int = 0) -> list[Case]:
    """The captured examples and `count` drawn cases, at different sizes where sizes are free."""
    found = [Case(list(example), _sizes_of(program, entry, example), given=True) for example in program.examples]
    choices = size_choices(program, count) or [{}]
    for k in range(count):
        found.append(draw(program, entry, choices[k % len(choices)], seed + k))
    return found


def _sizes_of(program: Program, entry: Entry, example: tuple[torch.Tensor, ...]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for node, tensor in zip(entry.input_nodes(), example, strict=True):
        kind = type_of(node.meta["val"])
        assert isinstance(kind, TensorType)
        for size, actual in zip(kind.shape, tensor.shape, strict=True):
            if isinstance(size, sympy.Symbol):
                sizes[program.symbols[size.name].name] = actual
    return sizes
