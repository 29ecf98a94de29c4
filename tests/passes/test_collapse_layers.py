"""collapse-layers: one block holds what several add up to, and twins collapse without a trace."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import laconic
from architectures import captured, wide
from helpers import bits
from laconic.ir.calibration import Calibration
from laconic.ir.depth import Depth
from laconic.ir.errors import PipelineError, UsageError
from laconic.ir.inputs import cases
from laconic.ir.outcomes import Outcomes
from laconic.ir.program import Program
from laconic.passes.collapse_layers import CollapseLayers
from laconic.passes.pipeline import parse_pipeline, print_pipeline
from sequences import Ragged

DATA = Ragged((9, 14, 6, 11, 12, 7), rows=3)
DECIDED = Calibration(DATA)


def silenced(layers: int, *blocks: int) -> nn.Module:
    """A module of whose blocks these are all zeros."""
    module = wide(layers)
    with torch.no_grad():
        for k in blocks:
            for weight in module.model.layers[k].parameters():
                weight.zero_()
    return module


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return wide(6)


@pytest.fixture(scope="module")
def program(module: nn.Module) -> Program:
    return captured(module)


def gone(plan: Any) -> list[str]:
    return [action["layer"] for action in plan.actions if action["rule"] == "drop block"]


@pytest.mark.parametrize("mode", ["rdsc", pytest.param("replace", marks=pytest.mark.slow)])
def test_what_it_does_is_what_the_formula_says(mode: Any, module: nn.Module, program: Program) -> None:
    """At a threshold that everything passes the topmost blocks go first."""
    item = CollapseLayers(keep=0.5, mode=mode, size=3, interval=2, threshold=-1.0)
    plan = item.plan(program, DECIDED)
    assert gone(plan) == ["block 2", "block 4", "block 5"]
    wanted = copy.deepcopy(module)
    for at, others in ((1, (2,)), (3, (4, 5))):
        for weight, *more in zip(
            wanted.model.layers[at].parameters(),
            *(module.model.layers[k].parameters() for k in others),
            strict=True,
        ):
            if weight.dim() == 2:
                own = weight.detach().double()
                total = more[-1].double() if mode == "replace" else own + sum(m.double() - own for m in more)
                weight.data.copy_(total.float())
    wanted.model.layers = nn.ModuleList(wanted.model.layers[k] for k in (0, 1, 3))
    after = item.apply(program, plan).program
    inputs = cases(program, program.forward)
    for ours, theirs in zip(
        Outcomes.of(after, inputs).outcomes, Outcomes.of(captured(wanted), inputs).outcomes, strict=True
    ):
        torch.testing.assert_close(ours.results[0], theirs.results[0], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_what_adds_nothing_is_found_by_its_likeness() -> None:
    """Blocks of zeros: putting one into another (replace) would lose it, adding (rdsc) loses it too; at a threshold
    near one only what is beside them may go."""
    planted = captured(silenced(6, 3, 4))
    item = CollapseLayers(keep=0.8, mode="replace", size=2, threshold=0.9999)
    plan = item.plan(planted, DECIDED)
    assert gone(plan) == ["block 4"]
    after = item.apply(planted, plan).program
    inputs = cases(planted, planted.forward)
    found = [[bits(o.results) for o in Outcomes.of(p, inputs).outcomes] for p in (planted, after)]
    assert found[0] == found[1]
    assert len(Depth(after).blocks) == 5


@pytest.mark.slow
def test_likeness_is_that_of_the_plain_module(module: nn.Module, program: Program) -> None:
    from laconic.passes.collapse_layers import _Collapse, _Model

    depth = Depth(program)
    search = _Collapse(program, depth, depth.blocks, DECIDED, CollapseLayers(mode="replace"), 1)
    model = search._merged(_Model(list(depth.blocks)), 4, 1)
    short = copy.deepcopy(module)
    norms = {name: value.clone() for name, value in short.model.layers[4].state_dict().items() if "norm" in name}
    short.model.layers[4].load_state_dict(module.model.layers[5].state_dict() | norms)
    short.model.layers = short.model.layers[:5]
    states = []
    for m in (module, short):
        seen: list[torch.Tensor] = []
        hook = m.model.layers[-1].register_forward_hook(lambda mod, args, out, seen=seen: seen.append(out))
        with torch.no_grad():
            for batch in DATA:
                m(**batch.inputs, use_cache=False)
        hook.remove()
        states.append([s for v, b in zip(seen, DATA, strict=True) for s in (v.double() * b.mask[..., None]).flatten(1)])
    each = [float(F.cosine_similarity(a, b, dim=0)) for a, b in zip(*states, strict=True)]
    wanted = sum(each[:5]) / 5  # the first five samples, which stand in two batches
    assert search._likeness(model) == pytest.approx(wanted, abs=1e-6)


def test_level_0_plans_and_presets(program: Program) -> None:
    assert CollapseLayers(keep=1.0).plan(program).reason == "all blocks are kept"
    assert "less than half" in CollapseLayers(keep=0.95).plan(program, DECIDED).reason
    item = CollapseLayers()
    plan, again = (item.plan(program, DECIDED) for _ in range(2))
    assert plan.actions == again.actions
    assert all(torch.equal(value, again.tensors[key]) for key, value in plan.tensors.items())
    assert print_pipeline(parse_pipeline("laco")) == "collapse-layers"
    assert [p.name for p in parse_pipeline("fold")] == ["drop-layers", "share-layers", "heal"]
    assert print_pipeline(parse_pipeline("shortgpt")) == "drop-layers{method=influence}"


def test_bad_input(program: Program) -> None:
    for text, said in (
        ("collapse-layers{keep=0}", "a share above 0"),
        ("collapse-layers{size=1}", "2 or more"),
        ("collapse-layers{interval=0}", "at least 1"),
        ("collapse-layers{threshold=2}", "a cosine"),
        ("collapse-layers{mode=sum}", "rdsc/replace"),
    ):
        with pytest.raises(PipelineError, match=said):
            laconic.optimize(program, text, calibration=DATA)
    with pytest.raises(UsageError, match="needs activations"):
        laconic.optimize(program, "collapse-layers")
    with pytest.raises(UsageError, match="6 of 6 blocks of run 0 cannot go"):
        laconic.optimize(program, "collapse-layers{keep=0.05}", calibration=DATA)
    with pytest.raises(UsageError, match="cannot be collapsed"):
        laconic.optimize(program, "share-layers{method=fixed},collapse-layers{keep=0.5}", calibration=DATA)
    with pytest.raises(UsageError, match="is empty"):
        laconic.optimize(program, "collapse-layers", calibration=Ragged(()))
    depth = Depth(program)
    with pytest.raises(UsageError, match="no blocks that recur"):
        laconic.optimize(depth.skip_blocks(depth.blocks[1:]), "collapse-layers", calibration=DATA)
