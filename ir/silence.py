"""Keeping torch quiet while it traces and exports: what it prints goes to the log, where `LACONIC_LOGS` shows it."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator

log = logging.getLogger(__name__)

_CHATTY = ("torch", "onnxscript", "onnx_ir")


@contextlib.contextmanager
def torch_silenced() -> Iterator[None]:
    """Keep torch and onnxscript from printing, warning and logging; errors are still raised."""
    loggers = [logging.getLogger(name) for name in _CHATTY]
    loggers += [
        found
        for name, found in list(logging.root.manager.loggerDict.items())
        if isinstance(found, logging.Logger) and name.startswith(tuple(f"{c}." for c in _CHATTY)) and found.level
    ]
    levels = [found.level for found in loggers]
    printed = io.StringIO()
    for found in loggers:
        found.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            warnings.simplefilter("ignore")
            yield
    finally:
        for found, level in zip(loggers, levels, strict=True):
            found.setLevel(level)
        if printed.getvalue().strip():
            log.debug("torch printed:\n%s", printed.getvalue())
