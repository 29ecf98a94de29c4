"""Makes the helpers of this folder importable by every test, gives what they compile a cache folder of its own, and
undoes what commands do to logging."""

import gc
import logging
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

if "PYTEST_XDIST_WORKER" in os.environ:  # several side by side: more threads than cores would wait for each other
    os.environ.setdefault("OMP_NUM_THREADS", "1")
gc.set_threshold(10_000)  # graphs are many small objects: looking for cycles every 700 takes an eighth of the time


@pytest.fixture(scope="session", autouse=True)
def _cache_of_its_own(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


@pytest.fixture(autouse=True)
def _logging_as_imported() -> Iterator[None]:
    """A command that runs in this process, be it in a fixture, sends the log to the stderr of its day; tests read it by
    `caplog` and `capfd`."""
    _reset_logging()
    yield
    _reset_logging()


def _reset_logging() -> None:
    for name, log in list(logging.Logger.manager.loggerDict.items()):
        if isinstance(log, logging.Logger) and name.split(".")[0] == "laconic":
            log.setLevel(logging.NOTSET)
            log.propagate, log.handlers = True, []


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """What other tests of this process left behind is not looked at when cycles are collected: that takes a second, and
    may fall into what is timed."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def nothing_compiled() -> Iterator[None]:
    """What Dynamo and the backend know of other tests is forgotten: past a number of recompilations Dynamo calls a
    function eagerly, and says nothing."""
    _forget_compiled()
    yield
    _forget_compiled()


def _forget_compiled() -> None:
    if "torch._dynamo" not in sys.modules:
        return
    import torch._dynamo

    from laconic.codegen import reset_stats

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reset_stats()
