"""Capture of a causal model of transformers for generation: `prefill` takes a prompt, `decode` one token more, and both
keep keys and values in states. Where images stand among tokens, `vision` makes the features that `prefill` takes.

`attention_mask` has a column for each place of the cache: 1 where there is a token that may be attended to. Prompts of
different length are padded on the left.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import nn
from torch.export import Dim

from laconic.ir.capture import capture_module
from laconic.ir.errors import UnsupportedError
from laconic.ir.hf_static import WithStaticCaches, kept_by, past_of
from laconic.ir.hf_towers import Reader, capture_vision, image_token
from laconic.ir.past import DECODE, FEATURES, PIXELS, PREFILL, VISION, example
from laconic.ir.program import Program


class WithCache(WithStaticCaches):
    """A causal model with its caches as buffers: the logits of the last position."""

    def __init__(self, model: nn.Module, batch: int, length: int) -> None:
        super().__init__(model)
        past = past_of(model, {"input_ids": torch.full((1, 2), 2)})
        self.cache = self.add_cache(kept_by(model, past), batch, length)
        takes = inspect.signature(model.forward).parameters
        self._last = {"logits_to_keep": 1} if "logits_to_keep" in takes else {}
        self._positions = "position_ids" in takes

    def forward(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        cache_position: torch.Tensor,
        image_features: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        self.hold(self.cache, cache_position[0])
        placed = {"position_ids": position_ids} if self._positions else {}
        if image_features is not None:
            placed[FEATURES] = image_features
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            past_key_values=self.cache,
            use_cache=True,
            **placed,
            **self._last,
        )
        return {"logits": found.logits[:, -1:]}


def capture_causal(
    model: nn.Module, examples: Mapping[str, torch.Tensor], *, batch: int, length: int
) -> dict[str, Program]:
    """The entries that generate, each captured by itself; `examples`, by name, of the model's own call.

    Raises UnsupportedError if it reads images and the examples have none.
    """
    token = image_token(model)
    found: dict[str, Program] = {}
    seen: dict[str, torch.Tensor] = {}
    if token is not None:
        if PIXELS not in examples:
            raise UnsupportedError(
                f"{type(model).__name__} cannot be captured with a cache",
                why=f"images stand among its tokens, and its example has no {PIXELS}",
                hint="give an example with an image",
            )
        pixels = examples[PIXELS]
        found[VISION], features = capture_vision(model, pixels[torch.arange(batch) % len(pixels)])
        seen, model = {FEATURES: features}, Reader(model)
    cached = WithCache(model, batch, length)
    tokens = Dim("tokens", min=2, max=length - 1)
    dynamic = {
        "input_ids": {1: tokens},
        "attention_mask": None,
        "position_ids": {1: tokens},
        "cache_position": {0: tokens},
        **dict.fromkeys(seen),
    }
    prompt = min(5, length - 1)
    found[PREFILL] = capture_module(cached, (), example(batch, length, prompt, 0) | seen, dynamic, check=False)
    found[DECODE] = capture_module(cached, (), example(batch, length, 1, prompt), None, check=False)
    return found
