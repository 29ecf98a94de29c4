"""`laconic doctor`: what will work here."""

from __future__ import annotations

from laconic.cli.logs import configure
from laconic.cli.options import Json, NoProgress, Quiet, Verbose, print_json


def doctor(json: Json = False, quiet: Quiet = False, verbose: Verbose = 0, no_progress: NoProgress = False) -> None:
    """Say what will work here and what will not."""
    configure(quiet, verbose)
    from laconic.cli.report import doctor_report
    from laconic.doctor import examine

    found = examine()
    return print_json(found) if json else doctor_report(found)
