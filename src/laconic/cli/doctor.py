"""`laconic doctor`: what will work here."""

from __future__ import annotations

from laconic.cli.options import Json, print_json


def doctor(json: Json = False) -> None:
    """Say what will work here and what will not."""
    from laconic.cli.report import doctor_report
    from laconic.doctor import examine

    found = examine()
    return print_json(found) if json else doctor_report(found)
