"""transformers' static caches as buffers of a module: (batch, heads, length, width) for each layer, which a call writes
into at the places that `cache_position` names."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from laconic.ir.errors import UnsupportedError, UsageError


class WithStaticCaches(nn.Module):
    """A model of transformers whose caches are buffers of this module: `<prefix>key_cache_0` and so on.

    Layers with a window keep all that they have seen too: the mask says what they see, and places stay places.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]

    def add_cache(self, kept: Sequence[Kept], batch: int, length: int, prefix: str = "") -> Any:
        """A cache of so many sequences and tokens for layers that keep such keys and values."""
        from transformers.cache_utils import Cache, StaticLayer

        _refuse_beyond_memory(kept, batch, length)
        layers: list[Any] = [StaticLayer(max_cache_len=length) for _ in kept]
        for k, (layer, (keys, values)) in enumerate(zip(layers, kept, strict=True)):
            layer.lazy_initialization(*(t[:1].expand(batch, *t.shape[1:]) for t in (keys, values)))
            self.register_buffer(f"{prefix}key_cache_{k}", layer.keys, persistent=False)
            self.register_buffer(f"{prefix}value_cache_{k}", layer.values, persistent=False)
        return Cache(layers=layers)

    def hold(self, cache: Any, place: torch.Tensor, prefix: str = "") -> None:
        """Let a cache hold this module's buffers, to be written into from this place on."""
        for k, layer in enumerate(cache.layers):
            layer.keys = getattr(self, f"{prefix}key_cache_{k}")
            layer.values = getattr(self, f"{prefix}value_cache_{k}")
            layer.cumulative_length = place.clone()


#: What a layer keeps of some tokens: keys and values, (batch, heads, tokens, width).
Kept = tuple[torch.Tensor, torch.Tensor]


@torch.no_grad()
def past_of(model: nn.Module, inputs: Mapping[str, torch.Tensor]) -> Any:
    """What the model itself keeps of these inputs."""
    return model(**inputs, use_cache=True).past_key_values


def kept_by(model: nn.Module, past: Any) -> list[Kept]:
    """What each layer keeps. Raises UnsupportedError if a layer keeps no keys and values."""
    found = []
    for k, layer in enumerate(getattr(past, "layers", ())):
        keys, values = (getattr(layer, name, None) for name in ("keys", "values"))
        if not (isinstance(keys, torch.Tensor) and isinstance(values, torch.Tensor) and keys.dim() == 4):
            raise not_cached(model, f"its layer {k} keeps a {type(layer).__name__}, and no keys and values")
        found.append((keys, values))
    if not found:
        raise not_cached(model, f"it keeps a {type(past).__name__}, and no keys and values of layers")
    return found


def not_cached(model: nn.Module, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(model).__name__} cannot be captured with a cache",
        why=why,
        hint="models of transformers with attention in every layer can",
    )


def _refuse_beyond_memory(kept: Sequence[Kept], batch: int, length: int) -> None:
    width = sum(t.shape[1] * t.shape[3] * t.element_size() for layer in kept for t in layer)
    most = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if width * batch * length > most:
        raise UsageError(
            f"caches of {batch} sequences of {length} tokens take {width * batch * length / 2**30:.0f} GiB",
            why=f"{width} bytes a token; the machine has {most / 2**30:.0f} GiB",
            hint="capture with fewer sequences, or shorter ones",
        )
