"""A captured Program against the module it was captured from: the same bits, on the examples and at other sizes."""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import nn

from laconic.ir.errors import VerificationError
from laconic.ir.inputs import Case, cases, draw
from laconic.ir.metrics import bit_equal, max_abs
from laconic.ir.program import Program, Role
from laconic.ir.run import evaluate
from laconic.ir.tree import Leaf, fill, leaves

log = logging.getLogger(__name__)

_SEED = 0


def compare_with_module(program: Program, module: nn.Module) -> None:
    """Hold the Program to the module's bits, and note in its facts on how many cases it was.

    Tracing assumes sizes of 2 and more. A dynamic size that is not right at 1 (the module fails there, or the Program
    says something else) gets 2 as its least. Raises VerificationError for a difference at any other size.
    """
    for key, symbol in program.symbols.items():
        if symbol.low == 1 and symbol.hint > 1 and not _right_at_one(program, module, symbol.name):
            log.warning("the size %r starts at 2: the model is not what was traced, or fails, at 1", symbol.name)
            program.symbols[key] = replace(symbol, low=2)
    skipped = []
    agreed = 0
    for case in cases(program, program.forward):
        try:
            expected = _run_module(program, module, case)
        except Exception as problem:
            if case.given:
                raise
            log.warning("the module itself does not run on %s: %s", case, problem)
            skipped.append(str(case))
            continue
        name, gap = _difference(program, expected, case)
        if name:
            raise VerificationError(
                f"the captured program does not compute what {type(module).__name__} does",
                where=f"{name} on {case}",
                why=gap,
                hint="an axis may be fixed inside the model: capture it without that dynamic axis",
            )
        agreed += 1
    program.facts["capture"] = {"bit_identical_cases": agreed, **({"skipped": skipped} if skipped else {})}


def _right_at_one(program: Program, module: nn.Module, size: str) -> bool:
    case = draw(program, program.forward, {size: 1}, _SEED)
    try:
        expected = _run_module(program, module, case)
        return not _difference(program, expected, case)[0]
    except Exception as problem:  # noqa: BLE001 - a model may fail in any way at a size it was not made for
        log.info("at %s = 1: %s", size, problem)
        return False


def _difference(program: Program, expected: dict[str, Any], case: Case) -> tuple[str, str]:
    """The first value that is not the module's, and by how much; ("", "") if there is none."""
    torch.manual_seed(_SEED)
    found = evaluate(program, program.forward, case.clone()).tensors()
    for name, value in expected.items():
        if name not in found:
            return name, "it is missing"
        if not bit_equal(value, found[name]):
            alike = isinstance(value, torch.Tensor) and isinstance(found[name], torch.Tensor)
            if alike and value.shape == found[name].shape:
                return name, f"greatest difference {max_abs(value, found[name])}"
            return name, "another type or shape"
    return "", ""


def _run_module(program: Program, module: nn.Module, case: Case) -> dict[str, Any]:
    """The module's results, states and inputs after a run, by the names that Outcome gives them; the module's buffers
    are put back."""
    entry = program.forward
    inputs = case.clone()
    arguments = {name: fill(tree, inputs) for name, tree in entry.arguments.items()}
    names = list(inspect.signature(module.forward).parameters)
    buffers = dict(module.named_buffers())
    before = {name: buffers[name].clone() for name in entry.updated()}
    try:
        torch.manual_seed(_SEED)
        extra = [v for k, v in arguments.items() if k.startswith("args_") and k not in names]
        if extra:
            positional = [v for k, v in arguments.items() if k in names]
            returned = module(*positional, *extra)
        else:
            returned = module(**arguments)
        flat = pytree.tree_leaves(returned)
        indexed = [f for f, (_, leaf) in zip(flat, leaves(entry.results), strict=True) if isinstance(leaf, Leaf)]
        found = {f"result {i}": r.clone() if isinstance(r, torch.Tensor) else r for i, r in enumerate(indexed)}
        found.update({f"state {n}": buffers[n].clone() for n in before})
        by_name = {i.name: t for i, t in zip(entry.inputs, inputs, strict=True)}
        found.update({f"input {o.name}": by_name[o.name] for o in entry.outputs if o.role is Role.INPUT_UPDATE})
        return found
    finally:
        for name, value in before.items():
            buffers[name].copy_(value)
