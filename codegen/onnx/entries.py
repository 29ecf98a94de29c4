"""Entries as ONNX files of their own, `F.onnx` as `F.NAME.onnx`.

Those that generate are `F.prefill.onnx` (of an encoder with a decoder, `F.encode.onnx`) and `F.decode.onnx`, beside
`F.vision.onnx` where images stand among tokens; their caches are explicit inputs and outputs. Beside its inputs each
takes the caches that it reads, `state.key_cache_0` and so on, (batch, heads, length, width), and returns those that it
writes as `state.key_cache_0.next`: what one call returns the next one takes, zeros at first. What the caches hold
stands in each file's metadata under `laconic.cache`.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from laconic.codegen.onnx.runtime import Session
from laconic.codegen.onnx.write import OnnxReport, write_onnx
from laconic.ir.entries import alone
from laconic.ir.errors import UsageError
from laconic.ir.files import refuse_existing, temporary_beside
from laconic.ir.inputs import draw
from laconic.ir.outcomes import with_states
from laconic.ir.past import DECODE, PAST, PREFILL, TEXT, VISION, cache_size, example, generating, refuse_without_past
from laconic.ir.precise import FACTOR
from laconic.ir.program import Program
from laconic.ir.run import evaluate

#: The key of the metadata.
_FACTS = "laconic.cache"


def entry_path(path: Path, name: str) -> Path:
    """Where the file of an entry stands."""
    return path.with_name(f"{path.stem}.{name}{path.suffix}")


def facts_of(session: Session) -> dict[str, int]:
    """What the caches of a written file hold, as `laconic.ir.past` has it. Raises UsageError if it does not say."""
    if _FACTS not in session.metadata:
        raise UsageError("the file says nothing of its caches", hint="write it by export --with-past")
    return dict(json.loads(session.metadata[_FACTS]))


#: Examples of each length.
_SEEDS = 4
#: How many times the program's own error is allowed where one row meets a matrix: ONNX Runtime sums such a product in
#: one chain, torch in lanes, and a chain's error grows faster (up to 2.5 times as large on the models of the tests).
_FACTOR_OF_ROWS = 4.0


def _apart(program: Program, names: Iterable[str]) -> dict[str, Program]:
    """The entries as programs of their own, with examples of several lengths; `decode` goes on from the states of the
    longest prompt."""
    found: dict[str, Program] = {}
    states: dict[str, torch.Tensor] = {}
    for name in names:
        own = alone(program, name, _examples(program, name))
        found[name] = with_states(own, {row: value for row, value in states.items() if row in own.weights})
        if name in PAST:
            states = evaluate(own, own.forward, list(own.examples[-1])).states
    return found


def _examples(program: Program, name: str) -> list[dict[str, torch.Tensor]]:
    """Inputs of an entry, by name, as they are drawn; prompts of several lengths, and tokens at several places."""
    entry, found = program.entries[name], []
    for seed in range(_SEEDS):
        drawn = draw(program, entry, {}, seed).inputs
        inputs = {given.name: value for given, value in zip(entry.inputs, drawn, strict=True)}
        if name not in (PREFILL, DECODE):
            found.append(inputs)
            continue
        batch, length = cache_size(program)
        for tokens in sorted({2 if name == PREFILL else 1, length // 2, length - 1}):
            size, at = (tokens, 0) if name == PREFILL else (1, tokens)
            found.append(inputs | {k: v for k, v in example(batch, length, size, at, seed).items() if k in inputs})
    return found


def write_past(program: Program, path: Path, **settings: Any) -> dict[str, OnnxReport]:
    """Write the entries that generate, as `write_entries` does.

    Raises UsageError for a Program that does not have them, and what `write_entries` raises.
    """
    refuse_without_past(program, "there is no past to write")
    return write_entries(program, path, generating(program), **settings)


def write_towers(program: Program, path: Path, **settings: Any) -> dict[str, OnnxReport]:
    """Write the two sides of a model that sees and reads, as `write_entries` does."""
    return write_entries(program, path, (VISION, TEXT), **settings)


def write_entries(
    program: Program,
    path: Path,
    names: Sequence[str],
    *,
    opset: int | None = None,
    functions: bool = False,
    force: bool = False,
    progress: Callable[[str], None] = lambda stage: None,
) -> dict[str, OnnxReport]:
    """Write these entries, each checked in ONNX Runtime as `write_onnx` does; all or none.

    Raises UsageError for an entry that the Program does not have, and what `write_onnx` raises.
    """
    for name in names:
        if name not in program.entries:
            raise UsageError(
                f"the model has no entry {name!r}",
                why=f"its entries are {', '.join(program.entries)}",
                hint="capture or optimize it with cache=(batch, length), or towers=True",
            )
        refuse_existing(entry_path(path, name), force)
    found: dict[str, OnnxReport] = {}
    metadata = {_FACTS: json.dumps(program.facts["cache"])} if "cache" in program.facts else None
    with temporary_beside(path) as folder:
        folder.mkdir()
        for name, own in _apart(program, names).items():
            found[name] = write_onnx(
                own,
                folder / entry_path(path, name).name,
                drawn=0,
                factor=_FACTOR_OF_ROWS if name in PAST else FACTOR,
                metadata=metadata,
                opset=opset,
                functions=functions,
                progress=lambda stage, name=name: progress(f"{name}: {stage}"),  # type: ignore[misc]
            )
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
