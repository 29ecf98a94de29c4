"""heal: what was changed is trained until it says again what the original said, the same way each time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import laconic
from architectures import captured, wide
from laconic.ir.calibration import Calibration
from laconic.ir.depth import Depth
from laconic.ir.errors import PipelineError, UsageError
from laconic.ir.metrics.registry import load
from laconic.ir.program import Program
from laconic.ir.quality import figure, measure
from laconic.passes.drop_layers import DropLayers
from laconic.passes.heal import Heal
from laconic.passes.heal.changed import Change
from laconic.passes.manager import PassManager
from laconic.passes.plans import read_plans
from laconic.passes.share_layers import ShareLayers
from sequences import Ragged

DATA = Ragged((18, 14, 16, 21, 12, 17), rows=2)


@pytest.fixture(scope="module")
def program() -> Program:
    return captured(wide(4))


@pytest.fixture(scope="module")
def shared(program: Program) -> Program:
    item = ShareLayers(method="fixed")
    return item.apply(program, item.plan(program)).program


def healed(item: Heal, original: Program, program: Program, **more: Any) -> Program:
    return item.apply(program, item.plan(program, Calibration(DATA, original=original, **more))).program


def apart(program: Program, original: Program) -> float:
    (units,) = measure([program], DATA, [load("kl")], reference=original)
    return figure(load("kl"), units["kl"]).value


def test_sharing_heals(program: Program, shared: Program) -> None:
    before = apart(shared, program)
    assert apart(healed(Heal(steps=30, rate=0.01), program, shared), program) < 0.6 * before
    assert apart(shared, program) == before, "what it was given is as it was"
    assert all(w.value.grad is None for w in program.weights.values())


@pytest.mark.parametrize("more", [{"loss": "nats", "tail": 0}, {"train": "blocks"}, {"lora": 2}, {"train": "all"}])
def test_other_ways(more: dict[str, Any], program: Program, shared: Program) -> None:
    item = Heal(steps=4, rate=0.01, **more)
    after = healed(item, program, shared)
    moved = {row for row, w in after.weights.items() if w.value is not shared.weights[row].value}
    assert ("lm_head.weight" in moved) == (more.get("train") == "all")
    assert moved > {"model.layers.0.mlp.up_proj.weight", "model.layers.1.input_layernorm.weight"}
    assert all(after.weights[row].value.dtype == shared.weights[row].value.dtype for row in moved)


def test_lora_moves_other_matrices_in_few_directions(program: Program) -> None:
    drop = DropLayers(method="influence", keep=0.75)
    dropped = drop.apply(program, drop.plan(program, Calibration(DATA))).program
    rows = Change(program, dropped).rows("changed")
    after = healed(Heal(steps=3, rate=0.01, lora=2), program, dropped)
    wide = [row for row in Change(program, dropped).matrices() if row not in rows]
    assert wide
    for row in wide:
        difference = after.weights[row].value - dropped.weights[row].value.detach()
        values = torch.linalg.svdvals(difference.double())
        assert float(values[0]) > 1e-5
        assert float(values[2]) < 1e-3 * float(values[0])


def test_what_is_trained(program: Program, shared: Program) -> None:
    """Donors, each read twice, and all norms; beside a gap the blocks on both sides."""
    rows = Change(program, shared).rows("changed")
    donors = {row for row, places in rows.items() if places == 2}
    assert len(donors) == 14
    assert all(".0." in row or ".2." in row for row in donors)
    assert {row for row, places in rows.items() if places == 1} == {
        f"model.layers.{k}.{name}_layernorm.weight" for k in range(4) for name in ("input", "post_attention")
    }
    drop = DropLayers(method="influence", keep=0.75)
    plan = drop.plan(program, Calibration(DATA))
    gone = plan.actions[0]["place"][1]
    beside = Change(program, drop.apply(program, plan).program).rows("changed")
    matrices = {int(row.split(".")[2]) for row in beside if "proj" in row}
    assert matrices == {k for k in (gone - 1, gone + 1) if 0 <= k < 4}


def test_it_is_the_same_each_time_and_goes_on_where_it_was_stopped(
    program: Program, shared: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    item = Heal(steps=6, rate=0.01)
    wanted = healed(item, program, shared)

    class Stop(Exception):
        pass

    def stopping(what: str) -> Any:
        def told(done: int, total: int) -> None:
            if done == 3:
                raise Stop

        return told

    with pytest.raises(Stop):
        healed(item, program, shared, folder=tmp_path, progress=stopping)
    (kept,) = tmp_path.glob("heal-*.safetensors")
    seen: list[int] = []
    after = healed(item, program, shared, folder=tmp_path, progress=lambda what: lambda done, total: seen.append(done))
    assert seen == [4, 5, 6]
    for found in (after, healed(item, program, shared)):
        assert all(torch.equal(w.value, found.weights[row].value) for row, w in wanted.weights.items())
    other = healed(item, program, shared, seed=1)
    assert any(not torch.equal(w.value, other.weights[row].value) for row, w in wanted.weights.items())
    kept.write_bytes(b"broken")
    again = healed(item, program, shared, folder=tmp_path)
    assert all(torch.equal(w.value, again.weights[row].value) for row, w in wanted.weights.items())


def test_a_weight_that_several_read_moves_by_less(program: Program, shared: Program) -> None:
    after = healed(Heal(steps=1, rate=0.01), program, shared)
    row, norm = "model.layers.0.mlp.up_proj.weight", "model.layers.0.input_layernorm.weight"
    moved = [float((after.weights[r].value - shared.weights[r].value.detach()).abs().max()) for r in (row, norm)]
    assert moved[0] == pytest.approx(moved[1] / 2, rel=1e-2)


def test_nothing_is_healed_where_nothing_was_changed(program: Program) -> None:
    run = PassManager([Heal()], calibration=Calibration(DATA)).run(program)
    assert run.ledger.rows[0].reason == "no weight was changed by the passes before"
    assert PassManager([Heal(steps=0)]).run(program).ledger.rows[0].reason == "no steps"


@pytest.mark.parametrize(
    "pipeline",
    [
        pytest.param("share-atoms", marks=pytest.mark.slow),
        "share-atoms{keep=0.25,rank=1}",
        pytest.param("share-layers{method=fixed,rank=1}", marks=pytest.mark.slow),
    ],
)
def test_what_weights_became_is_healed_saved_and_replayed(pipeline: str, program: Program, tmp_path: Path) -> None:
    """Mixtures, atoms and corrections of one direction too, whose strides could be any."""
    result = laconic.optimize(program, f"{pipeline},simplify,heal{{steps=2}}", calibration=DATA)
    made = [row for row, w in result.program.weights.items() if row not in program.weights and w.trainable]
    assert made
    before = laconic.optimize(program, pipeline, calibration=DATA).program
    assert result.program.weight_bytes() < before.weight_bytes() + 64, "nothing that weights became is folded"
    assert any(not torch.equal(before.weights[row].value, result.program.weights[row].value) for row in made)
    result.save(tmp_path / "out")
    for kept, again in zip(result.plans, read_plans(tmp_path / "out"), strict=True):
        assert again.spec == kept.spec
        assert again.tensors.keys() == kept.tensors.keys()
        assert all(torch.equal(again.tensors[name], value) for name, value in kept.tensors.items())


@pytest.mark.slow
def test_what_was_folded_is_not_trained() -> None:
    """Tables of positions, which an exact pass computed, are no weights."""
    module = wide(4)
    inputs = {"input_ids": torch.arange(18).reshape(2, 9), "attention_mask": torch.ones(2, 9, dtype=torch.long)}
    program = laconic.capture(module, **inputs, use_cache=False)
    data = [inputs]
    folded = laconic.optimize(program, "exact").program
    assert any(row not in program.weights for row in folded.weights)
    assert not laconic.optimize(program, "exact,heal{steps=2}", calibration=data).report.rows[-1].modified
    rows = Change(program, DropLayers(method="random").apply(folded, _drawn(folded)).program).rows("changed")
    assert rows
    assert all(row in program.weights for row in rows)


def _drawn(program: Program) -> Any:
    return DropLayers(method="random").plan(program, Calibration(DATA))


def test_what_stands_beside_branches_that_are_gone_is_trained(program: Program) -> None:
    """Also where no block is whole any more; of a block that lost one branch the other one."""
    depth = Depth(program)
    every = Change(program, depth.skip([depth.units[k] for k in (0, 3, 4, 7)])).rows("changed")
    assert {int(row.split(".")[2]) for row in every if "proj" in row} == {0, 1, 2, 3}
    one = Change(program, depth.skip([depth.units[3]])).rows("changed")
    assert {row.split(".")[3] for row in one if ".1." in row and "proj" in row} == {"self_attn"}


def test_a_pipeline_drops_shares_and_heals(program: Program, tmp_path: Path) -> None:
    text = "drop-layers{method=influence},share-layers{keep=0.667,method=fixed},heal{steps=5}"
    with pytest.raises(Exception, match="cannot be cut"):
        laconic.optimize(program, text, calibration=DATA)
    text = text.replace("method=fixed", "method=functional")
    result = laconic.optimize(program, text, calibration=DATA, data=Ragged(seed=2))
    assert [row.modified for row in result.report.rows] == [True, True, True]
    assert result.report.verified
    result.save(tmp_path / "out")
    again = laconic.load(tmp_path / "out")
    inputs = DATA.batch(0).inputs
    assert torch.equal(again(**inputs)["logits"], result.model(**inputs)["logits"])


def test_options_that_are_none(program: Program, shared: Program) -> None:
    for text, said in (("heal{steps=-1}", "at least 0"), ("heal{rate=0}", "above 0"), ("heal{loss=mse}", "kl/nats")):
        with pytest.raises(PipelineError, match=said):
            laconic.optimize(program, text, calibration=DATA)
    with pytest.raises(UsageError, match="needs training"):
        laconic.optimize(program, "heal")
    with pytest.raises(UsageError, match="diverged"):
        healed(Heal(steps=200, rate=1e30, tail=0), program, shared)
