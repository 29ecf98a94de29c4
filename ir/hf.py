"""A Hugging Face folder (`config.json` and `*.safetensors`) as something to capture.

Nothing is fetched, no code from the folder is run and nothing is unpickled: transformers gets the configuration and
tensors that we have read and checked, never the path. Each weight must come from a file; one that transformers would
make up is an error.
"""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import logging
import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.export import Dim

from laconic.ir.errors import (
    LaconicError,
    MissingDependencyError,
    ModelError,
    UnsupportedError,
    UsageError,
    did_you_mean,
)
from laconic.ir.source_model import Source
from laconic.ir.weight_files import common_dtype, listed, read_json, read_tensors

__all__ = ["Source", "load_folder", "load_model", "longest_sequence"]

log = logging.getLogger(__name__)

_BATCH, _SEQUENCE, _DECODER_SEQUENCE = 3, 7, 5
_PROPORTION = 16
_MOST = 1_000_000  # of layers, labels, experts and what else a configuration counts
_IMAGE_SIZE = 224  # where the configuration names none: what image classifiers are trained at
_COUNTS = re.compile(r"num_|n_|layer|depth|label|expert|block|stage", re.IGNORECASE)
_CALLABLE = "write a function that returns the module and its example inputs, and pass package.module:callable"


def load_folder(path: Path, *, seed: int = 0) -> Source:
    """The model of a folder and an example call: batch 3, sequence 7 (a decoder's 5), pixels and sound of its size.

    Numbers are drawn by a generator with this seed. Axes are named batch, sequence and decoder_sequence.
    Raises what `load_model` raises, and UnsupportedError for a model that takes anything else.
    """
    model = load_model(path)
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
            hint=_CALLABLE,
        )
    if _returns_cache(model):
        kwargs["use_cache"], shapes["use_cache"] = False, None
    return Source(model, (), kwargs, shapes, Path(path).resolve().name)


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


def load_model(path: Path) -> Any:
    """The transformers model of a folder: in eval mode, in the dtype of its files.

    Raises UsageError if there is no such folder; MissingDependencyError without transformers; ModelError for a file
    that is missing, damaged or lacks a weight of the model; UnsupportedError for an architecture unknown here, pickled
    weights, adapters and quantised weights.
    """
    path = Path(path)
    _refuse_no_folder(path)
    data = read_json(path / "config.json", "a Hugging Face folder has one")
    if importlib.util.find_spec("transformers") is None:
        raise MissingDependencyError(
            "transformers is not installed",
            why=f"{path} is a Hugging Face folder",
            hint='pip install "laconic-compiler[hf]"',
        )
    with _quiet():
        class_, config = _architecture(path, data)
        tensors = read_tensors(path)
        dtype = common_dtype(path, tensors)
        try:
            with _no_larger_than(tensors, path):
                model, info = _build(class_, config, tensors, dtype)
        except LaconicError:
            raise
        except Exception as problem:
            raise ModelError(
                f"transformers cannot build {class_.__name__} from this folder",
                where=str(path),
                why=f"{type(problem).__name__}: {problem}",
            ) from problem
        made_up = set(info["missing_keys"]) | _drawn(class_, config, tensors, dtype, model)
    _refuse_mismatch(path, model, made_up, info["mismatched_keys"])
    if info["unexpected_keys"]:
        unused = listed(sorted(info["unexpected_keys"]), ", ")
        log.warning("%s: %s does not use these tensors: %s", path, class_.__name__, unused)
    return model


def _build(
    class_: Any, config: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype, *, seed: int = 0
) -> tuple[Any, Any]:
    """The model and transformers' account of the tensors. What no file holds is drawn with `seed`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return class_.from_pretrained(  # type: ignore[no-any-return]
            None,
            config=config,
            state_dict=dict(tensors),
            dtype=dtype,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported by us, all at once
            trust_remote_code=False,
            local_files_only=True,
        )


@contextmanager
def _no_larger_than(tensors: dict[str, torch.Tensor], path: Path) -> Iterator[None]:
    """Raise ModelError from within the building of a model that is out of proportion to its files: it would take all
    memory, or for ever. Sharing makes a model name a tensor several times, and buffers may be in no file."""
    count, size = 0, 0
    most_count = _PROPORTION * len(tensors) + 10_000
    most_size = _PROPORTION * sum(t.numel() for t in tensors.values()) + (1 << 26)

    def weigh(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        nonlocal count, size
        count, size = count + 1, size + (0 if tensor is None else tensor.numel())
        if count > most_count or size > most_size:
            raise ModelError(
                "config.json describes a far larger model than the files hold",
                where=str(path / "config.json"),
                why=f"at least {count} tensors of {size} values; the files hold {len(tensors)}",
                hint="a number in config.json is damaged, or the files belong to another model",
            )

    hooks = [
        torch.nn.modules.module.register_module_parameter_registration_hook(weigh),
        torch.nn.modules.module.register_module_buffer_registration_hook(weigh),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def _quiet() -> Iterator[None]:
    """No bars, notes or warnings from transformers, which says on stderr what we raise; restored afterwards."""
    import transformers

    theirs: Any = transformers.utils.logging
    level, bars = theirs.get_verbosity(), theirs.is_progress_bar_enabled()
    theirs.set_verbosity_error()
    theirs.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        theirs.set_verbosity(level)
        if bars:
            theirs.enable_progress_bar()


def _refuse_no_folder(path: Path) -> None:
    if path.is_file():
        raise UsageError(f"{path} is a file", why="a folder with config.json and *.safetensors is wanted")
    if not path.is_dir():
        beside = [p.name for p in path.parent.iterdir() if p.is_dir()] if path.parent.is_dir() else []
        close = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.5)
        raise UsageError(
            f"there is no folder {path}", hint=did_you_mean(path.name, close) or "nothing is fetched: give a local path"
        )
    if (path / "adapter_config.json").exists() and not (path / "config.json").exists():
        raise UnsupportedError(
            f"{path} is an adapter, not a model",
            why="it holds adapter_config.json and no config.json",
            hint="merge it into its model first: peft's merge_and_unload(), then save_pretrained()",
        )
    if not (path / "config.json").exists():
        inside = sorted(str(p.parent) for p in path.glob("*/config.json"))
        raise ModelError(
            f"{path} has no config.json",
            why="a Hugging Face folder has config.json and *.safetensors",
            hint="did you mean " + " or ".join(inside[:3]) + "?" if inside else "save_pretrained() writes both",
        )


def _architecture(path: Path, data: dict[str, Any]) -> tuple[Any, Any]:
    """The model's class and configuration, both from transformers."""
    import transformers

    kind, names = data.get("model_type"), data.get("architectures") or []
    if "quantization_config" in data:
        raise UnsupportedError(
            f"{path} holds quantised weights",
            why=f"quantization_config in config.json: {json.dumps(data['quantization_config'])[:200]}",
            hint="start from the model that was quantised",
        )
    name = names[0] if isinstance(names, list) and names else None
    class_: Any = getattr(transformers, name, None) if isinstance(name, str) else None
    known = isinstance(class_, type) and issubclass(class_, transformers.PreTrainedModel)
    if kind not in transformers.CONFIG_MAPPING and not (kind is None and known):
        own = "\nit brings code of its own (auto_map), which is not run" if "auto_map" in data else ""
        types = list(transformers.CONFIG_MAPPING.keys())
        close = difflib.get_close_matches(str(kind), types, n=3, cutoff=0.5)
        version = transformers.__version__
        raise UnsupportedError(
            f"transformers knows no model type {kind!r}" if kind else "config.json names no model_type",
            where=str(path / "config.json"),
            why=f"transformers {version} knows {len(types)} types{own}",
            hint=did_you_mean(str(kind), close) or f"a newer transformers may know it; else {_CALLABLE}",
        )
    _refuse_absurd(path, data)
    try:
        maker = transformers.AutoConfig if kind else class_.config_class
        config = maker.from_pretrained(path, local_files_only=True, **({"trust_remote_code": False} if kind else {}))
        if not known:
            class_ = transformers.MODEL_MAPPING[type(config)]
    except Exception as problem:
        raise UnsupportedError(
            f"transformers makes no model of this {kind or name} configuration",
            where=str(path / "config.json"),
            why=f"{type(problem).__name__}: {problem}",
        ) from problem
    class_ = class_[0] if isinstance(class_, tuple) else class_
    if config._attn_implementation not in (None, "eager", "sdpa"):
        config._attn_implementation = None  # flash kernels and kernels named by a hub address: transformers chooses
    if name and not known:
        log.warning("%s: transformers has no %r; loading %s", path, name, class_.__name__)
    return class_, config


def _refuse_absurd(path: Path, data: dict[str, Any]) -> None:
    """Counts that no model has, but that a configuration would make a list of."""
    pending: list[tuple[str, Any]] = list(data.items())
    while pending:
        key, value = pending.pop()
        if isinstance(value, (dict, list)):
            pending += value.items() if isinstance(value, dict) else [(key, item) for item in value]
        elif isinstance(value, int) and value > _MOST and _COUNTS.search(key):
            raise ModelError(
                f"config.json has {key} = {value}",
                where=str(path / "config.json"),
                hint="that number is damaged: copy the file again",
            )


def _drawn(class_: Any, config: Any, tensors: dict[str, torch.Tensor], dtype: torch.dtype, model: Any) -> set[str]:
    """Weights that transformers lets a file lack without reporting it, and that it then draws at random.

    Some such are computed (sinusoids), so the names alone prove nothing: what differs when built again was drawn.
    """
    if not getattr(model, "_keys_to_ignore_on_load_missing", None):
        return set()
    again, _ = _build(class_, config, tensors, dtype, seed=1)
    second = again.state_dict()
    return {name for name, value in model.state_dict().items() if not torch.equal(value, second[name])}


def _refuse_mismatch(path: Path, model: Any, missing: set[str], mismatched: set[Any]) -> None:
    # A counter of training steps, unused in eval mode, that older files lack.
    missing = {n for n in missing if not n.endswith("num_batches_tracked")} - {m[0] for m in mismatched}
    if mismatched:
        lines = [
            f"{name}: the file has {tuple(found)}, the model {tuple(wanted)}" for name, found, wanted in mismatched
        ]
        raise ModelError(
            f"{len(lines)} tensors have another shape than {type(model).__name__} needs",
            where=str(path),
            why=listed(sorted(lines)),
            hint="config.json and the weights belong to different models",
        )
    if missing:
        raise ModelError(
            f"{len(missing)} weights of {type(model).__name__} are not in the files",
            where=str(path),
            why=listed(sorted(missing)),
            hint="they would be made up at random; is another class meant by architectures in config.json?",
        )
