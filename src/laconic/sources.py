"""MODEL, as people name it: `zoo:NAME`, a Hugging Face folder, a .onnx, a .pt2, a saved DIR, a numbered dump, or
`package.module:callable`."""

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
from torch.export import Dim

from laconic.artefact import LEDGER, RECIPE, folder_of, load_program
from laconic.ir.capture import capture_module
from laconic.ir.errors import FixedAxisError, LaconicError, UnsupportedError, UsageError
from laconic.ir.hf import load_folder
from laconic.ir.hf_entries import with_entries
from laconic.ir.past import TEXT
from laconic.ir.program import Program
from laconic.ir.pt2 import read_pt2
from laconic.ir.source_model import Source
from laconic.ir.store import PROGRAM, read_program
from laconic.ir.types import TensorType, type_of

FORMS = "zoo:NAME, a Hugging Face folder, a .onnx, a .pt2, a saved DIR, a dump, or package.module:callable"

Progress = Callable[[str], None]


def resolve(model: str, *, allow_unverified: bool = False, progress: Progress = lambda stage: None) -> Source | Program:
    """What MODEL names: something to capture, or a Program that was saved or exported.

    Raises UsageError for an unknown form or name, and what reading it raises.
    """
    if model.startswith("zoo:"):
        from laconic.models import zoo

        return zoo.load(model.removeprefix("zoo:"))
    path = Path(model)
    if path.is_dir():
        return _from_folder(path, allow_unverified)
    if path.is_file():
        return _from_file(path, progress)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", model):
        return _from_callable(model)
    siblings = [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, siblings, n=2)
    hint = f"did you mean {' or '.join(close)}? " if close else ""
    raise UsageError(f"there is no model {model!r}", hint=f"{hint}MODEL is one of: {FORMS}")


def _from_folder(path: Path, allow_unverified: bool) -> Source | Program:
    """A saved DIR, by its recipe (or ledger, should the recipe be missing); a dump, which has neither; else Hugging
    Face's."""
    if (path / RECIPE).exists() or (path / LEDGER).exists():
        return load_program(path, allow_unverified=allow_unverified)
    return read_program(path) if (path / PROGRAM).exists() else load_folder(path)


def _from_file(path: Path, progress: Progress) -> Source | Program:
    if path.suffix == ".pt2":
        return read_pt2(path, progress)
    if path.suffix == ".onnx":
        from laconic.ir.onnx import read_onnx  # brings onnx with it

        return read_onnx(path)
    if path.suffix in (".bin", ".pkl", ".pt", ".pth", ".ckpt"):
        raise UnsupportedError(
            f"{path} is not read",
            why="such files are pickles, and reading one runs the code in it",
            hint=f"MODEL is one of: {FORMS}",
        )
    raise UsageError(f"{path} is a file of a kind that is not read", hint=f"MODEL is one of: {FORMS}")


def capture_source(source: Source, progress: Progress = lambda stage: None) -> Program:
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
    if fixed:
        program.facts["specialized"] = fixed
    return program


def free_axes(program: Program, dynamic_shapes: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The part of `dynamic_shapes` (by argument name, one tensor an argument) that `program` left dynamic, within the
    bounds that it found, and the axes that it fixed, in words."""
    kept: dict[str, Any] = {}
    fixed: list[str] = []
    kinds = {n.meta["name"]: type_of(n.meta["val"]) for n in program.forward.input_nodes()}
    for name, axes in dynamic_shapes.items():
        kind = kinds.get(name)
        if not isinstance(axes, dict) or not isinstance(kind, TensorType):
            kept[name] = axes
            continue
        kept[name] = {axis: dim for axis, dim in axes.items() if not isinstance(kind.shape[axis], int)}
        fixed += [f"{name} axis {axis} = {kind.shape[axis]}" for axis in axes if axis not in kept[name]]
    return _bounded(kept, kinds, program), fixed


def _bounded(shapes: dict[str, Any], kinds: dict[str, Any], program: Program) -> dict[str, Any]:
    """The same axes, those of one name within the bounds of all of them."""
    named = [
        (dim, program.symbols[size.name])
        for name, axes in shapes.items()
        for axis, dim in (axes.items() if isinstance(axes, dict) else ())
        if isinstance(dim, Dim) and (size := kinds[name].shape[axis]).is_Symbol
    ]

    def bounded(dim: Any) -> Any:
        found = [symbol for other, symbol in named if isinstance(dim, Dim) and other.__name__ == dim.__name__]
        highs = [high for high in (dim.max, *(s.high for s in found)) if isinstance(high, int)] if found else []
        lows = [low for low in (dim.min, *(s.low for s in found)) if low is not None and low > 2] if found else []
        return Dim(dim.__name__, min=max(lows, default=dim.min), max=min(highs, default=None)) if found else dim

    return {
        name: {axis: bounded(dim) for axis, dim in axes.items()} if isinstance(axes, dict) else axes
        for name, axes in shapes.items()
    }


def program_of(
    model: str,
    progress: Progress = lambda stage: None,
    *,
    cache: tuple[int, int] | None = None,
    towers: bool = False,
) -> Program:
    """The Program that MODEL names, captured if need be."""
    return opened(model, progress, cache=cache, towers=towers)[0]


def opened(
    model: str,
    progress: Progress = lambda stage: None,
    *,
    cache: tuple[int, int] | None = None,
    towers: bool = False,
) -> tuple[Program, Path | None]:
    """The Program that MODEL names, and the folder where its tokenizer may stand; a saved DIR remembers it. `cache` and
    `towers` are those of `laconic.capture`.

    Raises UsageError for either beside a Program that was captured already.
    """
    found = resolve(model, progress=progress)
    if isinstance(found, Program):
        if cache is not None or (towers and TEXT not in found.entries):
            raise UsageError(
                f"{model} is captured already", hint="give a cache, or towers, where the model itself is captured"
            )
        return found, folder_of(model)
    program = capture_source(found, progress)
    if cache is not None or towers:
        progress("tracing more entries")
    return with_entries(found.module, program, cache=cache, towers=towers), found.folder


def call_named(said: str) -> Any:
    """What `package.module:callable` returns. Raises UsageError, at the user's own line, for what goes wrong there."""
    name, _, attribute = said.partition(":")
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
    if isinstance(function, nn.Module) or not callable(function):
        raise UsageError(f"{said} is a {type(function).__name__}", hint="name a function")
    try:
        return function()
    except LaconicError:
        raise
    except Exception as problem:
        frame = traceback.extract_tb(problem.__traceback__)[-1]
        raise UsageError(
            f"{said} raised {type(problem).__name__}: {problem}",
            where=f"{frame.filename}:{frame.lineno}: {frame.line}",
        ) from problem


def _from_callable(model: str) -> Source:
    """`package.module:callable` returns (module, inputs) or (module, inputs, dynamic_shapes); inputs are a tuple or a
    dict of keyword arguments."""
    made = call_named(model)
    shaped = isinstance(made, tuple) and len(made) in (2, 3) and isinstance(made[0], nn.Module)
    if not shaped or not isinstance(made[1], (tuple, dict)):
        parts = ", ".join(type(part).__name__ for part in made) if isinstance(made, tuple) else ""
        raise UsageError(
            f"{model} must return (module, inputs) or (module, inputs, dynamic_shapes)",
            why=f"it returned {f'({parts})' if parts else f'a {type(made).__name__}'}; inputs are a tuple of "
            "positional or a dict of keyword arguments",
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
