"""share-layers: planted twins are shared bit for bit, sharings are judged as the plain module, corrections correct."""

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
from architectures import captured, gpt2, llama, wide
from helpers import apart, bits
from laconic.ir.axes import analyse
from laconic.ir.calibration import Calibration
from laconic.ir.capture import capture_module
from laconic.ir.depth import Depth
from laconic.ir.errors import PipelineError, UsageError
from laconic.ir.inputs import cases
from laconic.ir.metrics.quality import Divergence
from laconic.ir.outcomes import Outcomes
from laconic.ir.program import Program
from laconic.ir.quality import figure, measure
from laconic.ir.types import nbytes
from laconic.passes.aligning import match
from laconic.passes.deciding import is_matrix
from laconic.passes.low_rank import whitened
from laconic.passes.manager import PassManager
from laconic.passes.methods import methods_of
from laconic.passes.share_layers import ShareLayers
from laconic.passes.share_layers.grouping import fixed
from laconic.passes.share_layers.task import Peers, ShareTask, peers_of
from sequences import Ragged

DATA = Ragged((40, 28, 45, 37, 50, 33, 41, 26), rows=2)
DECIDED = Calibration(DATA)
MATRICES = tuple(f"self_attn.{name}_proj" for name in "qkvo") + tuple(
    f"mlp.{name}_proj" for name in ("gate", "up", "down")
)


def shared(module: nn.Module, sharing: tuple[int, ...]) -> nn.Module:
    """The plain module whose blocks hold the donors' matrices."""
    other = copy.deepcopy(module)
    for k, donor in enumerate(sharing):
        for name in MATRICES:
            other.model.layers[k].get_submodule(name).weight = module.model.layers[donor].get_submodule(name).weight
    return other


@pytest.fixture(scope="module")
def module() -> nn.Module:
    return wide(4)


@pytest.fixture(scope="module")
def program(module: nn.Module) -> Program:
    return captured(module)


@pytest.fixture(scope="module")
def twins(module: nn.Module) -> Program:
    """Blocks 1 and 3 hold copies of the matrices of 0 and 2; norms differ."""
    other = copy.deepcopy(module)
    for k, donor in ((1, 0), (3, 2)):
        for name in MATRICES:
            weight = module.model.layers[donor].get_submodule(name).weight
            other.model.layers[k].get_submodule(name).weight = nn.Parameter(weight.detach().clone())
    return captured(other)


def results(program: Program, like: Program | None = None) -> list[Any]:
    """What a program gives for the inputs of another one, to the bit."""
    inputs = cases(like or program, (like or program).forward)
    return [bits(outcome.results) for outcome in Outcomes.of(program, inputs).outcomes]


def sharing_of(item: ShareLayers, program: Program) -> tuple[int, ...]:
    found = list(range(len(Depth(program).blocks)))
    for action in item.plan(program, DECIDED).actions:
        if action["rule"] == "share":
            found[action["block"]] = action["donor"]
    return tuple(found)


def logits(module: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([module(**batch.inputs, use_cache=False).logits[batch.mask].double() for batch in DATA])


def divergence(module: nn.Module, other: nn.Module) -> float:
    a, b = (logits(m).log_softmax(-1) for m in (module, other))
    return float(F.kl_div(b, a, reduction="none", log_target=True).sum(-1).mean())


def divergence_of(program: Program, other: Program) -> float:
    (units,) = measure([other], DATA, [Divergence()], reference=program)
    return figure(Divergence(), units["kl"]).value


def test_level_0_is_the_same_program(program: Program) -> None:
    item = ShareLayers(keep=1.0)
    assert item.apply(program, item.plan(program)).program is program
    run = PassManager([ShareLayers(keep=0.95)], calibration=DECIDED).run(program)
    assert run.ledger.rows[0].reason == "5% of the blocks is less than half a block"


@pytest.mark.parametrize("method", ["fixed", "functional", "search", "exhaustive"])
def test_planted_twins_are_shared_and_no_bit_changes(method: str, twins: Program) -> None:
    item = ShareLayers(method=method)
    plan = item.plan(twins, DECIDED)
    after = item.apply(twins, plan).program
    assert results(after, twins) == results(twins)
    gone = [w for name, w in twins.weights.items() if w.value.dim() == 2 and (".1." in name or ".3." in name)]
    assert len(gone) == 14
    assert twins.weight_bytes() - after.weight_bytes() == sum(nbytes(w.value) for w in gone)
    assert all(name in after.weights for name in twins.weights if "norm" in name)
    groups = {frozenset((a["block"], a["donor"])) for a in plan.actions}
    assert groups == {frozenset((0, 1)), frozenset((2, 3))}


def test_sharings_are_judged_as_the_plain_module(module: nn.Module, program: Program) -> None:
    depth = Depth(program)
    task = ShareTask(program, depth, DECIDED, 0, peers_of(depth, 0.5))
    for sharing in ((0, 0, 0, 3), (1, 1, 2, 2), (3, 1, 1, 3), (0, 1, 2, 3)):
        found = task.scorer(task.candidate(sharing))
        assert found == pytest.approx(divergence(module, shared(module, sharing)), rel=1e-4, abs=1e-12)
    values = {state: task.fitness(state, range(len(DATA))) for state in task.space.states()}
    best = task.nearest(min(values, key=values.__getitem__))
    chosen = sharing_of(ShareLayers(method="exhaustive"), program)
    assert {k for k, donor in enumerate(chosen) if k == donor} == {k for k, donor in enumerate(best) if k == donor}
    kept = [k for k, donor in enumerate(best) if k == donor]
    losses = {}
    for donors in itertools.product(*([k] if k in kept else kept for k in range(4))):
        losses[donors] = divergence(module, shared(module, donors))
    assert losses[chosen] < losses[best], "the nearest is not always the one that is missed least"
    assert losses[chosen] == min(losses.values())
    assert sharing_of(ShareLayers(method="search"), program) == chosen


def test_the_rewritten_program_is_the_plain_module_with_shared_weights(module: nn.Module, program: Program) -> None:
    item = ShareLayers(method="fixed")
    after = item.apply(program, item.plan(program)).program
    wanted = captured(shared(module, (0, 0, 2, 2)))
    assert results(after, program) == results(wanted, program)
    assert after.aliases["model.layers.1.mlp.up_proj.weight"].target == "model.layers.0.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("donor", "wanted"), [("own", (0, 0, 2, 2)), ("first", (0, 0, 2, 2)), ("middle", (1, 1, 3, 3))]
)
def test_donors(donor: Any, wanted: tuple[int, ...], program: Program) -> None:
    assert sharing_of(ShareLayers(method="fixed", donor=donor), program) == wanted


@pytest.mark.parametrize("operator", ["average", "regmean", "fisher", "ties"])
def test_merged_donors(operator: str, module: nn.Module, program: Program) -> None:
    item = ShareLayers(method="fixed", donor="merged", merge=operator)
    plan = item.plan(program, DECIDED)
    after = item.apply(program, plan).program
    name = "model.layers.0.mlp.up_proj.weight"
    pair = [program.weights[name.replace("0", str(k))].value.detach() for k in (0, 1)]
    held = after.weights[name].value
    if operator == "average":
        torch.testing.assert_close(held, (pair[0] + pair[1]) / 2)
    assert not torch.equal(held, pair[0])
    assert after.value_of(name.replace("0", "1")) is held
    again = item.plan(program, DECIDED)
    assert all(torch.equal(value, again.tensors[key]) for key, value in plan.tensors.items())


def test_regmean_keeps_products_nearer_than_the_average(module: nn.Module, program: Program) -> None:
    """On the calibration data itself, summed over the two blocks that share."""
    inputs: dict[int, list[torch.Tensor]] = {0: [], 1: []}
    hooks = [
        module.model.layers[k].mlp.down_proj.register_forward_hook(lambda m, args, out, k=k: inputs[k].append(args[0]))
        for k in (0, 1)
    ]
    with torch.no_grad():
        for batch in DATA:
            for value in inputs.values():
                del value[len(value) :]
            module(**batch.inputs, use_cache=False)
            for k in (0, 1):
                inputs[k][-1] = inputs[k][-1][batch.mask]
    for hook in hooks:
        hook.remove()
    name = "model.layers.0.mlp.down_proj.weight"
    errors = {}
    for operator in ("average", "regmean"):
        plan = ShareLayers(method="fixed", donor="merged", merge=operator).plan(program, DECIDED)
        held = plan.tensors[f"merged.{name}"]
        errors[operator] = sum(
            float((torch.cat(x) @ (program.weights[name.replace("0", str(k))].value.detach() - held).T).square().sum())
            for k, x in inputs.items()
        )
    assert errors["regmean"] < 0.9 * errors["average"]


def test_corrections_of_what_is_missing_restore_the_model(module: nn.Module) -> None:
    """Blocks that differ from the first by matrices of rank 3."""
    near = copy.deepcopy(module)
    for k in (1, 2, 3):
        for name in MATRICES:
            weight = near.model.layers[k].get_submodule(name).weight
            outer, inner = (0.4 * torch.randn(n, 3) for n in weight.shape)
            weight.data.copy_(near.model.layers[0].get_submodule(name).weight + outer @ inner.T)
    program = captured(near)
    item = ShareLayers(keep=0.25, method="fixed", rank=3)
    plan = item.plan(program, DECIDED)
    after = item.apply(program, plan).program
    for ours, theirs in zip(
        Outcomes.of(after, cases(program, program.forward)).outcomes,
        Outcomes.of(program, cases(program, program.forward)).outcomes,
        strict=True,
    ):
        torch.testing.assert_close(ours.results[0], theirs.results[0], rtol=2e-3, atol=2e-4)
    left = [action["left"] for action in plan.actions if action["rule"] == "correct"]
    assert len(left) == 3 * len(MATRICES)
    assert max(left) < 1e-5


@pytest.mark.parametrize("donor", ["own", "merged"])
def test_fewer_donors_pay_for_corrections(donor: Any, program: Program) -> None:
    """No more bytes than with half of the blocks, of the greatest rank that this allows."""

    def held(made: Program) -> int:
        return sum(w.value.numel() for name, w in made.weights.items() if w.kind != "state" and "rotary" not in name)

    sizes = [program.weights[f"model.layers.1.{m}.weight"].value.shape for m in MATRICES]
    item = ShareLayers(keep=0.5, donors=0.25, method="fixed", donor=donor)
    plan = item.plan(program, DECIDED)
    half = ShareLayers(keep=0.5, method="fixed").apply(program, ShareLayers(method="fixed").plan(program)).program
    ours = item.apply(program, plan).program
    assert held(ours) <= held(half)
    rank = next(len(value) for name, value in plan.tensors.items() if name.startswith("inner."))
    corrected = 4 if donor == "merged" else 3
    more = corrected * sum(min(rank + 1, *size) * sum(size) for size in sizes)
    assert more > sum(a * b for a, b in sizes)
    assert divergence_of(program, ours) < divergence_of(program, half)


def test_a_matrix_no_larger_than_its_correction_stays(program: Program) -> None:
    item = ShareLayers(method="fixed", rank=12)
    plan = item.plan(program, DECIDED)
    shared_rows = {row for action in plan.actions if action["rule"] == "share" for row in action["rows"]}
    wanted = {
        m for m in MATRICES if 12 * sum(s := program.weights[f"model.layers.1.{m}.weight"].value.shape) < s.numel()
    }
    assert shared_rows == {f"model.layers.{k}.{m}.weight" for k in (1, 3) for m in wanted}
    assert 0 < len(wanted) < len(MATRICES)
    with pytest.raises(UsageError, match="does not pay for corrections of rank 1") as caught:
        ShareLayers(keep=0.52, donors=0.51, method="fixed").plan(program, DECIDED)
    assert caught.value.hint == "fewer donors, or keep more"
    reason = ShareLayers(method="fixed", rank=64).plan(program, DECIDED).reason
    assert reason == "no matrix of these blocks is larger than its correction of rank 64"


def test_one_donor_at_least_pays_for_corrections(program: Program) -> None:
    plan = ShareLayers(donors=0.125, method="fixed").plan(program, DECIDED)
    assert len({action["donor"] for action in plan.actions if action["rule"] == "share"}) == 1
    assert len([action for action in plan.actions if action["rule"] == "share"]) == 3
    assert any(action["rule"] == "correct" for action in plan.actions)


def test_blocks_that_share_already_pay_for_nothing(program: Program) -> None:
    item = ShareLayers(keep=0.5, donors=0.25, method="fixed")
    none = "these blocks have no floating-point matrices of their own"
    assert item.plan(item.apply(program, item.plan(program, DECIDED)).program, DECIDED).reason == none
    part, depth = program.clone(), Depth(program.clone())
    pair = depth.blocks[1], depth.blocks[0]
    depth.repoint(*pair, {row for row in depth.pairs(*pair) if not is_matrix(program, row)}, into=part)
    with pytest.raises(UsageError, match="do not hold as many matrices of their own") as caught:
        item.plan(part, DECIDED)
    assert caught.value.why == "some share theirs already"


def test_corrections_bring_the_model_nearer(module: nn.Module, program: Program) -> None:
    found = []
    for rank in (0, 4, 10):
        item = ShareLayers(method="fixed", rank=rank)
        plan = item.plan(program, DECIDED)
        after = item.apply(program, plan).program
        found.append(laconic.optimize(program, [item], calibration=DATA, data=Ragged(seed=4), check=False))
        more = sum(nbytes(w.value) for name, w in after.weights.items() if name.endswith(("_inner", "_outer")))
        wide = {32: 7}  # matrices of two blocks: q, k, v, o, gate, up, down
        assert len([a for a in plan.actions if a["rule"] == "correct"]) == (2 * wide[32] if rank else 0)
        sizes = [program.weights[f"model.layers.1.{m}.weight"].value.shape for m in MATRICES]
        assert more == 2 * 4 * sum(min(rank, *size) * sum(size) for size in sizes)
    kl = [result.report.after.metrics["kl"] for result in found]
    assert kl[0] > kl[1] > kl[2] > 0


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_whitening_is_the_best_correction_of_its_rank(rank: int) -> None:
    draw = torch.Generator().manual_seed(rank)
    x = torch.randn(400, 8, generator=draw, dtype=torch.float64) * torch.tensor([9, 5, 3, 2, 1, 0.5, 0.2, 0.1])
    missing = torch.randn(6, 8, generator=draw, dtype=torch.float64)
    found = whitened(missing, x.T @ x, len(x), rank)
    error = (x @ (missing - found.outer @ found.inner).T).norm()
    values = torch.linalg.svdvals(x @ missing.T)
    torch.testing.assert_close(error, values[rank:].norm(), rtol=1e-6, atol=1e-6)
    assert found.left == pytest.approx(float(values[rank:].norm() / values.norm()), abs=1e-7)
    u, s, v = torch.linalg.svd(missing, full_matrices=False)
    plain = (u[:, :rank] * s[:rank]) @ v[:rank]
    assert error <= (x @ (missing - plain).T).norm() + 1e-9


def test_few_rows_and_dead_inputs_do_not_break_whitening() -> None:
    x = torch.zeros(3, 8, dtype=torch.float64)
    x[:, :2] = torch.randn(3, 2, dtype=torch.float64)
    found = whitened(torch.randn(6, 8, dtype=torch.float64), x.T @ x, 3, 2)
    assert bool(torch.isfinite(found.outer).all() and torch.isfinite(found.inner).all())
    assert found.inner.abs().max() < 1e3


def shuffled(module: nn.Module, program: Program, block: int) -> Program:
    """The program in which a block's hidden units stand in another order."""
    made, order = apart(program), torch.randperm(64, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        for name in ("gate_proj", "up_proj"):
            made.weights[f"model.layers.{block}.mlp.{name}.weight"].value.copy_(
                made.weights[f"model.layers.{block}.mlp.{name}.weight"].value[order]
            )
        row = made.weights[f"model.layers.{block}.mlp.down_proj.weight"].value
        row.copy_(row[:, order].clone())
    return made


def test_a_shuffled_twin_is_put_in_order(module: nn.Module, twins: Program) -> None:
    planted = shuffled(module, twins, 1)
    depth, axes = Depth(planted), analyse(planted)
    pairs = depth.pairs(depth.blocks[1], depth.blocks[0])
    rows = {row: other for row, other in pairs.items() if "norm" not in row}
    found = match(axes, depth.blocks[1].rows, rows)
    assert all(b >= a for a, b in zip(found.objective, found.objective[1:], strict=False))
    assert all(sorted(order) == list(range(len(order))) for order in found.orders.values())
    plain, aligned = (ShareLayers(method="fixed", donor="merged", align=align) for align in (False, True))
    after = aligned.apply(planted, aligned.plan(planted, DECIDED)).program
    for ours, theirs in zip(
        Outcomes.of(after, cases(twins, twins.forward)).outcomes,
        Outcomes.of(twins, cases(twins, twins.forward)).outcomes,
        strict=True,
    ):
        torch.testing.assert_close(ours.results[0], theirs.results[0], rtol=1e-4, atol=1e-5)
    other = plain.apply(planted, plain.plan(planted, DECIDED)).program
    assert not torch.allclose(other.weights["model.layers.0.mlp.up_proj.weight"].value, pairs_value(twins), atol=1e-3)


def pairs_value(program: Program) -> torch.Tensor:
    return program.weights["model.layers.0.mlp.up_proj.weight"].value


@pytest.mark.parametrize("method", methods_of("share-layers"))
def test_one_seed_is_one_plan_and_plans_replay_to_the_bit(method: str, program: Program) -> None:
    item = ShareLayers(method=method, generations=1, rank=2, align=method == "fixed")
    plan, again = (item.plan(program, DECIDED) for _ in range(2))
    assert plan.actions == again.actions
    assert all(torch.equal(value, again.tensors[key]) for key, value in plan.tensors.items())
    said = type(plan)(plan.spec, tuple(json.loads(json.dumps([dict(a) for a in plan.actions]))), again.tensors)
    first, second = (item.apply(program, p).program for p in (plan, said))
    assert str(first) == str(second)
    assert all(bits([w.value]) == bits([second.weights[name].value]) for name, w in first.weights.items())


@pytest.mark.slow
def test_caches_stay_each_blocks_own_and_it_generates() -> None:
    module = wide(4)
    _, inputs, axes = llama(1)
    whole = laconic.capture(module, **inputs, dynamic_shapes=axes, cache=(2, 16))
    result = laconic.optimize(whole, "share-layers{method=fixed,rank=2}", calibration=DATA)
    states = [{n for n, w in p.weights.items() if w.kind == "state"} for p in (whole, result.program)]
    assert states[0] == states[1]
    tokens = result.model.generate([[5, 6, 7], [9, 8]], max_new_tokens=5)
    assert tokens.shape[1] <= 8
    for name in ("prefill", "decode"):
        assert sum("_inner" in row for row in result.program.entries[name].weight_nodes()) == 14


@pytest.mark.parametrize("method", ["fixed", "crash", "random", "functional"])
def test_protected_blocks_take_no_part(method: str, program: Program) -> None:
    plan = ShareLayers(keep=0.75, method=method, protect=1).plan(program, DECIDED)
    (action,) = plan.actions
    assert {action["block"], action["donor"]} == {1, 2}
    with pytest.raises(UsageError, match="the 2 of 4 blocks of run 0 that may share none would keep") as caught:
        ShareLayers(keep=0.5, method=method, protect=1).plan(program, DECIDED)
    assert caught.value.hint == "keep more, or protect less"


def test_a_share_that_divides_is_told(program: Program) -> None:
    depth = Depth(program)
    (peers,) = peers_of(depth, 0.75, protect=1)
    assert (peers.blocks, peers.donors, peers.protected) == ((1, 2), 1, 2)
    with pytest.raises(UsageError, match="6 blocks of run 0 cannot be cut into 4 groups") as caught:
        fixed(ShareTask(program, depth, None, 0, (Peers(0, (1, 2, 3, 4, 5, 6), 4, protected=2),)))
    assert caught.value.hint == "3 groups would do, a share of 0.625, or method=search"


class Masked(nn.Module):
    """Blocks of which each is given a mask of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, d: torch.Tensor) -> Any:
        for layer, mask in zip(self.layers, (a, b, c, d), strict=True):
            x = x + torch.tanh(layer(x)) * mask
        return x


def test_what_cannot_be_shared_is_refused(program: Program) -> None:
    with pytest.raises(UsageError, match="4 blocks of run 0 cannot be cut into 3 groups of one size"):
        laconic.optimize(program, "share-layers{keep=0.75,method=fixed}", calibration=DATA)
    with pytest.raises(UsageError, match="none would keep its weights"):
        laconic.optimize(program, "share-layers{keep=0.05,method=fixed}", calibration=DATA)
    masks = tuple(torch.rand(8) for _ in range(4))
    masked = capture_module(Masked().eval(), (torch.randn(2, 8), *masks), {}, None)
    with pytest.raises(UsageError, match="no block could do with the weights of another") as caught:
        laconic.optimize(masked, "share-layers{method=fixed}")
    assert "it reads %" in str(caught.value)
    with pytest.raises(UsageError, match="needs activations"):
        laconic.optimize(program, "share-layers")
    for text, said in (
        ("share-layers{keep=2}", "a share above 0"),
        ("share-layers{rank=-1}", "at least 0"),
        ("share-layers{rank=2,donors=0.25}", "both say how much"),
        ("share-layers{donors=0.5}", "must be less than keep=0.5, is 0.5"),
        ("share-layers{donors=-1}", "a share above 0"),
        ("share-layers{merge=mean}", "no merge operator 'mean'"),
        ("share-layers{method=fix}", "no method 'fix'"),
        ("share-layers{donor=last}", "own/first/middle/merged"),
    ):
        with pytest.raises(PipelineError, match=said):
            laconic.optimize(program, text, calibration=DATA)


def test_units_are_put_in_order_where_queries_keys_and_values_are_one_matrix() -> None:
    program = captured(wide(4, gpt2), gpt2)
    after = laconic.optimize(program, "share-layers{method=fixed,align=yes}", calibration=DATA).program
    assert len(Depth(after).blocks) == 4
    gone = {row for row in program.weights if row not in after.weights}
    theirs = {row for row in program.weights if ".1." in row or ".3." in row}
    assert gone == {row for row in theirs if program.weights[row].value.dim() == 2}


class Quantised(nn.Module):
    """Blocks of one product each, with matrices of whole numbers and a scale for each output."""

    def __init__(self) -> None:
        super().__init__()
        for k in range(4):
            self.register_buffer(f"whole{k}", torch.randint(-127, 127, (8, 8), dtype=torch.int8))
            self.register_parameter(f"scale{k}", nn.Parameter(torch.rand(8, 1)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for k in range(4):
            x = x + F.linear(torch.tanh(x), getattr(self, f"whole{k}") * getattr(self, f"scale{k}"))
        return x


@pytest.mark.parametrize(
    "pipeline", ["share-layers{method=fixed}", "collapse-layers{keep=0.5,size=2}", "share-hash{least=4}"]
)
def test_quantised_weights_are_refused(pipeline: str) -> None:
    program = capture_module(Quantised().eval(), (torch.randn(2, 8),), {}, None)
    with pytest.raises(UsageError, match="these weights are quantised"):
        laconic.optimize(program, pipeline, calibration=[{"x": torch.randn(2, 8)}])


def test_blocks_that_share_already_have_nothing_to_share(program: Program) -> None:
    item = ShareLayers(method="fixed")
    after = item.apply(program, item.plan(program)).program
    everything = ShareLayers(keep=0.25, method="fixed")
    once = everything.apply(after, everything.plan(after)).program
    assert everything.plan(once).reason == "these blocks have no floating-point matrices of their own"
