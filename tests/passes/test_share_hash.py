"""share-hash: the mapping is a bijection at a ratio of 1 and even below, and what is trained moves as without it."""

from __future__ import annotations

import copy
import math
import subprocess
import sys
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import laconic
from laconic.ir.capture import capture_module
from laconic.ir.errors import PipelineError, UsageError
from laconic.passes.pipeline import parse_pipeline
from laconic.passes.share_hash import ShareHash, scale_steps, share_hash, slot_scale
from laconic.passes.share_hash.mapping import RandomFold


def slots_of(fold: RandomFold) -> torch.Tensor:
    """Where each element stands."""
    every = torch.arange(fold.slots)
    return torch.cat([every[start : start + length] for start, length in fold.pieces(0, fold.total)])


@pytest.mark.parametrize(("total", "slots"), [(1000, 1000), (1000, 400), (1000, 137), (20000, 1), (9000, 8999)])
def test_slots_are_used_evenly(total: int, slots: int) -> None:
    found = slots_of(RandomFold(total, slots, seed=3))
    assert len(found) == total
    load = torch.bincount(found, minlength=slots)
    assert set(load.tolist()) <= {total // slots, -(-total // slots)}
    for i in range(0, total, 97):
        turn, step = divmod(i, slots)
        assert int(found[i]) == (RandomFold(total, slots, seed=3).start(turn) + step) % slots


def test_a_part_is_that_part_of_the_whole() -> None:
    fold = RandomFold(50000, 1234, seed=1)
    array, table = torch.randn(1234), fold.table
    whole = fold.expand(array, table, 0, 50000)
    signs = fold.signs(table, 0, 50000)
    assert torch.equal(whole, array[slots_of(fold)] * signs)
    assert 0.45 < float((signs > 0).double().mean()) < 0.55
    for first, count in ((0, 1), (1233, 2), (5000, 20000), (40001, 9999)):
        assert torch.equal(fold.expand(array, table, first, count), whole[first : first + count])


def test_the_mapping_is_the_same_in_every_process() -> None:
    said = (
        "from laconic.passes.share_hash.mapping import RandomFold as R; f = R(100, 7, 5); "
        "print([f.start(k) for k in range(9)], int(f.table[:64].sum()))"
    )
    found = {
        subprocess.run([sys.executable, "-c", said], capture_output=True, text=True, check=True).stdout for _ in "12"
    }
    fold = RandomFold(100, 7, 5)
    assert found == {f"{[fold.start(k) for k in range(9)]} {int(fold.table[:64].sum())}\n"}


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(50, 32), nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 50, bias=False)).eval()


def test_at_a_ratio_of_1_a_fit_keeps_every_bit() -> None:
    model, ids = small(), torch.randint(0, 50, (4, 7))
    made = share_hash(model, 1.0, fit=True)
    assert torch.equal(made(ids), model(ids))
    for a, b in zip(made, model, strict=True):  # type: ignore[call-overload]
        if hasattr(b, "weight"):
            assert torch.equal(a.weight, b.weight)
    assert sum(p.numel() for p in made.parameters()) == sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize("ratio", [0.25, 0.5])
def test_there_are_as_many_weights_as_asked(ratio: float) -> None:
    model = small()
    made = share_hash(model, ratio)
    shared = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    assert sum(p.numel() for p in made.parameters()) == int(ratio * shared) + 64
    for a, b in zip(made, model, strict=True):  # type: ignore[call-overload]
        if hasattr(b, "weight"):
            assert float(a.weight.detach().std()) == pytest.approx(float(b.weight.detach().std()), rel=0.5)


def test_a_fit_is_least_squares() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 32)).eval()
    made = share_hash(model, 0.3, fit=True)

    def error(other: Any) -> float:
        return sum(float((a.weight - b.weight).detach().square().sum()) for a, b in zip(other, model, strict=True))

    best = error(made)
    with torch.no_grad():
        for k in range(0, len(made.hash_shared), 211):  # type: ignore[arg-type]
            for step in (1e-3, -1e-3):
                moved = copy.deepcopy(made)
                moved.hash_shared[k] += step  # type: ignore[index,operator]
                assert error(moved) >= best - 1e-6


def test_tied_weights_stay_tied_and_biases_stay() -> None:
    model = small()
    model[3].weight = nn.Parameter(model[1].weight.detach()[:50].repeat(1, 2))  # type: ignore[index,union-attr]
    tied = nn.Sequential(nn.Embedding(50, 64), nn.Linear(64, 50))
    tied[1].weight = tied[0].weight
    made = share_hash(tied, 0.5)
    assert torch.equal(made[0].weight, made[1].weight)  # type: ignore[index]
    assert sum(p.numel() for p in made.parameters()) == 1600 + 50


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_one_step_at_a_ratio_of_1_is_the_plain_models(optimizer: str) -> None:
    model, ids, targets = small(), torch.randint(0, 50, (8, 5)), torch.randint(0, 50, (8, 5))
    made = share_hash(model, 1.0, fit=True)

    def step(module: nn.Module) -> None:
        if optimizer == "sgd":
            chosen: Any = torch.optim.SGD(module.parameters(), lr=0.5)
        else:
            chosen = torch.optim.Adam(module.parameters(), lr=1e-3, eps=1e-12)
            chosen = scale_steps(chosen, module) if module is made else chosen
        F.cross_entropy(module(ids).flatten(0, 1), targets.flatten()).backward()
        chosen.step()

    step(model)
    step(made)
    for a, b in zip(made, model, strict=True):  # type: ignore[call-overload]
        if hasattr(b, "weight"):
            touched = b.weight.grad.abs() > 1e-7
            torch.testing.assert_close(a.weight[touched], b.weight[touched], rtol=1e-3, atol=1e-6)


def test_scaling_is_that_of_the_formula() -> None:
    made = share_hash(small(), 0.3)
    scales, fold = torch.zeros(0), None
    for part in made.modules():
        if type(part).__name__ == "_Folded":
            scales = torch.cat([scales, torch.full((part.shape.numel(),), part.scale)])
            fold = part.fold
    assert fold is not None
    slots = slots_of(fold)
    total = torch.zeros(fold.slots).index_add(0, slots, scales)
    count = torch.bincount(slots, minlength=fold.slots)
    torch.testing.assert_close(slot_scale(made).float(), total.square() / count)


def test_it_is_captured_with_one_array_and_no_indices() -> None:
    model = nn.Sequential(nn.Linear(128, 256), nn.ReLU(), nn.Linear(256, 128)).eval()
    made, x = share_hash(model, 0.25, least=100).eval(), torch.randn(3, 128)
    program = capture_module(made, (x,), {}, None)
    assert program.weight_bytes() < 0.25 * 65536 * 4 + 4 * (256 + 128) + 2 * 8191 * 4
    assert all(w.value.is_floating_point() for w in program.weights.values())
    from laconic.ir.inputs import cases
    from laconic.ir.outcomes import Outcomes

    found = Outcomes.of(program, cases(program, program.forward)[:1])
    (case,) = found.cases
    assert torch.equal(found.outcomes[0].results[0], made(case.inputs[0]))


def test_training_needs_the_scaling() -> None:
    """At three learning rates, the greatest more than the plain model bears, a quarter of the weights train with the
    scaling and diverge without."""
    torch.manual_seed(0)
    x = torch.randn(256, 32)
    y = torch.tanh(x @ torch.randn(32, 32) / 4) @ torch.randn(32, 4)

    def loss_of(scaled: bool, rate: float) -> float:
        torch.manual_seed(1)
        model = share_hash(nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 4)), 0.25, least=100)
        if not scaled:
            model.hash_shared._backward_hooks.clear()  # type: ignore[union-attr]
        chosen = torch.optim.SGD(model.parameters(), lr=rate)
        for _ in range(200):
            chosen.zero_grad()
            loss = F.mse_loss(model(x), y)
            loss.backward()
            chosen.step()
        return float(loss.detach())

    for rate in (0.3, 1.0, 2.0):
        assert loss_of(True, rate) < 0.05 * float(y.var())
        assert not math.isfinite(loss_of(False, rate))


def test_copies_and_other_dtypes_train_alike() -> None:
    """A copy has hooks of its own, what is frozen stays, and a converted module may change its dtype."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 32))
    plain[2].weight.requires_grad_(False)
    small = share_hash(plain, 0.25, least=100)
    assert not nn.utils.parametrize.is_parametrized(small[2])
    x = torch.randn(8, 32)
    gradients = []
    for model in (small, copy.deepcopy(small)):
        model(x).square().sum().backward()
        gradients.append(model.hash_shared.grad)
    assert torch.equal(*gradients)
    for dtype in (torch.bfloat16, torch.float64):
        assert copy.deepcopy(small).to(dtype)(x.to(dtype)).dtype == dtype
    with torch.no_grad():
        plain[0].weight[0, 0] = math.nan
    with pytest.raises(UsageError, match="not finite"):
        share_hash(plain, 0.25, least=100)


def test_decoupled_decay_is_the_plain_models() -> None:
    torch.manual_seed(0)
    plain = nn.Linear(64, 64, bias=False)
    hashed = share_hash(plain, 1.0, fit=True)
    chosen = [torch.optim.AdamW(m.parameters(), lr=0.01, weight_decay=0.1) for m in (plain, hashed)]
    scale_steps(chosen[1], hashed)
    for model, optimizer in zip((plain, hashed), chosen, strict=True):
        for _ in range(20):
            for weight in model.parameters():
                weight.grad = torch.zeros_like(weight)
            optimizer.step()
    torch.testing.assert_close(hashed.weight.detach(), plain.weight.detach(), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_pass_gives_what_the_fitted_module_gives(dtype: torch.dtype) -> None:
    model = nn.Sequential(nn.Linear(96, 512), nn.ReLU(), nn.Linear(512, 96)).eval().to(dtype)
    x = torch.randn(3, 96, dtype=dtype)
    program = capture_module(model, (x,), {}, None)
    item = ShareHash(ratio=0.3)
    plan = item.plan(program)
    after = item.apply(program, plan).program
    made = share_hash(model, 0.3, fit=True)
    for k in (0, 2):
        torch.testing.assert_close(
            after_weight(after, k), made[k].weight.detach(), rtol=0.02 if dtype == torch.bfloat16 else 1e-6, atol=1e-6
        )
    size = torch.finfo(dtype).bits // 8
    assert after.weight_bytes() == size * (int(0.3 * 2 * 96 * 512) + 8191 + 512 + 96)
    assert item.apply(program, plan).program.weights["hash_shared"].value.equal(after.weights["hash_shared"].value)
    assert ShareHash(ratio=1.0).apply(program, ShareHash(ratio=1.0).plan(program)).program is program
    result = laconic.optimize(program, "exact,share-hash{ratio=0.3}")
    assert result.report.verified
    assert result.program.weight_bytes() <= after.weight_bytes()


def after_weight(program: Any, k: int) -> torch.Tensor:
    """What a linear layer multiplies by."""
    linears = [node for node in program.forward.calls() if node.target is torch.ops.aten.linear.default]
    from laconic.ir.interpret import Interpreter, Tap

    seen: list[torch.Tensor] = []
    run = Interpreter(program, [Tap((linears[k // 2].args[1].name,), seen.append)], results=False)
    run([torch.zeros(3, 96, dtype=program.weights["hash_shared"].value.dtype)])
    return seen[0]


def test_bad_input() -> None:
    for text in ("share-hash{ratio=0}", "share-hash{ratio=2}", "share-hash{least=0}"):
        with pytest.raises(PipelineError):
            parse_pipeline(text)
    for ratio in (0.0, 1.5, -1.0):
        with pytest.raises(UsageError, match="a ratio is above 0"):
            share_hash(small(), ratio)
    with pytest.raises(UsageError, match="no weight has two axes"):
        share_hash(nn.Linear(2, 2), 0.5)
