"""What is asked of generation: prompts side by side, and what does not fit refused with numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from laconic.generate.decoding import Decoder
from laconic.ir.errors import UsageError
from laconic.ir.past import FEATURES, PIXELS, PREFILL, VISION

Prompts = torch.Tensor | Sequence[Sequence[int]]


def side_by_side(prompts: Prompts, mask: Any, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Prompts as (sequences, tokens) int64 with padding on the left, and 1 where there is a token.

    Raises UsageError for what is no prompt.
    """
    if isinstance(prompts, torch.Tensor):
        return _of_tensor(prompts, mask, pad)
    if mask is not None:
        raise UsageError("there is an attention_mask beside lists of tokens", hint="lists are as long as they are")
    rows = [_tokens(prompt) for prompt in prompts] if _listed(prompts) else []
    if not rows or not all(rows):
        raise UsageError("there is no prompt, or an empty one", hint="each prompt needs one token at least")
    width = max(map(len, rows))
    ids = torch.full((len(rows), width), pad, dtype=torch.long)
    found = torch.zeros_like(ids)
    for k, row in enumerate(rows):
        ids[k, width - len(row) :] = torch.tensor(row)
        found[k, width - len(row) :] = 1
    return ids, found


def _listed(value: Any) -> bool:
    return isinstance(value, Iterable) and not isinstance(value, (str, bytes))


def _tokens(prompt: Any) -> list[int]:
    """One prompt as numbers."""
    if isinstance(prompt, torch.Tensor) or hasattr(prompt, "__array__"):
        prompt = torch.as_tensor(prompt)
        prompt = prompt.tolist() if prompt.dim() == 1 and _whole(prompt) else None
    if not _listed(prompt) or not all(isinstance(token, int) for token in prompt):
        raise UsageError(
            f"a prompt is a {type(prompt).__name__}, and no list of token ids",
            hint="[[5, 6, 7], [9, 8]]; a tokenizer makes them of text",
        )
    return list(prompt)


def _whole(values: torch.Tensor) -> bool:
    return not (values.dtype.is_floating_point or values.dtype.is_complex or values.dtype is torch.bool)


def _of_tensor(prompts: torch.Tensor, mask: Any, pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.ones_like(prompts) if mask is None else torch.as_tensor(mask)
    if prompts.dim() != 2 or mask.shape != prompts.shape or not _whole(prompts):
        raise UsageError(
            f"prompts are {tuple(prompts.shape)} of {prompts.dtype}, their mask {tuple(mask.shape)}",
            hint="token ids (sequences, tokens), and a mask of the same shape",
        )
    there = mask.bool()
    if not prompts.numel() or not bool(there.any(1).all()):
        raise UsageError("there is no prompt, or an empty one", hint="each prompt needs one token at least")
    if torch.equal(there.long(), there.long().cummax(1).values):  # padded on the left already
        return prompts.long(), there.long()
    return side_by_side([row[own].tolist() for row, own in zip(prompts, there, strict=True)], None, pad)


def refuse_misfits(decoder: Decoder, ids: torch.Tensor, more: Any, tokens: Mapping[str, Iterable[int]]) -> None:
    """Raise UsageError for more than the caches hold, and for ids, among them those of `tokens` by name, that the model
    does not know."""
    sequences, width = ids.shape
    if sequences > decoder.batch:
        raise UsageError(
            f"there are {sequences} prompts, and the cache holds {decoder.batch}",
            hint=f"give {decoder.batch} at a time, or capture with a larger cache",
        )
    if type(more) is not int or more < 1:
        raise UsageError(f"max_new_tokens is {more}", hint="one token at least")
    for name, values in {"prompts": sorted(set(ids.flatten().tolist())), **tokens}.items():
        known = range(decoder.vocabulary)
        unknown = [value for value in values if value not in known and value != decoder.image_token]
        if unknown:
            raise UsageError(
                f"the model does not know the token {unknown[0]} of {name}",
                why=f"it has {decoder.vocabulary}, from 0 to {decoder.vocabulary - 1}",
            )
    if decoder.source is not None:
        _refuse_long_source(width, decoder.source, more, decoder.length)
    else:
        _refuse_long_prompt(width, more, decoder.length)


def _refuse_long_source(width: int, source: int, more: int, length: int) -> None:
    if width > source:
        raise UsageError(
            f"the longest source has {width} tokens, and its cache holds {source}",
            hint="shorten it, or capture with a longer cache",
        )
    if more > length:
        raise UsageError(f"{more} new tokens need a cache of {more}", why=f"it holds {length}", hint="ask for fewer")


def _refuse_long_prompt(width: int, more: int, length: int) -> None:
    if max(width, 2) >= length:
        raise UsageError(
            f"the longest prompt has {width} tokens, and the cache holds {length}",
            why="the prompt and what is generated stand in it",
            hint="shorten the prompt, or capture with a longer cache",
        )
    if max(width, 2) + more - 1 > length:
        raise UsageError(
            f"a prompt of {width} tokens and {more} new ones need a cache of {max(width, 2) + more - 1}",
            why=f"it holds {length}",
            hint=f"max_new_tokens={length - max(width, 2) + 1}, or capture with a longer cache",
        )


def refuse_other_images(decoder: Decoder, ids: torch.Tensor, pixels: torch.Tensor | None) -> None:
    """Raise UsageError for images without their tokens, tokens without their image, and images of another shape."""
    if decoder.image_token is None:
        if pixels is not None:
            raise UsageError(f"there are {PIXELS}, and the model was captured without images", hint="leave them out")
        return
    counts = (ids == decoder.image_token).sum(1).tolist()
    features = decoder.empty(PREFILL, FEATURES).shape[1]
    wanted = (0, features) if pixels is not None else (0,)
    for row, count in enumerate(counts):
        if count not in wanted:
            raise UsageError(
                f"prompt {row} has {count} image tokens ({decoder.image_token})",
                why=f"an image has {features} features" if pixels is not None else f"there are no {PIXELS}",
                hint=f"one token for each feature, and one image for each prompt, as {PIXELS}",
            )
    if pixels is not None:
        image = tuple(decoder.empty(VISION, PIXELS).shape[1:])
        if pixels.dim() != 4 or len(pixels) != len(ids) or tuple(pixels.shape[1:]) != image:
            raise UsageError(
                f"{PIXELS} are {tuple(pixels.shape)}", hint=f"{(len(ids), *image)}: one image for each prompt"
            )
