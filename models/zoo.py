"""The reference models by name. Nothing heavy is imported before a model is loaded."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from laconic.ir.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from laconic.ir.source_model import Source

#: Those that are trained here.
TRAINED = ("llama-gqa", "llama-mha", "moe", "moe-sigmoid", "vit", "vlm")


def names() -> list[str]:
    """What `load` takes, sorted."""
    return sorted(["minilm", *TRAINED])


def load(name: str) -> Source:
    """A reference model with an example call. Raises UsageError for an unknown name, and what its loader raises."""
    if name == "minilm":
        from laconic.models import minilm

        return minilm.source()
    if name in TRAINED:
        from laconic.models import trained

        return trained.source(name)
    raise UsageError(f"there is no model zoo:{name}", hint=did_you_mean(name, names()))


def folder(name: str) -> Path:
    """Where a reference model and its tokenizer stand. Raises what `load` raises."""
    if name == "minilm":
        from laconic.models import minilm

        return minilm.folder()
    from laconic.models import trained

    return trained.folder(name)
