"""The loop: prompts in, tokens out. What chooses and what stops are transformers' own parts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from laconic.generate.decoding import Decoder
from laconic.ir.errors import UsageError
from laconic.ir.past import FEATURES, PIXELS, PREFILL, VISION

Prompts = torch.Tensor | Sequence[Sequence[int]]


@dataclass(frozen=True)
class Choice:
    """How the next token is chosen: the most likely, or drawn by the distribution that the settings leave."""

    do_sample: bool = False
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    repetition_penalty: float | None = None

    def processors(self, more: Iterable[Any]) -> Any:
        """transformers' logits processors for these settings, then those given."""
        import transformers as hf

        found = hf.LogitsProcessorList()
        if self.repetition_penalty is not None and self.repetition_penalty != 1.0:
            found.append(hf.RepetitionPenaltyLogitsProcessor(penalty=self.repetition_penalty))
        found.extend(more)
        if self.do_sample:
            if self.temperature != 1.0:
                found.append(hf.TemperatureLogitsWarper(self.temperature))
            if self.top_k:
                found.append(hf.TopKLogitsWarper(top_k=self.top_k))
            if self.top_p is not None and self.top_p < 1.0:
                found.append(hf.TopPLogitsWarper(top_p=self.top_p))
        return found


def generate(
    decoder: Decoder,
    prompts: Prompts,
    *,
    attention_mask: torch.Tensor | None = None,
    pixel_values: torch.Tensor | None = None,
    max_new_tokens: int = 20,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
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
    ids, mask = _padded(prompts, attention_mask, pad_token_id)
    given, width = ids.shape
    _refuse_misfits(decoder, given, width, max_new_tokens)
    _refuse_other_images(decoder, ids, pixel_values)
    choice = choice or Choice()
    rows = torch.arange(decoder.batch).clamp(max=given - 1)  # sequences that nobody asked for repeat the last one
    images = {} if pixel_values is None else {PIXELS: pixel_values[rows]}
    steps: _Steps | _SourceSteps = _Steps(decoder, ids[rows], mask[rows], images)
    if decoder.source is not None:
        start = pad_token_id if decoder_start_token_id is None else decoder_start_token_id
        steps = _SourceSteps(decoder, decoder.source, ids[rows], mask[rows], start)
        ids = torch.full((given, 1), start)
    processors = choice.processors(logits_processor)
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    ends = torch.tensor([eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or ()), dtype=torch.long)
    going = torch.ones(given, dtype=torch.bool)
    said = ids
    if hasattr(streamer, "put"):
        streamer.put(ids)  # transformers' streamers are given the prompt first
    logits = steps.prompt()[:given]
    for step in range(max_new_tokens):
        scores = processors(said, logits.float())
        token = _chosen(scores, choice.do_sample, generator)
        token = torch.where(going, token, torch.full_like(token, pad_token_id))
        said = torch.cat([said, token[:, None]], 1)
        _stream(streamer, token)
        going &= ~torch.isin(token, ends)
        for criterion in stopping_criteria:
            going &= ~criterion(said, scores)
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
        self.ids, self.mask = (
            torch.zeros(len(ids), size, dtype=torch.long),
            torch.zeros(len(ids), size, dtype=torch.long),
        )
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


def _chosen(scores: torch.Tensor, sample: bool, generator: torch.Generator | None) -> torch.Tensor:
    if not sample:
        return scores.argmax(-1)
    return torch.multinomial(scores.softmax(-1), 1, generator=generator)[:, 0]


def _stream(streamer: Any, token: torch.Tensor) -> None:
    if streamer is not None:
        (streamer.put if hasattr(streamer, "put") else streamer)(token)


def _padded(prompts: Prompts, mask: torch.Tensor | None, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as (sequences, tokens) with padding on the left, and 1 where there is a token."""
    if isinstance(prompts, torch.Tensor):
        if prompts.dim() != 2 or (mask is not None and mask.shape != prompts.shape):
            raise UsageError(
                f"prompts are {tuple(prompts.shape)}"
                + (f", their mask {tuple(mask.shape)}" if mask is not None else ""),
                hint="token ids (sequences, tokens), and a mask of the same shape",
            )
        if mask is None:
            return prompts.long(), torch.ones_like(prompts, dtype=torch.long)
        rows = [row[own.bool()].tolist() for row, own in zip(prompts, mask, strict=True)]
        if torch.equal(mask.long(), mask.long().cummax(1).values):  # padded on the left already
            return prompts.long(), mask.long()
        return _padded(rows, None, pad)
    if not prompts or not all(prompts):
        raise UsageError("there is no prompt, or an empty one", hint="each prompt needs one token at least")
    width = max(map(len, prompts))
    ids = torch.full((len(prompts), width), pad, dtype=torch.long)
    found = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(list(prompt))
        found[row, width - len(prompt) :] = 1
    return ids, found


def _refuse_misfits(decoder: Decoder, sequences: int, width: int, more: int) -> None:
    if sequences > decoder.batch:
        raise UsageError(
            f"there are {sequences} prompts, and the cache holds {decoder.batch}",
            hint=f"give {decoder.batch} at a time, or capture with a larger cache",
        )
    if more < 1:
        raise UsageError(f"max_new_tokens is {more}", hint="one token at least")
    if decoder.source is not None:
        if width > decoder.source:
            raise UsageError(
                f"the longest source has {width} tokens, and its cache holds {decoder.source}",
                hint="shorten it, or capture with a longer cache",
            )
        if more > decoder.length:
            raise UsageError(
                f"{more} new tokens need a cache of {more}", why=f"it holds {decoder.length}", hint="ask for fewer"
            )
        return
    if max(width, 2) >= decoder.length:
        raise UsageError(
            f"the longest prompt has {width} tokens, and the cache holds {decoder.length}",
            why="the prompt and what is generated stand in it",
            hint="shorten the prompt, or capture with a longer cache",
        )
    if max(width, 2) + more - 1 > decoder.length:
        raise UsageError(
            f"a prompt of {width} tokens and {more} new ones need a cache of {max(width, 2) + more - 1}",
            why=f"it holds {decoder.length}",
            hint=f"max_new_tokens={decoder.length - max(width, 2) + 1}, or capture with a longer cache",
        )


def _refuse_other_images(decoder: Decoder, ids: torch.Tensor, pixels: torch.Tensor | None) -> None:
    if decoder.image_token is None:
        if pixels is not None:
            raise UsageError(f"there are {PIXELS}, and the model was captured without images", hint="leave them out")
        return
    counts = (ids == decoder.image_token).sum(1).tolist()
    features = decoder.takes(PREFILL, FEATURES).shape[1]
    wanted = (0, features) if pixels is not None else (0,)
    for row, count in enumerate(counts):
        if count not in wanted:
            raise UsageError(
                f"prompt {row} has {count} image tokens ({decoder.image_token})",
                why=f"an image has {features} features" if pixels is not None else f"there are no {PIXELS}",
                hint=f"one token for each feature, and one image for each prompt, as {PIXELS}",
            )
    if pixels is not None:
        image = tuple(decoder.takes(VISION, PIXELS).shape[1:])
        if pixels.dim() != 4 or len(pixels) != len(ids) or tuple(pixels.shape[1:]) != image:
            raise UsageError(
                f"{PIXELS} are {tuple(pixels.shape)}", hint=f"{(len(ids), *image)}: one image for each prompt"
            )
