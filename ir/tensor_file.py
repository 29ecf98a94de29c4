"""Safetensors files: opened with every size checked first, read a tensor at a time, written a piece at a time.

    8 bytes: length of the header | header: JSON, padded with spaces | the tensors' bytes, without gaps

What is written here is standard safetensors. The bytes begin at a multiple of 64, and tensors whose size is a multiple
of 64 stand first, so that they can be mapped where kernels want them (`laconic.ir.memory`). Complex numbers are stored
as pairs of their halves, as older readers know no others.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import torch

from laconic.ir.errors import ModelError
from laconic.ir.memory import ALIGNMENT, as_bytes, from_file, pieces

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_METADATA = "__metadata__"
_LONGEST_HEADER = 100_000_000  # what safetensors itself reads


@dataclass(frozen=True)
class Stored:
    """Where a tensor lies in a file: dtype, sizes, and the offset of its first byte."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class TensorFile:
    """An open safetensors file: `stored` by name, and `metadata`.

    Raises ModelError for a file that is missing, damaged or cut short: its header must name, without gaps, each byte
    that follows it.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            if path.exists() and not path.is_file():  # a pipe would be waited for
                raise OSError(f"{path} is no file")
            self._file: BinaryIO = path.open("rb")
        except OSError as problem:
            hint = "the file is missing: copy it, or write it again"
            raise ModelError(f"{path.name} cannot be read", where=str(path), why=str(problem), hint=hint) from problem
        try:
            self.stored, self.metadata = _header(self._file, path)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def read(self, name: str, start: int = 0) -> torch.Tensor:
        """A tensor, row-major, that starts `start` bytes behind a 64-byte boundary: mapped if it lies so in the file.

        Raises KeyError for another name, ModelError if the file has been cut since it was opened or holds bytes that
        are no truth values where it says they are.
        """
        where = self.stored[name]
        try:
            found = from_file(self._file, where.offset, where.shape, where.dtype, start=start)
        except (EOFError, OSError) as problem:
            raise damaged(self.path, str(problem)) from problem
        if where.dtype is torch.bool and any(bool((p.view(torch.uint8) > 1).any()) for p in pieces(found)):
            raise damaged(self.path, f"{name!r} holds other bytes than 0 and 1")
        return found


def damaged(path: Path, why: str, hint: str = "copy or download the file again") -> ModelError:
    """The error for a file that is not what it was when it was written."""
    return ModelError(f"{path.name} is damaged or cut short", where=str(path), why=why, hint=hint)


def _header(file: BinaryIO, path: Path) -> tuple[dict[str, Stored], dict[str, str]]:
    found = path.stat().st_size
    start = file.read(8)
    if start == b"version ":
        raise damaged(path, "it is a Git LFS pointer, not the weights", "git lfs pull")
    length = int.from_bytes(start, "little")
    if len(start) < 8 or 8 + length > found:
        wanted = f"{8 + length}" if len(start) == 8 else "8"
        raise damaged(path, f"expected at least {wanted} bytes, found {found}")
    if length > _LONGEST_HEADER:
        raise damaged(path, f"its header says that it has {length} bytes")
    try:
        table = json.loads(file.read(length), object_pairs_hook=_once)
        metadata = table.pop(_METADATA, {})
        if not all(isinstance(text, str) for text in metadata.values()):
            raise TypeError("metadata that is no text")
        stored = {name: _stored(name, entry) for name, entry in table.items()}
    except (ValueError, KeyError, TypeError, AttributeError, IndexError, RecursionError) as problem:
        raise damaged(path, f"its header is no safetensors header ({problem})") from problem
    end = 0
    for name, (where, stop) in sorted(stored.items(), key=lambda item: (item[1][0].offset, item[1][1])):
        if where.offset != end or stop - where.offset != where.size:
            why = f"{name!r} of {where.size} bytes cannot lie at {where.offset}-{stop}, behind {end}"
            raise damaged(path, f"its header is no safetensors header ({why})")
        end = stop
    if 8 + length + end != found:
        raise damaged(path, f"expected {8 + length + end} bytes, found {found}")
    data = 8 + length
    return {name: Stored(w.dtype, w.shape, data + w.offset) for name, (w, _) in stored.items()}, metadata


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object no key of which is given twice."""
    table = dict(pairs)
    if len(table) != len(pairs):
        raise ValueError("a name is given twice")
    return table


def _stored(name: str, entry: dict[str, Any]) -> tuple[Stored, int]:
    """A tensor's dtype, sizes and offset behind the header, and the offset of its end."""
    start, stop = entry["data_offsets"]
    shape = entry["shape"]
    if not all(type(n) is int and n >= 0 for n in (start, stop, *shape)):
        raise ValueError(f"{name!r} has sizes or offsets that are no whole numbers")
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"{name!r} has the unknown dtype {entry['dtype']!r}")
    return Stored(DTYPES[entry["dtype"]], tuple(shape), start), stop


def write_tensors(path: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file. Values are taken as they read, in row-major order; nothing is copied as a whole."""
    values = {name: torch.view_as_real(t) if t.is_complex() else t for name, t in tensors.items()}
    order = sorted(values, key=lambda name: values[name].nbytes % ALIGNMENT != 0)
    table: dict[str, Any] = {_METADATA: dict(metadata)}
    end = 0
    for name in order:
        value = values[name]
        start, end = end, end + value.nbytes
        table[name] = {"dtype": _NAMES[value.dtype], "shape": list(value.shape), "data_offsets": [start, end]}
    header = json.dumps(table, ensure_ascii=False, separators=(",", ":")).encode()
    header += b" " * (-(8 + len(header)) % ALIGNMENT)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        for name in order:
            for piece in pieces(values[name]):
                file.write(as_bytes(piece))
