"""Capture: from an `nn.Module` and example inputs to a Program, checked against the module on several inputs.

`torch.export` traces, the empty decomposition table makes the graph functional and keeps `linear`,
`scaled_dot_product_attention`, norms and `index_copy` whole. What follows is ours: one row a tensor however many names
it has, plain trees for arguments and results, sites, canonical form, types recomputed in a shape environment of our
own.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from laconic.ir.capture_build import build
from laconic.ir.capture_check import compare_with_module
from laconic.ir.errors import LaconicError, ModelError, UnsupportedError
from laconic.ir.program import Program
from laconic.ir.silence import torch_silenced
from laconic.ir.source import user_source
from laconic.ir.torch_private import dead_draws_kept
from laconic.ir.verify import verify


def capture_module(
    module: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any = None,
    *,
    check: bool = True,
    progress: Callable[[str], None] = lambda stage: None,
) -> Program:
    """Capture `module` in eval mode without gradients, as called with these example inputs.

    `dynamic_shapes` is torch.export's: by argument name, None for what is no tensor. Weights are shared with the
    module, states are copied; the module is left as it was. With `check` the Program must give the module's bits on the
    examples and at other sizes of every dynamic axis.

    Raises UnsupportedError with the user's source line if the model cannot be captured, ModelError if a parameter is
    not finite, VerificationError if the captured Program is not the module.
    """
    _refuse_nonfinite(module)
    with _inference(module):
        progress("tracing")
        exported = _export(module, args, kwargs, dynamic_shapes)
        progress("building the program")
        program = build(module, exported, args, kwargs, dynamic_shapes)
        progress("verifying types")
        verify(program)
        if check:
            progress("comparing with the module")
            with torch.random.fork_rng(devices=[]):
                compare_with_module(program, module)
    return program


@contextmanager
def _inference(module: nn.Module) -> Iterator[None]:
    """Eval mode without gradients, each submodule's own mode restored afterwards."""
    training = [m for m in module.modules() if m.training]
    module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for m in training:
            m.training = True


def _refuse_nonfinite(module: nn.Module) -> None:
    bad = []
    for name, parameter in module.named_parameters():
        if parameter.is_floating_point() and not bool(torch.isfinite(parameter).all()):
            count = int((~torch.isfinite(parameter)).sum())
            bad.append(f"{name}: {count} of {parameter.numel()} values")
    for name, buffer in module.named_buffers():
        if buffer.is_floating_point() and bool(buffer.isnan().any()):
            bad.append(f"{name}: {int(buffer.isnan().sum())} of {buffer.numel()} values are NaN")
    if bad:
        shown = "\n".join(bad[:8]) + (f"\nand {len(bad) - 8} more" if len(bad) > 8 else "")
        raise ModelError(
            f"{len(bad)} weights are not finite",
            why=shown,
            hint="repair the checkpoint: nothing that is computed from these values can be compared",
        )


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    try:
        with torch_silenced(), dead_draws_kept():
            exported = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            functional: ExportedProgram = exported.run_decompositions({})
        return functional
    except LaconicError:
        raise
    except Exception as problem:
        raise UnsupportedError(
            f"{type(module).__name__} cannot be captured",
            where=_culprit(problem),
            why=_first_lines(problem),
            hint=_advice(module, problem),
        ) from problem


def _first_lines(problem: Exception) -> str:
    lines = [line.strip() for line in str(problem).strip().splitlines() if line.strip()]
    return f"{type(problem).__name__}: " + "\n".join(lines[:3]) if lines else type(problem).__name__


def _advice(module: nn.Module, problem: Exception) -> str:
    said = f"{type(problem).__name__} {problem}"
    if "ConstraintViolation" in said or "Constraints violated" in said:
        return "fix the axis that torch names, or leave it out of dynamic_shapes"
    if "dynamic_shapes" in str(problem):
        return "dynamic_shapes goes by argument name: {'x': {0: torch.export.Dim('batch')}}, None for what is no tensor"
    shared = _shared_names(module)
    if isinstance(problem, AssertionError) and shared:
        return "these names share storage, and torch cannot trace one being written: " + ", ".join(shared[:4])
    if "DataDependent" in type(problem).__name__:
        return "rewrite that line without control flow or sizes that depend on tensor values"
    return "see that the model runs in eval mode on these inputs; what torch cannot trace must be rewritten"


def _culprit(problem: BaseException) -> str:
    """The user's line: the innermost frame that is not torch's or ours, in a `forward` if possible."""
    ours = Path(__file__).resolve().parent
    frames = [f for f in traceback.extract_tb(problem.__traceback__) if user_source(f.filename)]
    frames = [f for f in frames if Path(f.filename).resolve().parent != ours]
    inside = [f for f in frames if f.name == "forward"] or frames
    return f"{inside[-1].filename}:{inside[-1].lineno}: {inside[-1].line}" if inside else ""


def _shared_names(module: nn.Module) -> list[str]:
    seen: dict[int, str] = {}
    shared = []
    for name, buffer in module.named_buffers(remove_duplicate=False):
        if buffer.numel():
            first = seen.setdefault(buffer.untyped_storage().data_ptr(), name)
            if first != name:
                shared.append(f"{first} and {name}")
    return shared
