"""Requests that would change what a program computes are refused, with the kind of pin, the reason and the place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from axes_oracles import captured
from axes_programs import CASES, Case
from laconic.ir.axes import analyse, factors, rewrite, row_factors
from laconic.ir.axes.dims import SOFT, Dim, Pin
from laconic.ir.errors import UsageError

WANTED: dict[Pin, str] = {
    Pin.IO: "relu",
    Pin.OPAQUE: "an op without a rule",
    Pin.MISALIGNED: "misaligned views",
    Pin.ENUM: "pad",
    Pin.ORDER: "flip",
    Pin.TIES: "argmax of what may be equal",
    Pin.ARRANGED: "sort",
    Pin.DATA_INDEX: "index of a table by data",
    Pin.OBSERVED: "argmax as a number",
    Pin.ARANGE_BOTH: "arange as both",
    Pin.COUNT: "mean",
    Pin.MASK: "softmax",
    Pin.TOPK: "topk",
}


def program_of(name: str):  # type: ignore[no-untyped-def]
    case: Case = next(case for case in CASES if case.name == name)
    torch.manual_seed(0)
    return captured(case.weights, case.function, [torch.randn(shape) for shape in case.inputs])


@pytest.mark.parametrize("kind", Pin)
def test_each_pin_refuses_with_its_reason(kind: Pin) -> None:
    axes = analyse(program_of(WANTED[kind]))
    everything = {f for label in [*axes.rows.values(), *_labels(axes)] for dim in label for f in factors(dim)}
    pinned = [f for f in everything if kind in f.pins and isinstance(f.size, int) and f.size > 1]
    assert pinned
    for factor in pinned:
        request = list(range(factor.size - 1)) if kind in SOFT else list(reversed(range(factor.size)))
        with pytest.raises(UsageError) as caught:
            rewrite(axes, {factor: request}, by="test")
        assert f"an axis of {factor.size}: {kind}, {factor.pins[kind].reason}" in str(caught.value)
        if factor.pins[kind].node is not None:
            assert f"%{factor.pins[kind].node.name}" in str(caught.value)
        if kind in SOFT and all(pin in SOFT for pin in factor.pins):
            rewrite(axes, {factor: list(reversed(range(factor.size)))}, by="test")
            rewrite(axes, {factor: request}, by="test", soft=True)


def _labels(axes) -> list[tuple[Dim, ...]]:  # type: ignore[no-untyped-def]
    return [label for label in axes.labels.values() if isinstance(label, tuple)]


@pytest.mark.parametrize(
    ("positions", "why"),
    [
        ([], "one must stay"),
        ([0, 12], "positions are 0 to 11"),
        ([-1], "0 to 11"),
        ([0.5], "0 to 11"),
        ([True], "0 to 11"),
    ],
)
def test_positions_that_are_not_there(positions: list[Any], why: str) -> None:
    axes = analyse(program_of("relu"))
    (factor,) = (f for f in row_factors(axes) if not f.pins)
    with pytest.raises(UsageError, match="these axes may not be rewritten so") as caught:
        rewrite(axes, {factor: positions}, by="test")
    assert why in str(caught.value)


def test_an_axis_of_another_analysis_is_refused() -> None:
    program = program_of("relu")
    (other,) = (f for f in row_factors(analyse(program)) if not f.pins)
    with pytest.raises(UsageError, match="an axis is none of this program's"):
        rewrite(analyse(program), {other: list(range(12))}, by="test")


def test_all_reasons_are_told_at_once() -> None:
    axes = analyse(program_of("relu"))
    pinned = [f for f in row_factors(axes) if f.pins]
    with pytest.raises(UsageError) as caught:
        rewrite(axes, {f: [1, 0] for f in pinned}, by="test")
    for factor in pinned:
        for why in factor.pins.values():
            assert why.reason in str(caught.value)


def test_an_axis_that_turned_out_to_be_another_is_refused() -> None:
    axes = analyse(program_of("relu"))
    dim = axes.rows["c"][1]
    linked = next(atom for atom in dim if atom.link is not None)
    with pytest.raises(UsageError, match="found to be another axis"):
        rewrite(axes, {linked: [1, 0]}, by="test")  # type: ignore[dict-item]
