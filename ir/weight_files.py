"""The weights of a Hugging Face folder: one safetensors file, or those that an index names. An error names the file and
says what is wrong with it. Pickled weights are never read.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch

from laconic.ir.errors import ModelError, UnsupportedError
from laconic.ir.files import read_text
from laconic.ir.tensor_file import TensorFile

log = logging.getLogger(__name__)

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".msgpack", ".h5")


def read_json(path: Path, why: str) -> dict[str, Any]:
    """A JSON object; `why` the file is wanted is said if it is missing. Raises ModelError for what cannot be read."""
    data = _parsed(path, why)
    if not isinstance(data, dict):
        raise ModelError(f"{path} is not a JSON object", why=f"it holds a {type(data).__name__}")
    return data


def read_json_list(path: Path, why: str) -> list[dict[str, Any]]:
    """A JSON list of objects, as `read_json`."""
    data = _parsed(path, why)
    if not isinstance(data, list) or not all(isinstance(item, dict) for item in data):
        raise ModelError(f"{path} is not a JSON list of objects", why=f"it holds a {type(data).__name__}")
    return data


def _parsed(path: Path, why: str) -> Any:
    try:
        return json.loads(read_text(path))
    except FileNotFoundError as problem:
        raise ModelError(f"{path} is missing", why=why) from problem
    except (ValueError, OSError, RecursionError) as problem:
        raise ModelError(f"{path} cannot be read as JSON", why=str(problem), hint="copy the file again") from problem


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder by name, on 64-byte boundaries; large ones that lie on one in the file are mapped.

    Raises ModelError for files missing or damaged, for a tensor that stands in two files, and for one that is not in
    the file that the index names.
    """
    tensors: dict[str, torch.Tensor] = {}
    homes: dict[str, str] = {}
    for file in weight_files(path):
        with TensorFile(file) as opened:
            twice = sorted(set(homes) & set(opened.stored))
            if twice:
                raise ModelError(
                    f"{len(twice)} tensors stand in two files of {path}",
                    why=listed([f"{name}: {homes[name]} and {file.name}" for name in twice]),
                    hint="remove the file that does not belong there",
                )
            homes.update(dict.fromkeys(opened.stored, file.name))
            tensors.update({name: opened.read(name) for name in opened.stored})
    _hold_to_index(path, homes)
    return tensors


def _hold_to_index(path: Path, homes: dict[str, str]) -> None:
    if (path / WHOLE).exists():
        return
    table = _weight_map(path / INDEX)
    wrong = [f"{name}: not in {file}" for name, file in sorted(table.items()) if homes.get(name) != file]
    if wrong:
        raise ModelError(
            f"{len(wrong)} tensors are not where the index says",
            where=str(path / INDEX),
            why=listed(wrong),
            hint="the index and the files belong to different models: copy both again",
        )


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights: `model.safetensors`, else the shards of its index.

    Raises ModelError if there are none or some are missing, UnsupportedError if there are only pickled ones.
    """
    whole, index = path / WHOLE, path / INDEX
    if whole.exists():
        return [whole]
    if index.exists():
        names = sorted(set(_weight_map(index).values()))
        outside = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
        if outside:
            raise ModelError(f"{index} names files that are no shards", why=listed(outside))
        missing = [n for n in names if not (path / n).is_file()]
        if missing:
            raise ModelError(
                f"{len(missing)} of {len(names)} shards are missing in {path}",
                where=str(index),
                why=listed(missing),
                hint="copy them beside the index",
            )
        return [path / n for n in names]
    others = sorted(p.name for p in path.glob("*.safetensors"))
    if others:
        raise ModelError(
            f"{path} has neither model.safetensors nor its index",
            why="found " + listed(others, ", "),
            hint="name the file of the model's weights model.safetensors",
        )
    pickled = sorted(p.name for p in path.iterdir() if p.suffix in _PICKLED)
    if pickled:
        raise UnsupportedError(
            f"{path} holds no safetensors",
            why=f"pickled weights are refused, because reading them runs code: {listed(pickled, ', ')}",
            hint="if you trust them: AutoModel.from_pretrained(folder).save_pretrained(new) writes model.safetensors",
        )
    raise ModelError(f"{path} holds no weights", why="no model.safetensors", hint="save_pretrained() writes it")


def _weight_map(index: Path) -> dict[str, str]:
    """Each tensor's file, as the index of a folder with several says."""
    table = read_json(index, "it names the shards").get("weight_map")
    if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()) or not table:
        raise ModelError(f"{index} has no weight_map", why="it maps each tensor's name to a file of the folder")
    return table


def common_dtype(path: Path, tensors: dict[str, torch.Tensor]) -> torch.dtype:
    """The one dtype of the floating tensors; the widest where they differ, which loses nothing."""
    kinds = {t.dtype for t in tensors.values() if t.is_floating_point()}
    narrow = sorted(str(k) for k in kinds if k.itemsize < 2)
    if narrow:
        raise UnsupportedError(
            f"{path} holds weights of {', '.join(narrow)}", hint="start from the model that was quantised"
        )
    common = torch.float32
    for position, kind in enumerate(sorted(kinds, key=str)):
        common = torch.promote_types(common, kind) if position else kind
    if len(kinds) > 1:
        log.info("%s: weights of %s are all loaded as %s", path, ", ".join(sorted(map(str, kinds))), common)
    return common


def listed(items: list[str], separator: str = "\n") -> str:
    """The first eight and how many more there are."""
    rest = [f"and {len(items) - 8} more"] if len(items) > 8 else []
    return separator.join([*items[:8], *rest])
