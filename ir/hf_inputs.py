"""Example inputs of a transformers model: text, images or sound, drawn at sizes that its configuration allows."""

from __future__ import annotations

import inspect
import math
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from laconic.ir.errors import UnsupportedError

_BATCH, _SEQUENCE, _DECODER_SEQUENCE = 3, 7, 5
_IMAGE_SIZE = 224  # where the configuration names none: what image classifiers are trained at

#: A hint for models that cannot be loaded or called from their folder alone.
WRITE_A_CALLABLE = "write a function that returns the module and its example inputs, and pass package.module:callable"


def draw_inputs(model: Any, path: Path, *, seed: int = 0) -> tuple[dict[str, Any], dict[str, Any]]:
    """Keyword arguments of an example call and their dynamic shapes: batch 3, sequence 7 (a decoder's 5), pixels and
    sound of the model's size.

    Numbers are drawn by a generator with this seed. Axes are named batch, sequence and decoder_sequence. Raises
    UnsupportedError, which names `path`, for a model that takes anything else.
    """
    generator = torch.Generator().manual_seed(seed)
    main = str(getattr(model, "main_input_name", "input_ids"))
    taken = _forward_parameters(model)
    required = [p.name for p in taken.values() if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    both = hasattr(model.config, "text_config") and hasattr(model.config, "vision_config")
    alone = not [name for name in required if name not in ("input_ids", "attention_mask", "pixel_values")]
    if main == "input_ids" and main in taken and alone and not both:
        kwargs, shapes = _text_inputs(model, generator)
    elif main == "pixel_values" and main in taken and alone and not model.config.is_encoder_decoder:
        kwargs, shapes = _image_inputs(model, generator)
    elif main == "input_features" and "decoder_input_ids" in taken and not required and (size := _feature_size(model)):
        kwargs, shapes = _audio_inputs(model, size, generator)
    else:
        wanted = ["input_ids", "pixel_values"] if both else sorted({main, *required})
        raise UnsupportedError(
            f"no example inputs can be drawn for {type(model).__name__}",
            where=str(path),
            why="it wants " + ", ".join(wanted) + "; text alone (input_ids), images alone (pixel_values)"
            " and sound of a fixed length for a decoder (input_features) are known",
            hint=WRITE_A_CALLABLE,
        )
    if _returns_cache(model):
        kwargs["use_cache"], shapes["use_cache"] = False, None
    return kwargs, shapes


def _forward_parameters(model: nn.Module) -> dict[str, inspect.Parameter]:
    return dict(inspect.signature(model.forward).parameters)


def _returns_cache(model: nn.Module) -> bool:
    """Whether forward returns a cache unless told not to. An encoder (is_decoder: false) takes the flag idly."""
    config: Any = model.config
    encoder = getattr(config, "is_decoder", None) is False and not config.is_encoder_decoder
    return "use_cache" in _forward_parameters(model) and not encoder


def _text_inputs(model: nn.Module, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    config: Any = model.config
    taken = _forward_parameters(model)
    longest = longest_sequence(model)
    batch = Dim("batch", min=1)
    length, sequence = _axis("sequence", _SEQUENCE, longest)
    vocabulary = _vocabulary(model)
    kwargs: dict[str, Any] = {"input_ids": torch.randint(0, vocabulary, (_BATCH, length), generator=generator)}
    shapes: dict[str, Any] = {"input_ids": {0: batch, 1: sequence}}
    if "attention_mask" in taken:
        kept = torch.randint(1, length + 1, (_BATCH, 1), generator=generator)
        kept[0] = length
        kwargs["attention_mask"] = (torch.arange(length) < kept).long()
        shapes["attention_mask"] = {0: batch, 1: sequence}
    if config.is_encoder_decoder and "decoder_input_ids" in taken:
        kwargs["decoder_input_ids"], shapes["decoder_input_ids"] = _decoder_ids(model, batch, generator)
    return kwargs, shapes


def _decoder_ids(model: Any, batch: Any, generator: torch.Generator) -> tuple[torch.Tensor, dict[int, Any]]:
    vocabulary = getattr(model.config, "decoder_vocab_size", None) or _vocabulary(model)
    length, sequence = _axis("decoder_sequence", _DECODER_SEQUENCE, longest_sequence(model))
    return torch.randint(0, vocabulary, (_BATCH, length), generator=generator), {0: batch, 1: sequence}


def _axis(name: str, size: int, longest: int | None) -> tuple[int, Any]:
    """An example size within range and its Dim; None where the range holds nothing but that size."""
    if longest is None:
        return size, Dim(name, min=1)
    return min(size, longest), Dim(name, min=1, max=longest) if longest > 1 else None


def _vocabulary(model: Any) -> int:
    embedding = model.get_input_embeddings()
    return int(getattr(embedding, "num_embeddings", 0) or model.config.vocab_size)


def longest_sequence(model: Any) -> int | None:
    """The longest sequence that the model's tables of positions serve; None if it has no such table.

    A table is an embedding of `max_position_embeddings` rows (some models keep a few more in front, and those that
    number positions after the padding index lose as many), or a buffer with an axis of that size.
    """
    limit = getattr(model.config, "max_position_embeddings", None) or getattr(model.config, "n_positions", None)
    limit = limit or getattr(model.config, "max_target_positions", None)  # a decoder's of sound
    if not isinstance(limit, int):
        return None
    words = model.get_input_embeddings()
    found = [limit] if any(b.dim() > 1 and limit in b.shape for b in model.buffers()) else []
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module is not words and 0 <= module.num_embeddings - limit <= 8:
            skipped = 0 if module.padding_idx is None else module.padding_idx + 1
            found.append(min(limit, module.num_embeddings - skipped))
    return min(found, default=None)


def _image_inputs(model: nn.Module, generator: torch.Generator) -> tuple[dict[str, Any], dict[str, Any]]:
    config: Any = model.config
    size = getattr(config, "image_size", None) or _IMAGE_SIZE
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = getattr(config, "num_channels", 3)
    pixels = torch.randn((_BATCH, channels, height, width), generator=generator)
    return {"pixel_values": pixels.to(_float_dtype(model))}, {"pixel_values": {0: Dim("batch", min=1)}}


def _feature_size(model: Any) -> tuple[int, int] | None:
    """How many bands and frames of sound an encoder takes that convolves them down to a fixed number of positions."""
    bands, positions = (getattr(model.config, name, None) for name in ("num_mel_bins", "max_source_positions"))
    convolutions = [m for m in model.get_encoder().children() if isinstance(m, nn.Conv1d)]
    if not positions or not convolutions or convolutions[0].in_channels != bands:
        return None
    return bands, positions * math.prod(m.stride[0] for m in convolutions)


def _audio_inputs(
    model: nn.Module, size: tuple[int, int], generator: torch.Generator
) -> tuple[dict[str, Any], dict[str, Any]]:
    batch = Dim("batch", min=1)
    features = torch.randn((_BATCH, *size), generator=generator).to(_float_dtype(model))
    ids, axes = _decoder_ids(model, batch, generator)
    return {"input_features": features, "decoder_input_ids": ids}, {
        "input_features": {0: batch},
        "decoder_input_ids": axes,
    }


def _float_dtype(model: nn.Module) -> torch.dtype:
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
