"""`laconic passes`: what there is."""

from __future__ import annotations

import typer

from laconic.cli.logs import configure
from laconic.cli.options import Json, NoProgress, Quiet, Verbose, print_json


def passes(json: Json = False, quiet: Quiet = False, verbose: Verbose = 0, no_progress: NoProgress = False) -> None:
    """List the passes: contract, what they need, options."""
    configure(quiet, verbose)
    from laconic.cli.report import passes_table, print_table
    from laconic.passes.methods import methods_of
    from laconic.passes.pipeline import options_of
    from laconic.passes.registry import PRESETS, load_all

    kinds = load_all()
    if json:
        listed = [
            {
                "name": kind.name,
                "summary": kind.summary,
                "contract": kind().contract,
                "needs": kind().needs,
                "methods": methods_of(kind.name),
                "reads_values": kind().reads_values,
                "options": {k: {"type": t, "default": d} for k, (t, d) in options_of(kind).items()},
                "source": kind.source,
            }
            for kind in kinds
        ]
        return print_json({"schema": 1, "passes": listed, "presets": PRESETS})
    print_table(passes_table(kinds))
    for name, text in PRESETS.items():
        typer.echo(f"preset {name} = {text or '(no pass)'}")
    return None
