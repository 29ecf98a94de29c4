"""The loop: prompts in, tokens out. What chooses and what stops are transformers' own parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from laconic.generate.decoding import Decoder
from laconic.generate.prompts import Prompts, refuse_misfits, refuse_other_images, side_by_side
from laconic.ir.errors import UsageError
from laconic.ir.past import PIXELS


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen: the most likely, or drawn by the distribution that the settings leave."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None

    def __post_init__(self) -> None:
        """Raise UsageError for a setting out of range."""
        k, p, penalty = self.top_k, self.top_p, self.repetition_penalty
        for name, right, allowed in (
            ("temperature", self.temperature > 0, "above 0; do_sample=False takes the likeliest"),
            ("top_k", k is None or k >= 0, "1 or more, or None"),
            ("top_p", p is None or 0 < p <= 1, "above 0, and 1 at most"),
            ("repetition_penalty", penalty is None or penalty > 0, "above 0; 1 changes nothing"),
        ):
            if not right:
                raise UsageError(f"{name} is {getattr(self, name)}", hint=allowed)

    def processors(self, more: Iterable[Any], padding: torch.Tensor) -> Any:
        """transformers' logits processors for these settings, then those given; `padding` (sequences,) tells how many
        places in front of each prompt hold none of it."""
        import transformers as hf

        found = hf.LogitsProcessorList()
        if self.repetition_penalty is not None and self.repetition_penalty != 1.0:
            penalty = float(self.repetition_penalty)
            found.append(hf.RepetitionPenaltyLogitsProcessor(penalty, prompt_ignore_length=padding))
        found.extend(more)
        if self.do_sample:
            if self.temperature != 1.0:
                found.append(hf.TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k:
                found.append(hf.TopKLogitsWarper(top_k=self.top_k))
            if self.top_p is not None and self.top_p < 1.0:
                found.append(hf.TopPLogitsWarper(top_p=float(self.top_p)))
        return found


def generate(
    decoder: Decoder,
    prompts: Prompts,
    *,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    max_new_tokens: int = 20,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = 0,
    decoder_start_token_id: int | None = None,
    choice: Choice | None = None,
    seed: int | None = None,
    logits_processor: Iterable[Any] = (),
    stopping_criteria: Iterable[Any] = (),
    streamer: Callable[[torch.Tensor], None] | Any = None,
) -> torch.Tensor:
    """Continue prompts: (sequences, prompt + new tokens) int64, padded on the left as the prompts were, and with
    `pad_token_id` behind a sequence that has ended. Where prompts are sources for an encoder, what is continued is
    `decoder_start_token_id` (the token that pads, if it is not given). Where images stand among tokens, `pixel_values`
    has one for each prompt, which holds as many image tokens as an image has features, or none.

    `prompts` are token ids, as lists of different length or as a tensor with an `attention_mask` (0 where padded). At
    most `max_new_tokens` are added; a sequence ends with one of `eos_token_id`. With `choice.do_sample` tokens are
    drawn, from a generator of their own if there is a `seed`. `logits_processor` and `stopping_criteria` are those of
    transformers; `streamer` is called with each step's tokens (sequences,), or is one of its streamers.

    Raises UsageError for prompts that do not fit the cache, empty ones, or settings out of range.
    """
    pad = 0 if pad_token_id is None else pad_token_id
    start = pad if decoder_start_token_id is None else decoder_start_token_id
    ends = torch.as_tensor([] if eos_token_id is None else eos_token_id, dtype=torch.long).reshape(-1)
    ids, mask = side_by_side(prompts, attention_mask, pad)
    given = len(ids)
    named = {"pad_token_id": [pad], "eos_token_id": ends.tolist(), "decoder_start_token_id": [start]}
    refuse_misfits(decoder, ids, max_new_tokens, named)
    refuse_other_images(decoder, ids, pixel_values)
    choice = choice or Choice()
    padding = (mask == 0).sum(1)
    rows = torch.arange(decoder.batch).clamp(max=given - 1)  # sequences that nobody asked for repeat the last one
    images = {} if pixel_values is None else {PIXELS: pixel_values[rows]}
    steps: _Steps | _SourceSteps = _Steps(decoder, ids[rows], mask[rows], images)
    if decoder.source is not None:
        steps = _SourceSteps(decoder, decoder.source, ids[rows], mask[rows], start)
        ids, padding = torch.full((given, 1), start), torch.zeros_like(padding)
    processors = choice.processors(_several("logits_processor", logits_processor), padding)
    criteria = _several("stopping_criteria", stopping_criteria)
    _refuse_others(streamer, seed)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    going = torch.ones(given, dtype=torch.bool)
    said = ids
    if hasattr(streamer, "put"):
        streamer.put(ids)  # transformers' streamers are given the prompt first
    logits = steps.prompt()[:given]
    for step in range(max_new_tokens):
        scores = processors(said, logits.float())
        token = _chosen(scores, choice.do_sample, generator)
        token = torch.where(going, token, torch.full_like(token, pad))
        said = torch.cat([said, token[:, None]], 1)
        _stream(streamer, token)
        going &= ~torch.isin(token, ends)
        for criterion in criteria:
            going &= ~torch.as_tensor(criterion(said, scores), dtype=torch.bool)
        if not bool(going.any()) or step == max_new_tokens - 1:
            break
        logits = steps.token(token[rows])[:given]
    if hasattr(streamer, "end"):
        streamer.end()
    return said


class _Steps:
    """The inputs of each step: which places of the cache are taken, and by tokens of which position."""

    def __init__(
        self, decoder: Decoder, ids: torch.Tensor, mask: torch.Tensor, images: dict[str, torch.Tensor]
    ) -> None:
        if ids.shape[1] == 1:  # a prompt has two places at least
            ids, mask = (torch.cat([torch.zeros_like(t), t], 1) for t in (ids, mask))
        self.decoder, self.ids, self.images, self.at = decoder, ids, images, ids.shape[1]
        self.positions = (mask.cumsum(1) - 1).clamp(min=0)
        self.mask = torch.zeros(len(ids), decoder.length, dtype=torch.long)
        self.mask[:, : self.at] = mask

    def prompt(self) -> torch.Tensor:
        self.decoder.start()
        return self._run(self.ids, self.positions, torch.arange(self.at), self.images, first=True)

    def token(self, token: torch.Tensor) -> torch.Tensor:
        """The logits behind one more token of each sequence, (batch,)."""
        self.mask[:, self.at] = 1
        self.positions = self.positions[:, -1:] + 1
        self.at += 1
        return self._run(token[:, None], self.positions, torch.tensor([self.at - 1]), {})

    def _run(
        self,
        ids: torch.Tensor,
        positions: torch.Tensor,
        places: torch.Tensor,
        more: dict[str, torch.Tensor],
        *,
        first: bool = False,
    ) -> torch.Tensor:
        given = {"input_ids": ids, "position_ids": positions, "attention_mask": self.mask, "cache_position": places}
        return self.decoder.run(given | more, first=first)


class _SourceSteps:
    """The inputs of each step where a source is read first: it is padded on the right to all that its cache holds."""

    def __init__(self, decoder: Decoder, size: int, ids: torch.Tensor, mask: torch.Tensor, start: int) -> None:
        self.decoder, self.start, self.at = decoder, start, 0
        self.ids = torch.zeros(len(ids), size, dtype=torch.long)
        self.mask = torch.zeros_like(self.ids)
        for row, (own, there) in enumerate(zip(ids, mask.bool(), strict=True)):
            kept = own[there]
            self.ids[row, : len(kept)], self.mask[row, : len(kept)] = kept, 1

    def prompt(self) -> torch.Tensor:
        self.decoder.start()
        return self._run(torch.full((len(self.ids), 1), self.start), {"input_ids": self.ids}, first=True)

    def token(self, token: torch.Tensor) -> torch.Tensor:
        """The logits behind one more token of each sequence, (batch,)."""
        self.at += 1
        return self._run(token[:, None], {})

    def _run(self, token: torch.Tensor, more: dict[str, torch.Tensor], *, first: bool = False) -> torch.Tensor:
        places = torch.tensor([self.at])
        given = {"decoder_input_ids": token, "attention_mask": self.mask, "cache_position": places}
        return self.decoder.run(given | more, first=first)


def _refuse_others(streamer: Any, seed: Any) -> None:
    if streamer is not None and not (callable(streamer) or hasattr(streamer, "put")):
        raise UsageError(f"streamer is a {type(streamer).__name__}", hint="a function of tokens, or one with put()")
    if seed is not None and type(seed) is not int:
        raise UsageError(f"seed is {seed!r}", hint="a whole number")


def _several(name: str, given: Any) -> list[Any]:
    """One function, or several. Raises UsageError for what is none."""
    found = list(given) if isinstance(given, Iterable) else [given]
    wrong = next((part for part in found if not callable(part)), None)
    if wrong is not None:
        raise UsageError(
            f"{name} has a {type(wrong).__name__}", hint="functions of ids and scores, as transformers' own"
        )
    return found


def _chosen(scores: torch.Tensor, sample: bool, generator: torch.Generator | None) -> torch.Tensor:
    if not sample:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def _stream(streamer: Any, token: torch.Tensor) -> None:
    if streamer is not None:
        (streamer.put if hasattr(streamer, "put") else streamer)(token)
