"""`laconic bisect`: which pass of a pipeline makes a model bad, by a metric or by a command's word."""

from __future__ import annotations

import math
from typing import Annotated

import typer

from laconic.cli.options import (
    Batch,
    Calibration,
    Json,
    Model,
    NoProgress,
    Pipeline,
    Quiet,
    Seed,
    Threads,
    Tokenizer,
    Verbose,
    calibration_of,
    display,
    judge_of,
    print_json,
    refuse_unmet,
    refuse_without_data,
)
from laconic.ir.errors import UsageError


def bisect(
    model: Model,
    pipeline: Pipeline = "exact",
    data: Annotated[
        str | None, typer.Option("--data", metavar="D", help="Data to judge by: zoo:NAME[:SPLIT], a file.")
    ] = None,
    metric: Annotated[str | None, typer.Option("--metric", metavar="M", help="What to judge by (default: kl).")] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop", metavar="X", help="A model whose metric is worse by more than this is bad (default 0)."
        ),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option("--check", metavar="CMD", help="Given a DIR: exits with 0 if it is good, 125 to skip, else bad."),
    ] = None,
    calibration: Calibration = None,
    tokenizer: Tokenizer = None,
    batch: Batch = 8,
    json: Json = False,
    seed: Seed = 0,
    threads: Threads = 0,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    no_progress: NoProgress = False,
) -> None:
    """Find the pass that makes a model bad, which of its actions, and which other pass it takes."""
    from laconic.passes.pipeline import parse_pipeline

    passes = parse_pipeline(pipeline)
    if (data is None) == (check is None):
        raise UsageError("what is bad is told by --data, or by --check CMD", hint="give one of the two")
    if check is not None:
        refuse_without_data(metric=metric, max_drop=max_drop)
    refuse_unmet(passes, calibration, data)
    if max_drop is not None and math.isnan(max_drop):
        raise UsageError("--max-drop is not a number", hint="name by how much the metric may get worse")
    with display(quiet, verbose, no_progress, threads) as shown:
        from laconic.bisect import Bisection, by_command, by_metric
        from laconic.ir.inputs import cases
        from laconic.sources import opened

        program, folder = opened(model, shown.stage)
        inputs, reader = cases(program, program.forward, seed=seed), tokenizer or folder
        decided = calibration_of(program, calibration, reader, batch, seed, shown)
        if check is not None:
            test = by_command(check, seed)
        else:
            assert data is not None
            judge = judge_of(program, data, [metric or "kl"], decided, reader, batch, shown)
            test = by_metric(judge, program, max_drop or 0.0)
        search = Bisection(program, passes, test, inputs=inputs, calibration=decided, progress=shown.stage)
        found = search.search()
    document = {"schema": 1, "model": model, "pipeline": pipeline, **found.to_json()}
    if json:
        return print_json(document)
    from laconic.cli.report import bisect_report

    return bisect_report(document)
