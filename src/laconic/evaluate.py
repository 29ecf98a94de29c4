"""Measuring programs on drawn inputs: how far apart two are, and how long a call takes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from laconic.ir.errors import UsageError
from laconic.ir.inputs import Case, cases
from laconic.ir.metrics.costs import peak_bytes
from laconic.ir.metrics.differences import cosine, max_abs
from laconic.ir.outcomes import run_case
from laconic.ir.program import Program
from laconic.ir.run import check_inputs
from laconic.ir.types import TensorType, type_of, type_text
from laconic.latency import Interval, by_turns, program_way, ratios


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
    median of `repeats` calls, the two programs taking turns, and their `ratio` (median of the paired ones), each with
    an interval of 95 %; `memory MB`, the peak of one call beside weights and inputs (10^6 bytes).

    Raises UsageError if the two take different inputs or return different results.
    """
    if against is not None:
        _same_interface(program, against)
    rows = []
    for case in _shared_cases(program, against, seed):
        progress(f"measuring on {case}")
        row: dict[str, Any] = {"input": str(case)}
        if against is not None:
            row.update(_differences(program, against, case, metrics))
        if "latency" in metrics:
            row.update(_latency(program, against, case, repeats))
        if "memory" in metrics:
            row.update(_memory(program, against, case))
        rows.append(row)
    edges = tuple(f"{name} {edge}" for name in rows[0] for edge in ("low", "high"))
    return {"columns": [name for name in rows[0] if name not in ("input", *edges)], "rows": rows}


def _same_interface(program: Program, against: Program) -> None:
    if len(program.forward.inputs) != len(against.forward.inputs):
        raise UsageError("the models take different numbers of inputs")
    for ours, theirs in zip(program.forward.input_nodes(), against.forward.input_nodes(), strict=True):
        name = ours.meta["name"]
        if name != theirs.meta["name"]:
            raise UsageError(f"the models take different inputs: {name!r} and {theirs.meta['name']!r}")
        a, b = type_of(ours.meta["val"]), type_of(theirs.meta["val"])
        assert isinstance(a, TensorType)
        assert isinstance(b, TensorType)
        gap = _gap(a, b)
        if gap:
            raise UsageError(
                f"the models take different inputs {name!r}: {gap}",
                why=f"{type_text(a, program.names)} against {type_text(b, against.names)}",
                hint="capture both with the same axes dynamic",
            )
    if [o.name for o in program.forward.outputs] != [o.name for o in against.forward.outputs]:
        raise UsageError("the models return different results")


def _gap(a: TensorType, b: TensorType) -> str:
    """Why inputs of type `a` are none of type `b`, in words."""
    if a.dtype != b.dtype:
        return "their dtypes differ"
    if len(a.shape) != len(b.shape):
        return f"one has {len(a.shape)} axes, the other {len(b.shape)}"
    for axis, (ours, theirs) in enumerate(zip(a.shape, b.shape, strict=True)):
        if isinstance(theirs, int) and ours != theirs:
            size = ours if isinstance(ours, int) else "dynamic"
            return f"axis {axis} is {size} in the one, fixed at {theirs} in the other"
    return ""


def _shared_cases(program: Program, against: Program | None, seed: int) -> list[Case]:
    """The cases whose sizes both programs take; all that are given must be."""
    found = cases(program, program.forward, seed=seed)
    if against is None:
        return found
    kinds = [type_of(n.meta["val"]) for n in against.forward.input_nodes()]
    shared: list[Case] = []
    for case in found:
        try:
            check_inputs(against, against.forward, list(case.inputs), kinds)
        except UsageError:
            if case.given or (case is found[-1] and not shared):
                raise
            continue
        shared.append(case)
    return shared


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
    ways = {"ours": program_way(program)} | ({"theirs": program_way(against)} if against is not None else {})
    times = by_turns(ways, case.clone, repeats)
    found = _spread("latency ms", [1e3 * t for t in times["ours"]])
    if against is not None:
        found |= _spread("latency ms against", [1e3 * t for t in times["theirs"]])
        found |= _spread("ratio", ratios(times, "ours", "theirs"))
    return found


def _spread(name: str, values: Sequence[float]) -> dict[str, float]:
    found = Interval.of(values)
    return {name: found.median, f"{name} low": found.low, f"{name} high": found.high}


def _memory(program: Program, against: Program | None, case: Case) -> dict[str, float]:
    programs = {"memory MB": program} | ({"memory MB against": against} if against is not None else {})
    return {name: peak_bytes(program_way(each)(case.clone())) / 1e6 for name, each in programs.items()}
