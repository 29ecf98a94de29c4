"""Capture: from an `nn.Module` and example inputs to a Program, checked against the module on several inputs.

`torch.export` traces, the empty decomposition table makes the graph functional and keeps `linear`,
`scaled_dot_product_attention`, norms and `index_copy` whole. What follows is ours: one row a tensor however many names
it has, plain trees for arguments and results, sites, canonical form, types recomputed in a shape environment of our
own.
"""

from __future__ import annotations

import inspect
import logging
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn
from torch.export import ExportedProgram

from laconic.ir.capture_build import build
from laconic.ir.capture_check import Call, ModuleState, compare_with_module
from laconic.ir.errors import FixedAxisError, LaconicError, ModelError, UnsupportedError, UsageError
from laconic.ir.memory import pieces
from laconic.ir.program import Program
from laconic.ir.silence import torch_silenced
from laconic.ir.source import user_source
from laconic.ir.torch_private import dead_draws_kept, exported_module
from laconic.ir.types import DTYPE_NAMES
from laconic.ir.verify import verify

log = logging.getLogger(__name__)

#: Modules of torch that have a native fast path in eval mode.
_FAST = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


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
    module, states are copied; the module is left as it was: modes, Python attributes, buffers and the values of plain
    tensor attributes are put back, also if capture fails. With `check` the Program must give the module's bits on the
    examples and at other sizes of every dynamic axis.

    Attention of `torch.nn` is captured as its Python code computes it, which is what it is compared with: eager takes
    one native kernel instead ("fast path"), which rounds differently and, given a padding mask, puts zeros at padded
    places. `facts["fastpath"]` is "off" for such a model, and a warning says so.

    Raises UnsupportedError with the user's source line if the model cannot be captured (FixedAxisError if it fixes an
    axis that is to be dynamic), ModelError if a parameter is not finite, VerificationError if the captured Program is
    not the module.
    """
    _refuse_wrong_call(module, args, kwargs)
    _refuse_tensors(module, args, kwargs)
    _refuse_nonfinite(module)
    args, kwargs = _unshared(args, kwargs)
    with inference(module) as state:
        progress("tracing")
        exported = _export(module, args, kwargs, dynamic_shapes)
        progress("building the program")
        program = build(module, exported, args, kwargs, dynamic_shapes)
        if any(isinstance(m, _FAST) for m in module.modules()):
            program.facts["fastpath"] = "off"
            log.warning("captured without torch's native attention, whose values differ where a mask pads")
        progress("verifying types")
        verify(program)
        if check:
            progress("comparing with the module")
            state.restore()
            compare_with_module(program, module, Call.of(args, kwargs), state)
    return program


def capture_exported(
    exported: ExportedProgram,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    dynamic_shapes: Any = None,
    *,
    progress: Callable[[str], None] = lambda stage: None,
) -> Program:
    """The Program that an ExportedProgram, of whatever dialect, says, with these example inputs; it must give the bits
    of `exported.module()`. `dynamic_shapes` names the axes that are dynamic in it, as for `capture_module`.

    Weights are shared with `exported`. Raises what `capture_module` raises.
    """
    with _unsupported("the exported program cannot be made a module"):
        module = exported_module(exported)
    _refuse_tensors(module, args, kwargs)
    _refuse_nonfinite(module)
    with inference(module) as state:
        progress("building the program")
        with _unsupported("the exported program cannot be made functional"), torch_silenced(), dead_draws_kept():
            functional = exported.run_decompositions({})
        program = build(module, functional, args, kwargs, dynamic_shapes)
        progress("verifying types")
        verify(program)
        progress("comparing with the exported program")
        with _unsupported("the exported program does not run on inputs drawn for it"):
            compare_with_module(program, module, Call.of(args, kwargs), state)
    return program


@contextmanager
def _unsupported(what: str) -> Iterator[None]:
    """Say of an exported program what failed: torch's own passes, and its ops' checks, raise errors of any type."""
    try:
        yield
    except LaconicError:
        raise
    except Exception as problem:
        raise UnsupportedError(
            what,
            where=_culprit(problem),
            why=_first_lines(problem),
            hint="it is damaged, or wants values of a certain kind: capture the module itself, with example inputs",
        ) from problem


@contextmanager
def inference(module: nn.Module) -> Iterator[ModuleState]:
    """Eval mode without gradients and native attention. The module, each submodule's mode included, and the CPU's
    random generator are put back afterwards."""
    training = [m for m in module.modules() if m.training]
    fast = torch.backends.mha.get_fastpath_enabled()
    module.eval()
    state = ModuleState(module)
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            yield state
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        state.restore()
        for m in training:
            m.training = True


def _unshared(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same call with a tensor of its own at each place: torch takes one tensor at two places for one input."""
    flat, spec = pytree.tree_flatten((tuple(args), kwargs))
    seen: set[int] = set()
    for k, value in enumerate(flat):
        if isinstance(value, torch.Tensor):
            if id(value) in seen:
                flat[k] = value.clone()
            seen.add(id(value))
    args, kwargs = pytree.tree_unflatten(flat, spec)
    return args, kwargs


def _refuse_wrong_call(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Arguments that forward does not take are the caller's slip, unless a hook changes them first."""
    if module._forward_pre_hooks:
        return
    try:
        inspect.signature(module.forward).bind(*args, **kwargs)
    except TypeError as problem:
        raise UsageError(
            f"{type(module).__name__}.forward is not called like this: {problem}",
            why=f"forward{inspect.signature(module.forward)}",
        ) from problem


def _refuse_tensors(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Layouts and dtypes that a Program has no type for."""
    named = [(f"the weight {name!r}", tensor) for name, tensor in module.state_dict(keep_vars=True).items()]
    named += [(f"the buffer {name!r}", buffer) for name, buffer in module.named_buffers()]
    named += [("an example input", value) for value in pytree.tree_leaves((tuple(args), kwargs))]
    for what, tensor in named:
        if nn.parameter.is_lazy(tensor):
            why, hint = "has no shape yet", "run the model once before it is captured"
        elif not isinstance(tensor, torch.Tensor):
            continue
        elif tensor.layout is not torch.strided:
            why, hint = f"has the layout {tensor.layout}", "make it dense, with to_dense()"
        elif tensor.dtype not in DTYPE_NAMES:
            why, hint = f"has the dtype {tensor.dtype}", "known dtypes: " + ", ".join(DTYPE_NAMES.values())
        else:
            continue
        raise UnsupportedError(f"{type(module).__name__} cannot be captured", why=f"{what} {why}", hint=hint)


def _refuse_nonfinite(module: nn.Module) -> None:
    bad = []
    for name, parameter in module.named_parameters():
        count = _count(parameter, lambda values: ~torch.isfinite(values))
        bad += [f"{name}: {count} of {parameter.numel()} values"] if count else []
    for name, buffer in module.named_buffers():
        count = _count(buffer, torch.isnan)
        bad += [f"{name}: {count} of {buffer.numel()} values are NaN"] if count else []
    if bad:
        shown = "\n".join(bad[:8]) + (f"\nand {len(bad) - 8} more" if len(bad) > 8 else "")
        raise ModelError(
            f"{len(bad)} weights are not finite",
            why=shown,
            hint="repair the checkpoint: nothing that is computed from these values can be compared",
        )


def _count(tensor: torch.Tensor, fails: Callable[[torch.Tensor], torch.Tensor]) -> int:
    """How many values of a floating or complex tensor fail a test; 0 for any other. Needs little memory."""
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 0
    narrow = tensor.is_floating_point() and tensor.element_size() < 4  # 8-bit floats have no tests or sums
    count = 0
    for part in pieces(tensor):
        wide = part.float() if narrow else part
        if not torch.isfinite(wide.sum()):  # else every value is finite
            count += int(fails(wide).sum())
    return count


def _export(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic_shapes: Any) -> ExportedProgram:
    try:
        with torch_silenced(), dead_draws_kept():
            exported = torch.export.export(module, args, kwargs, dynamic_shapes=dynamic_shapes, strict=False)
            functional: ExportedProgram = exported.run_decompositions({})
        return functional
    except LaconicError:
        raise
    except Exception as problem:
        kind = FixedAxisError if _fixes_an_axis(problem) else UnsupportedError
        raise kind(
            f"{type(module).__name__} cannot be captured",
            where=_culprit(problem),
            why=_first_lines(problem),
            hint=_advice(module, problem, args, kwargs),
        ) from problem


def _fixes_an_axis(problem: Exception) -> bool:
    """Whether torch refuses an axis that the model, or the example's size of 0 or 1, does not leave free."""
    kind = getattr(getattr(problem, "error_type", None), "name", "")
    said = f"{type(problem).__name__} {problem}"
    signs = ("ConstraintViolation", "Constraints violated", "conflicts between user-specified ranges and inferred")
    return kind == "CONSTRAINT_VIOLATION" or any(sign in said for sign in signs)


def _first_lines(problem: Exception) -> str:
    """What torch says: at most three lines, and with them what it suggests, six in all."""
    lines = [line.strip() for line in str(problem).strip().splitlines() if line.strip()]
    if not lines:
        return type(problem).__name__
    start = next((k for k, line in enumerate(lines) if line.startswith("Suggested fixes")), len(lines))
    suggested = [line for line in lines[start:] if not line.startswith("The error above")]
    shown = list(dict.fromkeys(lines[:start]))[:3] + suggested
    return f"{type(problem).__name__}: " + "\n".join(line[:300] for line in shown[:6])


def _advice(module: nn.Module, problem: Exception, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str:
    if _fixes_an_axis(problem):
        given = [v for v in pytree.tree_leaves((tuple(args), kwargs)) if isinstance(v, torch.Tensor)]
        if any(size <= 1 for tensor in given for size in tensor.shape):
            return (
                "torch takes a size of 0 or 1 for a fixed one: give examples of size 2 or more on dynamic axes; else "
                "fix the axis that torch names, or leave it out of dynamic_shapes"
            )
        return "take what torch suggests, fix the axis that it names, or leave it out of dynamic_shapes"
    if "dynamic_shapes" in str(problem):
        return "dynamic_shapes goes by argument name: {'x': {0: torch.export.Dim('batch')}}, None for what is no tensor"
    shared = _shared_names(module)
    if isinstance(problem, AssertionError) and shared:
        return "these names share storage, and torch cannot trace one being written: " + ", ".join(shared[:4])
    if "DataDependent" in type(problem).__name__:
        return "rewrite that line without control flow or sizes that depend on tensor values"
    if "Cache" in str(problem) and "use_cache" in inspect.signature(module.forward).parameters:
        return "call it with use_cache=False; capture(..., cache=(batch, length)) has caches as states"
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
