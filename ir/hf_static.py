"""transformers' static caches as buffers of a module: (batch, heads, length, width) for each layer, which a call writes
into at the places that `cache_position` names."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import nn


class WithStaticCaches(nn.Module):
    """A model of transformers whose caches are buffers of this module: `<prefix>key_cache_0` and so on.

    Layers with a window keep all that they have seen too: the mask says what they see, and places stay places.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]

    def add_cache(self, batch: int, length: int, prefix: str = "") -> Any:
        """A cache of so many sequences and tokens for all layers of the decoder."""
        from transformers.cache_utils import Cache, StaticLayer

        config = self.config
        count = getattr(config, "num_decoder_layers", None) or config.num_hidden_layers
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
        width = width or config.hidden_size // config.num_attention_heads
        weight = next(self.model.parameters())
        cache = Cache(layers=[StaticLayer(max_cache_len=length) for _ in range(count)])
        cache.early_initialization(batch, heads, width, weight.dtype, weight.device)
        for k, layer in enumerate(cast(list[Any], cache.layers)):
            self.register_buffer(f"{prefix}key_cache_{k}", layer.keys, persistent=False)
            self.register_buffer(f"{prefix}value_cache_{k}", layer.values, persistent=False)
        return cache

    def hold(self, cache: Any, place: torch.Tensor, prefix: str = "") -> None:
        """Let a cache hold this module's buffers, to be written into from this place on."""
        for k, layer in enumerate(cache.layers):
            layer.keys = getattr(self, f"{prefix}key_cache_{k}")
            layer.values = getattr(self, f"{prefix}value_cache_{k}")
            layer.cumulative_length = place.clone()
