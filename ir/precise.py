"""The reference for everything that holds within a tolerance: an entry evaluated in float64, and the rule itself.

The rule, for each tensor of floating numbers: its greatest error against the float64 reference is at most
max(2 x the original's, 4 eps max|y|), eps that of the tensor's dtype and y the reference. Other tensors must be equal.

Passes and other runtimes are held to it with the original's error taken from all cases together (`pooled`), since they
sum in other orders: where an output has a handful of values, the original's error on one case is a single draw, at
times a lucky one, and says little of what rounding does there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isfinite
from typing import Any

import torch
from torch import fx, nn

from laconic.ir.errors import UnsupportedError, VerificationError
from laconic.ir.metrics.differences import bit_equal, max_abs
from laconic.ir.program import Entry, Kind, Program, copy_graph
from laconic.ir.run import Outcome, outcome
from laconic.ir.traits import traits

aten = torch.ops.aten

#: Reads the bits of its operand, so the operand must have the dtype that it had.
_READS_BITS = (aten.view.dtype,)
#: How far from float64 a result may be: this many times the original's error, or this many eps of the greatest value.
FACTOR, FLOOR = 2.0, 4.0


@dataclass(frozen=True)
class Deviation:
    """How a result compares: its greatest difference from the original's, both errors against float64, what is allowed.

    `scale` is the greatest finite |y| of the reference. For tensors of integers and booleans all is 0, or `found` is
    infinite.
    """

    name: str
    max_abs: float
    found: float
    original: float
    allowed: float
    scale: float = 0.0

    @property
    def ok(self) -> bool:
        return self.found <= self.allowed


def deviation(
    name: str, original: Any, found: Any, reference: Any, *, factor: float = FACTOR, floor: float = FLOOR
) -> Deviation:
    """Hold `found` to the rule, given the original result and the float64 reference.

    Infinities and NaNs must stand in the same places. Raises VerificationError if dtypes or shapes differ.
    """
    if not isinstance(original, torch.Tensor) or not isinstance(found, torch.Tensor):
        wrong = 0.0 if bit_equal(original, found) else float("inf")
        return Deviation(name, wrong, wrong, 0.0, 0.0)
    if original.dtype != found.dtype or original.shape != found.shape:
        raise VerificationError(
            f"{name} is {found.dtype} {list(found.shape)}, expected {original.dtype} {list(original.shape)}"
        )
    difference = max_abs(original, found)
    if not (original.is_floating_point() or original.is_complex()):
        wrong = 0.0 if bit_equal(original, found) else float("inf")
        return Deviation(name, difference, wrong, 0.0, 0.0)
    magnitude = reference.abs()
    magnitude = magnitude[torch.isfinite(magnitude)]
    greatest = float(magnitude.max()) if magnitude.numel() else 0.0
    base = max_abs(original, reference)
    allowed = max(factor * base, floor * torch.finfo(original.dtype).eps * greatest)
    return Deviation(name, difference, max_abs(found, reference), base, allowed, greatest)


def pooled(rows: Sequence[Deviation], *, factor: float = FACTOR) -> list[Deviation]:
    """The rows of one output on several cases, each with the original's error as all cases together tell it.

    That error is the greatest of any case relative to max|y|, times this case's max|y|, yet never above the greatest
    absolute error of any case: a case whose values cancel to almost nothing has a huge relative error and must not
    loosen the others. No row is allowed less than before, and none more than `factor` times an error that the original
    has shown itself. Infinite errors tell nothing of rounding and are left out.
    """
    known = [row for row in rows if isfinite(row.original)]
    relative = max((row.original / row.scale for row in known if row.scale), default=0.0)
    absolute = max((row.original for row in known), default=0.0)
    return [replace(row, allowed=max(row.allowed, factor * min(relative * row.scale, absolute))) for row in rows]


def evaluate_precise(program: Program, entry: Entry, inputs: list[torch.Tensor]) -> Outcome:
    """Run an entry with every floating value in float64 and every complex one in complex128.

    Weights and inputs are widened where they are used, so that only one wide copy at a time is held. Integers and
    booleans stay what they are. Raises UnsupportedError if the entry draws random numbers: there is no reference then.
    """
    drawn = [node for node in entry.calls() if traits(node).random]
    if drawn:
        raise UnsupportedError(
            "a program that draws random numbers has no float64 reference",
            where="\n".join(program.describe(node) for node in drawn[:4]),
        )
    graph = copy_graph(entry.graph)
    position = {declared.name: k for k, declared in enumerate(entry.inputs)}
    operands = []
    for node in entry.placeholders():
        name = node.meta["name"]
        operands.append(inputs[position[name]] if node.meta["kind"] == Kind.INPUT else program.weights[name].value)
    with torch.no_grad():
        outputs = _Wide(fx.GraphModule(nn.Module(), graph)).run(*operands)
    return outcome(entry, tuple(widen(value) for value in outputs))


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for floating dtypes, complex128 for complex ones, else the same."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def widen(value: Any) -> Any:
    """A value with all its tensors, or a dtype, in double precision."""
    if isinstance(value, torch.Tensor):
        return value.detach().to(wide_dtype(value.dtype))
    if isinstance(value, torch.dtype):
        return wide_dtype(value)
    if isinstance(value, (list, tuple)):
        return type(value)(widen(v) for v in value)
    return value


class _Wide(fx.Interpreter):
    """Runs a graph in double precision."""

    def run_node(self, n: fx.Node) -> Any:
        if n.op != "call_function" or not isinstance(n.target, torch._ops.OpOverload):
            return super().run_node(n)
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        if n.target in _READS_BITS:
            source = n.args[0]
            assert isinstance(source, fx.Node)
            return widen(n.target(args[0].to(source.meta["val"].dtype), *args[1:], **kwargs))
        args = tuple(widen(a) for a in args)
        kwargs = {k: widen(v) for k, v in kwargs.items()}
        wanted = _default_dtype(n)
        if wanted is not None:
            kwargs["dtype"] = wanted
        return widen(n.target(*args, **kwargs))


def _default_dtype(node: fx.Node) -> torch.dtype | None:
    """The dtype to ask for where a call makes a tensor out of numbers alone and would take torch's default, float32."""
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor) or not (value.is_floating_point() or value.is_complex()):
        return None
    if any(isinstance(n.meta.get("val"), torch.Tensor) for n in node.all_input_nodes):
        return None
    assert isinstance(node.target, torch._ops.OpOverload)
    named = {argument.name for argument in node.target._schema.arguments}
    return wide_dtype(value.dtype) if "dtype" in named and node.kwargs.get("dtype") is None else None
