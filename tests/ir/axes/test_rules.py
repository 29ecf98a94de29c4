"""Rules of ops, one little program each: which axes are free, which are pinned and why, and that what is free may be
permuted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from axes_oracles import captured, try_permutations, try_shrinks
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


@pytest.mark.parametrize("batched", [False, True])
def test_numbers_that_spell_dynamic_sizes_are_spelled_again(batched: bool) -> None:
    """Rows and channels in one axis, whose size stands in the graph: it is computed from the input's own size."""

    def run(w: Any, x: torch.Tensor) -> torch.Tensor:
        h = F.linear(x, w.a).reshape(-1, 3, 4).transpose(1, 2)
        rows = h.reshape(x.shape[0] * 12, 1) if not batched else h.reshape(x.shape[0] * x.shape[1] * 12, 1)
        return F.linear(rows.relu(), w.c).sum(0)

    sizes = {0: torch.export.Dim("rows", min=3, max=30)}
    if batched:
        sizes[1] = torch.export.Dim("columns", min=3, max=30)
    x = torch.randn(7, 5, 8) if batched else torch.randn(7, 8)
    program = captured({"a": (12, 8), "c": (4, 1)}, run, [x], [sizes])
    _, tried = try_permutations(program)
    assert [trial.moved < 1e-10 for trial in tried] == [True] * 3  # sums do not care: permutations alone say nothing
    _, tried = try_shrinks(program)
    assert sorted(trial.factor.size for trial in tried) == [3, 4]
    assert all(trial.moved < 1e-10 and not trial.void for trial in tried)
