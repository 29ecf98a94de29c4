"""drop-layers: planted zero layers go bit for bit, scores are those of the plain module, plans hold all."""

from __future__ import annotations

import copy
import itertools
import json
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import laconic
from architectures import bert, captured, gpt2, llama, vit, wide
from helpers import apart, bits
from laconic.ir.calibration import Calibration
from laconic.ir.capture import capture_module
from laconic.ir.data import Batch, Data
from laconic.ir.depth import Depth
from laconic.ir.errors import PipelineError, UsageError
from laconic.ir.inputs import cases
from laconic.ir.outcomes import Outcomes
from laconic.ir.program import Kind, Program
from laconic.ir.types import nbytes
from laconic.passes.drop_layers import DropLayers
from laconic.passes.drop_layers.gates import train_gates
from laconic.passes.drop_layers.influence import influence
from laconic.passes.drop_layers.task import DropTask, blocks_of, branches_of, space_of
from laconic.passes.manager import PassManager
from laconic.passes.methods import methods_of
from sequences import Ragged

DATA = Ragged((9, 14, 6, 11, 12, 7), rows=2)
DECIDED = Calibration(DATA)


def silenced(layers: int, *blocks: int) -> nn.Module:
    """A module in which these blocks add nothing."""
    module = wide(layers)
    with torch.no_grad():
        for k in blocks:
            module.model.layers[k].self_attn.o_proj.weight.zero_()
            module.model.layers[k].mlp.down_proj.weight.zero_()
    return module


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return wide(5)


@pytest.fixture(scope="module")
def program(module: nn.Module) -> Program:
    return captured(module)


@pytest.fixture(scope="module")
def planted() -> Program:
    return captured(silenced(5, 1, 3))


def task(program: Program, keep: float = 0.6, unit: str = "block") -> DropTask:
    depth = Depth(program)
    layers = blocks_of(depth) if unit == "block" else branches_of(depth)
    return DropTask(program, depth, DECIDED, 0, tuple(layers), space_of(depth, layers, keep, 0), 200)


def dropped(item: DropLayers, program: Program, decided: Calibration = DECIDED) -> list[str]:
    return [a["layer"] for a in item.plan(program, decided).actions if a["rule"].startswith("drop")]


def logits(module: nn.Module) -> list[torch.Tensor]:
    """Those of the positions that count, by batch."""
    with torch.no_grad():
        return [module(**batch.inputs, use_cache=False).logits[batch.mask].double() for batch in DATA]


def divergence(module: nn.Module, other: nn.Module) -> float:
    pairs = list(zip(logits(module), logits(other), strict=True))
    each = [F.kl_div(b.log_softmax(-1), a.log_softmax(-1), reduction="none", log_target=True).sum(-1) for a, b in pairs]
    return float(torch.cat(each).mean())


def without(module: nn.Module, blocks: Any) -> nn.Module:
    """The plain module with these layers taken out of its list."""
    short = copy.deepcopy(module)
    short.model.layers = nn.ModuleList(layer for k, layer in enumerate(short.model.layers) if k not in set(blocks))
    return short


def test_level_0_is_the_same_program(program: Program) -> None:
    item = DropLayers(keep=1.0)
    assert item.apply(program, item.plan(program)).program is program
    run = PassManager([item]).run(program)
    assert not run.ledger.rows[0].modified
    assert run.ledger.rows[0].reason == "all layers are kept"


@pytest.mark.parametrize("method", ["influence", "search", "exhaustive", "greedy", "gates"])
def test_planted_blocks_go_and_no_bit_changes(method: str, planted: Program) -> None:
    item = DropLayers(keep=0.6, method=method, steps=60, repair=False)
    plan = item.plan(planted, DECIDED)
    assert [a["layer"] for a in plan.actions] == ["block 1", "block 3"]
    after = item.apply(planted, plan).program
    inputs = cases(planted, planted.forward)
    found = [[bits(o.results) for o in Outcomes.of(p, inputs).outcomes] for p in (planted, after)]
    assert found[0] == found[1]
    gone = sum(nbytes(w.value) for name, w in planted.weights.items() if ".1." in name or ".3." in name)
    assert planted.weight_bytes() - after.weight_bytes() == gone
    assert len(blocks_of(Depth(after))) == 3


@pytest.mark.parametrize(
    "method", ["influence", *(pytest.param(m, marks=pytest.mark.slow) for m in ("search", "gates"))]
)
def test_planted_branches_go(method: str) -> None:
    module = wide(5)
    with torch.no_grad():
        module.model.layers[0].self_attn.o_proj.weight.zero_()
        module.model.layers[3].mlp.down_proj.weight.zero_()
    item = DropLayers(keep=0.8, method=method, unit="branch", steps=60, repair=False)
    assert dropped(item, captured(module)) == ["attention 0", "mlp 7"]


def test_a_planted_span_goes() -> None:
    assert dropped(DropLayers(keep=0.6, method="span"), captured(silenced(5, 2, 3))) == ["block 2", "block 3"]


def test_influence_and_angles_are_those_of_the_plain_module(module: nn.Module, program: Program) -> None:
    hidden: list[list[torch.Tensor]] = []
    for batch in DATA:
        with torch.no_grad():
            seen: list[torch.Tensor] = []
            hooks = [
                layer.register_forward_hook(lambda m, args, out, seen=seen: seen.extend([args[0], out]))
                for layer in module.model.layers
            ]
            module(**batch.inputs, use_cache=False)
            for hook in hooks:
                hook.remove()
        hidden.append([value[batch.mask].double() for value in seen])
    states = [torch.cat([h[k] for h in hidden]) for k in range(2 * len(module.model.layers))]
    wanted = [1 - float(F.cosine_similarity(states[2 * k], states[2 * k + 1], dim=-1).mean()) for k in range(5)]
    assert influence(task(program)) == pytest.approx(wanted, abs=1e-6)
    plan = DropLayers(keep=0.6, method="influence").plan(program, DECIDED)
    assert [a["layer"] for a in plan.actions] == [
        f"block {k}" for k in sorted(sorted(range(5), key=wanted.__getitem__)[:2])
    ]
    angles = [float(F.cosine_similarity(states[2 * k], states[2 * k + 3], dim=-1).acos().mean()) for k in range(4)]
    first = min(range(4), key=angles.__getitem__)
    plan = DropLayers(keep=0.6, method="span").plan(program, DECIDED)
    assert [a["layer"] for a in plan.actions] == [f"block {first}", f"block {first + 1}"]
    assert plan.actions[0]["score"] == pytest.approx(angles[first] / torch.pi, abs=1e-6)


def test_influence_of_branches_is_that_of_the_plain_module(module: nn.Module, program: Program) -> None:
    sums = torch.zeros(5, 2, dtype=torch.float64)
    rows = 0
    for batch in DATA:
        with torch.no_grad():
            x = module.model.embed_tokens(batch.inputs["input_ids"])
            mask = batch.inputs["attention_mask"][:, None, None] * torch.ones(x.shape[1], x.shape[1]).tril()
            place = module.model.rotary_emb(x, torch.arange(x.shape[1])[None])
            for k, layer in enumerate(module.model.layers):
                bias = torch.where(mask > 0, 0.0, -torch.inf)
                added = layer.self_attn(layer.input_layernorm(x), position_embeddings=place, attention_mask=bias)[0]
                for j in range(2):
                    after = x + added
                    sums[k, j] += F.cosine_similarity(x.double(), after.double(), dim=-1)[batch.mask].sum()
                    x, added = after, layer.mlp(layer.post_attention_layernorm(after))
        rows += int(batch.mask.sum())
    wanted = (1 - sums / rows).flatten().tolist()
    assert influence(task(program, unit="branch")) == pytest.approx(wanted, abs=1e-6)


def test_states_are_judged_as_the_plain_module_without_these_layers(module: nn.Module, program: Program) -> None:
    found = task(program)
    everything = range(len(DATA))
    values = {}
    for pair in itertools.combinations(range(5), 2):
        state = tuple(int(k in pair) for k in range(5))
        values[pair] = found.fitness(state, everything)
        assert values[pair] == pytest.approx(divergence(module, without(module, pair)), rel=1e-4)
    best = min(values, key=values.__getitem__)
    for method in ("exhaustive", "search"):
        assert dropped(DropLayers(keep=0.6, method=method), program) == [f"block {k}" for k in best]


def test_branches_are_judged_as_the_plain_module_with_zeros(module: nn.Module, program: Program) -> None:
    zeros = copy.deepcopy(module)
    with torch.no_grad():
        zeros.model.layers[1].self_attn.o_proj.weight.zero_()
        zeros.model.layers[4].mlp.down_proj.weight.zero_()
    state = tuple(int(k in (2, 9)) for k in range(10))
    found = task(program, keep=0.8, unit="branch")
    assert found.space.legal(state)
    assert found.fitness(state, range(len(DATA))) == pytest.approx(divergence(module, zeros), rel=1e-4)


def test_what_is_rewritten_is_what_was_judged(program: Program) -> None:
    item = DropLayers(keep=0.6)
    plan = item.plan(program, DECIDED)
    after = item.apply(program, plan).program
    names = [a["layer"] for a in plan.actions]
    found = task(program)
    state = tuple(int(layer.name in names) for layer in found.layers)
    judged = found.fitness(state, range(len(DATA)))
    result = laconic.optimize(program, [item], calibration=DATA, data=Ragged(seed=3), check=False)
    assert result.report.rows[0].after.metrics["kl"] > 0
    from laconic.ir.metrics.registry import load
    from laconic.ir.quality import figure, measure

    (units,) = measure([after], DATA, [load("kl")], reference=program)
    assert figure(load("kl"), units["kl"]).value == pytest.approx(judged, rel=1e-6)


def test_gates_of_branches_that_stay_are_folded(program: Program) -> None:
    item = DropLayers(keep=0.6, method="gates", unit="branch", steps=40)
    plan = item.plan(program, DECIDED)
    scaled = [a for a in plan.actions if a["rule"] == "scale branch"]
    assert len(scaled) == 6
    after = item.apply(program, plan).program
    wanted = apart(program)
    for action in plan.actions:
        k, kind = int(action["layer"].split()[1]) // 2, action["layer"].split()[0]
        row = f"model.layers.{k}." + ("self_attn.o_proj.weight" if kind == "attention" else "mlp.down_proj.weight")
        factor = action["factor"] if action["rule"] == "scale branch" else 0.0
        assert factor == 0 or 0.8 < factor < 1.2
        if factor:
            assert action["rows"] == [row]
        wanted.weights[row].value.detach().mul_(factor)
    inputs = cases(program, program.forward)
    for ours, theirs in zip(Outcomes.of(after, inputs).outcomes, Outcomes.of(wanted, inputs).outcomes, strict=True):
        torch.testing.assert_close(ours.results[0], theirs.results[0], rtol=1e-4, atol=1e-5)


def test_gates_become_closed_or_open_and_keep_to_the_budget(planted: Program) -> None:
    chances = train_gates(task(planted)).scores
    assert sum(chances) == pytest.approx(3.0, abs=1e-3)  # of five blocks
    assert all(chance < 0.1 or chance > 0.9 for chance in chances)
    first = DropLayers(keep=0.6, method="gates", steps=5).plan(planted, DECIDED)
    again = DropLayers(keep=0.6, method="gates", steps=5).plan(planted, DECIDED)
    assert first == again


@pytest.mark.parametrize("method", methods_of("drop-layers"))
def test_one_seed_is_one_plan_and_plans_replay_to_the_bit(method: str, program: Program) -> None:
    item = DropLayers(keep=0.6, method=method, steps=3, generations=2)
    plan = item.plan(program, DECIDED)
    assert plan == item.plan(program, DECIDED)
    said = json.loads(json.dumps([dict(action) for action in plan.actions]))
    replayed = type(plan)(plan.spec, tuple(said))
    first, again = (item.apply(program, p).program for p in (plan, replayed))
    assert str(first) == str(again)
    assert all(bits([w.value]) == bits([again.weights[name].value]) for name, w in first.weights.items())


def test_other_seeds_draw_other_layers(program: Program) -> None:
    drawn = {
        tuple(dropped(DropLayers(keep=0.4, method="random"), program, Calibration(DATA, seed))) for seed in range(8)
    }
    assert len(drawn) > 3


def test_a_plan_restricted_to_a_site_drops_one_block(planted: Program) -> None:
    item = DropLayers(keep=0.6, method="influence")
    plan = item.plan(planted, DECIDED)
    one = plan.restricted({plan.actions[1]["site"]})
    assert [a["layer"] for a in one.actions] == ["block 3"]
    assert len(blocks_of(Depth(item.apply(planted, one).program))) == 4


@pytest.mark.parametrize("build", [vit, *(pytest.param(build, marks=pytest.mark.slow) for build in (bert, gpt2))])
def test_other_architectures(build: Any) -> None:
    """Post-norm, Conv1D, images: what is judged is what the rewritten program gives."""
    torch.manual_seed(0)
    module = build(4)[0].eval()
    program = captured(module, build)
    data: Data = Pictures() if build is vit else DATA
    for unit in ("block", "branch"):
        item = DropLayers(keep=0.5, method="influence", unit=unit)  # type: ignore[arg-type]
        run = PassManager([item], calibration=Calibration(data)).run(program)
        assert run.ledger.rows[0].modified
        assert len(run.plans[0].actions) == (2 if unit == "block" else 4)


class Pictures(Data):
    name = digest = "pictures"
    samples = frozenset({"pictures"})

    def __len__(self) -> int:
        return 2

    def batch(self, k: int) -> Batch:
        return Batch({"pixel_values": torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(k))})


@pytest.mark.slow
def test_caches_go_and_it_still_generates() -> None:
    module = silenced(5, 1, 3)
    _, inputs, axes = llama(1)
    whole = laconic.capture(module, **inputs, dynamic_shapes=axes, cache=(2, 16))
    result = laconic.optimize(whole, "drop-layers{keep=0.6,method=influence}", calibration=DATA)
    prompts = [[5, 6, 7], [9, 8]]
    wanted = laconic.optimize(whole, "none").model.generate(prompts, max_new_tokens=6)
    assert torch.equal(result.model.generate(prompts, max_new_tokens=6), wanted)
    before, after = (_state_bytes(p) for p in (whole, result.program))
    assert after / before == pytest.approx(0.6, abs=0.02)


def _state_bytes(program: Program) -> int:
    return sum(nbytes(weight.value) for weight in program.weights.values() if weight.kind is Kind.STATE)


class Odd(nn.Module):
    """Blocks that each scale their branch otherwise."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k, layer in enumerate(self.layers):
            x = x + torch.tanh(layer(x)) * (k + 2.5)
        return x


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("drop-layers{keep=0}", "a share above 0"),
        ("drop-layers{keep=1.5}", "a share above 0"),
        ("drop-layers{keep=nan}", "a share above 0"),
        ("drop-layers{method=serach}", "no method 'serach'"),
        ("drop-layers{protect=-1}", "at least 0"),
        ("drop-layers{steps=0}", "at least 1"),
        ("drop-layers{unit=layer}", "block/branch"),
    ],
)
def test_options_that_are_none(text: str, said: str, program: Program) -> None:
    with pytest.raises(PipelineError, match=said):
        laconic.optimize(program, text, calibration=DATA)


def test_what_cannot_be_given_is_refused(program: Program) -> None:
    with pytest.raises(UsageError, match=r"needs activations, and there is no data"):
        laconic.optimize(program, "drop-layers")
    with pytest.raises(UsageError, match=r"(?s)3 of 5 blocks of run 0 cannot be dropped.*keep more, or protect less"):
        laconic.optimize(program, "drop-layers{keep=0.4,protect=2}", calibration=DATA)
    with pytest.raises(UsageError, match="5 of 5 blocks"):
        laconic.optimize(program, "drop-layers{keep=0.05}", calibration=DATA)
    with pytest.raises(UsageError, match="a span is one of blocks"):
        laconic.optimize(program, "drop-layers{method=span,unit=branch}", calibration=DATA)
    odd = capture_module(Odd().eval(), (torch.randn(2, 8),), {}, None)
    with pytest.raises(UsageError, match="no blocks that recur"):
        laconic.optimize(odd, "drop-layers", calibration=DATA)
    depth = Depth(program)
    one, three = (depth.skip_blocks(depth.blocks[left:]) for left in (1, 3))
    with pytest.raises(UsageError, match="no blocks that recur"):
        laconic.optimize(one, "drop-layers", calibration=DATA)
    item = DropLayers(keep=0.6, method="influence")
    with pytest.raises(UsageError, match="there is no block 3"):
        item.apply(three, item.plan(captured(silenced(5, 3, 4)), DECIDED))


def test_less_than_half_a_layer_is_none(program: Program) -> None:
    run = PassManager([DropLayers(keep=0.95)], calibration=DECIDED).run(program)
    assert run.ledger.rows[0].reason == "5% of 5 layers is less than half a layer"
