"""Code generation: from a Program to what runs elsewhere, and the backend of torch.compile."""

from __future__ import annotations

from typing import Any


def stats() -> dict[str, Any]:
    """What the backend did in this process, as `laconic.codegen.backend.stats.stats` tells it."""
    from laconic.codegen.backend import stats as counted

    return counted.stats()


def reset_stats() -> None:
    """Forget what the backend did so far."""
    from laconic.codegen.backend import stats as counted

    counted.reset_stats()
