"""`laconic bench`: latency beside other ways to run the model."""

from __future__ import annotations

from typing import Annotated

import typer

from laconic.cli.options import (
    Json,
    Model,
    NoProgress,
    Quiet,
    Seed,
    Threads,
    Verbose,
    assignments,
    display,
    print_json,
)


def bench(
    model: Model,
    against: Annotated[
        str,
        typer.Option("--against", help="With commas between: eager, onnxruntime, compiled, inductor, regional, ..."),
    ] = "",
    size: Annotated[
        str, typer.Option("--size", help="Sizes other than the example's, e.g. batch=4,sequence=128.")
    ] = "",
    repeats: Annotated[int, typer.Option("--repeats", min=6, help="Timed calls of each way.")] = 30,
    warmup: Annotated[int, typer.Option("--warmup", min=0, help="Calls of each way before those.")] = 3,
    json: Json = False,
    seed: Seed = 0,
    threads: Threads = 0,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    no_progress: NoProgress = False,
) -> None:
    """Time a model against the original module, ONNX Runtime or compilers, by turns."""
    sizes = assignments(size, "--size")
    ways = [name.strip() for name in against.split(",") if name.strip()]
    with display(quiet, verbose, no_progress, threads) as shown:
        from laconic.bench import bench as measure
        from laconic.bench import check_module, check_ways
        from laconic.cli.report import bench_report
        from laconic.ir.program import Program
        from laconic.sources import capture_source, resolve

        check_ways(ways)
        found = resolve(model, progress=shown.stage)
        check_module(ways, found)
        source, program = (None, found) if isinstance(found, Program) else (found, capture_source(found, shown.stage))
        options = {"seed": seed, "repeats": repeats, "warmup": warmup}
        result = measure(program, source, ways, sizes=sizes, model=model, progress=shown.stage, **options)
    data = {"schema": 1, "model": model, **result}
    return print_json(data) if json else bench_report(data)
