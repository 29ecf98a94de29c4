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
from laconic.ir.axes.rewriter import free, row_factors
from laconic.ir.axes.rules import rule

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_what_is_free_and_what_is_pinned(case: Case) -> None:
    torch.manual_seed(1)
    program = captured(case.weights, case.function, [torch.randn(shape) for shape in case.inputs])
    axes, tried = try_permutations(program)
    static = [f for f in row_factors(axes) if isinstance(f.size, int)]
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
    (found,) = (f for f in row_factors(axes) if f.size == 40)
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
    _, tried = try_shrinks(program, proved=False)  # what a dynamic axis holds is not looked at
    assert sorted(trial.factor.size for trial in tried) == [3, 4]
    assert all(trial.moved < 1e-10 and not trial.void for trial in tried)


def test_a_rule_of_somebody_elses_op(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a rule its axes are pinned; with one they are not."""
    with torch.library._scoped_library("axes_test", "DEF") as library:
        library.define("scaled(Tensor x, Tensor scale) -> Tensor")
        library.impl("scaled", lambda x, scale: x * scale, "CompositeExplicitAutograd")
        library.impl("scaled", lambda x, scale: torch.empty_like(x), "Meta")
        program = captured(
            {"a": (12, 8), "s": (12,), "c": (4, 12)},
            lambda w, x: F.linear(torch.ops.axes_test.scaled(F.linear(x, w.a), w.s), w.c),
            [torch.randn(5, 8)],
        )
        pins = [set(f.pins) for f in row_factors(analyse(program)) if f.size == 12]
        assert pins == [{Pin.OPAQUE}] * 3

        def scaled(call: Any) -> Any:
            x, scale = call.dims(call.given("x")), call.dims(call.given("scale"))
            call.join(x[-1], scale[0])
            return tuple(x)

        monkeypatch.setitem(rule.rules, "axes_test.scaled", scaled)
        axes, tried = try_permutations(program)
        assert [f.size for f in row_factors(axes) if free(f)] == [12]
        assert all(trial.moved < 1e-10 and not trial.void for trial in tried)


#: Values by which several positions may be the greatest, and by which they are so by chance only.
TIED = {
    "relu": lambda h: h.relu(),
    "cat": lambda h: torch.cat([h[:3].relu(), h[3:].relu()], 0),
    "a comparison": lambda h: (h > 0).float(),
    "a product with one": lambda h: h * (h > 0),
    "where": lambda h: torch.where(h > 1, h, 0.0),
    "a fill": lambda h: h.masked_fill(h < 1, 0.0),
    "a pad": lambda h: F.pad(h, (0, 0, 0, 3)),
    "a pool": lambda h: F.max_pool1d(h, 3, 1, 1),
    "an inverse": lambda h: 1 / (h.relu() + 1),
    "rounding": lambda h: (h * 4).round().softmax(-1),
}
CLEAR = {
    "a product": lambda h: h,
    "shares": lambda h: (h * 2).softmax(-1).float(),
    "a bias": lambda h: h.relu() + h * 0.5,
    "groups": lambda h: h.masked_fill(
        torch.zeros(5, 2)
        .scatter(1, h.view(5, 2, 3).amax(-1).topk(1).indices, 1.0)
        .repeat_interleave(3, 1)
        .bool()
        .logical_not(),
        float("-inf"),
    ),
}


@pytest.mark.parametrize("name", [*TIED, *CLEAR])
def test_ties_are_told_from_chance(name: str) -> None:
    values: Any = (TIED | CLEAR)[name]
    program = captured(
        {"r": (6, 8), "t": (6, 4)}, lambda w, x: F.embedding(values(F.linear(x, w.r)).argmax(-1), w.t), [X]
    )
    assert any(Pin.TIES in factor.pins for factor in row_factors(analyse(program))) == (name in TIED)
