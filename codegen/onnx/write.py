"""Writing a checked .onnx: nothing is put in place that ONNX Runtime did not compute as the Program does.

Large models keep their weights in a file beside the model, named by its content: `model.onnx.<hash8>.data`. The data is
placed first, then the model in one step, then data that no model refers to any more goes.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import torch

from laconic.codegen.onnx.convert import to_onnx
from laconic.codegen.onnx.functions import count, inlined_nodes, outline
from laconic.codegen.onnx.runtime import Session, default_opset, onnxruntime, takes
from laconic.ir.errors import UnsupportedError, UsageError, VerificationError
from laconic.ir.exported import flat_names
from laconic.ir.files import place_file, refuse_existing, temporary_beside
from laconic.ir.inputs import Case, cases, cases_again
from laconic.ir.outcomes import Outcomes
from laconic.ir.precise import FACTOR, Deviation, deviation, evaluate_precise, pooled
from laconic.ir.program import Program, Role
from laconic.ir.run import Outcome
from laconic.ir.torch_private import oldest_onnx_opset

log = logging.getLogger(__name__)

#: Weights beyond this many bytes stand in a file of their own; a protobuf message holds at most 2 GiB.
EXTERNAL_DATA_BYTES = 1_500_000_000
#: Inputs drawn beside the examples.
DRAWN = 3


@dataclass(frozen=True)
class OnnxReport:
    """What was written and how far it is from the Program.

    `nodes` counts nodes of standard ops, functions inlined; `stored_nodes` those that stand in the file, the `calls` of
    `functions` local functions among them. `bytes` counts model and data. `checks` has the greatest absolute difference
    of each case that was judged: the examples and DRAWN drawn ones, and those of `cases_again` where they did not do.
    `worst` is the greatest ratio of an error against float64 to what `laconic.ir.precise.pooled` allows.
    """

    path: Path
    data_path: Path | None
    opset: int
    ir_version: int
    nodes: int
    bytes: int
    checks: list[float]
    worst: float
    functions: int = 0
    calls: int = 0
    stored_nodes: int = 0


def write_onnx(
    program: Program,
    path: str | os.PathLike[str],
    *,
    opset: int | None = None,
    functions: bool = False,
    force: bool = False,
    drawn: int = DRAWN,
    factor: float = FACTOR,
    metadata: Mapping[str, str] | None = None,
    progress: Callable[[str], None] = lambda stage: None,
) -> OnnxReport:
    """Write the entry `forward` as an .onnx file, checked in ONNX Runtime on the examples and on so many `drawn` inputs
    of several sizes, to so many times (`factor`) the program's own error. `metadata` is text by key, which the model
    keeps.

    `opset` is a standard opset version; by default the newest that torch's exporter and ONNX Runtime share. With
    `functions`, repeated blocks are written once, as ONNX local functions of the domain "laconic".

    Raises UsageError if the name does not end in .onnx, the opset is out of range, or the file exists and `force` is
    not given; MissingDependencyError without ONNX Runtime; UnsupportedError, with op and source line, if the program
    cannot be expressed or ONNX Runtime lacks a kernel; VerificationError if what was written is not the Program.
    """
    final = Path(path)
    if final.suffix != ".onnx":
        raise UsageError(f"{final} does not end in .onnx", hint="name the file so that runtimes know it")
    refuse_existing(final, force)
    chosen = _opset(opset)
    progress("translating")
    model = to_onnx(program, chosen)
    if not takes(chosen, int(model.ir_version)):
        raise UnsupportedError(
            f"the installed ONNX Runtime takes no models of opset {chosen} with IR version {model.ir_version}",
            hint=f"opset {default_opset()} works",
        )
    if functions:
        progress("outlining")
        outline(model)
    model.metadata_props.update(metadata or {})
    nodes, counted = list(model.graph.all_nodes()), count(model)
    sources = {str(node.name): node.metadata_props.get("source", "") for node in nodes}
    with temporary_beside(final) as folder:
        folder.mkdir()
        progress("writing")
        draft = folder / final.name
        data = _save(model, draft)
        progress("checking")
        _check_model(draft)
        deviations = _compare(program, Session(draft, sources), drawn, factor)
        size = draft.stat().st_size + (data.stat().st_size if data else 0)
        progress("placing")
        placed = _place(draft, data, final, force)
    return OnnxReport(
        path=final,
        data_path=placed,
        opset=chosen,
        ir_version=int(model.ir_version),
        nodes=inlined_nodes(model),
        bytes=size,
        checks=[max((d.max_abs for d in case), default=0.0) for case in deviations],
        worst=max((d.found / d.allowed for case in deviations for d in case if d.allowed), default=0.0),
        functions=counted.functions,
        calls=counted.calls,
        stored_nodes=counted.stored,
    )


def _opset(asked: int | None) -> int:
    onnxruntime()
    if asked is None:
        return default_opset()
    newest = onnx.defs.onnx_opset_version()
    if not 7 <= asked <= newest:
        raise UsageError(f"there is no opset {asked} to write", why=f"onnx {onnx.__version__} knows 7 to {newest}")
    if asked < oldest_onnx_opset():
        log.info("opset %d is converted to from %d, which does not always succeed", asked, oldest_onnx_opset())
    return asked


def _save(model: ir.Model, path: Path) -> Path | None:
    """Write the model, with a data file beside it if its weights are large; returns the latter's path."""
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    if sum(w.nbytes for w in weights) <= EXTERNAL_DATA_BYTES:
        ir.save(model, path)
        return None
    unnamed = path.with_name(f"{path.name}.data")
    model = ir.external_data.unload_from_model(model, path.parent, unnamed.name, size_threshold_bytes=256)
    data = path.with_name(f"{path.name}.{_content_hash(unnamed)}.data")
    os.rename(unnamed, data)
    for value in model.graph.initializers.values():
        old = value.const_value
        if isinstance(old, ir.ExternalTensor):
            value.const_value = ir.ExternalTensor(
                data.name,
                old.offset,
                old.length,
                old.dtype,
                shape=ir.Shape(old.shape),
                name=str(old.name),
                base_dir=path.parent,
            )
    ir.save(model, path)
    return data


def _content_hash(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 24):
            digest.update(block)
    return digest.hexdigest()[:8]


def _check_model(path: Path) -> None:
    """The rules of ONNX itself, with shape inference."""
    try:
        onnx.checker.check_model(os.fspath(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as problem:
        raise VerificationError(
            "the exported model breaks a rule of ONNX; nothing was written",
            why="\n".join(str(problem).splitlines()[:3])[:500],
            hint="this is a fault of laconic or of torch's exporter: please report it with the program's text",
        ) from problem


def _compare(program: Program, session: Session, drawn: int, factor: float) -> list[list[Deviation]]:
    """Hold each output to the rule, on several inputs, by output and case. Raises VerificationError with the first that
    breaks it.

    Where the rule is broken on the usual cases, all is judged once more, and for good, on those of `cases_again`.
    """
    usual = cases(program, program.forward, drawn)
    held = _deviations(program, session, usual, factor)
    if drawn and not all(row.ok for _, row, _ in held):
        held = _deviations(program, session, cases_again(program, usual), factor)
    for case, row, dtype in held:
        _judge(row, case, dtype)
    by_case: dict[int, list[Deviation]] = {}
    for case, row, _ in held:
        by_case.setdefault(id(case), []).append(row)
    return list(by_case.values())


def _deviations(
    program: Program, session: Session, given: list[Case], factor: float
) -> list[tuple[Case, Deviation, torch.dtype]]:
    """Each output on each case, with what is allowed pooled over the cases."""
    entry = program.forward
    _, outputs = flat_names(program)
    families: dict[str, list[tuple[Case, Deviation, torch.dtype]]] = {name: [] for name in outputs}
    for case, wanted in Outcomes.of(program, given):
        feeds = {i.name: tensor for i, tensor in zip(entry.inputs, case.clone(), strict=True)}
        feeds.update({f"state.{n}": w.value for n, w in program.weights.items() if f"state.{n}" in session.inputs})
        found = session.run(feeds)
        precise = _by_name(program, evaluate_precise(program, entry, case.clone()))
        original = _by_name(program, wanted)
        for name, value in zip(outputs, found.values(), strict=True):
            row = deviation(name, original[name], value, precise[name], factor=factor)
            families[name].append((case, row, original[name].dtype))
            log.debug("%s on %s: difference %.2g", name, case, row.max_abs)
    return [
        (case, row, dtype)
        for name, family in families.items()
        for (case, _, dtype), row in zip(family, pooled([row for _, row, _ in family], factor=factor), strict=True)
    ]


def _judge(row: Deviation, case: Case, dtype: torch.dtype) -> None:
    hint = "try another opset"
    if dtype == torch.float64:
        hint = "ONNX keeps numbers such as a norm's epsilon in float32: export the model in float32, or as .pt2"
    if not row.ok:
        raise VerificationError(
            "ONNX Runtime does not compute what the program does; nothing was written",
            where=f"output {row.name} on {case}",
            why=f"error against float64 {row.found:.3g}, allowed {row.allowed:.3g} (the program's own: "
            f"{row.original:.3g}); greatest difference {row.max_abs:.3g}",
            hint=hint,
        )


def _by_name(program: Program, outcome: Outcome) -> dict[str, Any]:
    """Results and new values under the names of the ONNX outputs; numbers as the tensors that ONNX has for them."""
    entry = program.forward
    results = [o.name for o in entry.outputs if o.role is Role.RESULT]
    named: dict[str, Any] = dict(zip(results, outcome.results, strict=True))
    named.update({f"state.{name}.next": value for name, value in outcome.states.items()})
    named.update({f"{name}.next": value for name, value in outcome.inputs.items()})
    return {name: _as_tensor(value) for name, value in named.items()}


def _as_tensor(value: Any) -> torch.Tensor:
    if isinstance(value, torch.Tensor):
        return value
    dtype = torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float32
    return torch.tensor(value, dtype=dtype)


def _place(draft: Path, data: Path | None, final: Path, force: bool) -> Path | None:
    """Data first, then the model, then away with data of models that are gone."""
    resolved = Path(os.path.realpath(final))
    placed = None
    if data is not None:
        placed = resolved.with_name(data.name.replace(draft.name, resolved.name, 1))
        if placed.name != data.name:
            raise UsageError(f"{final} is a link, and a model with a data file cannot be written through one")
        place_file(data, placed, force=True)
    place_file(draft, final, force)
    pattern = re.compile(re.escape(resolved.name) + r"\.[0-9a-f]{8}\.data")
    for entry in resolved.parent.iterdir():
        if pattern.fullmatch(entry.name) and entry != placed:
            log.info("removing %s, which no model refers to any more", entry)
            entry.unlink()
    return placed
