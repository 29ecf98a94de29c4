"""share-atoms: full rank is exact to rounding, error is the tail of the eigenvalues, twins take one atom."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn

import laconic
from architectures import captured, gpt2, llama, wide
from laconic.ir.calibration import Calibration
from laconic.ir.errors import PipelineError, UsageError
from laconic.ir.inputs import cases
from laconic.ir.outcomes import Outcomes
from laconic.ir.program import Program
from laconic.passes.share_atoms import ShareAtoms, _dictionary
from sequences import Ragged

DATA = Ragged((40, 28, 45, 37, 50, 33), rows=2)
NAMES = [f"model.layers.{{}}.self_attn.{part}_proj.weight" for part in "qkv"]


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return wide(4)


@pytest.fixture(scope="module")
def program(module: nn.Module) -> Program:
    return captured(module)


def near(after: Program, wanted: Program, like: Program, **how: float) -> None:
    inputs = cases(like, like.forward)
    for ours, theirs in zip(Outcomes.of(after, inputs).outcomes, Outcomes.of(wanted, inputs).outcomes, strict=True):
        torch.testing.assert_close(ours.results[0], theirs.results[0], **how)


@pytest.mark.parametrize("lowering", ["rebuild", pytest.param("mix", marks=pytest.mark.slow)])
def test_what_is_computed_is_the_plain_module_with_mixed_matrices(
    lowering: Any, module: nn.Module, program: Program
) -> None:
    item = ShareAtoms(lowering=lowering)
    plan = item.plan(program)
    assert len(plan.actions) == 12
    after = item.apply(program, plan).program
    mixed = copy.deepcopy(module)
    for name in NAMES:
        rows = [name.format(k) for k in range(4)]
        flat = torch.stack([module.get_parameter(row).detach().double().flatten() for row in rows])
        u, s, v = torch.linalg.svd(flat, full_matrices=False)
        best = (u[:, :2] * s[:2]) @ v[:2]
        left = float(s[2:].norm() / s.norm())
        assert [a["left"] for a in plan.actions if a["row"] in rows] == pytest.approx([left] * 4, rel=1e-6)
        for row, value in zip(rows, best, strict=True):
            weight = mixed.get_parameter(row)
            weight.data.copy_(value.reshape(weight.shape).float())
    near(after, captured(mixed), program, rtol=1e-4, atol=1e-5)
    sizes = [program.weights[name.format(0)].value.numel() for name in NAMES]
    assert program.weight_bytes() - after.weight_bytes() == 4 * sum(4 * n - (2 * n + 4 * 2) for n in sizes)
    linears = sum(node.target is torch.ops.aten.mm.default for node in after.forward.calls())
    assert linears == (12 if lowering == "rebuild" else 0)


@pytest.mark.slow
def test_twins_take_one_atom_and_nothing_is_lost(module: nn.Module) -> None:
    twins = copy.deepcopy(module)
    for name in NAMES:
        for k in range(1, 4):
            twins.get_parameter(name.format(k)).data.copy_(2.0 * k * twins.get_parameter(name.format(0)).detach())
    program = captured(twins)
    item = ShareAtoms(keep=0.75)
    plan = item.plan(program)
    assert all(len(value) == 1 for name, value in plan.tensors.items() if name.startswith("atoms."))
    near(item.apply(program, plan).program, program, program, rtol=1e-4, atol=1e-5)


def test_as_many_atoms_as_matrices_lose_nothing(program: Program) -> None:
    rows = [NAMES[0].format(k) for k in range(4)]
    assert _dictionary(program, rows, 4) is None, "that is no fewer numbers"
    item = ShareAtoms(keep=1.0)
    assert item.apply(program, item.plan(program)).program is program


def test_a_correction_of_full_rank_restores_the_model(program: Program) -> None:
    item = ShareAtoms(keep=0.5, rank=32)
    after = item.apply(program, item.plan(program, Calibration(DATA))).program
    near(after, program, program, rtol=2e-3, atol=2e-4)
    found = []
    for rank in (0, 4, 16):
        result = laconic.optimize(program, f"share-atoms{{rank={rank}}}", calibration=DATA, data=Ragged(seed=3))
        found.append(result.report.after.metrics["kl"])
    assert found[0] > found[1] > found[2]


@pytest.mark.slow
def test_for_one_token_products_are_mixed() -> None:
    module = wide(4)
    _, inputs, axes = llama(1)
    whole = laconic.capture(module, **inputs, dynamic_shapes=axes, cache=(1, 16))
    result = laconic.optimize(whole, "share-atoms")
    counts = {
        name: sum(node.target is torch.ops.aten.mm.default for node in entry.calls())
        for name, entry in result.program.entries.items()
    }
    assert counts["decode"] == 0
    assert counts["forward"] == 12
    assert result.model.generate([[5, 6, 7]], max_new_tokens=4).shape[0] == 1


@pytest.mark.slow
def test_matrices_of_other_layouts() -> None:
    """GPT-2 packs q, k and v into one matrix, with its outputs as columns."""
    module = wide(4, gpt2)
    program = captured(module, gpt2)
    result = laconic.optimize(program, "share-atoms{rank=2}", calibration=DATA)
    assert result.report.rows[0].modified
    assert len(result.plans[0].actions) == 4


class Plain(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x))
        return x


def test_bad_input(program: Program) -> None:
    for text in ("share-atoms{keep=0}", "share-atoms{rank=-1}", "share-atoms{parts=qk}", "share-atoms{lowering=x}"):
        with pytest.raises(PipelineError):
            laconic.optimize(program, text)
    with pytest.raises(UsageError, match="needs activations"):
        laconic.optimize(program, "share-atoms{rank=2}")
    with pytest.raises(UsageError, match="no attention projections recur"):
        laconic.optimize(Plain().eval(), "share-atoms", inputs=(torch.randn(2, 8),))
