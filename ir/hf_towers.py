"""Models of transformers with two towers, each an entry of its own: `vision` makes features of images, `text` reads
tokens.

Where images stand among tokens (Llava), `text` is given their features, (batch, features, width): the k-th place of
the token that stands for images is taken by the k-th feature. Of a pair of encoders (CLIP, SigLIP), both give features.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from laconic.ir.capture import capture_module
from laconic.ir.errors import FixedAxisError, UnsupportedError
from laconic.ir.past import FEATURES, PIXELS, TEXT, VISION
from laconic.ir.program import Program

log = logging.getLogger(__name__)


def image_token(model: nn.Module) -> int | None:
    """The token that stands for images, of a model that reads images among its tokens."""
    token: Any = getattr(getattr(model, "config", None), "image_token_id", None)
    return token if hasattr(model, "get_image_features") and hasattr(model, "get_decoder") else None


class Vision(nn.Module):
    """The side of a model that sees."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        return {FEATURES: _features(self.model.get_image_features(pixel_values=pixel_values))}


class Reader(nn.Module):
    """The side of a model that reads, given the features of its images: called as a causal model is."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.config: Any = self.model.config

    def forward(
        self,
        input_ids: torch.Tensor,
        image_features: torch.Tensor | None = None,
        *,
        logits_to_keep: int = 0,
        position_ids: torch.Tensor | None = None,
        **settings: Any,
    ) -> Any:
        words = self.model.get_input_embeddings()(input_ids)
        if image_features is not None:
            words = placed(words, image_features, input_ids == self.config.image_token_id)
        found = self.model.get_decoder()(inputs_embeds=words, position_ids=position_ids, **settings)
        logits = self.model.get_output_embeddings()(found.last_hidden_state[:, -logits_to_keep:])
        return SimpleNamespace(logits=logits, past_key_values=found.past_key_values)


class Text(nn.Module):
    """The text side of a pair of encoders, or of a model that reads images among its tokens."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model: Any = model
        self.reader = Reader(model) if image_token(model) is not None else None

    def forward(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, image_features: torch.Tensor | None = None
    ) -> dict[str, torch.Tensor]:
        if self.reader is None:
            masked = "attention_mask" in inspect.signature(self.model.get_text_features).parameters
            mask = {"attention_mask": attention_mask} if masked else {}
            found = self.model.get_text_features(input_ids=input_ids, **mask)
            return {"text_features": _features(found)}
        return {"logits": self.reader(input_ids, image_features, attention_mask=attention_mask, use_cache=False).logits}


def placed(words: torch.Tensor, features: torch.Tensor, where: torch.Tensor) -> torch.Tensor:
    """`words` (batch, tokens, width) with `features` (batch, features, width), in order, where the mask (batch, tokens)
    says so."""
    order = (where.long().cumsum(1) - 1).clamp(0, features.shape[1] - 1)
    taken = features.to(words.dtype).gather(1, order[:, :, None].expand(-1, -1, features.shape[2]))
    return torch.where(where[:, :, None], taken, words)


def _features(found: Any) -> torch.Tensor:
    """What a side gives: a tensor, or transformers' record of it, image by image or all at once."""
    found = getattr(found, "pooler_output", found)
    return torch.stack(list(found)) if isinstance(found, (list, tuple)) else found


def capture_vision(
    model: nn.Module, pixels: torch.Tensor, axes: Mapping[str, Any] | None = None
) -> tuple[Program, torch.Tensor]:
    """The entry `vision` for images like these, and what it gives for them, (images, features, width)."""
    vision = Vision(model)
    with torch.no_grad():
        features = vision(pixels)[FEATURES]
    return _capture(vision, {PIXELS: pixels}, axes or {}), features


def capture_towers(
    model: nn.Module, examples: Mapping[str, torch.Tensor], axes: Mapping[str, Mapping[int, Any]] | None = None
) -> dict[str, Program]:
    """The entries `vision` and `text`, each captured by itself on these examples. `axes` are torch.export's dynamic
    ones, by input; a side that fixes one is captured at the examples' sizes, and that is logged.

    Raises UnsupportedError for a model without two such sides.
    """
    among = image_token(model) is not None
    if PIXELS not in examples or not (among or hasattr(model, "get_text_features")):
        raise _no_sides(model, f"it takes {', '.join(examples)}")
    if among and len(examples[PIXELS]) != len(examples["input_ids"]):
        raise _no_sides(model, f"{len(examples[PIXELS])} images are given for {len(examples['input_ids'])} prompts")
    try:
        return _towers(model, examples, dict(axes or {}), among)
    except (AttributeError, TypeError) as problem:
        raise _no_sides(model, str(problem).splitlines()[0]) from problem


def _towers(
    model: nn.Module, examples: Mapping[str, torch.Tensor], known: dict[str, Any], among: bool
) -> dict[str, Program]:
    vision, features = capture_vision(model, examples[PIXELS], known)
    ids = examples["input_ids"]
    given = {"input_ids": ids, "attention_mask": examples.get("attention_mask", torch.ones_like(ids))}
    known.setdefault("attention_mask", known.get("input_ids", {}))
    if among:
        given[FEATURES] = features
        known[FEATURES] = {axis: dim for axis, dim in known.get(PIXELS, {}).items() if axis == 0}
    return {VISION: vision, TEXT: _capture(Text(model), given, known)}


def _no_sides(model: nn.Module, why: str) -> UnsupportedError:
    return UnsupportedError(
        f"{type(model).__name__} cannot be captured with the entries {VISION!r} and {TEXT!r}",
        why=why,
        hint="models of transformers with get_image_features of pixels alone, one image for each prompt, and a decoder "
        "or get_text_features, can",
    )


def _capture(module: nn.Module, given: Mapping[str, torch.Tensor], axes: Mapping[str, Any]) -> Program:
    dynamic = {name: dict(axes.get(name, {})) for name in given}
    try:
        return capture_module(module, (), dict(given), dynamic, check=False)
    except FixedAxisError as problem:
        log.info("the sizes of %s are fixed: %s", type(module).__name__.lower(), problem.why)
        return capture_module(module, (), dict(given), None, check=False)
