"""Each test compiles from scratch: what Dynamo and the backend know of others is forgotten."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def _from_scratch(nothing_compiled: None) -> None:
    pass


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
