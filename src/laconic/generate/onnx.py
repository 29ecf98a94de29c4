"""Generation by ONNX Runtime, on the files that `export --with-past` writes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from laconic.codegen.onnx.past import past_path
from laconic.codegen.onnx.runtime import Session
from laconic.generate.decoding import Decoder
from laconic.ir.errors import UsageError
from laconic.ir.past import DECODE, PREFILL

_STATE, _NEXT = "state.", ".next"


class OnnxDecoder(Decoder):
    """`F.prefill.onnx` and `F.decode.onnx` in ONNX Runtime, by the name `F.onnx`; caches are its own.

    Raises UsageError if a file is missing, or the two have other caches.
    """

    def __init__(self, path: str | Path, *, threads: int = 0) -> None:
        files = {name: past_path(Path(path), name) for name in (PREFILL, DECODE)}
        for file in files.values():
            if not file.is_file():
                raise UsageError(f"there is no {file}", hint="laconic export MODEL -o F.onnx --with-past writes it")
        self._sessions = {name: Session(file, threads=threads) for name, file in files.items()}
        shapes = {name: _declared(session) for name, session in self._sessions.items()}
        caches = [{n: s for n, s in found.items() if n.startswith(_STATE)} for found in shapes.values()]
        if caches[0] != caches[1]:
            raise UsageError(f"{files[PREFILL]} and {files[DECODE]} have other caches", hint="export both again")
        self._caches = caches[0]
        self.batch, self.length = shapes[DECODE]["attention_mask"].shape
        self.start()

    def start(self) -> None:
        session = self._sessions[DECODE]
        zeros = {n: torch.zeros(cache.shape, dtype=cache.dtype) for n, cache in self._caches.items()}
        self._states: dict[str, Any] = session.values(zeros)

    def run(self, inputs: Mapping[str, torch.Tensor], *, first: bool) -> torch.Tensor:
        session = self._sessions[PREFILL if first else DECODE]
        given = {name: inputs[name] for name in session.inputs if not name.startswith(_STATE)}
        found = dict(zip(session.outputs, session.run_values(session.values(given) | self._states), strict=True))
        self._states |= {n.removesuffix(_NEXT): v for n, v in found.items() if n.endswith(_NEXT)}
        return torch.from_numpy(found["logits"].numpy())[:, -1]

    @property
    def cache_bytes(self) -> int:
        return sum(torch.Size(cache.shape).numel() * cache.dtype.itemsize for cache in self._caches.values())


@dataclass(frozen=True)
class _Declared:
    shape: tuple[int, ...]
    dtype: torch.dtype


_DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
    "tensor(int64)": torch.int64,
}


def _declared(session: Session) -> dict[str, _Declared]:
    return {given.name: _Declared(tuple(given.shape), _DTYPES[given.type]) for given in session.session.get_inputs()}
