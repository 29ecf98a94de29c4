"""Logging of the command line: as its flags say, and beyond them as LACONIC_LOGS does."""

from __future__ import annotations

import logging
import os

from laconic.ir.logs import log_to_stderr, set_levels


def configure(quiet: bool = False, verbose: int = 0, spec: str | None = None) -> None:
    """Send laconic's log to stderr. Raises UsageError for an unknown name in the specification."""
    log_to_stderr()
    levels = {0: logging.WARNING, 1: logging.INFO}
    logging.getLogger("laconic").setLevel(logging.ERROR if quiet else levels.get(verbose, logging.DEBUG))
    set_levels(os.environ.get("LACONIC_LOGS", "") if spec is None else spec)
