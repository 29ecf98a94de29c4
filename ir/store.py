"""A program on disk: `program.txt`, the text form, beside `weights.safetensors`, each storage once.

A row that has a dense storage of its own is stored under its name, in row-major order; its strides stand in the text.
Rows that share a storage, or leave gaps in it, are stored as one flat span and found in it by an offset. Nothing is
pickled.

Kernels choose their path by strides and by where in memory a tensor starts, and another path rounds differently. So
that a program reads back to the same bits, a row gets the strides and the alignment that it had.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from laconic.ir.errors import ModelError, UnsupportedError
from laconic.ir.memory import ALIGNMENT, misalignment, placed
from laconic.ir.parse import parse_program
from laconic.ir.program import Program, Weight
from laconic.ir.text import print_program
from laconic.ir.types import DTYPE_NAMES, TensorType, is_dense
from laconic.ir.verify import verify

PROGRAM = "program.txt"
WEIGHTS = "weights.safetensors"


def write_program(program: Program, folder: Path) -> None:
    """Write the program's two files into an existing folder.

    Raises UnsupportedError for a weight of a dtype that has no text form.
    """
    rows = list(program.weights.values())
    for row in rows:
        if row.value.dtype not in DTYPE_NAMES:
            raise UnsupportedError(
                f"{row.name!r} cannot be saved: its dtype {row.value.dtype} has no text form",
                hint="known: " + ", ".join(str(d) for d in DTYPE_NAMES),
            )
    tensors, views = _pack(rows)
    starts = {w.name: start for w in rows if (start := misalignment(w.value))}
    metadata = {"views": json.dumps(views), "alignment": json.dumps(starts)}
    save_file(tensors, folder / WEIGHTS, metadata=metadata)
    (folder / PROGRAM).write_text(print_program(program), encoding="utf-8")
    (folder / WEIGHTS).chmod((folder / PROGRAM).stat().st_mode)  # safetensors itself writes for the owner alone


def read_program(folder: Path) -> Program:
    """The program in a folder, verified.

    Raises ModelError for a missing or damaged file, ParseError for text that does not parse, VerificationError for
    what is no program by other rules.
    """
    try:
        text = (folder / PROGRAM).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as problem:
        raise ModelError(f"{PROGRAM} cannot be read", where=str(folder / PROGRAM), why=str(problem)) from problem
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as opened:
            weights = _Reader(opened, folder / WEIGHTS)
            program = parse_program(text, weights.lookup, str(folder / PROGRAM))
    except (OSError, SafetensorError) as problem:
        raise ModelError(
            f"{WEIGHTS} cannot be read",
            where=str(folder / WEIGHTS),
            why=str(problem),
            hint="the file is missing, truncated or damaged: write it again",
        ) from problem
    verify(program)
    return program


def _pack(rows: list[Weight]) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors to store by key, and for rows that are views the key and offset where they lie."""
    rows = [_plain(row) for row in rows]
    names = {row.name for row in rows}
    groups: dict[tuple[int, torch.dtype], list[Weight]] = defaultdict(list)
    for row in rows:
        groups[(row.value.untyped_storage().data_ptr() if row.value.numel() else id(row), row.value.dtype)].append(row)
    tensors: dict[str, torch.Tensor] = {}
    views: dict[str, Any] = {}
    for number, group in enumerate(groups.values()):
        first = group[0].value
        if len(group) == 1 and is_dense(first):
            tensors[group[0].name] = _storable(first.detach().contiguous())
            continue
        low = min(int(w.value.storage_offset()) for w in group)
        high = max(int(w.value.storage_offset()) + _span(w.value) for w in group)
        key = f"storage.{number}"
        while key in names:
            key += "_"
        tensors[key] = _storable(first.detach().as_strided((high - low,), (1,), low).clone())
        for row in group:
            views[row.name] = {"of": key, "offset": int(row.value.storage_offset()) - low}
    return tensors, views


def _plain(row: Weight) -> Weight:
    """A row whose bytes are its values: not conjugated or negated when read."""
    value = row.value.detach()
    if not (value.is_conj() or value.is_neg()):
        return row
    span = value.as_strided((_span(value),), (1,)).resolve_conj().resolve_neg()
    return replace(row, value=span.as_strided(value.shape, value.stride()))


def _span(tensor: torch.Tensor) -> int:
    """How many elements of its storage a tensor reaches over."""
    return _reach(tuple(tensor.shape), tensor.stride())


def _reach(shape: tuple[int, ...], stride: tuple[int, ...]) -> int:
    return 0 if 0 in shape else 1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))


def _storable(tensor: torch.Tensor) -> torch.Tensor:
    """Complex numbers are stored as pairs."""
    return torch.view_as_real(tensor).contiguous() if tensor.is_complex() else tensor


class _Reader:
    """Rows from an open weights file, as the text declares them."""

    def __init__(self, opened: Any, path: Path) -> None:
        self._opened, self._path = opened, path
        self._keys = set(opened.keys())
        self._spans: dict[str, torch.Tensor] = {}
        metadata = opened.metadata() or {}
        try:
            self._views: dict[str, Any] = dict(json.loads(metadata.get("views", "{}")))
            starts = dict(json.loads(metadata.get("alignment", "{}")))
            self._starts = {str(name): int(start) % ALIGNMENT for name, start in starts.items()}
        except (TypeError, ValueError, OverflowError, RecursionError, AttributeError) as problem:
            raise ModelError(f"{WEIGHTS} has damaged metadata", where=str(path), why=str(problem)) from problem

    def lookup(self, name: str, kind: TensorType) -> torch.Tensor:
        """The row as a tensor in memory of its own. Raises KeyError if the file lacks it, ModelError if it cannot be
        what the text declares."""
        shape, stride = tuple(map(int, kind.shape)), tuple(map(int, kind.stride))
        if name in self._views:
            return self._view(name, kind, shape, stride)
        if name not in self._keys:
            raise KeyError(name)
        stored = self._tensor(name, kind)
        if tuple(stored.shape) != shape or stored.dtype != kind.dtype:
            return stored
        start = self._starts.get(name, 0)
        if (stored.stride(), misalignment(stored), str(stored.device)) == (stride, start, kind.device):
            return stored
        try:
            if stored.numel() and not is_dense(torch.empty_strided(shape, stride, device="meta")):
                raise ValueError(f"strides {stride} leave gaps, or let elements overlap")
            return placed(stored, stride, start, kind.device)
        except (ValueError, RuntimeError) as problem:
            raise ModelError(
                f"{name!r} cannot lie in memory as the text says", where=str(self._path), why=str(problem)
            ) from problem

    def _view(self, name: str, kind: TensorType, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
        place = self._views[name]
        try:
            key, offset = str(place["of"]), int(place["offset"])
            if key not in self._spans:
                start = self._starts.get(name, 0) - offset * kind.dtype.itemsize
                self._spans[key] = placed(self._tensor(key, kind), (1,), start % ALIGNMENT, kind.device)
            span = self._spans[key]
            if offset < 0 or offset + _reach(shape, stride) > span.numel():
                raise ValueError(f"the file holds {span.numel()} elements there")
            return span.as_strided(shape, stride, int(span.storage_offset()) + offset)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError, SafetensorError) as problem:
            raise ModelError(
                f"{name!r} is not where {WEIGHTS} says", where=str(self._path), why=str(problem)
            ) from problem

    def _tensor(self, key: str, kind: TensorType) -> torch.Tensor:
        stored: torch.Tensor = self._opened.get_tensor(key)
        if kind.dtype.is_complex and stored.is_floating_point() and stored.shape[-1:] == (2,):
            # The file aligns pairs to their halves, and kernels read complex numbers as aligned to the whole.
            return torch.view_as_complex(stored.clone())
        return stored
