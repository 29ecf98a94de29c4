"""`laconic export`: a checked file for another runtime."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from laconic.cli.options import (
    Cache,
    Force,
    Json,
    Model,
    NoProgress,
    Quiet,
    Threads,
    Towers,
    Verbose,
    cache_of,
    display,
    print_json,
    refuse_early,
)
from laconic.ir.errors import UsageError


def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="F.onnx or F.pt2.")],
    opset: Annotated[
        int | None, typer.Option("--opset", min=1, help="ONNX opset; default: the newest that runs.")
    ] = None,
    functions: Annotated[
        bool, typer.Option("--functions", help="Repeated blocks once, as ONNX local functions.")
    ] = False,
    with_past: Annotated[
        bool,
        typer.Option(
            "--with-past",
            help="F.prefill.onnx and F.decode.onnx, caches as inputs and outputs, of a model with --cache.",
        ),
    ] = False,
    cache: Cache = None,
    towers: Towers = False,
    force: Force = False,
    json: Json = False,
    threads: Threads = 0,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    no_progress: NoProgress = False,
) -> None:
    """Write a checked ONNX or .pt2 file."""
    kind = output.suffix
    if kind not in (".onnx", ".pt2"):
        raise UsageError(f"{output} does not say what to write", hint="name it F.onnx or F.pt2")
    for_onnx = {"--opset": opset is not None, "--functions": functions, "--with-past": with_past, "--towers": towers}
    if kind == ".pt2" and any(for_onnx.values()):
        raise UsageError(f"{next(name for name, given in for_onnx.items() if given)} is for ONNX")
    held = cache_of(cache)
    if not (with_past or towers):
        refuse_early(output, force)
    with display(quiet, verbose, no_progress, threads) as shown:
        from laconic.cli.report import export_report
        from laconic.codegen.onnx import write_onnx
        from laconic.codegen.onnx.entries import write_past, write_towers
        from laconic.codegen.pt2 import write_pt2
        from laconic.sources import program_of

        program = program_of(model, shown.stage, cache=held)
        data: dict[str, Any] = {"schema": 1, "model": model, "path": str(output), "format": kind[1:]}
        if kind == ".onnx":
            settings: dict[str, Any] = {"opset": opset, "functions": functions, "force": force}
            if with_past or towers:
                write = write_past if with_past else write_towers
                written = list(write(program, output, progress=shown.stage, **settings).values())
                report = written[-1]
                data |= {"path": str(report.path), "paths": [str(each.path) for each in written]}
            else:
                report = write_onnx(program, output, progress=shown.stage, **settings)
            data.update({k: v for k, v in asdict(report).items() if k not in ("path", "data_path")})
        else:
            shown.stage("writing and checking")
            write_pt2(program, output, force=force)
    if json:
        return print_json(data)
    return export_report(data)
