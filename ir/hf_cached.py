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
from laconic.ir.past import DECODE, PREFILL, example
from laconic.ir.program import Program


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
        weight = next(model.parameters())
        self.cache.early_initialization(batch, *heads_and_width(config), weight.dtype, weight.device)
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


def heads_and_width(config: Any) -> tuple[int, int]:
    """The heads of keys, and the width of each, as a configuration has them. Raises AttributeError if it does not."""
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    width = getattr(config, "head_dim", None) or getattr(config, "d_kv", None)
    return heads, width or config.hidden_size // config.num_attention_heads


def capture_cached(model: nn.Module, forward: Program, *, batch: int, length: int) -> Program:
    """The Program `forward` of a model of transformers, with entries that generate, and caches for so many sequences of
    so many tokens: `prefill` of prompts of 2 tokens to all but one, and `decode` of one; of an encoder with a decoder,
    `encode` of a source of as many tokens, and `decode`.

    Raises UsageError for sizes that hold nothing, UnsupportedError for a model whose cache is not of this kind.
    """
    from laconic.ir.hf_seq2seq import capture_both

    if batch < 1 or length < 3:
        raise UsageError(
            f"a cache of {batch} sequences of {length} tokens", hint="at least one sequence of three tokens"
        )
    facts = {"batch": batch, "length": length}
    try:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            entries, facts["source"] = capture_both(model, batch=batch, source=length, length=length), length
        else:
            entries = _capture_causal(model, batch, length)
    except (AttributeError, TypeError, ImportError, StopIteration) as problem:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be captured with a cache",
            why=str(problem).splitlines()[0],
            hint="models of transformers with attention in every layer can",
        ) from problem
    for name, program in entries.items():
        states = {f"{part}_cache_{k}" for part in ("key", "value") for k in range(_layers(program))}
        missing = states - program.forward.updated()
        if missing or not states:
            raise UnsupportedError(
                f"{type(model).__name__} cannot be captured with a cache",
                why=f"{name} does not write into {', '.join(sorted(missing)[:4]) or 'any'}",
                hint="models of transformers with attention in every layer can",
            )
    made = combine({"forward": forward, **entries})
    made.facts["cache"] = facts
    return made


def _layers(program: Program) -> int:
    """How many layers the caches of an entry have."""
    return sum(name.startswith("key_cache_") for name in program.weights)


def _capture_causal(model: nn.Module, batch: int, length: int) -> dict[str, Program]:
    cached = WithCache(model, batch, length).eval()
    tokens = Dim("tokens", min=2, max=length - 1)
    dynamic = {
        "input_ids": {1: tokens},
        "attention_mask": None,
        "position_ids": {1: tokens},
        "cache_position": {0: tokens},
    }
    prompt = min(5, length - 1)
    return {
        PREFILL: capture_module(cached, (), example(batch, length, prompt, 0), dynamic, check=False),
        DECODE: capture_module(cached, (), example(batch, length, 1, prompt), None, check=False),
    }
