"""Writing a Program as a .pt2 that `torch.export.load` reads where neither laconic nor the model's library exists."""

from __future__ import annotations

import io
import logging
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from laconic.ir.errors import UnsupportedError, UsageError, VerificationError
from laconic.ir.exported import to_exported
from laconic.ir.files import place_file, refuse_existing, temporary_beside
from laconic.ir.inputs import Case, cases
from laconic.ir.memory import aligned
from laconic.ir.metrics.differences import bit_equal
from laconic.ir.outcomes import SEED, Outcomes
from laconic.ir.program import Entry, Program, Role
from laconic.ir.pt2 import NOTES, notes
from laconic.ir.run import Outcome
from laconic.ir.traits import op_name
from laconic.ir.tree import Leaf, fill, leaves

log = logging.getLogger(__name__)

#: Namespaces of ops that torch itself registers.
_TORCH_NAMESPACES = {"aten", "prims", "prim"}


def write_pt2(program: Program, path: str | os.PathLike[str], *, force: bool = False) -> Path:
    """Write the entry `forward` as a .pt2 and return its path.

    The file is loaded again and must give the Program's bits on the examples and at other sizes of every dynamic axis
    before it is put in place. It holds no example inputs; names of axes and ranges of values stand beside the graph,
    for `laconic.ir.pt2` to read. How the loaded model is called: `laconic.ir.exported`.

    Raises UsageError if the name does not end in .pt2 or the file exists and `force` is not given, UnsupportedError if
    the program uses ops that torch does not have, VerificationError if what was written is not the Program.
    """
    final = Path(path)
    if final.suffix != ".pt2":
        raise UsageError(f"{final} does not end in .pt2", hint="torch.export.load asks for that ending")
    refuse_existing(final, force)
    _refuse_foreign(program)
    exported = to_exported(program)
    with temporary_beside(final) as temporary:
        with _Kept(io.FileIO(temporary, "wb")) as file:
            _save(exported, notes(program), file)
            if file.problem is not None:
                raise file.problem
        del exported
        with temporary.open("rb") as stream:
            _verify(program, torch.export.load(stream))
        place_file(temporary, final, force)
    return final


class _Kept(io.BufferedWriter):
    """A file as torch is given it: its archive writer ends the process when a write fails, on a full disk say. So every
    write succeeds, and the first failure is kept in `problem`."""

    problem: OSError | None = None

    def write(self, data: Any) -> int:
        if self.problem is None:
            try:
                return super().write(data)
            except OSError as problem:
                self.problem = problem
        return len(data)


def _save(exported: torch.export.ExportedProgram, beside: str, stream: io.BufferedWriter) -> None:
    try:
        torch.export.save(exported, stream, extra_files={NOTES: beside})
    except OSError:
        raise
    except Exception as problem:  # torch's serializer meets what it does not know with errors of any type
        lines = [line for line in str(problem).splitlines() if line.strip()]
        raise UnsupportedError(
            "torch cannot write the program as .pt2",
            why=f"{type(problem).__name__}: {lines[0] if lines else ''}",
            hint="a result that is a truth value about sizes is one known reason: return a tensor instead",
        ) from problem


def _refuse_foreign(program: Program) -> None:
    foreign = [
        node
        for node in program.forward.calls()
        if isinstance(node.target, torch._ops.OpOverload) and node.target.namespace not in _TORCH_NAMESPACES
    ]
    if foreign:
        raise UnsupportedError(
            f"a .pt2 with {', '.join(sorted({op_name(n.target) for n in foreign}))} would load only beside the library "
            "that registers it",
            where="\n".join(program.describe(node) for node in foreign[:4]),
            hint="export before the pass that put it there",
        )


def _verify(program: Program, loaded: torch.export.ExportedProgram) -> None:
    """Compare the bits of results, states and written inputs on several inputs at several sizes.

    torch loads weights into memory of its own, so the Program runs from aligned memory here too: elsewhere kernels
    round differently.
    """
    weights = {name: replace(w, value=aligned(w.value)) for name, w in program.weights.items()}
    program = replace(program, weights=weights)
    entry = program.forward
    for case, outcome in Outcomes.of(program, cases(program, entry)):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            found = _call(program, loaded, case).tensors()
        for name, value in outcome.tensors().items():
            if not bit_equal(value, found.get(name)):
                raise VerificationError(
                    "the .pt2 does not compute what the program does; nothing was written",
                    where=f"{name} on {case}",
                    hint="this is a fault of laconic or of torch: please report it with the program's text",
                )
        log.info("%s: the reloaded .pt2 gives the same bits", case)


def _call(program: Program, loaded: torch.export.ExportedProgram, case: Case) -> Outcome:
    """One call of a fresh module of the loaded program, with its states put back afterwards."""
    entry = program.forward
    module: nn.Module = loaded.module()
    buffers = dict(module.named_buffers())
    before = {name: buffers[name].clone() for name in entry.updated()}
    inputs = case.clone()
    args, kwargs = _arguments(loaded, entry, inputs)
    try:
        with torch.no_grad():
            returned = module(*args, **kwargs)
        flat = [value for _, value in leaves(returned)]
        declared = [leaf for _, leaf in leaves(entry.results)]
        if len(flat) != len(declared):
            raise VerificationError(f"the .pt2 returns {len(flat)} values, expected {len(declared)}")
        results = [v for v, leaf in zip(flat, declared, strict=True) if isinstance(leaf, Leaf)]
        by_name = {i.name: t for i, t in zip(entry.inputs, inputs, strict=True)}
        return Outcome(
            results,
            {name: buffers[name].clone() for name in before},
            {o.name: by_name[o.name] for o in entry.outputs if o.role is Role.INPUT_UPDATE},
        )
    finally:
        with torch.no_grad():
            for name, value in before.items():
                buffers[name].copy_(value)


def _arguments(
    loaded: torch.export.ExportedProgram, entry: Entry, inputs: list[torch.Tensor]
) -> tuple[list[Any], dict[str, Any]]:
    """The arguments as the loaded program takes them: its own count by position, the others by keyword."""
    trees = {name: tree for name, tree in entry.arguments.items() if any(isinstance(x, Leaf) for _, x in leaves(tree))}
    given = {name: fill(tree, inputs) for name, tree in trees.items()}
    spec = loaded.call_spec.in_spec
    assert spec is not None
    count = len(spec.children()[0].children())
    names = list(given)
    return [given[name] for name in names[:count]], {name: given[name] for name in names[count:]}
