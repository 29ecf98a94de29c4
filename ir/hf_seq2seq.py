"""Capture of an encoder with a decoder of transformers for generation: `encode` takes a source and the first token,
`decode` one token more.

Keys and values of the source stand in states beside those of the tokens: `encode` writes both, `decode` reads the one
and adds to the other. `attention_mask` is 1 where the source has a token; it is as long as the cache of the source.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from laconic.ir.capture import capture_module
from laconic.ir.hf_static import WithStaticCaches, kept_by, past_of
from laconic.ir.past import DECODE, ENCODE
from laconic.ir.program import Program


class WithBothCaches(WithStaticCaches):
    """An encoder with a decoder, with caches as buffers: the logits of one token. A source is given to the `first` call
    only."""

    def __init__(self, model: nn.Module, batch: int, source: int, length: int, *, first: bool) -> None:
        super().__init__(model)
        self.first = first
        some = torch.full((1, 2), 2)
        past = past_of(model, {"input_ids": some, "decoder_input_ids": some})
        self.own = self.add_cache(kept_by(model, past.self_attention_cache), batch, length)
        self.cross = self.add_cache(kept_by(model, past.cross_attention_cache), batch, source, "cross_")
        self.hidden = (batch, source, int(self.config.hidden_size))

    def forward(
        self,
        attention_mask: torch.Tensor,
        decoder_input_ids: torch.Tensor,
        cache_position: torch.Tensor,
        input_ids: torch.Tensor | None = None,
    ) -> dict[str, torch.Tensor]:
        from transformers.cache_utils import EncoderDecoderCache
        from transformers.modeling_outputs import BaseModelOutput

        self.hold(self.own, cache_position[0])
        self.hold(self.cross, torch.zeros_like(cache_position[0]), "cross_")
        both: Any = EncoderDecoderCache.__new__(EncoderDecoderCache)  # its constructor looks at values
        both.self_attention_cache, both.cross_attention_cache = self.own, self.cross
        both.is_updated = dict.fromkeys(range(len(self.own.layers)), not self.first)
        given: dict[str, Any] = {"input_ids": input_ids}
        if not self.first:  # what is read of the source stands in the cache: its shape is all that counts
            weight = next(self.model.parameters())
            empty = torch.zeros(self.hidden, dtype=weight.dtype, device=weight.device)
            given = {"encoder_outputs": BaseModelOutput(last_hidden_state=empty)}
        found = self.model(
            attention_mask=attention_mask,
            decoder_input_ids=decoder_input_ids,
            past_key_values=both,
            use_cache=True,
            **given,
        )
        return {"logits": found.logits[:, -1:]}


def capture_both(model: nn.Module, *, batch: int, source: int, length: int) -> dict[str, Program]:
    """The entries that generate, each captured by itself."""
    first = WithBothCaches(model, batch, source, length, first=True)
    later = WithBothCaches(model, batch, source, length, first=False)
    ids = {"input_ids": (torch.arange(batch * source) % 29 + 2).reshape(batch, source)}
    mask = torch.ones(batch, source, dtype=torch.long)
    mask[0, -1] = 0  # the range that inputs are drawn from
    given = {
        "attention_mask": mask,
        "decoder_input_ids": torch.full((batch, 1), 2),
        "cache_position": torch.tensor([0]),
    }
    return {
        ENCODE: capture_module(first, (), given | ids, None, check=False),
        DECODE: capture_module(later, (), given | {"cache_position": torch.tensor([1])}, None, check=False),
    }
