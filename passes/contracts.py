"""Contracts, checked: a program after a pass against the one before it, on several inputs and sizes."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from laconic.ir.errors import VerificationError
from laconic.ir.inputs import Case
from laconic.ir.metrics import bit_equal, max_abs
from laconic.ir.program import Program
from laconic.ir.run import Outcome, evaluate
from laconic.passes.base import Contract

log = logging.getLogger(__name__)

SEED = 0


@dataclass
class Outcomes:
    """What a program returns on each case, all from the same RNG state."""

    cases: list[Case]
    values: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def of(cls, program: Program, cases: Sequence[Case]) -> Outcomes:
        """Run every case. A drawn case on which the program itself raises is left out, and logged; a given one raises."""
        found = cls([])
        for case in cases:
            try:
                outcome = run_case(program, case)
            except Exception as problem:
                if case.given:
                    raise
                log.info("left out: the program does not run on %s: %s", case, problem)
                continue
            found.cases.append(case)
            found.values.append(outcome.tensors())
        if not found.cases:
            raise VerificationError(
                "there is no input to check contracts on",
                why="the program runs on none of the drawn inputs",
                hint="give example inputs",
            )
        return found


def run_case(program: Program, case: Case) -> Outcome:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        return evaluate(program, program.forward, case.clone())


def check(contract: Contract, before: Outcomes, after: Outcomes) -> None:
    """Raise VerificationError, naming output and case, if `after` breaks `contract`. LOSSY promises nothing here."""
    if contract is Contract.LOSSY:
        return
    for case, old, new in zip(before.cases, before.values, after.values, strict=True):
        for name, value in old.items():
            if name not in new:
                raise VerificationError(f"{name} is gone", where=str(case))
            if contract is Contract.EXACT and not bit_equal(value, new[name]):
                raise VerificationError(
                    f"the contract 'exact' is broken: {name} changed", where=str(case), why=_gap(value, new[name])
                )


def _gap(old: Any, new: Any) -> str:
    if isinstance(old, torch.Tensor) and isinstance(new, torch.Tensor) and old.shape == new.shape:
        return f"greatest absolute difference {max_abs(old, new):.3g}"
    return "another shape or type"


def distance(captured: Outcomes, now: Outcomes) -> float:
    """The greatest absolute difference of any output on any case."""
    worst = 0.0
    for old, new in zip(captured.values, now.values, strict=True):
        for name, value in old.items():
            if isinstance(value, torch.Tensor):
                same = bit_equal(value, new[name])
                worst = max(worst, 0.0 if same else max_abs(value, new[name]))
    return worst
