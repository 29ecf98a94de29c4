"""A module with an example call: what every way of naming a model comes to before capture."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import Dim


@dataclass(frozen=True)
class Source:
    """A module with the arguments of an example call; `dynamic_shapes` as torch.export takes it, by argument name.

    `folder` is where the model came from, if it has one: a tokenizer or the scale of pixels may stand there too.
    """

    module: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dynamic_shapes: Any
    name: str
    folder: Path | None = None

    def with_auto_dims(self) -> Source:
        """The same call with `Dim.AUTO` (of the same range) for each named axis: torch then fixes what it must."""
        return replace(self, dynamic_shapes=_auto(self.dynamic_shapes))


def _auto(spec: Any) -> Any:
    if isinstance(spec, Dim):
        return Dim.AUTO(min=spec.min, max=spec.max)
    if isinstance(spec, dict):
        return {key: _auto(value) for key, value in spec.items()}
    return type(spec)(map(_auto, spec)) if isinstance(spec, (list, tuple)) else spec
