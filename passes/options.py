"""What options of several passes must be; a pass asks when it is made, and the pipeline tells the column."""

from __future__ import annotations


def check_share(name: str, value: float) -> None:
    """Raise ValueError unless an option is a share of something, and not none of it."""
    if not 0 < value <= 1:
        raise ValueError(f"option {name!r} is a share above 0 and up to 1, not {value}")


def check_least(least: int, /, **values: float) -> None:
    """Raise ValueError for the first of these options that is less."""
    for name, value in values.items():
        if not value >= least:
            raise ValueError(f"option {name!r} is at least {least}, not {value}")
