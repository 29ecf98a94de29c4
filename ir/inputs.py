"""Inputs for checks: drawn at several sizes of every dynamic axis, from the ranges seen at capture.

Each number is drawn uniformly between the least and the greatest value of the example. A binary integer input is drawn
as ones followed by zeros along its last axis, never all zeros: what a padding mask looks like. Whole numbers stay in
their range, since they may be indices; floating ones are also drawn once from a wider range, on both sides of zero,
where a `relu` shows that did nothing to the example.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import sympy
import torch

from laconic.ir.errors import UsageError, did_you_mean
from laconic.ir.program import Entry, Input, Program
from laconic.ir.torch_private import free_symbols
from laconic.ir.types import TensorType, type_of

log = logging.getLogger(__name__)

#: How many inputs are drawn, beside the usual ones and with a seed of their own, to judge once more what seems to break
#: a tolerance.
DRAWN_AGAIN = 16
_SEED_AGAIN = 1_000
_LEAST, _GREATEST = -(2**63), 2**63 - 1


@dataclass(frozen=True)
class Case:
    """Flat inputs of an entry and the sizes they have, by display name. `given`: the user's own, not drawn; `wide`:
    drawn from beyond the range that the example has."""

    inputs: list[torch.Tensor]
    sizes: dict[str, int]
    given: bool = False
    wide: bool = False
    entry: str = "forward"

    def clone(self) -> list[torch.Tensor]:
        return [t.clone() for t in self.inputs]

    def __str__(self) -> str:
        sizes = ", ".join(f"{k}={v}" for k, v in self.sizes.items()) or "fixed sizes"
        whose = "" if self.entry == "forward" else f" of {self.entry}"
        return f"{'given' if self.given else 'widely drawn' if self.wide else 'drawn'} inputs{whose} ({sizes})"


def observed(name: str, example: torch.Tensor) -> Input:
    """An input with the range of its example; what is not finite does not count."""
    values = example.detach()
    if values.is_complex():
        values = torch.view_as_real(values.resolve_conj())
    if values.is_floating_point():
        values = values.float() if values.element_size() == 1 else values
        values = values[torch.isfinite(values)]
    offset = 0
    if values.dtype in (torch.uint16, torch.uint32):  # torch has no least and greatest of these
        values = values.to(torch.int64)
    elif values.dtype is torch.uint64:
        values, offset = values.contiguous().view(torch.int64) ^ _LEAST, -_LEAST
    if not values.numel():
        inexact = example.is_floating_point() or example.is_complex()
        return Input(name, 0.0 if inexact else 0, 1.0 if inexact else 1)
    low, high = values.min().item(), values.max().item()
    return Input(name, low + offset, high + offset) if offset else Input(name, low, high)


def check_sizes(program: Program, sizes: Mapping[str, int]) -> None:
    """Raise UsageError for the name of no dynamic size, and for a size that is out of its range."""
    symbols = {symbol.name: symbol for symbol in program.symbols.values()}
    for name, size in sizes.items():
        if name not in symbols:
            hint = did_you_mean(name, symbols) or "all its axes are fixed"
            raise UsageError(f"the model has no dynamic size {name!r}", hint=hint)
        low, high = symbols[name].low, symbols[name].high
        if size < low or (high is not None and size > high):
            raise UsageError(
                f"{name}={size} is out of range", why=f"{name} is in [{low}, {'inf' if high is None else high}]"
            )


def draw(program: Program, entry: Entry, sizes: dict[str, int], seed: int, *, wide: bool = False) -> Case:
    """Inputs with the given sizes (by display name; the example's where not given). With `wide`, floating ones reach
    beyond the example's range, to both sides of zero, and hold some zeros of either sign."""
    generator = torch.Generator().manual_seed(seed)
    chosen = {s.name: sizes.get(s.name, s.hint) for s in program.symbols.values()}
    values = {sympy.Symbol(key, positive=True, integer=True): chosen[s.name] for key, s in program.symbols.items()}
    by_name = {symbol.name: number for symbol, number in values.items()}
    inputs = []
    for declared, node in zip(entry.inputs, entry.input_nodes(), strict=True):
        kind = type_of(node.meta["val"])
        assert isinstance(kind, TensorType)
        shape = [_size(s, by_name) for s in kind.shape]
        tensor = draw_values(declared, kind.dtype, shape, generator, wide).to(kind.device)
        if not kind.contiguous:
            strided = torch.empty_strided(
                shape, [_size(s, by_name) for s in kind.stride], dtype=kind.dtype, device=kind.device
            )
            tensor = strided.copy_(tensor)
        inputs.append(tensor)
    seen = {s.name for node in entry.input_nodes() for s in free_symbols(node.meta["val"])}
    own = {s.name: chosen[s.name] for key, s in program.symbols.items() if key in seen or entry.name == "forward"}
    return Case(inputs, own, wide=wide, entry=entry.name)


def _size(size: int | sympy.Expr, values: dict[str, int]) -> int:
    if isinstance(size, int):
        return size
    return int(size.xreplace({s: sympy.Integer(values[s.name]) for s in size.free_symbols}))


def draw_values(
    declared: Input, dtype: torch.dtype, shape: list[int], generator: torch.Generator, wide: bool = False
) -> torch.Tensor:
    """A contiguous tensor drawn from an input's range, or from beyond it if `wide`."""
    low, high = declared.low, declared.high
    if dtype.is_floating_point or dtype.is_complex:
        return _floats(low, high, dtype, shape, generator, wide)
    if (low, high) == (0, 1) and shape and 0 not in shape:
        kept = torch.randint(1, shape[-1] + 1, [*shape[:-1], 1], generator=generator)
        return (torch.arange(shape[-1]) < kept).to(dtype)
    if int(high) < _GREATEST:
        return torch.randint(int(low), int(high) + 1, shape, generator=generator).to(dtype)
    drawn = torch.empty(shape, dtype=torch.int64)
    if dtype is not torch.uint64:
        return drawn.random_(int(low), None, generator=generator).to(dtype)
    if high - low >= _GREATEST:
        return drawn.random_(_LEAST, None, generator=generator).view(dtype)
    drawn.random_(0, int(high - low) + 1, generator=generator)
    start = int(low)  # added as two's complement
    return (drawn + (start if start <= _GREATEST else start - 2**64)).view(dtype)


def _floats(
    low: float, high: float, dtype: torch.dtype, shape: list[int], generator: torch.Generator, wide: bool
) -> torch.Tensor:
    real = torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32
    drawn = torch.rand([*shape, 2] if dtype.is_complex else shape, generator=generator, dtype=real)
    part = drawn
    if wide:
        high = min(2 * max(abs(low), abs(high), 1.0), torch.finfo(dtype).max)
        low = -high
    span = high - low
    drawn = drawn * span + low if span <= torch.finfo(real).max else drawn * high + (1 - drawn) * low
    if wide:
        drawn = torch.where(part < 1 / 16, 0.0, torch.where(part > 15 / 16, -0.0, drawn))
    return (torch.view_as_complex(drawn) if dtype.is_complex else drawn).to(dtype)


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
    """The captured examples, `count` drawn cases, at different sizes where sizes are free, and, if there are floating
    inputs, one that is drawn from a wider range."""
    examples = program.examples if entry.name == "forward" else []
    found = [Case(list(example), _sizes_of(program, entry, example), given=True) for example in examples]
    choices = size_choices(program, count) or [{}]
    for k in range(count):
        found.append(draw(program, entry, choices[k % len(choices)], seed + k))
    if any(node.meta["val"].is_floating_point() or node.meta["val"].is_complex() for node in entry.input_nodes()):
        found.append(draw(program, entry, {}, seed + count, wide=True))
    return found


def cases_beside(program: Program, count: int = 3) -> list[Case]:
    """Drawn cases of all entries but `forward`, in the order in which states pass from one to the next."""
    return [
        case for name, entry in program.entries.items() if name != "forward" for case in cases(program, entry, count)
    ]


def cases_again(program: Program, usual: Sequence[Case]) -> list[Case]:
    """What to judge once more, and for good, where the `usual` cases show more than a tolerance allows: these, the
    failing ones among them, and DRAWN_AGAIN more of each entry that has some."""
    log.info("beyond what is allowed on the usual inputs; judged on %d more", DRAWN_AGAIN)
    entries = [program.entries[name] for name in dict.fromkeys(case.entry for case in usual)]
    drawn = [case for entry in entries for case in cases(program, entry, DRAWN_AGAIN, seed=_SEED_AGAIN)]
    return [*usual, *(case for case in drawn if not case.given)]


def _sizes_of(program: Program, entry: Entry, example: tuple[torch.Tensor, ...]) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for node, tensor in zip(entry.input_nodes(), example, strict=True):
        kind = type_of(node.meta["val"])
        assert isinstance(kind, TensorType)
        for size, actual in zip(kind.shape, tensor.shape, strict=True):
            if isinstance(size, sympy.Symbol):
                sizes[program.symbols[size.name].name] = actual
    return sizes
