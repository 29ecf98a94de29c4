"""Capture of a decoder of transformers for generation: `prefill` takes a prompt, `decode` one token more, and both keep
keys and values in states.

The caches are transformers' own static ones: (batch, heads, length, width) for each layer, which a call writes into at
the places that `cache_position` names. `attention_mask` has a column for each place of the cache: 1 where there is a
token that may be attended to. Prompts of different length are padded on the left.
"""

from __future__ import annotations

import inspect
from typing import Any, cast

import torch
from torch import nn
from torch.export import Dim

from laconic.ir.capture import capture_module
from laconic.ir.entries import combine
from laconic.ir.errors import UnsupportedError, UsageError
from laconic.ir.program import Program

#: The entries that generate.
PREFILL, DECODE = "prefill", "decode"


class WithCache(nn.Module):
    """A causal model with its caches as buffers: the logits of the last position."""

    def __init__(self, model: nn.Module, batch: int, length: int) -> None:
        from transformers.cache_utils import Cache, StaticLayer

        super().__init__()
        self.model, self.length = model, length
        config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        layers = config.num_hidden_layers
        # Layers with a window keep all that they have seen too: the mask says what they see, and places stay places.
        self.cache = Cache(layers=[StaticLayer(max_cache_len=length) for _ in range(layers)])
        self.layers = cast(list[Any], self.cache.layers)
        heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        weight = next(model.parameters())
        self.cache.early_initialization(batch, heads, width, weight.dtype, weight.device)
        for k, layer in enumerate(self.layers):
            self.register_buffer(f"key_cache_{k}", layer.keys, persistent=False)
            self.register_buffer(f"value_cache_{k}", layer.values, persistent=False)
        takes = inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._positions = "position_ids" in takes

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache_position: torch.Tensor,
    ) -> dict[str, torch.Tensor]:
        for k, layer in enumerate(self.layers):
            layer.keys, layer.values = getattr(self, f"key_cache_{k}"), getattr(self, f"value_cache_{k}")
            layer.cumulative_length = cache_position[0].clone()
        placed = {"position_ids": position_ids} if self._positions else {}
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=self.cache,
            use_cache=True,
            **placed,
            **self._last,
        )
        return {"logits": found.logits[:, -1:]}


def capture_cached(model: nn.Module, forward: Program, *, batch: int, length: int) -> Program:
    """The Program `forward` of a causal model, with entries that generate, and caches for so many sequences of so many
    tokens: `prefill` of prompts of 2 tokens to all but one, `decode` of one.

    Raises UsageError for sizes that hold nothing, UnsupportedError for a model whose cache is not of this kind.
    """
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise UnsupportedError(
            f"{type(model).__name__} cannot be captured with a cache",
            why="it is an encoder with a decoder, whose cache has keys of both",
            hint="causal models of transformers with attention in every layer can",
        )
    if batch < 1 or length < 3:
        raise UsageError(
            f"a cache of {batch} sequences of {length} tokens", hint="at least one sequence of three tokens"
        )
    try:
        cached = WithCache(model, batch, length).eval()
    except (AttributeError, TypeError, ImportError, StopIteration) as problem:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be captured with a cache",
            why=str(problem).splitlines()[0],
            hint="causal models of transformers with attention in every layer can",
        ) from problem
    tokens = Dim("tokens", min=2, max=length - 1)
    dynamic = {
        "input_ids": {1: tokens},
        "attention_mask": None,
        "position_ids": {1: tokens},
        "cache_position": {0: tokens},
    }
    prompt = min(5, length - 1)
    entries = {
        PREFILL: capture_module(cached, (), example(batch, length, prompt, 0), dynamic, check=False),
        DECODE: capture_module(cached, (), example(batch, length, 1, prompt), None, check=False),
    }
    for name, program in entries.items():
        missing = {f"{part}_cache_{k}" for part in ("key", "value") for k in range(len(cached.layers))}
        missing -= program.forward.updated()
        if missing:
            raise UnsupportedError(
                f"{type(model).__name__} cannot be captured with a cache",
                why=f"{name} does not write into {', '.join(sorted(missing)[:4])}",
                hint="causal models of transformers with attention in every layer can",
            )
    return combine({"forward": forward, **entries})


def refuse_without_past(program: Program, cannot: str) -> None:
    """Raise UsageError for a Program without the entries that generate; `cannot` says what follows from that."""
    missing = [name for name in (PREFILL, DECODE) if name not in program.entries]
    if missing:
        raise UsageError(
            f"the model has no entry {missing[0]!r}, so {cannot}",
            why=f"its entries are {', '.join(program.entries)}",
            hint="capture or optimize it with cache=(batch, length), or --cache BATCHxLENGTH",
        )


def cache_size(program: Program) -> tuple[int, int]:
    """The sequences and tokens that the caches of a Program that can generate hold."""
    entry = program.entries[DECODE]
    node = next(n for n in entry.input_nodes() if n.meta["name"] == "attention_mask")
    batch, length = node.meta["val"].shape
    return int(batch), int(length)


def example(batch: int, length: int, tokens: int, at: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs for so many tokens from a place of the cache on; low token ids, which every vocabulary has."""
    places = torch.arange(at, at + tokens)
    mask = torch.zeros(batch, length, dtype=torch.long)
    mask[:, : at + tokens] = 1
    return {
        "input_ids": (torch.arange(batch * tokens) * (seed + 1) % 29 + 2).reshape(batch, tokens),
        "attention_mask": mask,
        "position_ids": places.expand(batch, tokens).clone(),
        "cache_position": places,
    }
