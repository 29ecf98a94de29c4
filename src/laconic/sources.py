"""MODEL, as people name it: `zoo:NAME`, a Hugging Face folder, a saved DIR, or `package.module:callable`."""

from __future__ import annotations

import difflib
import importlib
import re
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from laconic.artefact import RECIPE, load_program
from laconic.ir.capture import capture_module
from laconic.ir.errors import FixedAxisError, LaconicError, UnsupportedError, UsageError
from laconic.ir.hf import load_folder
from laconic.ir.program import Program
from laconic.ir.source_model import Source
from laconic.ir.types import TensorType, type_of

FORMS = "zoo:NAME, a Hugging Face folder, a saved DIR, or package.module:callable"


def resolve(model: str, *, allow_unverified: bool = False) -> Source | Program:
    """What MODEL names: something to capture, or a Program that was saved.

    Raises UsageError for an unknown form or name, and what reading it raises.
    """
    if model.startswith("zoo:"):
        from laconic.models import zoo

        return zoo.load(model.removeprefix("zoo:"))
    path = Path(model)
    if path.is_dir():
        if (path / RECIPE).exists() or (path / "program.txt").exists():
            return load_program(path, allow_unverified=allow_unverified)
        return load_folder(path)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", model):
        return _from_callable(model)
    if path.is_file():
        raise UsageError(f"{model} is a file of a kind that is not read", hint=f"MODEL is one of: {FORMS}")
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=2)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UsageError(f"there is no model {model!r}", hint=f"{hint}MODEL is one of: {FORMS}")


def capture_source(source: Source, progress: Callable[[str], None] = lambda stage: None) -> Program:
    """Capture a source. An axis that the model fixes is given up, and named in the facts, rather than the model; the
    other axes keep the identity that their names give them."""

    def attempt(dynamic_shapes: Any) -> Program:
        return capture_module(source.module, source.args, source.kwargs, dynamic_shapes, progress=progress)

    try:
        return attempt(source.dynamic_shapes)
    except FixedAxisError:
        if source.dynamic_shapes is None:
            raise
    progress("tracing again, since the model fixes an axis")
    free = attempt(source.with_auto_dims().dynamic_shapes)
    kept, fixed = free_axes(free, source.dynamic_shapes)
    try:
        program = attempt(kept)
    except UnsupportedError:
        return free
    program.facts["specialized"] = fixed
    return program


def free_axes(program: Program, dynamic_shapes: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The part of `dynamic_shapes` (by argument name, one tensor an argument) that `program` left dynamic, and the
    axes that it fixed, in words."""
    kept, fixed = {}, []
    kinds = {n.meta["name"]: type_of(n.meta["val"]) for n in program.forward.input_nodes()}
    for name, axes in dynamic_shapes.items():
        kind = kinds.get(name)
        if not isinstance(axes, dict) or not isinstance(kind, TensorType):
            kept[name] = axes
            continue
        kept[name] = {axis: dim for axis, dim in axes.items() if not isinstance(kind.shape[axis], int)}
        fixed += [f"{name} axis {axis} = {kind.shape[axis]}" for axis in axes if axis not in kept[name]]
    return kept, fixed


def program_of(model: str, progress: Callable[[str], None] = lambda stage: None) -> Program:
    """The Program that MODEL names, captured if need be."""
    found = resolve(model)
    return found if isinstance(found, Program) else capture_source(found, progress)


def _from_callable(model: str) -> Source:
    """`package.module:callable` returns (module, inputs) or (module, inputs, dynamic_shapes); inputs are a tuple or a
    dict of keyword arguments."""
    name, _, attribute = model.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # the user's own folder, as `python -m` has it
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as problem:
        if not problem.name or not f"{name}.".startswith(f"{problem.name}."):
            raise _import_error(name, problem) from problem
        raise UsageError(f"there is no module {problem.name!r}", hint=f"MODEL is one of: {FORMS}") from problem
    except LaconicError:
        raise
    except Exception as problem:
        raise _import_error(name, problem) from problem
    function: Any = module
    for part in attribute.split("."):
        if not hasattr(function, part):
            close = difflib.get_close_matches(part, dir(function), n=1)
            hint = f"did you mean {name}:{close[0]}?" if close else ""
            raise UsageError(f"{name} has no {attribute!r}", hint=hint)
        function = getattr(function, part)
    try:
        made = function()
    except LaconicError:
        raise
    except Exception as problem:
        frame = traceback.extract_tb(problem.__traceback__)[-1]
        raise UsageError(
            f"{model} raised {type(problem).__name__}: {problem}",
            where=f"{frame.filename}:{frame.lineno}: {frame.line}",
        ) from problem
    shaped = isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module)
    if not shaped or not isinstance(made[1], (tuple, dict)):
        raise UsageError(
            f"{model} must return (module, inputs) or (module, inputs, dynamic_shapes)",
            why="inputs are a tuple of positional or a dict of keyword arguments",
        )
    args, kwargs = (made[1], {}) if isinstance(made[1], tuple) else ((), made[1])
    return Source(made[0], args, kwargs, made[2] if len(made) == 3 else None, name=model)


def _import_error(name: str, problem: Exception) -> UsageError:
    """What stops the user's module from being imported, at its own line."""
    if isinstance(problem, SyntaxError) and problem.filename:
        where, said = f"{problem.filename}:{problem.lineno}: {(problem.text or '').strip()}", problem.msg
    else:
        frames = [f for f in traceback.extract_tb(problem.__traceback__) if not f.filename.startswith("<frozen")]
        where, said = f"{frames[-1].filename}:{frames[-1].lineno}: {frames[-1].line}", str(problem)
    return UsageError(f"{name} cannot be imported: {type(problem).__name__}: {said}", where=where)
