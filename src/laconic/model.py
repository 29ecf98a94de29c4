"""What people call: a Program as a model that also generates."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from laconic.codegen.backend.programs import CompiledModel
from laconic.generate import ProgramDecoder, generate
from laconic.generate.compiled import CompiledDecoder
from laconic.generate.loop import Choice
from laconic.generate.prompts import Prompts
from laconic.ir.program import Kind
from laconic.ir.run import Runnable


class Model(Runnable):
    """A Program as a model, which generates if it was captured with a cache."""

    _decoding: ProgramDecoder | None = None

    def decoding(self) -> ProgramDecoder:
        """The entries that generate, on this model's weights. Raises UsageError if it has none."""
        if self._decoding is None:
            self._decoding = self._new_decoding()
        return self._decoding

    def _new_decoding(self) -> ProgramDecoder:
        return ProgramDecoder(self.program, self._own_rows())

    def _own_rows(self) -> dict[str, torch.Tensor]:
        """This model's weights, with the program's states."""
        rows = {name: getattr(module, last) for name, (module, last) in self._rows.items()}
        return rows | {name: w.value for name, w in self.program.weights.items() if w.kind is Kind.STATE}

    def generate(
        self,
        prompts: Prompts,
        *,
        attention_mask: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        max_new_tokens: int = 20,
        do_sample: bool = False,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        repetition_penalty: float | None = None,
        eos_token_id: int | Sequence[int] | None = None,
        pad_token_id: int | None = 0,
        decoder_start_token_id: int | None = None,
        seed: int | None = None,
        logits_processor: Iterable[Any] = (),
        stopping_criteria: Iterable[Any] = (),
        streamer: Any = None,
    ) -> torch.Tensor:
        """Continue prompts, as `laconic.generate.generate` does: (sequences, prompt + new tokens) int64.

        Greedy, or with `do_sample` drawn at a temperature from the `top_k` likeliest tokens, or from those that make
        `top_p`; the same tokens again for the same `seed`. `eos_token_id` ends a sequence.

        Raises UsageError for a model that was captured without a cache, and prompts that do not fit it.
        """
        return generate(
            self.decoding(),
            prompts,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            max_new_tokens=max_new_tokens,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            decoder_start_token_id=decoder_start_token_id,
            choice=Choice(do_sample, temperature, top_k, top_p, repetition_penalty),
            seed=seed,
            logits_processor=logits_processor,
            stopping_criteria=stopping_criteria,
            streamer=streamer,
        )


class Compiled(Model, CompiledModel):
    """A saved Program as a compiled model, which generates by compiled entries."""

    def _new_decoding(self) -> CompiledDecoder:
        return CompiledDecoder(self.program, self._own_rows(), self._options)
