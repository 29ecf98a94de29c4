"""What positions hold whatever the inputs are: every claim is true, and what is planted is found."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import fx

from axes_oracles import captured
from axes_programs import CASES, Case
from held_oracle import held_true, planted
from helpers import sampled
from laconic.ir.axes import analyse
from laconic.ir.axes.held import Holding


@pytest.mark.parametrize("seed", sampled(range(3), 3))
@pytest.mark.parametrize("case", sampled(CASES, 4), ids=lambda case: case.name)
def test_what_is_claimed_is_so(case: Case, seed: int) -> None:
    torch.manual_seed(seed)
    program = captured(case.weights, case.function, [torch.randn(shape) for shape in case.inputs])
    held_true(planted(program, (0.15, 0.4, 0.8)[seed], seed))


ZERO, INF = 0.0, float("inf")


def rows(name: str, *positions: int, to: float = ZERO) -> tuple[str, int, tuple[int, ...], float]:
    return (name, 0, positions, to)


def columns(name: str, *positions: int, to: float = ZERO) -> tuple[str, int, tuple[int, ...], float]:
    return (name, 1, positions, to)


A = {"a": (6, 8), "b": (6,)}
KNOWN: dict[str, tuple[Any, ...]] = {
    # weights, what is planted, function, axis of the result, {position: number}
    "a row of zeros": (A, [rows("a", 2)], lambda w, x: F.linear(x, w.a), 1, {2: 0.0}),
    "a row of zeros with a bias": (
        A,
        [rows("a", 2), rows("b", 2, to=0.5)],
        lambda w, x: F.linear(x, w.a, w.b),
        1,
        {2: 0.5},
    ),
    "through an activation": (A, [rows("a", 2)], lambda w, x: F.linear(x, w.a).sigmoid(), 1, {2: 0.5}),
    "a product with a zero": (A, [rows("b", 3)], lambda w, x: F.linear(x, w.a) * w.b, 1, {3: 0.0}),
    "a zero divided": (A, [rows("a", 1)], lambda w, x: F.linear(x, w.a) / (w.b.abs() + 1), 1, {1: 0.0}),
    "a sum with what is not known": (A, [rows("a", 1)], lambda w, x: F.linear(x, w.a) + x[:, :6], 1, {}),
    "constant inputs": (
        {**A, "c": (4, 6)},
        [rows("a", 0, 1, 2, 3), columns("c", *range(6), to=2.0), ("c", 0, (1, 3), ZERO), columns("c", 4, 5)],
        lambda w, x: F.linear(F.linear(x, w.a).exp(), w.c),
        1,
        {0: 8.0, 1: 0.0, 2: 8.0, 3: 0.0},
    ),
    "rows that read constants alone": (
        {**A, "c": (4, 6)},
        [rows("a", 0, 1), ("c", 0, (1,), ZERO)],
        lambda w, x: F.linear(F.linear(x, w.a).cos(), w.c),
        1,
        {1: 0.0},
    ),
    "masked, but for a finite number": (
        {**A, "m": (6,)},
        [rows("m", 1, 4, to=-1e9)],
        lambda w, x: (F.linear(x, w.a) + w.m).softmax(-1),
        1,
        {},
    ),
    "minus infinity under a softmax": (
        {**A, "m": (6,)},
        [rows("m", *range(6)), rows("m", 1, 4, to=-INF)],
        lambda w, x: (F.linear(x, w.a) + w.m).softmax(-1),
        1,
        {1: 0.0, 4: 0.0},
    ),
    "a channel that its norm scales away": (
        {**A, "g": (6,)},
        [rows("g", 3), rows("b", 3, to=0.5)],
        lambda w, x: F.layer_norm(F.linear(x, w.a), (6,), w.g, w.b),
        1,
        {3: 0.5},
    ),
    "a channel that an RMS norm scales away": (
        {**A, "g": (6,)},
        [rows("g", 3)],
        lambda w, x: F.rms_norm(F.linear(x, w.a), (6,), w.g),
        1,
        {3: 0.0},
    ),
    "a channel of a group that its norm scales away": (
        {**A, "g": (6,)},
        [rows("g", 3), rows("b", 3, to=0.5)],
        lambda w, x: F.group_norm(F.linear(x, w.a)[..., None], 2, w.g, w.b)[..., 0],
        1,
        {3: 0.5},
    ),
    "a channel of an image that its norm scales away": (
        {**A, "g": (6,)},
        [rows("g", 3), rows("b", 3, to=0.5)],
        lambda w, x: F.instance_norm(F.linear(x, w.a)[..., None].expand(5, 6, 7), weight=w.g, bias=w.b),
        1,
        {3: 0.5},
    ),
    "batch norm of a constant, and by what is not known": (
        {**A, "g": (6,), "m": (6,)},
        [rows("a", 2), rows("g", *range(6), to=1.0), rows("m", *range(6), to=0.5), rows("b", *range(6))],
        lambda w, x: F.batch_norm(F.linear(x, w.a), w.m * 0, w.m * 2, w.g, w.b) + w.m,
        1,
        {2: 0.5},
    ),
    "batch norm by what depends on the input": (
        {**A, "m": (6,)},
        [rows("a", 2), rows("m", *range(6), to=0.5)],
        lambda w, x: F.batch_norm(F.linear(x, w.a), w.m, w.m, x[0, :6].cos(), w.b),
        1,
        {},
    ),
    "one set of values for every sequence": (
        {"v": (1, 3, 5, 4)},
        [("v", 1, (1,), ZERO)],
        lambda w, x: F.scaled_dot_product_attention(
            x[:, None, None, :4].expand(5, 3, 2, 4), x[:, None, None, :4].expand(5, 3, 5, 4), w.v.expand(5, 3, 5, 4)
        ),
        1,
        {1: 0.0},
    ),
    "heads, apart and together again": (
        A,
        [rows("a", 2, 3)],
        lambda w, x: F.linear(x, w.a).reshape(5, 3, 2).transpose(0, 1).relu().transpose(0, 1).reshape(5, 6),
        1,
        {2: 0.0, 3: 0.0},
    ),
    "parts": (
        A,
        [rows("a", 1, 4)],
        lambda w, x: torch.cat(F.linear(x, w.a).split([2, 4], -1)[::-1], -1),
        1,
        {2: 0.0, 5: 0.0},
    ),
    "every other": (A, [rows("a", 1, 2)], lambda w, x: F.linear(x, w.a)[:, ::2], 1, {1: 0.0}),
    "from the end": (A, [rows("a", 4)], lambda w, x: F.linear(x, w.a)[:, -3:-1], 1, {1: 0.0}),
    "stacked": (A, [rows("a", 4)], lambda w, x: torch.stack([F.linear(x, w.a)] * 2, 1), 2, {4: 0.0}),
    "padded": (A, [rows("a", 0)], lambda w, x: F.pad(F.linear(x, w.a), (1, 2)), 1, {0: 0.0, 1: 0.0, 7: 0.0, 8: 0.0}),
    "repeated": (A, [rows("a", 1)], lambda w, x: F.linear(x, w.a).repeat(1, 2), 1, {1: 0.0, 7: 0.0}),
    "each repeated": (A, [rows("a", 1)], lambda w, x: F.linear(x, w.a).repeat_interleave(2, 1), 1, {2: 0.0, 3: 0.0}),
    "rows of a table": (
        {"e": (9, 6)},
        [columns("e", 5)],
        lambda w, x: F.embedding(x.abs().long() % 9, w.e),
        2,
        {5: 0.0},
    ),
    "a column of a matrix product": (
        {"a": (8, 6)},
        [columns("a", 5)],
        lambda w, x: x @ w.a,
        1,
        {5: 0.0},
    ),
    "a letter of an einsum": (
        {"a": (6, 8)},
        [rows("a", 2)],
        lambda w, x: torch.einsum("bi,oi->bo", x, w.a),
        1,
        {2: 0.0},
    ),
    "a mean over others": (A, [rows("a", 2)], lambda w, x: F.linear(x, w.a).exp().mean(0), 0, {2: 1.0}),
    "a sum over others": (A, [rows("a", 2)], lambda w, x: F.linear(x, w.a).sum(0), 0, {2: 0.0}),
    "a sum of constants": (A, [rows("a", 2)], lambda w, x: F.linear(x, w.a).exp().sum(0), 0, {}),
    "where a mask is known": (
        {**A, "m": (6,)},
        [rows("m", *range(6)), rows("m", 3, to=1.0)],
        lambda w, x: torch.where(w.m > 0, 7.0, F.linear(x, w.a)),
        1,
        {3: 7.0},
    ),
    "filled where a mask is known": (
        {**A, "m": (6,)},
        [rows("m", *range(6)), rows("m", 3, to=1.0)],
        lambda w, x: F.linear(x, w.a).masked_fill(w.m > 0, 7.0),
        1,
        {3: 7.0},
    ),
}


@pytest.mark.parametrize("name", KNOWN)
def test_what_is_known(name: str) -> None:
    shapes, plants, function, axis, expected = KNOWN[name]
    program = captured(shapes, function, [torch.randn(5, 8)])
    for row, along, positions, number in plants:
        program.weights[row].value.detach().index_fill_(along, torch.tensor(positions), number)
    held_true(program)
    (result,) = program.forward.output_values
    assert isinstance(result, fx.Node)
    held = Holding(analyse(program)).of(result, axis)
    found = {} if held is None else {k: float(held.value[k]) for k in held.known.nonzero().flatten().tolist()}
    assert found == expected
