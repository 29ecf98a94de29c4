"""Logging, as LACONIC_LOGS says: `+passes,ir,-codegen` is debug of passes, info of ir, only errors of codegen.

The command line asks for it always; without one, under torch.compile, it is set up at first use if the variable is set
and nobody else has seen to it.
"""

from __future__ import annotations

import logging
import os
import sys

from laconic.ir.errors import UsageError, did_you_mean

_PARTS = ("artefact", "codegen", "ir", "models", "passes")


def log_to_stderr() -> None:
    """Send laconic's log to stderr, unless it has a handler."""
    root = logging.getLogger("laconic")
    if not root.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        root.addHandler(handler)
        root.propagate = False


def set_levels(spec: str) -> None:
    """Set the level of each part that a specification names. Raises UsageError for an unknown name."""
    for part in filter(None, (p.strip() for p in spec.split(","))):
        name = part.lstrip("+-")
        if name.split(".")[0] not in (*_PARTS, "all"):
            raise UsageError(f"LACONIC_LOGS names {name!r}, which logs nothing", hint=did_you_mean(name, _PARTS))
        level = {"+": logging.DEBUG, "-": logging.ERROR}.get(part[0], logging.INFO)
        logging.getLogger("laconic" if name == "all" else f"laconic.{name}").setLevel(level)


def configure_from_environment() -> None:
    """Do what LACONIC_LOGS says, if it is set and laconic's own logger has no handler yet. Where the program has set
    logging up, its handlers get what is logged."""
    spec = os.environ.get("LACONIC_LOGS", "")
    root = logging.getLogger("laconic")
    if not spec or root.handlers:
        return
    set_levels(spec)
    if not root.hasHandlers():
        log_to_stderr()
