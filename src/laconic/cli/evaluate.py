"""`laconic eval`: quality on data, or differences and latency on drawn inputs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laconic.cli.options import (
    Batch,
    Calibration,
    Json,
    Model,
    NoProgress,
    Quiet,
    Seed,
    Threads,
    Tokenizer,
    Verbose,
    display,
    print_json,
    refuse_without_data,
)
from laconic.ir.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from laconic.cli.progress import Display
    from laconic.ir.program import Program

COMPARED = ("max-abs", "cosine")
DRAWN = (*COMPARED, "latency", "memory")


def evaluate(
    model: Model,
    metric: Annotated[
        list[str] | None,
        typer.Option(
            "--metric",
            help="With data nats, ppl, top1, recall@1, kl, cosine, generation, latency, memory, or an installed one; "
            "without max-abs, cosine, latency, memory (repeatable; default: what the data is for, or all).",
        ),
    ] = None,
    data: Annotated[
        str | None, typer.Option("--data", metavar="D", help="zoo:NAME[:SPLIT], a file, a folder, module:callable.")
    ] = None,
    against: Annotated[str | None, typer.Option("--against", help="The model to compare with.")] = None,
    calibration: Calibration = None,
    tokenizer: Tokenizer = None,
    batch: Batch = 8,
    repeats: Annotated[int, typer.Option("--repeats", min=1, help="Timed calls per model and input.")] = 20,
    json: Json = False,
    seed: Seed = 0,
    threads: Threads = 0,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    no_progress: NoProgress = False,
) -> None:
    """Measure a model: its quality on data, or differences and latency on drawn inputs."""
    said = data or _own_data(model, metric)
    if said is None:
        _refuse_slips(metric, against)
        refuse_without_data(calibration=calibration)
    with display(quiet, verbose, no_progress, threads) as shown:
        from laconic.sources import opened

        first, folder = opened(model, shown.stage)
        second = opened(against, shown.stage)[0] if against else None
        if said is None:
            found = _drawn(first, second, metric, seed, repeats, shown)
        else:
            where = tokenizer or folder
            found = _figures(first, second, metric, said, calibration, where, batch, seed, shown)
    document = {"schema": 1, "model": model, "against": against, **found}
    if json:
        return print_json(document)
    from laconic.cli.report import evaluation_report, figures_report

    return evaluation_report(document) if said is None else figures_report(document)


def _own_data(model: str, metric: list[str] | None) -> str | None:
    """The test split of a reference model, unless only what needs no data is asked for."""
    from laconic.models import zoo

    name = model.removeprefix("zoo:")
    drawn = bool(metric) and all(each in DRAWN for each in metric or ())
    return f"{model}:test" if name != model and name in zoo.names() and not drawn else None


def _refuse_slips(metric: list[str] | None, against: str | None) -> None:
    for name in metric or ():
        if name not in DRAWN:
            from laconic.ir.metrics.registry import METRICS

            if name in METRICS.names():
                raise UsageError(f"{name} is measured on data", hint="add --data D")
            raise UsageError(f"there is no metric {name!r}", hint=did_you_mean(name, [*METRICS.names(), *DRAWN]))
        if name in COMPARED and against is None:
            raise UsageError(f"{name} compares two models", hint="add --against MODEL2")


def _drawn(
    first: Program, second: Program | None, metric: list[str] | None, seed: int, repeats: int, shown: Display
) -> dict[str, Any]:
    from laconic.evaluate import evaluate_programs

    metrics = metric or [name for name in DRAWN if second is not None or name not in COMPARED]
    return evaluate_programs(first, second, metrics, seed=seed, repeats=repeats, progress=shown.stage)


def _figures(
    first: Program,
    second: Program | None,
    metric: list[str] | None,
    said: str,
    calibration: str | None,
    folder: Path | None,
    batch: int,
    seed: int,
    shown: Display,
) -> dict[str, Any]:
    from laconic.data.load import load_data
    from laconic.figures import figures
    from laconic.ir.data import refuse_overlap
    from laconic.ir.metrics.registry import load

    data = load_data(said, first, folder=folder, split="test", batch=batch)
    metrics = [load(name) for name in dict.fromkeys(metric or data.metrics)]
    if calibration is not None:
        refuse_overlap(data, load_data(calibration, first, folder=folder, split="calibration", batch=batch))
    advance = shown.counted(f"measuring on {data.name}")
    return {"data": data.name, "figures": figures(first, second, data, metrics, seed=seed, progress=advance)}
