"""Generation by ONNX Runtime, on the files that `export --with-past` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laconic.codegen.onnx.entries import entry_path, facts_of
from laconic.codegen.onnx.runtime import Session, to_torch
from laconic.generate.decoding import Decoder
from laconic.ir.errors import UsageError
from laconic.ir.past import DECODE, VISION

_STATE, _NEXT = "state.", ".next"


class OnnxDecoder(Decoder):
    """`F.prefill.onnx` and `F.decode.onnx` in ONNX Runtime, by the name `F.onnx`, with `F.vision.onnx` if images are
    read; `F.encode.onnx` in place of the first if a source is. Caches are its own.

    Raises UsageError if a file is missing, or they have other caches.
    """

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        last = entry_path(Path(path), DECODE)
        _refuse_missing(last)
        self._sessions = {DECODE: Session(last, threads=threads)}
        super().__init__(facts_of(self._sessions[DECODE]))
        names = [self._first, DECODE, *([VISION] if self.image_token is not None else [])]
        files = {name: entry_path(Path(path), name) for name in names}
        for file in files.values():
            _refuse_missing(file)
        self._sessions |= {n: Session(file, threads=threads) for n, file in files.items() if n != DECODE}
        self._declared = {name: _declared(session) for name, session in self._sessions.items()}
        caches = {
            name: {n: s for n, s in self._declared[name].items() if n.startswith(_STATE)}
            for name in (self._first, DECODE)
        }
        if caches[self._first] != caches[DECODE]:
            raise UsageError(f"{files[self._first]} and {files[DECODE]} have other caches", hint="export both again")
        self._caches = caches[DECODE]
        self.start()

    def start(self) -> None:
        zeros = {name: cache.zeros() for name, cache in self._caches.items()}
        self._states: dict[str, Any] = self._sessions[DECODE].values(zeros)

    def _call(self, name: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        session = self._sessions[name]
        given = session.values({own: inputs[own] for own in session.inputs if not own.startswith(_STATE)})
        states = {cache: self._states[cache] for cache in session.inputs if cache.startswith(_STATE)}
        found = dict(zip(session.outputs, session.run_values(given | states), strict=True))
        self._states |= {n.removesuffix(_NEXT): v for n, v in found.items() if n.endswith(_NEXT)}
        return {result: to_torch(value) for result, value in found.items() if not result.endswith(_NEXT)}

    def empty(self, name: str, given: str) -> torch.Tensor:
        return self._declared[name][given].zeros()

    @property
    def vocabulary(self) -> int:
        outputs = self._sessions[DECODE].session.get_outputs()
        return int(next(output for output in outputs if output.name == "logits").shape[-1])

    @property
    def cache_bytes(self) -> int:
        return sum(cache.zeros().nbytes for cache in self._caches.values())


def _refuse_missing(file: Path) -> None:
    if not file.is_file():
        raise UsageError(f"there is no {file}", hint="laconic export MODEL -o F.onnx --with-past writes it")


@dataclass(frozen=True)
class _Declared:
    shape: tuple[int, ...]
    dtype: torch.dtype

    def zeros(self) -> torch.Tensor:
        return torch.zeros(self.shape, dtype=self.dtype)


_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
}


def _declared(session: Session) -> dict[str, _Declared]:
    return {given.name: _Declared(tuple(given.shape), _DTYPES[given.type]) for given in session.session.get_inputs()}
