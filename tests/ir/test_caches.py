"""Caches are recognised, in place and concatenated, and held in another layout in all entries at once."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import laconic
from architectures import gpt2, llama
from laconic.ir.caches import CacheSite, cast_caches, find_caches
from laconic.ir.capture import capture_module
from laconic.ir.errors import UnsupportedError
from laconic.ir.past import cache_bytes_per_token
from laconic.ir.program import Program
from laconic.ir.run import evaluate
from laconic.ir.verify import verify, verify_rewrite
from laconic.model import Model

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5]]


def cached(make: Any = llama, dtype: torch.dtype = torch.float32) -> Program:
    torch.manual_seed(0)
    module, inputs, axes = make()
    return laconic.capture(module.to(dtype).eval(), **inputs, dynamic_shapes=axes, cache=(2, 16))


@pytest.fixture(scope="module")
def small() -> Program:
    return cached()


@pytest.mark.slow
@pytest.mark.parametrize("make", [llama, gpt2])
def test_static_caches_are_found_in_every_entry(make: Any, small: Program) -> None:
    found, near = find_caches(small if make is llama else cached(make))
    assert found == [
        CacheSite("static", f"key_cache_{k}", f"value_cache_{k}", 2, ("prefill", "decode")) for k in range(2)
    ]
    assert near == []


class Past(nn.Module):
    """Attention that continues keys and values that it is given; what it returns says how far."""

    def __init__(self, returned: bool = True) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.returned = returned

    def forward(self, x: torch.Tensor, past_key: torch.Tensor, past_value: torch.Tensor) -> Any:
        q, k, v = (p(x).reshape(1, -1, 2, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
        y = self.o(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, -1, 16)) + x
        return (y, k, v) if self.returned else y


def past(returned: bool) -> Program:
    past = torch.randn(1, 2, 5, 8)
    return capture_module(Past(returned).eval(), (torch.randn(1, 3, 16), past, past.clone()), {})


def test_caches_that_are_inputs_and_results_are_found() -> None:
    found, near = find_caches(past(True))
    assert found == [CacheSite("concatenated", "past_key", "past_value", 2, ("forward",))]
    assert near == []


def test_what_callers_give_and_get_is_held_otherwise_too() -> None:
    """Keys and values are given and returned in two bytes each; what is new is rounded, what was there stays."""
    before = past(True)
    after = cast_caches(before, torch.bfloat16)
    verify(after)
    found, _ = find_caches(after)
    assert found == [CacheSite("concatenated", "past_key", "past_value", 2, ("forward",))]
    x, *caches = before.examples[0]
    short = [cache.bfloat16() for cache in caches]
    assert all(torch.equal(a, b) for a, b in zip(after.examples[0], (x, *short), strict=True))
    y, *full = evaluate(before, before.forward, [x, *(cache.float() for cache in short)]).results
    z, *kept = evaluate(after, after.forward, [x, *short]).results
    for a, b in zip(kept, full, strict=True):
        assert torch.equal(a, b.bfloat16())
    assert 0 < float((z - y).abs().max() / y.abs().max()) < 2e-2  # bfloat16 has eight bits


def test_what_is_no_cache_says_why() -> None:
    found, near = find_caches(past(False))
    assert found == []
    assert [miss.wanted for miss in near] == ["cache"]
    assert "its keys continue the input 'past_key', and no result says how far" in near[0].reason
    with pytest.raises(UnsupportedError, match="no cache was found") as caught:
        cast_caches(past(False), torch.bfloat16)
    assert "no result says how far" in str(caught.value)
    assert "cache=(batch, length)" in str(caught.value)


@pytest.mark.parametrize("was", [pytest.param(torch.float16, marks=pytest.mark.slow), torch.float32])
def test_caches_in_another_dtype(was: torch.dtype, small: Program) -> None:
    """The states, what is written into them in both entries, and what attention reads of them."""
    now = torch.bfloat16
    before = small if was is torch.float32 else cached(dtype=was)
    after = cast_caches(before, now)
    verify(after)
    verify_rewrite(before, after)
    sites, _ = find_caches(after)
    assert [(s.key, s.value) for s in sites] == [(f"key_cache_{k}", f"value_cache_{k}") for k in range(2)]
    assert all(after.weights[name].value.dtype is now for s in sites for name in (s.key, s.value))
    assert _bytes(after) * was.itemsize == _bytes(before) * now.itemsize
    logits: list[list[torch.Tensor]] = []
    for program in (before, after):
        seen: list[torch.Tensor] = []

        def keep(ids: torch.Tensor, scores: torch.Tensor, seen: list[torch.Tensor] = seen) -> torch.Tensor:
            seen.append(scores.clone())
            return torch.zeros_like(scores)  # the same tokens for both

        Model(program).generate(PROMPTS, max_new_tokens=6, logits_processor=[keep])
        logits.append(seen)
    gaps = [float((a - b).abs().max() / b.abs().max()) for a, b in zip(*logits, strict=True)]
    assert all(0 < gap < 2e-2 for gap in gaps)  # bfloat16 has eight bits


def _bytes(program: Program) -> float:
    found = cache_bytes_per_token(program)
    assert found
    return found


@pytest.mark.slow
def test_the_same_dtype_changes_no_bit(small: Program) -> None:
    after = cast_caches(small, torch.float32)
    assert torch.equal(*(Model(p).generate(PROMPTS, max_new_tokens=6) for p in (small, after)))


def test_a_state_that_is_used_otherwise_is_left_alone() -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(3))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.count.add_(1)
            return x * self.count

    from laconic.ir.caches import Cast, relayout

    program = capture_module(Counting(), (torch.randn(2, 3),), {})
    with pytest.raises(UnsupportedError, match="the state 'count' cannot be held otherwise") as caught:
        relayout(program, ["count"], Cast(torch.float16, torch.float32))
    assert "does not write into a part of it, nor continue it" in str(caught.value)
