"""The entries that generate as ONNX files of their own, caches as explicit inputs and outputs.

`F.onnx` becomes `F.prefill.onnx` and `F.decode.onnx`. Each takes, beside its inputs, `state.key_cache_0` and so on,
(batch, heads, length, width), and returns them as `state.key_cache_0.next`: what one call returns the next one takes,
zeros at first.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from laconic.codegen.onnx.write import OnnxReport, write_onnx
from laconic.ir.entries import alone
from laconic.ir.errors import UnsupportedError
from laconic.ir.files import refuse_existing, temporary_beside
from laconic.ir.outcomes import with_states
from laconic.ir.past import DECODE, PREFILL, cache_size, example, refuse_without_past
from laconic.ir.program import Program
from laconic.ir.run import evaluate


def past_path(path: Path, name: str) -> Path:
    """Where the file of an entry stands."""
    return path.with_name(f"{path.stem}.{name}{path.suffix}")


def _apart(program: Program) -> dict[str, Program]:
    """The two entries as programs of their own, with prompts of several lengths as examples; `decode` goes on from the
    states of a prompt."""
    batch, length = cache_size(program)
    prompts = [
        example(batch, length, tokens, 0, seed)
        for tokens in sorted({2, length // 2, length - 1})
        for seed in range(_SEEDS)
    ]
    prefill = alone(program, PREFILL, prompts)
    entry = prefill.forward
    longest = evaluate(prefill, entry, list(prefill.examples[-1])).states
    steps = [
        example(batch, length, 1, at, seed) for at in sorted({1, length // 2, length - 1}) for seed in range(_SEEDS)
    ]
    return {PREFILL: prefill, DECODE: with_states(alone(program, DECODE, steps), longest)}


#: Prompts of each length.
_SEEDS = 4


def write_past(
    program: Program,
    path: Path,
    *,
    opset: int | None = None,
    functions: bool = False,
    force: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, OnnxReport]:
    """Write both entries, checked in ONNX Runtime as `write_onnx` does; both or none.

    Raises UsageError for a Program that does not have them, and what `write_onnx` raises.
    """
    refuse_without_past(program, "there is no past to write")
    if PREFILL not in program.entries:
        raise UnsupportedError(
            "the past of an encoder with a decoder is not written as ONNX yet", hint="generate with the saved DIR"
        )
    for name in (PREFILL, DECODE):
        refuse_existing(past_path(path, name), force)
    found: dict[str, OnnxReport] = {}
    with temporary_beside(path) as folder:
        folder.mkdir()
        apart = _apart(program)
        for name, own in apart.items():
            draft = folder / past_path(path, name).name
            settings: dict[str, Any] = {"opset": opset, "functions": functions, "progress": progress}
            # One token's logits are rows of a prompt's: their own rounding is asked of both.
            found[name] = write_onnx(own, draft, drawn=0, beside=apart[PREFILL], **settings)
        for written in sorted(folder.iterdir(), key=lambda file: file.suffix == ".onnx"):  # data first
            os.replace(written, path.parent / written.name)
    return {
        name: replace(
            report,
            path=path.parent / report.path.name,
            data_path=path.parent / report.data_path.name if report.data_path else None,
        )
        for name, report in found.items()
    }
