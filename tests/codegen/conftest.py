"""Each test compiles from scratch: what Dynamo and the backend know of others is forgotten."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _nothing_compiled() -> Iterator[None]:
    _forget()
    yield
    _forget()


@pytest.fixture
def no_caches() -> Iterator[None]:
    """Everything is compiled, whatever another test has."""
    import torch._functorch.config
    import torch._inductor.config

    with (
        torch._functorch.config.patch(enable_autograd_cache=False),
        torch._inductor.config.patch(fx_graph_cache=False),
    ):
        yield


def _forget() -> None:
    if "torch._dynamo" not in sys.modules:
        return
    import torch._dynamo

    from laconic.codegen import reset_stats

    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    reset_stats()
