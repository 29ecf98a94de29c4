"""Merge operators: what holds of each, and each against its formula written out, or against what it minimises."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from laconic.ir.errors import UsageError
from laconic.passes.merging import OPERATORS, Members, merge

NAMES = OPERATORS.names()


def members(count: int = 3, shape: tuple[int, ...] = (6, 5), seed: int = 0, **more: Any) -> Members:
    draw = torch.Generator().manual_seed(seed)

    def values() -> tuple[torch.Tensor, ...]:
        return tuple(torch.randn(shape, generator=draw) for _ in range(count))

    inputs = [torch.randn(40, shape[-1], generator=draw) for _ in range(count)]
    given: dict[str, Any] = {
        "values": values(),
        "squares": tuple(value.square() for value in values()),
        "covariances": tuple(x.T @ x for x in inputs),
        "base": values()[0],
    }
    return Members(**(given | more))


@pytest.mark.parametrize("name", NAMES)
def test_one_member_is_returned_as_it_is_and_equal_ones_too(name: str) -> None:
    (value,) = members(1).values
    assert merge(name, members(1, values=(value,))) is value
    equal = (value, value.clone(), value.clone())
    assert merge(name, members(values=equal)) is value


@pytest.mark.parametrize("name", [n for n in NAMES if n != "dare"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_order_does_not_matter(name: str, dtype: torch.dtype) -> None:
    given = members()
    values = tuple(value.to(dtype) for value in given.values)
    found = merge(name, members(values=values))
    turned = {key: tuple(reversed(getattr(given, key))) for key in ("squares", "covariances")}
    other = merge(name, members(values=values[::-1], **turned))
    assert found.dtype == dtype
    torch.testing.assert_close(found, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", ["average", "fisher"])
def test_convex_operators_stay_between_the_members(name: str) -> None:
    given = members(weights=(0.2, 3.0, 1.0))
    found, every = merge(name, given), torch.stack(given.values)
    assert bool((found >= every.amin(0) - 1e-6).all())
    assert bool((found <= every.amax(0) + 1e-6).all())


def test_average_is_weighted() -> None:
    given = members(weights=(1.0, 3.0, 0.0))
    a, b, _ = given.values
    torch.testing.assert_close(merge("average", given), (a.double() + 3 * b.double()).div(4).float())


def test_fisher_follows_who_has_gradients() -> None:
    given = members(2)
    squares = (torch.ones(6, 5), torch.zeros(6, 5))
    found = merge("fisher", members(2, squares=squares))
    torch.testing.assert_close(found, given.values[0], rtol=1e-5, atol=1e-5)
    alike = merge("fisher", members(2, squares=(torch.ones(6, 5), 7 * torch.ones(6, 5))))
    torch.testing.assert_close(alike, merge("average", given))
    nobody = merge("fisher", members(2, squares=(torch.zeros(6, 5), torch.zeros(6, 5))))
    torch.testing.assert_close(nobody, merge("average", given))


def test_regmean_is_the_least_squares_solution() -> None:
    draw = torch.Generator().manual_seed(3)
    inputs = [
        torch.randn(50, 5, generator=draw, dtype=torch.float64) @ torch.randn(5, 5, generator=draw).double()
        for _ in range(3)
    ]
    values = tuple(torch.randn(6, 5, generator=draw) for _ in range(3))
    given = Members(values, covariances=tuple(x.T @ x for x in inputs))
    targets = torch.cat([x @ value.double().T for x, value in zip(inputs, values, strict=True)])
    wanted = torch.linalg.lstsq(torch.cat(inputs), targets).solution.T
    found = merge("regmean", given, {"shrink": 1.0})
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    dead = tuple(torch.zeros(5, 5) for _ in range(3))
    torch.testing.assert_close(merge("regmean", Members(values, covariances=dead)), merge("average", Members(values)))


def test_ties_by_hand() -> None:
    base = torch.zeros(4)
    values = (torch.tensor([3.0, -1.0, 0.1, 5.0]), torch.tensor([1.0, 2.0, 0.2, -4.0]))
    found = merge("ties", Members(values, base=base), {"density": 0.75})
    # trimmed: 3 -1 0 5 and 1 2 0 -4; signs by the sums: + + + +; averages of those that agree
    assert found.tolist() == [2.0, 2.0, 0.0, 5.0]
    assert merge("ties", Members(values, base=base), {"density": 0.75, "scale": 0.5}).tolist() == [1.0, 1.0, 0.0, 2.5]


def test_dare_is_unbiased_and_follows_its_seed() -> None:
    value, base = torch.full((200, 200), 2e-3), torch.zeros(200, 200)
    given = (value, value * 2)
    found = merge("dare", Members(given, base=base, seed=1), {"drop": 0.5})
    assert float(found.mean()) == pytest.approx(3e-3, rel=0.02)
    assert 0.2 < float((found == 0).double().mean()) < 0.3
    assert torch.equal(found, merge("dare", Members(given, base=base, seed=1), {"drop": 0.5}))
    assert not torch.equal(found, merge("dare", Members(given, base=base, seed=2), {"drop": 0.5}))
    torch.testing.assert_close(merge("dare", Members(given, base=base), {"drop": 0.0}), value * 1.5)


def test_breadcrumbs_leave_out_both_ends() -> None:
    values = (torch.arange(1.0, 101.0), torch.arange(1.0, 101.0) + 0.5)
    found = merge("breadcrumbs", Members(values, base=torch.zeros(100)), {"density": 0.1, "top": 0.05, "scale": 1.0})
    assert torch.nonzero(found).flatten().tolist() == list(range(85, 95))
    assert found[90] == values[0][90] + values[1][90]
    small = (torch.tensor([1.0, 2.0]), torch.tensor([2.0, 1.0]))
    assert bool((merge("breadcrumbs", Members(small, base=torch.zeros(2)), {"density": 1.0, "scale": 1.0}) > 0).all())


def test_pcb_keeps_what_stands_out_and_agrees() -> None:
    values = (torch.tensor([5.0, 5.0, 0.1, 0.2, 0.3]), torch.tensor([5.0, -5.0, 0.2, 0.1, 0.3]))
    found = merge("pcb", Members(values, base=torch.zeros(5)), {"ratio": 0.4, "scale": 1.0})
    assert float(found[0]) == pytest.approx(5.0, rel=1e-3)
    assert found.abs().argmax() == 0
    flat = (torch.ones(5), 2 * torch.ones(5))
    assert bool(torch.isfinite(merge("pcb", Members(flat, base=torch.zeros(5)))).all())


def test_what_cannot_be_merged_is_refused() -> None:
    whole = (torch.tensor([1, 2]), torch.tensor([3, 4]))
    with pytest.raises(UsageError, match=r"tensors of torch.int64 are not merged"):
        merge("average", Members(whole))
    with pytest.raises(UsageError, match="several kinds"):
        Members((torch.ones(2), torch.ones(3)))
    with pytest.raises(UsageError, match="nothing to merge"):
        Members(())
    with pytest.raises(UsageError, match="cannot count"):
        Members((torch.ones(2), torch.ones(2)), weights=(0.0, 0.0))
    with pytest.raises(UsageError, match="2 members have 1 weights"):
        Members((torch.ones(2), torch.ones(2)), weights=(1.0,))
    apart = (torch.ones(2), torch.zeros(2))
    for name in ("ties", "dare", "breadcrumbs", "pcb"):
        with pytest.raises(UsageError, match="one ancestor"):
            merge(name, Members(apart))
    for name in ("fisher", "regmean"):
        with pytest.raises(UsageError, match=f"{name} weighs"):
            merge(name, Members(apart))
    with pytest.raises(UsageError, match="there is no merge operator 'averge'"):
        merge("averge", Members(apart))
    with pytest.raises(UsageError, match="not finite"):
        merge("average", Members((torch.tensor([torch.inf]), torch.tensor([1.0]))))
