"""A .pt2 as bytes: which members it has, and its tensors. Nothing is unpickled, unpacked or run.

torch writes a zip of stored (never compressed) members below one folder: `models/NAME.json`, the graph;
`data/weights/*` and `data/constants/*`, the bytes of storages, with a JSON file that says which tensor lies where;
`data/sample_inputs/NAME.pt`, always a pickle, which is not read; `extra/*`, whatever who saved it put there. Tensor
subclasses, script objects and everything in files of torch 2.7 and older are pickles: refused.
"""

from __future__ import annotations

import json
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import nn

from laconic.ir.errors import LaconicError, ModelError, UnsupportedError
from laconic.ir.memory import as_bytes, from_file, pieces
from laconic.ir.pt2_graph import is_weight_name
from laconic.ir.torch_private import stored_dtypes

_PLAIN = re.compile(r"[\w.-]+", re.ASCII)
_LOCAL_HEADER = 30  # bytes before a member's name
_ENCRYPTED = 0x1
_LONGEST_JSON = 1 << 30
#: An expanded weight says one byte many times; no more than this many bytes may be said so.
_EXPANDED = 1 << 30


@dataclass(frozen=True)
class Archive:
    """What a .pt2 holds: the graph as JSON, parameters and persistent buffers, constants and other buffers, extras."""

    model: dict[str, Any]
    state: dict[str, torch.Tensor]
    constants: dict[str, torch.Tensor]
    extra: dict[str, bytes]


def read_archive(path: Path) -> Archive:
    """Read a .pt2. Large tensors are mapped, not copied.

    Raises ModelError for a file that is missing, damaged or no .pt2; UnsupportedError for one that holds pickles where
    tensors are needed, objects, compiled code or several models.
    """
    try:
        with path.open("rb") as file:
            members = _Members(file, path)
            name = members.model()
            return Archive(
                members.json(f"models/{name}.json"),
                _tensors(members, "weights", name),
                _tensors(members, "constants", name),
                {key: members.read(f"extra/{key}") for key in members.below("extra/")},
            )
    except LaconicError:
        raise
    except OSError as problem:
        raise ModelError(f"{path.name} cannot be read", where=str(path), why=str(problem)) from problem


class _Members:
    """The members of an open archive, by their names without the folder that they all stand in."""

    def __init__(self, file: BinaryIO, path: Path) -> None:
        self._file, self.path = file, path
        try:
            listed = zipfile.ZipFile(file).infolist()
        except (zipfile.BadZipFile, ValueError, NotImplementedError, EOFError) as problem:
            raise self._no_archive(problem) from problem
        self._refuse_odd(listed)
        self._infos = {info.filename.partition("/")[2]: info for info in listed}
        self._refuse_foreign(listed)

    def _no_archive(self, problem: Exception) -> LaconicError:
        self._file.seek(0)
        start = self._file.read(8)
        hint = "torch.export.save(torch.export.export(model, args), path) writes a .pt2"
        if start[:1] == b"\x80":
            return UnsupportedError(
                f"{self.path.name} is a pickle, not a .pt2",
                where=str(self.path),
                why="reading a pickle runs the code in it",
                hint=hint,
            )
        return self.damaged(str(problem), hint)

    def damaged(self, why: str, hint: str = "copy the file again") -> ModelError:
        return ModelError(f"{self.path.name} is damaged or no .pt2", where=str(self.path), why=why, hint=hint)

    def _refuse_odd(self, listed: list[zipfile.ZipInfo]) -> None:
        """Members that torch does not write: compressed ones (which may be bombs), overlapping ones, odd paths."""
        room = self.path.stat().st_size
        names = [info.filename for info in listed]
        for info in listed:
            parts = info.filename.split("/")
            if len(parts) < 2 or "" in parts[:-1] or ".." in parts or "\\" in info.filename:
                raise self.damaged(f"it has a member of the name {info.filename!r}")
            if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
                raise self.damaged(f"its member {info.filename!r} is compressed")
            if info.flag_bits & _ENCRYPTED:
                raise self.damaged(f"its member {info.filename!r} is encrypted")
        if len(set(names)) != len(names) or len({name.partition("/")[0] for name in names}) > 1:
            raise self.damaged("its members do not stand in one folder, or have the same name")
        if sum(info.file_size for info in listed) > room:
            raise self.damaged("its members are larger than the file")

    def _refuse_foreign(self, listed: list[zipfile.ZipInfo]) -> None:
        """Other archives of torch's, by what they are."""
        if "data.pkl" in self._infos:
            kind = "a TorchScript archive" if self.below("code/") else "what torch.save writes"
            raise UnsupportedError(
                f"{self.path.name} is {kind}, a pickle",
                where=str(self.path),
                why="reading a pickle runs the code in it",
                hint="save the model with torch.export.save",
            )
        if any(info.filename.endswith("serialized_state_dict.pt") for info in listed):
            raise UnsupportedError(
                f"{self.path.name} is a .pt2 of torch 2.7 or older, whose weights are pickles",
                where=str(self.path),
                hint="load it with torch.export.load, if you trust it, and save it again",
            )
        if self.below("data/aotinductor/"):
            raise UnsupportedError(
                f"{self.path.name} holds compiled code",
                where=str(self.path),
                hint="save what torch.export.export gives",
            )

    def below(self, folder: str) -> list[str]:
        """The names of the members in a folder, without it."""
        return [name.removeprefix(folder) for name in self._infos if name.startswith(folder) and name != folder]

    def model(self) -> str:
        """The name of the one model in the archive."""
        names = [n.removesuffix(".json") for n in self.below("models/") if n.endswith(".json")]
        if len(names) > 1:
            raise UnsupportedError(
                f"{self.path.name} holds {len(names)} models", where=str(self.path), why=", ".join(sorted(names)[:8])
            )
        if not names:
            raise self.damaged("it has no models/NAME.json", "torch.export.save writes it")
        return names[0]

    def has(self, name: str) -> bool:
        return name in self._infos

    def size(self, name: str) -> int:
        if name not in self._infos:
            raise self.damaged(f"its member {name!r} is missing")
        return self._infos[name].file_size

    def read(self, name: str) -> bytes:
        return bytes(as_bytes(self.storage(name)))

    def json(self, name: str) -> dict[str, Any]:
        if self.size(name) > _LONGEST_JSON:
            raise self.damaged(f"{name} has {self.size(name)} bytes")
        try:
            data = json.loads(self.read(name))
        except (ValueError, RecursionError) as problem:
            raise self.damaged(f"{name} is no JSON: {problem}") from problem
        if not isinstance(data, dict):
            raise self.damaged(f"{name} is no JSON object")
        return data

    def storage(self, name: str) -> torch.Tensor:
        """The bytes of a member, compared with their checksum."""
        size, info = self.size(name), self._infos[name]
        self._file.seek(info.header_offset)
        header = self._file.read(_LOCAL_HEADER)
        if len(header) < _LOCAL_HEADER or header[:4] != b"PK\3\4":
            raise self.damaged(f"its member {name!r} is not where its table says")
        skipped = int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")
        try:
            found = from_file(self._file, info.header_offset + _LOCAL_HEADER + skipped, (size,), torch.uint8)
        except EOFError as problem:
            raise self.damaged(f"its member {name!r} is cut short: {problem}") from problem
        checksum = 0
        for piece in pieces(found):
            checksum = zlib.crc32(as_bytes(piece), checksum)
        if checksum != info.CRC:
            raise self.damaged(f"the checksum of its member {name!r} is not that of its bytes")
        return found


def _tensors(members: _Members, what: str, model: str) -> dict[str, torch.Tensor]:
    """The tensors that `data/<what>/` holds, by their names; those of one storage share it."""
    folder = f"data/{what}/"
    if members.has(f"{folder}{model}.pt"):
        raise _pickled(members, what, f"{folder}{model}.pt")
    table = members.json(f"{folder}{model}_{what}_config.json").get("config")
    if not isinstance(table, dict):
        raise members.damaged(f"the table of {what} has no entry 'config'")
    storages: dict[str, torch.Tensor] = {}
    found: dict[str, torch.Tensor] = {}
    for name, entry in table.items():
        try:
            member, pickled, meta = entry["path_name"], entry["use_pickle"], entry["tensor_meta"]
            if pickled is not False or meta is None:
                raise _pickled(members, what, name)
            if not is_weight_name(name):
                raise members.damaged(f"{name!r} is no name of a weight")
            if not isinstance(member, str) or not _PLAIN.fullmatch(member):
                raise members.damaged(f"{name!r} lies in {member!r}, which is no name of a member")
            if member not in storages:
                storages[member] = members.storage(folder + member)
            tensor = _view(storages[member], meta)
            found[name] = nn.Parameter(tensor, meta["requires_grad"] is True) if entry["is_param"] is True else tensor
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as problem:
            raise members.damaged(f"{name!r} cannot be what the table of {what} says: {problem}") from problem
    return found


def _pickled(members: _Members, what: str, name: str) -> UnsupportedError:
    return UnsupportedError(
        f"{members.path.name} holds pickled {what}",
        where=f"{members.path}: {name}",
        why="reading a pickle runs the code in it; torch pickles tensor subclasses and script objects",
        hint="export a model of plain tensors",
    )


def _view(storage: torch.Tensor, meta: dict[str, Any]) -> torch.Tensor:
    """A tensor in the bytes of a storage. Raises ValueError or RuntimeError if it does not fit there."""
    dtype = stored_dtypes().get(meta["dtype"])
    if dtype is None:
        raise ValueError(f"the dtype {meta['dtype']!r} is not known")
    if meta["device"]["type"] != "cpu":
        raise ValueError(f"it is on the device {meta['device']['type']!r}; save the model from the CPU")
    shape, stride = [_size(n) for n in meta["sizes"]], [_size(n) for n in meta["strides"]]
    count, flat = 1, storage.view(dtype)
    for size in shape:
        count *= size
    if count * dtype.itemsize > len(storage) + _EXPANDED:
        raise ValueError(f"it says {count * dtype.itemsize} bytes, and the file holds {len(storage)}")
    if not count:
        return torch.empty_strided(shape, stride, dtype=dtype)
    return flat.as_strided(shape, stride, _size(meta["storage_offset"]))


def _size(entry: dict[str, Any]) -> int:
    value = entry["as_int"]
    if type(value) is not int or not 0 <= value < 2**62:
        raise ValueError(f"{value!r} is no size")
    return value
