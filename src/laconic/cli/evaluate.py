"""`laconic eval`: differences and latency."""

from __future__ import annotations

from typing import Annotated

import typer

from laconic.cli.options import Json, Model, NoProgress, Quiet, Seed, Threads, Verbose, display, print_json
from laconic.ir.errors import UsageError, did_you_mean

METRICS = ("max-abs", "cosine", "latency")


def evaluate(
    model: Model,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", help="max-abs, cosine or latency (repeatable; default: all).")
    ] = None,
    against: Annotated[str | None, typer.Option("--against", help="The model to compare with.")] = None,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed calls per model and input.")] = 20,
    json: Json = False,
    seed: Seed = 0,
    threads: Threads = 0,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    no_progress: NoProgress = False,
) -> None:
    """Measure differences and latency on drawn inputs."""
    metrics = metric or (list(METRICS) if against else ["latency"])
    for name in metrics:
        if name not in METRICS:
            raise UsageError(f"there is no metric {name!r}", hint=did_you_mean(name, METRICS))
        if name != "latency" and against is None:
            raise UsageError(f"{name} compares two models", hint="add --against MODEL2")
    with display(quiet, verbose, no_progress, threads) as shown:
        from laconic.cli.report import evaluation_report
        from laconic.evaluate import evaluate_programs
        from laconic.sources import program_of

        first = program_of(model, shown.stage)
        second = program_of(against, shown.stage) if against else None
        found = evaluate_programs(first, second, metrics, seed=seed, repeats=repeats, progress=shown.stage)
    data = {"schema": 1, "model": model, "against": against, **found}
    if json:
        return print_json(data)
    return evaluation_report(data)
