"""The commands. Each resolves its arguments, calls the library, and prints: results on stdout, the rest on stderr."""

from __future__ import annotations

import json as jsonlib
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laconic.cli.logs import configure
from laconic.formats import FORMATS
from laconic.ir.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from laconic.cli.progress import Display

Model = Annotated[str, typer.Argument(help="zoo:NAME, a Hugging Face folder, a saved DIR, or package.module:callable.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more; twice for everything.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="No progress display.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0 leaves torch's choice.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the inputs drawn for checks.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]

METRICS = ("max-abs", "cosine", "latency")


def passes(json: Json = False) -> None:
    """List the passes: contract, what they need, options."""
    from laconic.cli.report import passes_table, print_table
    from laconic.passes.pipeline import options_of
    from laconic.passes.registry import PRESETS, load_all

    kinds = load_all()
    if json:
        listed = [
            {
                "name": kind.name,
                "summary": kind.summary,
                "contract": kind.contract,
                "needs": kind.needs,
                "methods": list(kind.methods),
                "reads_values": kind().reads_values,
                "options": {k: {"type": t, "default": d} for k, (t, d) in options_of(kind).items()},
                "source": kind.source,
            }
            for kind in kinds
        ]
        return _json({"schema": 1, "passes": listed, "presets": PRESETS})
    print_table(passes_table(kinds))
    for name, text in PRESETS.items():
        typer.echo(f"preset {name} = {text or '(no pass)'}")
    return None


def optimize(
    model: Model,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The DIR to write.")] = None,
    pipeline: Annotated[str, typer.Option("--passes", "-p", help="Pipeline, e.g. 'dedup{slices=no},cse'.")] = "exact",
    formats: Annotated[
        list[str] | None, typer.Option("--format", help="Also write this export into DIR: onnx, pt2 (repeatable).")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Run and check everything, write nothing.")] = False,
    verify_each: Annotated[bool, typer.Option(help="Verify the program after each pass.")] = True,
    check: Annotated[bool, typer.Option(help="Check each pass's contract on several inputs and sizes.")] = True,
    force: Force = False,
    json: Json = False,
    seed: Seed = 0,
    threads: Threads = 0,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    no_progress: NoProgress = False,
) -> None:
    """Optimise a model and write a verified DIR."""
    from laconic.passes.pipeline import parse_pipeline

    if output is None and not dry_run:
        raise UsageError("there is nowhere to write to", hint="give -o DIR, or --dry-run to see what would be done")
    passes = parse_pipeline(pipeline)  # before the slow part, so that a slip costs nothing
    _check_formats(formats or [])
    if output is not None and not dry_run:
        _refuse_early(output, force)
    with _display(quiet, verbose, no_progress, threads) as display:
        from laconic.artefact import refuse_foreign, save
        from laconic.cli.report import ledger_report
        from laconic.ir.inputs import cases
        from laconic.passes.manager import PassManager
        from laconic.sources import program_of

        if output is not None and not dry_run:
            refuse_foreign(output)
        program = program_of(model, display.stage)
        inputs = cases(program, program.forward, seed=seed)
        run = PassManager(passes, verify_each, check, (display.instrument(),)).run(program, inputs)
        run.ledger.model = model
        if output is not None and not dry_run:
            options: dict[str, Any] = {"formats": formats or (), "force": force, "progress": display.stage}
            save(run.program, run.ledger, run.plans, output, seed=seed, **options)
    if json:
        return _json(run.ledger.to_json())
    ledger_report(run.ledger)
    if dry_run:
        typer.echo("dry run: nothing was written")
    elif not run.ledger.verified:
        typer.echo(f"{output} is written and marked UNVERIFIED, since checks were switched off")
    else:
        typer.echo(f"{output} is written, read back and verified")
    return None


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
    with _display(quiet, verbose, no_progress, threads) as display:
        from laconic.cli.report import evaluation_report
        from laconic.evaluate import evaluate_programs
        from laconic.sources import program_of

        first = program_of(model, display.stage)
        second = program_of(against, display.stage) if against else None
        found = evaluate_programs(first, second, metrics, seed=seed, repeats=repeats, progress=display.stage)
    data = {"schema": 1, "model": model, "against": against, **found}
    if json:
        return _json(data)
    return evaluation_report(data)


def export(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="F.onnx or F.pt2.")],
    opset: Annotated[
        int | None, typer.Option("--opset", min=1, help="ONNX opset; default: the newest that runs.")
    ] = None,
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
    if kind == ".pt2" and opset is not None:
        raise UsageError("--opset is for ONNX")
    _refuse_early(output, force)
    with _display(quiet, verbose, no_progress, threads) as display:
        from laconic.cli.report import export_report
        from laconic.codegen.onnx import write_onnx
        from laconic.codegen.pt2 import write_pt2
        from laconic.sources import program_of

        program = program_of(model, display.stage)
        data: dict[str, Any] = {"schema": 1, "model": model, "path": str(output), "format": kind[1:]}
        if kind == ".onnx":
            report = write_onnx(program, output, opset=opset, force=force, progress=display.stage)
            data.update({k: v for k, v in asdict(report).items() if k not in ("path", "data_path")})
        else:
            display.stage("writing and checking")
            write_pt2(program, output, force=force)
    if json:
        return _json(data)
    return export_report(data)


def doctor(json: Json = False) -> None:
    """Say what will work here and what will not."""
    from laconic.cli.report import doctor_report
    from laconic.doctor import examine

    found = examine()
    return _json(found) if json else doctor_report(found)


def _display(quiet: bool, verbose: int, no_progress: bool, threads: int) -> Display:
    """Logging, threads and the progress display; heavy imports happen under it."""
    from laconic.cli.progress import Display

    configure(quiet, verbose)
    display = Display(shown=not (quiet or no_progress))
    if threads:
        import torch

        torch.set_num_threads(threads)
    return display


def _refuse_early(output: Path, force: bool) -> None:
    """Before the slow part: saving asks again."""
    from laconic.ir.files import refuse_existing

    refuse_existing(output, force)


def _check_formats(formats: list[str]) -> None:
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"there is no format {name!r}", hint=did_you_mean(name, FORMATS))


def _json(data: Any) -> None:
    typer.echo(jsonlib.dumps(data, indent=1))
