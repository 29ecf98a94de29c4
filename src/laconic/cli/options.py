"""What the commands share: options that many of them take, logging and progress, JSON. Nothing heavy is imported."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from laconic.cli.logs import configure
from laconic.ir.errors import UsageError
from laconic.schema import finite

if TYPE_CHECKING:
    from collections.abc import Sequence

    from laconic.cli.progress import Display
    from laconic.figures import Judge
    from laconic.ir.calibration import Calibration as CalibrationData
    from laconic.ir.program import Program
    from laconic.passes.base import Pass

MODEL_HELP = "zoo:NAME, a Hugging Face folder, a .pt2, an .onnx, a saved DIR, a dump, or package.module:callable."

Model = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no warnings.")]
Verbose = Annotated[int, typer.Option("--verbose", "-v", count=True, help="Say more; twice for everything.")]
NoProgress = Annotated[bool, typer.Option("--no-progress", help="No progress display.")]
Threads = Annotated[int, typer.Option("--threads", min=0, help="CPU threads; 0 leaves torch's choice.")]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Seed of the inputs drawn for checks.")]
Tokenizer = Annotated[
    Path | None,
    typer.Option("--tokenizer", metavar="FOLDER", help="Where tokenizer.json stands, if not beside the model."),
]
Batch = Annotated[int, typer.Option("--batch", min=1, help="Samples per run over data.")]
Calibration = Annotated[
    str | None, typer.Option("--calibration", metavar="D", help="What decisions are made on: may not overlap.")
]
Pipeline = Annotated[str, typer.Option("--passes", "-p", help="Pipeline, e.g. 'dedup{slices=no},cse'.")]
Force = Annotated[bool, typer.Option("--force", help="Replace an output that exists.")]


Cache = Annotated[
    str | None,
    typer.Option(
        "--cache", metavar="BATCHxLENGTH", help="Capture a model so that it generates, with caches of this size."
    ),
]
Towers = Annotated[
    bool, typer.Option("--towers", help="Capture the two sides of a model that sees and reads, vision and text, too.")
]


def cache_of(text: str | None) -> tuple[int, int] | None:
    """The sequences and tokens that `--cache` names. Raises UsageError for other text."""
    if text is None:
        return None
    found = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", text)
    if found is None:
        raise UsageError(f"--cache {text} says no size", hint="sequences and tokens, e.g. --cache 4x2048")
    return int(found[1]), int(found[2])


def display(quiet: bool, verbose: int, no_progress: bool, threads: int) -> Display:
    """Logging, threads and the progress display; heavy imports happen under it."""
    from laconic.cli.progress import Display

    configure(quiet, verbose)
    shown = Display(shown=not (quiet or no_progress))
    if threads:
        import torch

        torch.set_num_threads(threads)
    return shown


def refuse_early(output: Path, force: bool) -> None:
    """Before the slow part: saving asks again."""
    from laconic.ir.files import refuse_existing

    refuse_existing(output, force)


def refuse_without_data(**given: object) -> None:
    """Raise UsageError for an option that says nothing without --data."""
    for name, value in given.items():
        if value is not None:
            raise UsageError(f"--{name.replace('_', '-')} says nothing without data to measure on", hint="add --data D")


def refuse_unmet(passes: Sequence[Pass], calibration: str | None, data: str | None) -> None:
    """Before the slow part: raise UsageError if a pass has nothing to decide on, or nothing decides."""
    hungry = [item for item in passes if item.needs != "nothing"]
    if hungry and calibration is None:
        raise UsageError(
            f"the pass {hungry[0].spec!r} needs {hungry[0].needs}, and there is no data to decide on",
            hint="add --calibration D",
        )
    if calibration is not None and not hungry and data is None:
        refuse_without_data(calibration=calibration)


def calibration_of(
    program: Program, said: str | None, folder: Path | None, batch: int, seed: int, shown: Display
) -> CalibrationData | None:
    """What decisions are made on, by its name; `folder` holds the model's tokenizer. Raises UsageError for what is no
    data."""
    if said is None:
        return None
    from laconic.cache import cache_folder
    from laconic.data.load import load_data
    from laconic.ir.calibration import Calibration

    data = load_data(said, program, folder=folder, split="calibration", batch=batch)
    return Calibration(data, seed, cache_folder() / "calibration", shown.counted)


def judge_of(
    program: Program,
    data: str,
    metric: list[str],
    calibration: CalibrationData | None,
    folder: Path | None,
    batch: int,
    shown: Display,
) -> Judge:
    """Metrics on data, by the names of both; `folder` holds the model's tokenizer. Raises UsageError for unknown names
    and for data that overlaps the calibration set."""
    from laconic.data.load import load_data
    from laconic.figures import Judge
    from laconic.ir.metrics.registry import load

    metrics = [load(name) for name in dict.fromkeys(metric)]
    judged = load_data(data, program, folder=folder, split="selection", batch=batch)
    decided = None if calibration is None else calibration.data
    return Judge(program, judged, metrics, calibration=decided, progress=shown.counted(f"measuring on {judged.name}"))


def print_json(data: Any) -> None:
    """A document on stdout, as `laconic.schema` has it."""
    typer.echo(json.dumps(finite(data), indent=1, allow_nan=False))


def assignments(text: str, option: str) -> dict[str, int]:
    """`a=4,b=128` as a dict; no text, no assignments. Raises UsageError for what is not of this form."""
    found: dict[str, int] = {}
    for part in text.split(",") if text.strip() else []:
        name, _, number = (piece.strip() for piece in part.partition("="))
        if not name or not number.isdecimal() or name in found:
            raise UsageError(f"{option} does not take {part.strip()!r}", hint=f"{option} batch=4,sequence=128")
        found[name] = int(number)
    return found
