"""permute-units: units stand in order, and results stay what they were."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from axes_oracles import captured, distance, results
from axes_programs import CASES, Case
from helpers import optimize, sampled
from laconic.passes.permute_units import PermuteUnits
from laconic.passes.plans import read_plan, write_plan


@pytest.mark.parametrize("case", sampled(CASES, 9), ids=lambda case: case.name)
def test_results_stay(case: Case) -> None:
    """Every check of the manager on; and once more it finds all in order."""
    torch.manual_seed(0)
    before = captured(case.weights, case.function, [torch.randn(shape) for shape in case.inputs])
    run = optimize(before, "permute-units")
    row = run.ledger.rows[-1]
    assert row.modified == any(size > 1 for size in case.free), row.reason
    moves = PermuteUnits().apply(before, run.plans[-1]).moves
    assert distance(results(run.program), results(before, moves)) < 1e-10
    again = optimize(run.program, "permute-units").ledger.rows[-1]
    assert not again.modified
    assert again.reason


@pytest.mark.parametrize(("by", "norm"), [("l2", 2.0), ("l1", 1.0), ("max", float("inf"))])
def test_the_heaviest_come_first(by: Any, norm: float, tmp_path: Path) -> None:
    (case,) = (case for case in CASES if case.name == "relu")
    program = captured(case.weights, case.function, [torch.randn(5, 8)])
    plan = PermuteUnits(by=by).plan(program)
    made = PermuteUnits(by=by).apply(program, plan).program
    parts = [made.weights["a"].value, made.weights["b"].value[:, None], made.weights["c"].value.t()]
    keys = torch.cat(parts, 1).double().norm(norm, dim=1)
    assert keys.tolist() == sorted(keys.tolist(), reverse=True)
    write_plan(plan, tmp_path, 1)
    assert str(read_plan(tmp_path, 1)) == str(plan)


@pytest.mark.parametrize("zeros", [False, True])
def test_a_router_of_zeros_chooses_by_order(zeros: bool) -> None:
    """Its experts are all alike to it: another order would choose others."""
    program = captured(
        {"r": (6, 8), "t": (6, 4)}, lambda w, x: F.embedding(F.linear(x, w.r).argmax(-1), w.t), [torch.randn(5, 8)]
    )
    if zeros:
        program.weights["r"].value.detach().zero_()
        assert not optimize(program, "permute-units").ledger.rows[-1].modified
        program.weights["r"].value.detach().copy_(torch.randn(3, 8).repeat(2, 1))  # each row twice
    assert optimize(program, "permute-units").ledger.rows[-1].modified != zeros


def test_what_no_axis_allows_is_said() -> None:
    (case,) = (case for case in CASES if case.name == "an op without a rule")
    program = captured(case.weights, case.function, [torch.randn(5, 8)])
    row = optimize(program, "permute-units").ledger.rows[-1]
    assert not row.modified
    assert row.reason == "no axis of a weight is free"
