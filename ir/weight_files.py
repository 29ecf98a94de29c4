"""The safetensors files of a folder, read with their sizes checked first, so that an error names the file and says
what is wrong with it. Pickled weights are never read.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from laconic.ir.errors import ModelError, UnsupportedError
from laconic.ir.memory import aligned

log = logging.getLogger(__name__)

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
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise ModelError(f"{path} is missing", why=why) from problem
    except (ValueError, OSError) as problem:
        raise ModelError(f"{path} cannot be read as JSON", why=str(problem), hint="copy the file again") from problem


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """All tensors of the folder by name. Raises ModelError for files missing or damaged."""
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(path):
        check_size(file)
        try:
            # A mapped file starts its tensors anywhere; kernels are faster on a boundary, and round in one way there.
            tensors.update({name: aligned(tensor) for name, tensor in load_file(file).items()})
        except (SafetensorError, OSError, ValueError) as problem:
            raise _damaged(file, str(problem)) from problem
    return tensors


def weight_files(path: Path) -> list[Path]:
    """The safetensors files that hold a folder's weights: `model.safetensors`, else the shards of its index.

    Raises ModelError if there are none or some are missing, UnsupportedError if there are only pickled ones.
    """
    whole, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if whole.exists():
        return [whole]
    if index.exists():
        table = read_json(index, "it names the shards").get("weight_map")
        if not isinstance(table, dict) or not all(isinstance(v, str) for v in table.values()) or not table:
            raise ModelError(f"{index} has no weight_map", why="it maps each tensor's name to a file of the folder")
        names = sorted(set(table.values()))
        outside = [n for n in names if Path(n).name != n or not n.endswith(".safetensors")]
        if outside:
            raise ModelError(f"{index} names files that are no shards", why=listed(outside))
        missing = [n for n in names if not (path / n).exists()]
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


def check_size(file: Path) -> None:
    """Compare a file's size with what its header announces: 8 bytes of length, the header, then the tensors."""
    found = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise _damaged(file, "it is a Git LFS pointer, not the weights", "git lfs pull")
        header = int.from_bytes(start, "little")
        if len(start) < 8 or 8 + header > found:
            wanted = f"{8 + header}" if len(start) == 8 else "8"
            raise _damaged(file, f"expected at least {wanted} bytes, found {found}")
        try:
            table = json.loads(stream.read(header))
            ends = [entry["data_offsets"][1] for name, entry in table.items() if name != "__metadata__"]
            expected = 8 + header + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as problem:
            raise _damaged(file, f"its header is no safetensors header ({problem})") from problem
    if expected != found:
        raise _damaged(file, f"expected {expected} bytes, found {found}")


def _damaged(file: Path, why: str, hint: str = "copy or download the file again") -> ModelError:
    return ModelError(f"{file.name} is damaged or cut short", where=str(file), why=why, hint=hint)


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
        log.warning("%s: weights of %s are all loaded as %s", path, ", ".join(sorted(map(str, kinds))), common)
    return common


def listed(items: list[str], separator: str = "\n") -> str:
    """The first eight and how many more there are."""
    rest = [f"and {len(items) - 8} more"] if len(items) > 8 else []
    return separator.join([*items[:8], *rest])
