"""The Python interface: capture, optimize, save, load, export."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from laconic import artefact, sources
from laconic.cache import cache_folder
from laconic.codegen.onnx import OnnxReport, write_onnx
from laconic.codegen.onnx.entries import write_past, write_towers
from laconic.codegen.pt2 import write_pt2
from laconic.data.load import load_data
from laconic.figures import Judge
from laconic.ir.calibration import Calibration
from laconic.ir.capture import capture_module
from laconic.ir.data import Data
from laconic.ir.errors import UsageError
from laconic.ir.hf_entries import with_entries
from laconic.ir.inputs import Case, cases
from laconic.ir.metrics.registry import load as load_metric
from laconic.ir.program import Program
from laconic.ir.run import check_inputs, flatten_arguments
from laconic.ir.types import type_of
from laconic.model import Compiled, Model
from laconic.passes.base import Pass, Plan
from laconic.passes.ledger import Ledger
from laconic.passes.manager import Contents, Instrument, PassManager, no_metrics
from laconic.passes.pipeline import parse_pipeline

Inputs = tuple[Any, ...] | dict[str, Any]


@dataclass(frozen=True)
class Result:
    """What `optimize` returns: the program, the ledger (`report`) and the plans; `model` runs it."""

    program: Program
    report: Ledger
    plans: list[Plan] = field(default_factory=list)
    contents: Contents = field(default_factory=Contents, repr=False)

    @cached_property
    def model(self) -> Model:
        """The optimised program as a callable module, with the captured model's arguments."""
        return Model(self.program)

    def save(
        self,
        path: str | Path,
        *,
        formats: Sequence[str] = (),
        force: bool = False,
        progress: Callable[[str], None] = lambda stage: None,
    ) -> Path:
        """Write a DIR that `laconic.load` reads: verified after writing, placed whole, never over another without
        `force`. `formats` adds exports beside it: "hf", "onnx", "pt2".

        Raises VerificationError if a weight was written into since the passes ran: what was verified is no more.
        """
        self.contents.hold(self.program)
        return artefact.save(
            self.program, self.report, self.plans, path, formats=formats, force=force, progress=progress
        )


def capture(
    model: nn.Module | str | Path,
    *args: Any,
    dynamic_shapes: Any = None,
    cache: tuple[int, int] | None = None,
    towers: bool = False,
    **kwargs: Any,
) -> Program:
    """Capture a model as called with these example inputs, in eval mode without gradients.

    `model` is a module, or what the command line calls MODEL (then no inputs are given). `dynamic_shapes` is
    torch.export's, by argument name: `{"x": {0: torch.export.Dim("batch")}}`, None for what is no tensor. The model is
    left as it was; weights are shared, states copied.

    With `cache`, sequences and tokens, a model of transformers that continues text can generate: it gets entries for a
    prompt (or source) and for one token more, with caches of that size; `forward` then has `use_cache=False`, unless
    you say otherwise. With `towers`, a model that sees and reads gets the entries `vision` and `text` for its two
    sides.

    Raises UnsupportedError with the user's source line if the model cannot be captured.
    """
    if isinstance(model, nn.Module):
        if (cache is not None or towers) and "use_cache" in inspect.signature(model.forward).parameters:
            kwargs.setdefault("use_cache", False)  # what `forward` itself would return
            dynamic_shapes = dynamic_shapes and {"use_cache": None, **dynamic_shapes}
        return with_entries(model, capture_module(model, args, kwargs, dynamic_shapes), cache=cache, towers=towers)
    if args or kwargs or dynamic_shapes is not None:
        raise UsageError(f"{model} brings its own example inputs", hint="capture(path) takes no others")
    return sources.program_of(str(model), cache=cache, towers=towers)


def optimize(
    model: nn.Module | Program | str | Path,
    pipeline: str | Sequence[Pass | str] = "exact",
    *,
    inputs: Inputs | Sequence[Inputs] | None = None,
    dynamic_shapes: Any = None,
    verify_each: bool = True,
    check: bool = True,
    instruments: Sequence[Instrument] = (),
    data: Data | str | Path | None = None,
    metric: str | Sequence[str] = "kl",
    calibration: Data | str | Path | None = None,
    cache: tuple[int, int] | None = None,
    towers: bool = False,
    seed: int = 0,
) -> Result:
    """Run a pipeline on a model and prove at each step what it cost. Never changes `model`.

    `inputs` are example inputs, a tuple of positional or a dict of keyword arguments, or a list of several; a module
    needs at least one, and contracts are checked on all of them beside drawn ones. `verify_each` and `check` switch the
    verifier and the contract checks off; the result then counts as unverified.

    `pipeline` is a text such as "dedup,cse", or a sequence of passes and such texts.

    `cache` and `towers` are those of `capture`: with a cache, the result can `generate`.

    With `data` (`laconic.ir.data.Data`, or what the command line calls DATA) the ledger tells each `metric` after each
    pass. `calibration` is what passes decide on: data that overlaps it is refused. `seed` is that of all that is drawn
    at random, for checks and for decisions: with the same one a pass decides alike.

    Raises VerificationError naming the pass that broke a rule or its contract, UsageError for an unknown pass and for
    inputs that do not fit the captured model.
    """
    passes = _passes(pipeline)
    given = _several(inputs)
    if isinstance(model, nn.Module):
        if not given:
            raise UsageError("a module needs example inputs", hint="optimize(model, inputs=(x,)) or inputs={'name': x}")
        args, kwargs = (given[0], {}) if isinstance(given[0], tuple) else ((), given[0])
        program = capture(model, *args, dynamic_shapes=dynamic_shapes, cache=cache, towers=towers, **kwargs)
        folder, given = None, given[1:]
    elif isinstance(model, Program):
        if cache is not None or towers:
            raise UsageError("a Program is captured already", hint="give its cache and towers to laconic.capture")
        program, folder = model, None
    else:
        program, folder = sources.opened(str(model), cache=cache, towers=towers)
    chosen = cases(program, program.forward, seed=seed) + [_case(program, g) for g in given]
    decided = None if calibration is None else _data(calibration, program, folder, "calibration")
    judge: Callable[[Program], Mapping[str, float]] = no_metrics
    if data is not None:
        judged = _data(data, program, folder, "selection")
        names = [metric] if isinstance(metric, str) else metric
        judge = Judge(program, judged, [load_metric(name) for name in names], calibration=decided)
    own = None if decided is None else Calibration(decided, seed, cache_folder() / "calibration")
    run = PassManager(passes, verify_each, check, instruments, judge=judge, calibration=own).run(program, chosen)
    return Result(run.program, run.ledger, run.plans, run.contents)


def load(
    path: str | Path,
    *,
    allow_unverified: bool = False,
    compile: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Model:
    """The model of a saved DIR as a callable, which generates if it was captured with a cache; its `program` is the
    Program. Nothing of the DIR is unpickled.

    It computes in eager, to the bits of the optimised model; with `compile`, by Inductor's kernels, which round
    otherwise: each distinct block is compiled once, or found in Inductor's cache on disk. `options` are then
    `{"strict": True}`, by which a failure is raised that otherwise is logged and computed in eager, and
    `{"inductor": {...}}`, settings of Inductor.

    Raises ModelError if a file is missing or damaged, VerificationError if the DIR is marked unverified, UsageError for
    options that there are not.
    """
    if compile:
        from laconic.codegen.backend.programs import load_options

        chosen = load_options(options)
        return Compiled(*artefact.load_outlined(path, allow_unverified=allow_unverified), chosen)
    if options is not None:
        raise UsageError("options say how to compile", hint="load(path, compile=True, options={...})")
    return Model(artefact.load_program(path, allow_unverified=allow_unverified))


def export_onnx(
    program: Program,
    path: str | Path,
    *,
    opset: int | None = None,
    functions: bool = False,
    with_past: bool = False,
    towers: bool = False,
    force: bool = False,
) -> OnnxReport:
    """Write an ONNX file with the program's names, dtypes and dynamic axes, checked in ONNX Runtime before it is put in
    place. With `functions`, repeated blocks are written once, as local functions. With `with_past`, of a program that
    was captured with a cache, `F.prefill.onnx` and `F.decode.onnx` are written instead, caches as inputs and outputs;
    with `towers`, `F.vision.onnx` and `F.text.onnx`. The report is then that of the last of them.

    Raises UnsupportedError for what ONNX cannot say, MissingDependencyError without ONNX Runtime.
    """
    if with_past or towers:
        write = write_past if with_past else write_towers
        return list(write(program, Path(path), opset=opset, functions=functions, force=force).values())[-1]
    return write_onnx(program, Path(path), opset=opset, functions=functions, force=force)


def export_pt2(program: Program, path: str | Path, *, force: bool = False) -> None:
    """Write a `.pt2` that torch alone loads and runs, checked bit for bit before it is put in place."""
    write_pt2(program, Path(path), force=force)


def _data(data: Data | str | Path, program: Program, folder: Path | None, split: str) -> Data:
    return load_data(data, program, folder=folder, split=split) if isinstance(data, (str, Path)) else data


def _passes(pipeline: str | Sequence[Pass | str]) -> list[Pass]:
    if isinstance(pipeline, str):
        return parse_pipeline(pipeline)
    if not isinstance(pipeline, Sequence):
        raise UsageError(f"a pipeline is a text or a list of passes, not a {type(pipeline).__name__}")
    found: list[Pass] = []
    for item in pipeline:
        if not isinstance(item, (str, Pass)):
            raise UsageError(f"{item!r} is no pass", hint="give instances such as Dedup(), or names such as 'dedup'")
        found += parse_pipeline(item) if isinstance(item, str) else [item]
    return found


def _several(inputs: Inputs | Sequence[Inputs] | None) -> list[Inputs]:
    if inputs is None:
        return []
    given: list[Any] = list(inputs) if isinstance(inputs, list) else [inputs]
    for one in given:
        if not isinstance(one, (tuple, dict)):
            raise UsageError(
                f"example inputs are a tuple or a dict, not a {type(one).__name__}",
                hint="inputs=(x,) by position, inputs={'name': x} by name, or a list of these",
            )
    return given


def _case(program: Program, given: Inputs) -> Case:
    args, kwargs = (given, {}) if isinstance(given, tuple) else ((), given)
    flat = flatten_arguments(program.forward, args, kwargs)
    check_inputs(program, program.forward, flat, [type_of(n.meta["val"]) for n in program.forward.input_nodes()])
    return Case(flat, {}, given=True)
