"""Latency of a model beside other ways to run it: the original module, ONNX Runtime, and compilers."""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from laconic.codegen.onnx import write_onnx
from laconic.codegen.onnx.runtime import Session
from laconic.compiling import WAYS, costs
from laconic.ir.capture_check import Call
from laconic.ir.errors import UsageError, did_you_mean
from laconic.ir.inputs import Case, check_sizes, draw
from laconic.ir.program import Program
from laconic.ir.run import check_inputs
from laconic.ir.source_model import Source
from laconic.ir.types import type_of
from laconic.latency import WARMUP, Interval, Spread, Way, by_turns, program_way, ratios
from laconic.machine import machine

#: What a model can be run against; the name of the model's own way is "laconic".
AGAINST = ("eager", "onnxruntime", *WAYS)
OWN = "laconic"

#: The least number of turns from which a median has an interval of 95 %.
LEAST_REPEATS = 6


def bench(
    program: Program,
    source: Source | None,
    against: Sequence[str] = (),
    *,
    model: str = "",
    sizes: Mapping[str, int] | None = None,
    seed: int = 0,
    repeats: int = 30,
    warmup: int = WARMUP,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Time `program` and the ways named in `against` by turns, on one input at the example's sizes but for `sizes`.

    Milliseconds are median and quartiles; a ratio is the program's time over the other's in the same turn, its median
    with an interval of 95 %. `source` is where the program was captured from: `eager` is its module, and what compilers
    are given. With `model`, as the command line names it, `compile` tells what each compiler takes to its first result
    and whether its gradients are right.

    Raises UsageError for an unknown way or size, or the module where there is no source; what exporting raises.
    """
    check_ways(against)
    check_module(against, source)
    case = input_at(program, sizes or {}, seed)
    with ExitStack() as stack:
        ways: dict[str, Way] = {OWN: program_way(program)}
        for name in dict.fromkeys(against):
            if name == "eager" and source is not None:
                ways[name] = module_way(source)
            elif name in WAYS and source is not None:
                progress(f"compiling: {name}")
                ways[name] = compiled_way(source, name, case)
            else:
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="laconic-bench-")))
                ways[name] = onnx_way(program, folder, progress)
        progress(f"timing {', '.join(ways)} on {case}")
        times = by_turns(ways, case.clone, repeats, warmup)
    compared = {name: Interval.of(ratios(times, OWN, name)) for name in ways if name != OWN}
    compiling = {}
    for name in (name for name in dict.fromkeys(against) if name in WAYS and model):
        progress(f"compiling in a process of its own: {name}")
        compiling[name] = costs(model, name, torch.get_num_threads())
    return {
        "input": str(case),
        "sizes": case.sizes,
        "repeats": repeats,
        "warmup": warmup,
        "milliseconds": {name: asdict(Spread.of([1e3 * t for t in found])) for name, found in times.items()},
        "ratio": {name: asdict(interval) for name, interval in compared.items()},
        "compile": compiling,
        "machine": machine(),
    }


def check_ways(against: Sequence[str]) -> None:
    """Raise UsageError for an unknown way. For before the slow part."""
    for name in against:
        if name not in AGAINST:
            raise UsageError(f"there is nothing called {name!r} to run against", hint=did_you_mean(name, AGAINST))


def check_module(against: Sequence[str], found: Source | Program | None) -> None:
    """Raise UsageError for a way that needs the module where there is none."""
    if not {"eager", *WAYS}.isdisjoint(against) and not isinstance(found, Source):
        raise UsageError(
            "there is no original module to run against",
            why="the model is a saved program; the module that it was made from is not in it",
            hint="name the module itself: zoo:NAME, a Hugging Face folder, or package.module:callable",
        )


def input_at(program: Program, sizes: Mapping[str, int], seed: int) -> Case:
    """One drawn input. Raises UsageError for a size that the program has not, or that is out of its range."""
    check_sizes(program, sizes)
    case = draw(program, program.forward, dict(sizes), seed)
    check_inputs(
        program, program.forward, case.clone(), [type_of(n.meta["val"]) for n in program.forward.input_nodes()]
    )
    return case


def module_way(source: Source) -> Way:
    """The module that the program was captured from, called as in its example. It is put into eval mode."""
    module, call = source.module.eval(), Call.of(source.args, source.kwargs)
    return lambda inputs: lambda: call(module, inputs)


def compiled_way(source: Source, name: str, case: Case) -> Way:
    """A copy of the module, compiled in one of `laconic.compiling.WAYS`, and called once on `case`."""
    call = Call.of(source.args, source.kwargs)
    with torch.no_grad(), torch._dynamo.config.patch(use_graph_deduplication=False):
        compiled: Any = WAYS[name](copy.deepcopy(source.module).eval())[0]
        call(compiled, case.clone())
    return lambda inputs: lambda: call(compiled, inputs)


def onnx_way(program: Program, folder: Path, progress: Callable[[str], None]) -> Way:
    """The program in ONNX Runtime, exported into `folder` and checked there; as many threads as torch uses."""
    path = folder / "model.onnx"
    write_onnx(program, path, progress=progress)
    session = Session(path, threads=torch.get_num_threads())
    states = {f"state.{name}": weight.value for name, weight in program.weights.items()}
    held = {name: value for name, value in states.items() if name in session.inputs}

    def prepare(inputs: list[torch.Tensor]) -> Callable[[], Any]:
        named = {declared.name: value for declared, value in zip(program.forward.inputs, inputs, strict=True)}
        feeds = session.values({**named, **held})
        return lambda: session.run_values(feeds)

    return prepare
