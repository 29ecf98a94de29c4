"""`laconic diff`: two models, part by part."""

from __future__ import annotations

from typing import Annotated

import typer

from laconic.cli.options import MODEL_HELP, Json, NoProgress, Quiet, Threads, Verbose, display, print_json


def diff(
    model: Annotated[str, typer.Argument(metavar="A", help=MODEL_HELP)],
    other: Annotated[str, typer.Argument(metavar="B", help="The same.")],
    json: Json = False,
    threads: Threads = 0,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    no_progress: NoProgress = False,
) -> None:
    """Show what differs between two models; the exit code is 0 whether they differ or not."""
    with display(quiet, verbose, no_progress, threads) as shown:
        from laconic.cli.report import diff_report
        from laconic.diff import diff_programs
        from laconic.ir.program import Program
        from laconic.sources import capture_source, resolve

        programs = []
        for name in (model, other):
            found = resolve(name, allow_unverified=True, progress=shown.stage)  # looking at it claims nothing
            programs.append(found if isinstance(found, Program) else capture_source(found, shown.stage))
        shown.stage("comparing")
        result = diff_programs(*programs)
    if json:
        return print_json({"schema": 1, "a": model, "b": other, **result.to_json()})
    return diff_report(model, other, result)
