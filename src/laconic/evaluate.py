"""Measuring programs on drawn inputs: how far apart two are, and how long a call takes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from laconic.ir.errors import UsageError
from laconic.ir.inputs import Case, cases
from laconic.ir.metrics import cosine, max_abs
from laconic.ir.outcomes import run_case
from laconic.ir.program import Program
from laconic.ir.run import Runnable
from laconic.ir.tree import fill
from laconic.ir.types import same_type, type_of


def evaluate_programs(
    program: Program,
    against: Program | None,
    metrics: Sequence[str],
    *,
    seed: int = 0,
    repeats: int = 20,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, Any]:
    """Columns, and a row per input: `max-abs` and `cosine` of all results against the other program; `latency ms`, the
    median of `repeats` calls, the two programs taking turns, and their `ratio` (median of the paired ones).

    Raises UsageError if the two take different inputs or return different results.
    """
    if against is not None:
        _same_interface(program, against)
    columns = [m for m in metrics if m != "latency"]
    if "latency" in metrics:
        columns += ["latency ms"] + (["latency ms against", "ratio"] if against else [])
    rows = []
    for case in cases(program, program.forward, seed=seed):
        progress(f"measuring on {case}")
        row: dict[str, Any] = {"input": str(case)}
        if against is not None:
            row.update(_differences(program, against, case, metrics))
        if "latency" in metrics:
            row.update(_latency(program, against, case, repeats))
        rows.append(row)
    return {"columns": columns, "rows": rows}


def _same_interface(program: Program, against: Program) -> None:
    for ours, theirs in zip(program.forward.input_nodes(), against.forward.input_nodes(), strict=False):
        a, b = type_of(ours.meta["val"]), type_of(theirs.meta["val"])
        if ours.meta["name"] != theirs.meta["name"] or not _like(a, b):
            raise UsageError(f"the models take different inputs: {ours.meta['name']!r} and {theirs.meta['name']!r}")
    if len(program.forward.inputs) != len(against.forward.inputs):
        raise UsageError("the models take different numbers of inputs")
    if [o.name for o in program.forward.outputs] != [o.name for o in against.forward.outputs]:
        raise UsageError("the models return different results")


def _like(a: Any, b: Any) -> bool:
    return bool(a.dtype == b.dtype and len(a.shape) == len(b.shape)) or same_type(a, b)


def _differences(program: Program, against: Program, case: Case, metrics: Sequence[str]) -> dict[str, float]:
    ours, theirs = run_case(program, case).tensors(), run_case(against, case).tensors()
    pairs = [(v, theirs[k]) for k, v in ours.items() if isinstance(v, torch.Tensor)]
    found = {}
    try:
        if "max-abs" in metrics:
            found["max-abs"] = max((max_abs(a, b) for a, b in pairs), default=0.0)
        if "cosine" in metrics:
            found["cosine"] = min((cosine(a, b) for a, b in pairs), default=1.0)
    except ValueError as problem:
        raise UsageError(f"the models' results cannot be compared: {problem}") from problem
    return found


def _latency(program: Program, against: Program | None, case: Case, repeats: int) -> dict[str, float]:
    models = [Runnable(p) for p in (program, against) if p is not None]
    times: list[list[float]] = [[] for _ in models]
    for turn in range(repeats + 2):
        for model, seconds in zip(models, times, strict=True):
            arguments = {name: fill(tree, case.clone()) for name, tree in program.forward.arguments.items()}
            with torch.no_grad():
                start = time.perf_counter()
                model(**arguments)
                elapsed = time.perf_counter() - start
            if turn >= 2:  # the first calls warm caches up
                seconds.append(elapsed)
    found = {"latency ms": 1e3 * statistics.median(times[0])}
    if against is not None:
        found["latency ms against"] = 1e3 * statistics.median(times[1])
        found["ratio"] = statistics.median(a / b for a, b in zip(*times, strict=True))
    return found
