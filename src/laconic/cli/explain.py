"""`laconic explain`: a saved DIR in words."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from laconic.cli.logs import configure
from laconic.cli.options import Json, NoProgress, Quiet, Verbose, print_json


def explain(
    path: Annotated[Path, typer.Argument(metavar="DIR", help="A DIR that `laconic optimize -o DIR` wrote.")],
    number: Annotated[
        int | None,
        typer.Option("--pass", min=1, help="All actions of this pass, by its number; --json: `actions` of the schema."),
    ] = None,
    json: Json = False,
    quiet: Quiet = False,
    verbose: Verbose = 0,
    no_progress: NoProgress = False,
) -> None:
    """Say what each pass of a saved DIR did, where, and what it cost."""
    configure(quiet, verbose)
    from laconic.cli import report
    from laconic.explain import actions_of
    from laconic.explain import explain as examine

    if number is not None:
        actions = actions_of(path, number)
        return print_json({"schema": 1, "pass": number, "actions": actions}) if json else report.actions_report(actions)
    found = examine(path)
    return print_json({"schema": 1, **found.to_json()}) if json else report.explain_report(found)
