"""The reference models by name. Nothing heavy is imported before a model is loaded."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from laconic.ir.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from laconic.ir.source_model import Source

# Name: the module and the function in it that returns a Source.
_LOADERS = {"minilm": ("laconic.models.minilm", "source")}


def names() -> list[str]:
    """What `load` takes, sorted."""
    return sorted(_LOADERS)


def load(name: str) -> Source:
    """A reference model with an example call. Raises UsageError for an unknown name, and what its loader raises."""
    if name not in _LOADERS:
        raise UsageError(f"there is no model zoo:{name}", hint=did_you_mean(name, _LOADERS))
    module, function = _LOADERS[name]
    found: Source = getattr(importlib.import_module(module), function)()
    return found
