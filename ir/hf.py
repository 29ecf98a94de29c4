"""A Hugging Face folder (`config.json` and `*.safetensors`) as something to capture.

Nothing is fetched, no code from the folder is run and nothing is unpickled: transformers gets the configuration and
tensors that we have read and checked, never the path. Each weight must come from a file; one that transformers would
make up is an error.
"""

from __future__ import annotations

import copy
import difflib
import importlib.util
import json
import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.ir.errors import (
    LaconicError,
    MissingDependencyError,
    ModelError,
    UnsupportedError,
    UsageError,
    did_you_mean,
)
from laconic.ir.hf_inputs import WRITE_A_CALLABLE, draw_inputs
from laconic.ir.source_model import Source
from laconic.ir.weight_files import common_dtype, listed, read_json, read_tensors

log = logging.getLogger(__name__)

_PROPORTION = 16
_MOST = 1_000_000  # of layers, labels, experts and what else a configuration counts
_COUNTS = re.compile(r"num_|n_|layer|depth|label|expert|block|stage", re.IGNORECASE)


def load_folder(path: Path, *, seed: int = 0) -> Source:
    """The model of a folder and an example call, drawn as `laconic.ir.hf_inputs.draw_inputs` says.

    Raises what `load_model` and `draw_inputs` raise.
    """
    model = load_model(path)
    kwargs, shapes = draw_inputs(model, path, seed=seed)
    return Source(model, (), kwargs, shapes, Path(path).resolve().name, Path(path))


def load_model(path: Path) -> Any:
    """The transformers model of a folder: in eval mode, in the dtype of its files.

    Raises UsageError if there is no such folder; MissingDependencyError without transformers; ModelError for a file
    that is missing, damaged or lacks a weight of the model; UnsupportedError for an architecture unknown here, pickled
    weights, adapters and quantised weights.
    """
    path = Path(path)
    _refuse_no_folder(path)
    class_, config = read_architecture(path)
    with _quiet():
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


def read_architecture(path: Path) -> tuple[Any, Any]:
    """The class and the configuration of a folder's model, by its `config.json` alone; raises as `load_model` does."""
    data = read_json(path / "config.json", "a Hugging Face folder has one")
    if importlib.util.find_spec("transformers") is None:
        raise MissingDependencyError(
            "transformers is not installed",
            why=f"{path} is a Hugging Face folder",
            hint='pip install "laconic-compiler[hf]"',
        )
    with _quiet():
        return _architecture(path, data)


def on_meta(class_: Any, config: Any) -> nn.Module:
    """The model of a class and a configuration, its weights tied, without memory for them."""
    with _quiet(), torch.device("meta"):
        model: nn.Module = class_(copy.deepcopy(config)).eval()
        model.tie_weights()  # type: ignore[operator]
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
            hint=did_you_mean(str(kind), close) or f"a newer transformers may know it; else {WRITE_A_CALLABLE}",
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
