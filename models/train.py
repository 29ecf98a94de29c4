"""`python -m laconic.models.train NAME`: train a reference model as its recipe says, and write its folder.

Interrupt it when you like; the same command goes on. What is kept meanwhile stands under `build/models/NAME`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from laconic.ir.errors import LaconicError, UsageError, did_you_mean
from laconic.ir.files import place_directory, refuse_existing, temporary_beside
from laconic.models import tokenizer
from laconic.models.decoders import LlamaGqa, LlamaMha, Moe, MoeSigmoid
from laconic.models.training import Recipe, Run, start, train
from laconic.models.vit import Vit
from laconic.models.vlm import Vlm

CHECKPOINTS = Path(__file__).resolve().parent / "checkpoints"

_RECIPES: dict[str, Callable[[Path], Recipe]] = {
    LlamaMha.name: LlamaMha,
    LlamaGqa.name: LlamaGqa,
    Moe.name: Moe,
    MoeSigmoid.name: MoeSigmoid,
    Vit.name: lambda folder: Vit(),
    Vlm.name: lambda folder: Vlm(),
}
_TEXT = (LlamaMha.name, LlamaGqa.name, Moe.name, MoeSigmoid.name, Vlm.name)


def recipe(name: str, folder: Path) -> Recipe:
    """A recipe by name; what it derives from its data is kept in `folder`. Raises UsageError for an unknown name."""
    if name not in _RECIPES:
        raise UsageError(f"there is no recipe {name!r}", hint=did_you_mean(name, _RECIPES))
    return _RECIPES[name](folder)


def write_checkpoint(run: Run, folder: Path, *, force: bool = False) -> None:
    """The trained model as a folder of transformers: configuration, bfloat16 weights, tokenizer, and the curve.

    The selection bias of routers stays in float32. Raises UsageError if the folder exists and `force` is not given.
    """
    from safetensors.torch import load_file, save_file

    student: Any = run.student
    with temporary_beside(folder) as temporary:
        student["model"].save_pretrained(temporary)
        path = temporary / "model.safetensors"
        rounded = {
            name: value if name.endswith("e_score_correction_bias") else value.bfloat16()
            for name, value in load_file(path).items()
        }
        save_file(rounded, path, metadata={"format": "pt"})
        if run.recipe.name in _TEXT:
            for part in ("tokenizer.json", "tokenizer_config.json"):
                (temporary / part).write_bytes((tokenizer.FOLDER / part).read_bytes())
        curve = {"seed": run.recipe.seed, "steps": run.step, "seconds": round(run.seconds), "curve": run.curve}
        (temporary / "training.json").write_text(json.dumps(curve, indent=1) + "\n", encoding="utf-8")
        place_directory(temporary, folder, force)


def main(
    name: Annotated[str, typer.Argument(metavar="NAME", help=", ".join(_RECIPES))],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Default: models/checkpoints/NAME.")] = None,
    work: Annotated[Path, typer.Option("--work", help="Where a run is kept until it is done.")] = Path("build/models"),
    until: Annotated[int | None, typer.Option("--until", min=0, help="Stop at this step (the last).")] = None,
    look_every: Annotated[int, typer.Option("--look-every", min=1, help="Steps between looks at selection.")] = 250,
    threads: Annotated[int, typer.Option("--threads", min=0, help="Default: torch's choice.")] = 0,
    compiled: Annotated[bool, typer.Option("--compile/--no-compile", help="Compile the loss.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a folder that is there.")] = False,
) -> None:
    """Train a reference model, or go on with it, and write its folder."""
    target = CHECKPOINTS / name if output is None else output
    chosen = recipe(name, work)
    if until is None or until >= chosen.steps:
        refuse_existing(target, force)
    if threads:
        torch.set_num_threads(threads)
    run = start(chosen, work / name)
    with _Bar(run) as report:
        done = train(run, until=until, look_every=look_every, compiled=compiled, report=report)
    if not done:
        typer.echo(f"interrupted at step {run.step}; the same command goes on", err=True)
        raise typer.Exit(130)
    if run.step == run.recipe.steps:
        write_checkpoint(run, target, force=force)
        typer.echo(str(target))


class _Bar:
    """A bar with the last figures; where there is no terminal, a line every fifty steps."""

    def __init__(self, run: Run) -> None:
        self._shown = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            disable=not sys.stderr.isatty(),
        )
        self._task = self._shown.add_task(run.recipe.name, total=run.recipe.steps, completed=run.step)

    def __enter__(self) -> Callable[[Run, dict[str, float]], None]:
        self._shown.start()
        return self._report

    def __exit__(self, *problem: object) -> None:
        self._shown.stop()

    def _report(self, run: Run, row: dict[str, float]) -> None:
        figures = ", ".join(f"{name} {value:.3f}" for name, value in row.items())
        self._shown.update(self._task, completed=run.step, description=f"{run.recipe.name}: {figures}")
        if self._shown.disable and (run.step % 50 == 0 or "selection" in row):
            rate = run.seconds / run.step
            print(f"step {run.step}: {figures} ({rate:.3f} processor seconds a step)", file=sys.stderr, flush=True)


if __name__ == "__main__":
    try:
        typer.run(main)
    except LaconicError as problem:
        typer.echo(problem.render(), err=True)
        sys.exit(problem.exit_code)
