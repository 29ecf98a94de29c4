"""Rules of ops, one little program each: which axes are free, which are pinned and why, and that what is free may be
permuted."""

from __future__ import annotations

import pytest
import torch

from axes_oracles import captured, try_permutations
from axes_programs import CASES, Case
from laconic.ir.axes.analysis import analyse
from laconic.ir.axes.dims import SOFT, Pin
from laconic.ir.axes.rewrite import changing, free


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_free_and_what_is_pinned(case: Case) -> None:
    torch.manual_seed(1)
    program = captured(case.weights, case.function, [torch.randn(shape) for shape in case.inputs])
    axes, tried = try_permutations(program)
    static = [f for f in changing(axes) if isinstance(f.size, int)]
    assert sorted(f.size for f in static if free(f)) == sorted(case.free)
    for size, kinds in case.pinned.items():
        found = {kind for f in static if f.size == size for kind in f.pins if kind not in SOFT}
        assert kinds <= found
    assert all(trial.moved < 1e-10 for trial in tried)
    assert {trial.factor.size for trial in tried if trial.void} == set(case.symmetric)


def test_a_part_that_starts_where_nobody_knows_is_pinned() -> None:
    """A place that depends on how many rows the caller gives says nothing about the axis of a weight."""
    program = captured(
        {"a": (40, 8, 6)},
        lambda w, x: w.a[x.shape[0] - 3 :].sum() + x,
        [torch.randn(7, 8)],
        [{0: torch.export.Dim("rows", min=3, max=30)}],
    )
    axes = analyse(program)
    (found,) = (f for f in changing(axes) if f.size == 40)
    assert set(found.pins) == {Pin.ORDER}
