"""A program on disk: `program.txt`, the text form, beside `weights.safetensors`, each storage once.

A row that has a dense storage of its own is stored under its name, in row-major order; its strides stand in the text.
Rows that share a storage, or leave gaps in it, are stored as one flat span and found in it by an offset. Nothing is
pickled.

Kernels choose their path by strides and by where in memory a tensor starts, and another path rounds differently. So
that a program reads back to the same bits, a row gets the strides and the alignment that it had.
"""

from __future__ import annotations

import json
import logging
import os
from collections import defaultdict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from laconic.ir.errors import ModelError, UnsupportedError, VerificationError
from laconic.ir.files import read_text
from laconic.ir.memory import ALIGNMENT, misalignment, placed
from laconic.ir.metrics.differences import bit_equal
from laconic.ir.outline import inline, outline
from laconic.ir.parse import parse_program
from laconic.ir.program import Kind, Program, Weight
from laconic.ir.tensor_file import TensorFile, write_tensors
from laconic.ir.text import print_program
from laconic.ir.torch_private import storage_key
from laconic.ir.types import DTYPE_NAMES, TensorType, is_dense
from laconic.ir.verify import verify

log = logging.getLogger(__name__)

PROGRAM = "program.txt"
WEIGHTS = "weights.safetensors"

Lookup = Callable[[str, TensorType], torch.Tensor]


def write_program(program: Program, folder: Path, same_weights: Path | None = None, *, outlined: bool = True) -> None:
    """Write the program's two files into an existing folder, its repeated blocks `outlined` or as they are.

    `same_weights` is a weights file written for the very rows of this program: it is hard-linked, where the file system
    can, and not written again.

    Raises UnsupportedError for a weight of a dtype that has no text form.
    """
    rows = list(program.weights.values())
    for row in rows:
        if row.value.dtype not in DTYPE_NAMES:
            raise UnsupportedError(
                f"{row.name!r} cannot be saved: its dtype {row.value.dtype} has no text form",
                hint="known: " + ", ".join(str(d) for d in DTYPE_NAMES),
            )
    (folder / PROGRAM).write_text(print_program(outline(program) if outlined else program), encoding="utf-8")
    if same_weights is not None and _linked(same_weights, folder / WEIGHTS):
        return
    tensors, views, zeros = _pack(rows)
    starts = {w.name: start for w in rows if (start := misalignment(w.value))}
    notes = {"views": views, "alignment": starts, "zeros": zeros}
    write_tensors(folder / WEIGHTS, tensors, {key: json.dumps(note) for key, note in notes.items()})


def _linked(existing: Path, target: Path) -> bool:
    """Make `target` another name of a file; whether the file system can."""
    try:
        os.link(existing, target)
    except OSError as problem:
        log.info("%s is written again and not linked: %s", target.name, problem)
        return False
    return True


def read_program(folder: Path) -> Program:
    """The program in a folder, verified. Large rows are mapped: read when they are used, and not copied.

    Raises ModelError for a missing or damaged file, ParseError for text that does not parse, VerificationError for
    what is no program by other rules.
    """
    return _read(folder, lambda stored: stored.lookup)


def read_outlined(folder: Path) -> tuple[Program, str]:
    """The program in a folder with its functions, not verified, and its text. For what is known to be as it was
    written: calls are believed the types that they declare. Raises ModelError and ParseError as `read_program`."""
    text = _text(folder)
    with TensorFile(folder / WEIGHTS) as opened:
        return parse_program(text, _Reader(opened).lookup, str(folder / PROGRAM), recompute=False), text


def read_back(folder: Path, program: Program) -> Program:
    """The program in a folder that `program` was written to, verified, around the rows of `program` itself: each was
    compared with the file's, which is read as `read_program` reads it, a row at a time.

    Raises what `read_program` raises, and VerificationError for a row of other bytes, strides or alignment, or that
    shares its storage with others than before.
    """
    proofs: list[_Proof] = []

    def proof(stored: _Reader) -> Lookup:
        proofs.append(_Proof(program, stored))
        return proofs[0].lookup

    found = _read(folder, proof)
    proofs[0].finish()
    return found


def _read(folder: Path, lookup: Callable[[_Reader], Lookup]) -> Program:
    text = _text(folder)
    with TensorFile(folder / WEIGHTS) as opened:
        program = parse_program(text, lookup(_Reader(opened)), str(folder / PROGRAM))
    verify(program)
    return inline(program)


def _text(folder: Path) -> str:
    path = folder / PROGRAM
    try:
        return read_text(path)
    except (OSError, UnicodeDecodeError) as problem:
        raise ModelError(f"{PROGRAM} cannot be read", where=str(path), why=str(problem)) from problem


def _pack(rows: list[Weight]) -> tuple[dict[str, torch.Tensor], dict[str, Any], list[str]]:
    """Tensors to store by key; for rows that are views the key and offset where they lie; and states of nothing but
    zeros, as empty caches, which are not stored."""
    rows = [_plain(row) for row in rows]
    names = {row.name for row in rows}
    groups: dict[tuple[int, torch.dtype], list[Weight]] = defaultdict(list)
    for row in rows:
        groups[(row.value.untyped_storage().data_ptr() if row.value.numel() else id(row), row.value.dtype)].append(row)
    tensors: dict[str, torch.Tensor] = {}
    views: dict[str, Any] = {}
    zeros: list[str] = []
    for number, group in enumerate(groups.values()):
        first = group[0].value
        if len(group) == 1 and is_dense(first):
            if group[0].kind is Kind.STATE and bit_equal(first, torch.zeros_like(first)):
                zeros.append(group[0].name)
            else:
                tensors[group[0].name] = first
            continue
        low = min(int(w.value.storage_offset()) for w in group)
        high = max(int(w.value.storage_offset()) + _span(w.value) for w in group)
        key = f"storage.{number}"
        while key in names:
            key += "_"
        tensors[key] = first.as_strided((high - low,), (1,), low)
        for row in group:
            views[row.name] = {"of": key, "offset": int(row.value.storage_offset()) - low}
    return tensors, views, zeros


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


class _Reader:
    """Rows of an open weights file, as the text declares them."""

    def __init__(self, opened: TensorFile) -> None:
        self._opened = opened
        self._spans: dict[str, torch.Tensor] = {}
        try:
            self._views: dict[str, Any] = dict(json.loads(opened.metadata.get("views", "{}")))
            starts = dict(json.loads(opened.metadata.get("alignment", "{}")))
            self._starts = {str(name): int(start) % ALIGNMENT for name, start in starts.items()}
            self._zeros = frozenset(map(str, json.loads(opened.metadata.get("zeros", "[]"))))
        except (TypeError, ValueError, OverflowError, RecursionError, AttributeError) as problem:
            raise self._damaged(f"{WEIGHTS} has damaged metadata", problem) from problem

    def _damaged(self, what: str, problem: Exception) -> ModelError:
        return ModelError(what, where=str(self._opened.path), why=str(problem))

    def lookup(self, name: str, kind: TensorType) -> torch.Tensor:
        """The row as a tensor of its own storage, or the one that the file says it shares. Raises KeyError if the file
        lacks it, ModelError if it cannot be what the text declares."""
        shape, stride = tuple(map(int, kind.shape)), tuple(map(int, kind.stride))
        if name in self._views:
            return self._view(name, kind, shape, stride)
        start = self._starts.get(name, 0)
        if name in self._zeros:
            try:
                return placed(torch.zeros(shape, dtype=kind.dtype), stride, start, kind.device)
            except (ValueError, RuntimeError) as problem:
                raise self._damaged(f"{name!r} cannot lie in memory as the text says", problem) from problem
        if name not in self._opened.stored:
            raise KeyError(name)
        stored = self._tensor(name, kind, start)
        if tuple(stored.shape) != shape or stored.dtype != kind.dtype:
            return stored
        if (stored.stride(), str(stored.device)) == (stride, kind.device):
            return stored
        try:
            if stored.numel() and not is_dense(torch.empty_strided(shape, stride, device="meta")):
                raise ValueError(f"strides {stride} leave gaps, or let elements overlap")
            return placed(stored, stride, start, kind.device)
        except (ValueError, RuntimeError) as problem:
            raise self._damaged(f"{name!r} cannot lie in memory as the text says", problem) from problem

    def home(self, name: str) -> str:
        """What tells the storage of a row from that of others."""
        return f"view {self._views[name]['of']}" if name in self._views else f"row {name}"

    def _view(self, name: str, kind: TensorType, shape: tuple[int, ...], stride: tuple[int, ...]) -> torch.Tensor:
        place = self._views[name]
        try:
            key, offset = str(place["of"]), int(place["offset"])
            if key not in self._spans:
                start = (self._starts.get(name, 0) - offset * kind.dtype.itemsize) % ALIGNMENT
                span = self._tensor(key, kind, start)
                self._spans[key] = span if kind.device == "cpu" else span.to(kind.device)
            span = self._spans[key]
            if offset < 0 or span.dim() != 1 or offset + _reach(shape, stride) > span.numel():
                raise ValueError(f"the file holds {span.numel()} elements there")
            return span.as_strided(shape, stride, int(span.storage_offset()) + offset)
        except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as problem:
            raise self._damaged(f"{name!r} is not where {WEIGHTS} says", problem) from problem

    def _tensor(self, key: str, kind: TensorType, start: int) -> torch.Tensor:
        stored = self._opened.read(key, start)
        if kind.dtype.is_complex and stored.is_floating_point() and stored.shape[-1:] == (2,):
            return torch.view_as_complex(stored)
        return stored


class _Proof:
    """Rows of an open weights file, held to those of the program that was written."""

    def __init__(self, program: Program, stored: _Reader) -> None:
        self._rows, self._stored = program.weights, stored
        self._names: list[str] = []

    def lookup(self, name: str, kind: TensorType) -> torch.Tensor:
        """The program's own row, once the file's is seen to be the same."""
        found = self._stored.lookup(name, kind)
        row = self._rows.get(name)
        if row is None:
            raise VerificationError(f"the file has a row {name!r}, and the program has none")
        for what, wanted, read in (
            ("strides", row.value.stride(), found.stride()),
            ("alignment", misalignment(row.value), misalignment(found)),
            ("device", row.value.device, found.device),
        ):
            if wanted != read:
                raise VerificationError(f"the {what} of the row {name!r} were {wanted} and are {read}")
        if not bit_equal(row.value, found):
            raise VerificationError(f"the row {name!r} does not read back to the same bytes")
        self._names.append(name)
        return row.value

    def finish(self) -> None:
        """Hold all rows together to who shares a storage with whom. Raises VerificationError."""
        homes: dict[int, str] = {}
        rows = [(name, self._rows[name].value) for name in self._names]
        pairs = {(storage_key(value), self._stored.home(name)) for name, value in rows if value.numel()}
        for key, home in pairs:
            if homes.setdefault(key, home) != home:
                raise VerificationError("two rows that shared a storage are stored apart")
        if len({home for _, home in pairs}) != len(pairs):
            raise VerificationError("two rows that had storages of their own are stored as one")
