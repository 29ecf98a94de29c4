"""`laconic optimize`: run a pipeline, check it, write a DIR."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laconic.cli import debug
from laconic.cli.options import (
    Batch,
    Cache,
    Calibration,
    Force,
    Json,
    Model,
    NoProgress,
    Pipeline,
    Quiet,
    Seed,
    Threads,
    Tokenizer,
    Towers,
    Verbose,
    cache_of,
    calibration_of,
    display,
    judge_of,
    print_json,
    refuse_early,
    refuse_unmet,
    refuse_without_data,
)
from laconic.formats import FORMATS
from laconic.ir.errors import UsageError, VerificationError, did_you_mean

if TYPE_CHECKING:
    from laconic.figures import Judge
    from laconic.passes.ledger import Ledger


def optimize(
    model: Model,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="The DIR to write.")] = None,
    pipeline: Pipeline = "exact",
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", metavar="F", help="Also write this export into DIR: hf, onnx, pt2 (repeatable)."),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="D", help="Data to measure each pass on: zoo:NAME[:SPLIT], a file.")
    ] = None,
    metric: Annotated[
        list[str] | None, typer.Option("--metric", metavar="M", help="What to measure on it (repeatable; default: kl).")
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option("--max-drop", metavar="X", help="Write nothing if the first metric gets worse by more than this."),
    ] = None,
    calibration: Calibration = None,
    heal: Annotated[
        int | None,
        typer.Option("--heal", min=1, metavar="STEPS", help="Fine-tune what was changed, on the calibration data."),
    ] = None,
    cache: Cache = None,
    towers: Towers = False,
    tokenizer: Tokenizer = None,
    batch: Batch = 8,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Run and check everything, write no DIR.")] = False,
    verify_each: Annotated[bool, typer.Option(help="Verify the program after each pass.")] = True,
    check: Annotated[bool, typer.Option(help="Check each pass's contract on several inputs and sizes.")] = True,
    print_after: debug.PrintAfter = None,
    print_after_all: debug.PrintAfterAll = False,
    print_changed: debug.PrintChanged = False,
    dump_dir: debug.DumpDir = None,
    time_passes: debug.TimePasses = False,
    bisect_limit: debug.BisectLimit = None,
    disable_pass: debug.DisablePass = None,
    stop_after: debug.StopAfter = None,
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
    target = None if dry_run else output
    if data is None:
        refuse_without_data(metric=metric, max_drop=max_drop)
    passes = parse_pipeline(pipeline)  # before the slow part, so that a slip costs nothing
    passes += parse_pipeline(f"heal{{steps={heal}}}") if heal else []
    refuse_unmet(passes, calibration, data)
    held = cache_of(cache)
    _refuse_slips(target, dump_dir, formats or [], force)
    flags = debug.Debug(
        print_after or (),
        print_after_all,
        print_changed,
        dump_dir,
        time_passes,
        bisect_limit,
        disable_pass or (),
        stop_after,
    )
    with display(quiet, verbose, no_progress, threads) as shown:
        from laconic.artefact import refuse_foreign, save
        from laconic.cli.report import times_table
        from laconic.ir.inputs import cases
        from laconic.passes.manager import PassManager, no_metrics
        from laconic.sources import opened

        instruments = flags.instruments(passes, shown, force, _repeated(seed, threads, verify_each, check))
        if target is not None:
            refuse_foreign(target)
        program, folder = opened(model, shown.stage, cache=held, towers=towers)
        inputs = cases(program, program.forward, seed=seed)
        judge, reader = None, tokenizer or folder
        decided = calibration_of(program, calibration, reader, batch, seed, shown)
        if data is not None:
            judge = judge_of(program, data, metric or ["kl"], decided, reader, batch, shown)
        observers = (*instruments, shown.instrument())
        manager = PassManager(passes, verify_each, check, observers, judge=judge or no_metrics, calibration=decided)
        run = manager.run(program, inputs)
        run.ledger.model = model
        if judge is not None and max_drop is not None:
            _refuse_drop(judge, run.ledger, max_drop)
        if timing := debug.timing_of(instruments):
            shown.table(times_table(timing))
        if target is not None:
            options: dict[str, Any] = {"formats": formats or (), "force": force, "progress": shown.stage}
            save(run.program, run.ledger, run.plans, target, seed=seed, **options)
    return print_json(run.ledger.to_json()) if json else _report(run.ledger, target)


def _refuse_drop(judge: Judge, ledger: Ledger, most: float) -> None:
    """Raise VerificationError if the first metric got worse by more than `most`."""
    drop = judge.drop(ledger.before.metrics, ledger.after.metrics)
    if not drop <= most:
        name = judge.metrics[0].name
        raise VerificationError(
            f"{name} gets worse by {drop:.4g}, more than {most:.4g}",
            why=f"{ledger.before.metrics[name]:.6g} before, {ledger.after.metrics[name]:.6g} after",
            hint="ask less of the pipeline, or allow more with --max-drop",
        )


def _repeated(seed: int, threads: int, verify_each: bool, check: bool) -> list[str]:
    """The options on which it depends whether and how a pass fails."""
    return [
        *(["--seed", str(seed)] if seed else []),
        *(["--threads", str(threads)] if threads else []),
        *([] if verify_each else ["--no-verify-each"]),
        *([] if check else ["--no-check"]),
    ]


def _refuse_slips(target: Path | None, dumps: Path | None, formats: list[str], force: bool) -> None:
    """Raise UsageError for formats and places that will not do."""
    for name in formats:
        if name not in FORMATS:
            raise UsageError(f"there is no format {name!r}", hint=did_you_mean(name, FORMATS))
    if target is None:
        return
    if "onnx" in formats:
        from laconic.codegen.onnx.runtime import onnxruntime

        onnxruntime()  # without one that works nothing can be checked: say so before the slow part
    refuse_early(target, force)
    if dumps is None:
        return
    inner, outer = dumps.resolve(), target.resolve()
    if inner.is_relative_to(outer):
        raise UsageError(
            f"the dumps would stand inside {target}, which is written whole", hint="give another --dump-dir"
        )
    if outer.is_relative_to(inner):
        raise UsageError(f"{target} would stand inside {dumps}, which holds nothing but dumps", hint="give another -o")


def _report(ledger: Ledger, target: Path | None) -> None:
    from laconic.cli.report import ledger_report

    ledger_report(ledger)
    if target is None:
        typer.echo("dry run: no DIR was written")
    elif ledger.verified:
        typer.echo(f"{target} is written, read back and verified")
    else:
        typer.echo(f"{target} is written and marked UNVERIFIED, since not all of it was checked")
