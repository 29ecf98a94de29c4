"""Labels of axes: what joining makes of products and sums."""

from __future__ import annotations

from typing import Any

import pytest
import sympy

from laconic.ir.axes.dims import (
    Dim,
    Factor,
    Pin,
    Sum,
    factors,
    fresh,
    join,
    order,
    parts_of,
    pin,
    quotient,
    resolve,
    size_of,
)

S = sympy.Symbol("s", positive=True, integer=True)
T = sympy.Symbol("t", positive=True, integer=True)


def told(dim: Dim, names: dict[Factor, str] | None = None) -> str:
    """A dim in words: factors as letters in the order in which they come."""
    names = {} if names is None else names

    def word(atom: Any) -> str:
        if isinstance(atom, Sum):
            return "(" + " + ".join(told(part, names) for part in parts_of(atom)) + ")"
        return names.setdefault(atom, chr(ord("a") + len(names)))

    return ".".join(word(atom) for atom in resolve(dim)) or "1"


def pinned(*dims: Dim) -> set[Pin]:
    return {kind for dim in dims for factor in factors(dim) for kind in factor.pins}


def test_heads_are_split_off_on_the_right() -> None:
    merged, heads, width = fresh(12), fresh(3), fresh(4)
    assert join(merged, heads + width)
    assert told(merged) == "a.b"
    assert resolve(merged) == resolve(heads + width)


def test_the_walk_goes_through_what_was_linked_on_the_way() -> None:
    a, b, c = fresh(2), fresh(3), fresh(5)
    left, right = fresh(6), fresh(10)
    assert join(a + b + c, left + c)
    assert told(left) == "a.b"
    assert join(right, a + c)
    assert resolve(right) == resolve(a + c)
    assert not pinned(left, right)


def test_stacked_matrices_are_one_factor_twice() -> None:
    both, first, second = fresh(16), fresh(8), fresh(8)
    assert join(both, (Sum([first, second]),))
    assert join(first, second)
    assert told(both) == "(a + a)"
    view = fresh(2) + fresh(8)
    assert join(both, view)
    assert told(view) == "(1 + 1).a"


def test_fused_projections_have_heads_in_every_part() -> None:
    q, k, v = fresh(8 * 4), fresh(2 * 4), fresh(2 * 4)
    rows = (Sum([q, k, v]),)
    assert join(q, fresh(8) + fresh(4))
    assert join(k, v)
    assert join(rows, fresh(12) + fresh(4))
    assert told(rows) == "(a + b + b).c"
    assert not pinned(rows)


def test_parts_that_only_add_up_are_grouped() -> None:
    parts = [fresh(2), fresh(4), fresh(2), fresh(4)]
    dim = (Sum(parts),)
    assert join(dim, fresh(2) + fresh(6))
    assert told(dim) == "(1 + 1).(a + b)"


def test_sums_are_cut_where_either_ends() -> None:
    a, b = [fresh(3), fresh(5)], [fresh(4), fresh(4)]
    assert join((Sum(a),), (Sum(b),))
    assert told((Sum([*a, *b]),)) == "(a + 1 + b + a + 1 + b)"
    assert [size_of(d) for d in parts_of(Sum(a))] == [3, 1, 4]


def test_what_does_not_divide_is_pinned() -> None:
    a, b = fresh(6), fresh(4)
    assert not join(a + fresh(2), b + fresh(3))
    assert pinned(a, b) == {Pin.MISALIGNED}


def test_shifted_slices_end_in_a_pin() -> None:
    whole, first, last = fresh(100), fresh(99), fresh(99)
    assert join(whole, (Sum([(), last]),))
    assert join(whole, (Sum([first, ()]),))
    assert not join(first, last)
    assert Pin.MISALIGNED in pinned(whole)


def test_pins_follow_into_parts_and_partners() -> None:
    whole, other = fresh(8), fresh(8)
    pin(whole, Pin.IO, "an input")
    assert join(whole, fresh(2) + fresh(4))
    assert join(other, whole)
    assert pinned(other) == {Pin.IO}
    third = fresh(8)
    assert join(third, (Sum([fresh(3), fresh(5)]),))
    assert join(third, other) is False
    assert pinned(third) == {Pin.MISALIGNED}


def test_sizes_may_be_expressions() -> None:
    assert quotient(S * T, S) == T
    assert quotient(S * T + S, S) == T + 1
    assert quotient(S, 2) is None
    assert quotient(6, 4) is None
    assert order(S + 1, S) == 1
    assert order(S, T) is None
    flat, batch, places = fresh(S * T), fresh(S), fresh(T)
    assert join(flat, batch + places)
    assert resolve(flat) == resolve(batch + places)
    tokens = (Sum([(), fresh(S)]),)
    assert join(fresh(S + 1), tokens)


@pytest.mark.parametrize("size", [1, 7])
def test_a_dim_of_one_is_empty(size: int) -> None:
    assert (fresh(size) == ()) == (size == 1)
