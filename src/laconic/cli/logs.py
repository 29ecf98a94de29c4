"""Logging, as LACONIC_LOGS says: `+passes,ir,-codegen` is debug of passes, info of ir, only errors of codegen."""

from __future__ import annotations

import logging
import os
import sys

from laconic.ir.errors import UsageError, did_you_mean

_PARTS = ("artefact", "codegen", "ir", "models", "passes")


def configure(quiet: bool = False, verbose: int = 0, spec: str | None = None) -> None:
    """Send laconic's log to stderr. Raises UsageError for an unknown name in the specification."""
    root = logging.getLogger("laconic")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        root.addHandler(handler)
        root.propagate = False
    levels = {0: logging.WARNING, 1: logging.INFO}
    root.setLevel(logging.ERROR if quiet else levels.get(verbose, logging.DEBUG))
    text = os.environ.get("LACONIC_LOGS", "") if spec is None else spec
    for part in filter(None, (p.strip() for p in text.split(","))):
        name = part.lstrip("+-")
        if name.split(".")[0] not in (*_PARTS, "all"):
            raise UsageError(f"LACONIC_LOGS names {name!r}, which logs nothing", hint=did_you_mean(name, _PARTS))
        level = {"+": logging.DEBUG, "-": logging.ERROR}.get(part[0], logging.INFO)
        logging.getLogger("laconic" if name == "all" else f"laconic.{name}").setLevel(level)
