"""Makes the helpers of this folder importable by every test, and undoes what commands do to logging."""

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(autouse=True)
def _logging_as_it_was() -> Iterator[None]:
    """A command that runs in this process sends the log to its own stderr; other tests read it by `caplog`."""
    log = logging.getLogger("laconic")
    level, propagate, handlers = log.level, log.propagate, list(log.handlers)
    yield
    log.setLevel(level)
    log.propagate, log.handlers = propagate, handlers
