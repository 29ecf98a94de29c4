"""Calibration: the statistics that plain hooks on the module give, whatever the batches, and however often stopped."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from architectures import bert, llama, qwen3_moe, t5
from laconic.data.named import NamedData
from laconic.ir import calibrate as module
from laconic.ir.calibrate import calibrate
from laconic.ir.capture import capture_module
from laconic.ir.data import Batch, Data
from laconic.ir.errors import ModelError, UsageError
from laconic.ir.evidence import boundaries, evidence_of
from laconic.ir.interpret import Interpreter, Tap
from laconic.ir.metrics.quality import Accuracy, Nats
from laconic.ir.program import Program
from laconic.ir.statistics.attention import Attended
from laconic.ir.statistics.base import Statistic, Sums
from laconic.ir.statistics.likeness import Similarity, TokenLikeness
from laconic.ir.statistics.moments import Covariance, GradientCovariance, Moments
from laconic.ir.statistics.rows import Rows
from laconic.ir.structure import entry_structure
from sequences import Ragged


@pytest.fixture(scope="module")
def subject() -> tuple[Any, Program]:
    torch.manual_seed(0)
    model, inputs, axes = llama(3)
    model.eval()
    return model, capture_module(model, (), inputs, axes)


def hooked(model: nn.Module, data: Data, names: list[str]) -> dict[str, list[torch.Tensor]]:
    """The inputs of some submodules, the rows that count, from plain hooks."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    mask: list[torch.Tensor] = []
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, name=name: found[name].append(args[0].detach()[mask[-1]])
        )
        for name in names
    ]
    for batch in data:
        assert batch.mask is not None
        mask.append(batch.mask)
        with torch.no_grad():
            model(**batch.inputs, use_cache=False)
    for hook in hooks:
        hook.remove()
    return found


def reads(program: Program, weight: str) -> str:
    """The node that a linear layer with this weight reads."""
    node = program.forward.weight_nodes()[weight]
    (linear,) = node.users
    return str(linear.args[0])


def close(found: torch.Tensor, wanted: torch.Tensor) -> None:
    torch.testing.assert_close(found, wanted.to(found.dtype), rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))


def test_moments_and_covariances_are_those_of_hooks(subject: tuple[Any, Program]) -> None:
    model, program = subject
    data = Ragged(lengths=(5, 9, 2, 7, 7, 3, 8, 6, 9, 9, 9), rows=3)
    layers = [f"model.layers.{k}.{part}" for k in range(3) for part in ("mlp.down_proj", "self_attn.q_proj")]
    nodes = {name: reads(program, f"{name}.weight") for name in layers}
    wanted = [kind(node) for node in nodes.values() for kind in (Moments, Covariance)]
    found = calibrate(program, data, wanted)
    for name, parts in hooked(model, data, layers).items():
        rows = torch.cat(parts).double()
        sums = found[Moments(nodes[name])]
        assert int(sums["rows"]) == len(rows) == 74
        close(sums["total"], rows.sum(0))
        close(sums["squares"], rows.square().sum(0))
        close(sums["absolute"], rows.abs().sum(0))
        close(sums["greatest"], rows.abs().amax(0))
        close(found[Covariance(nodes[name])]["products"], rows.T @ rows)


def test_padding_and_batches_make_no_difference(subject: tuple[Any, Program]) -> None:
    _, program = subject
    evidence = list(evidence_of(program, entry_structure(program, program.forward)).statistics())
    assert len({type(statistic) for statistic in evidence}) >= 4
    lengths = (8, 3, 6, 7, 2, 5)
    one, other = (calibrate(program, Ragged(lengths=lengths, rows=rows), evidence) for rows in (1, 4))
    for statistic in evidence:
        for name, value in one[statistic].items():
            close(other[statistic][name], value)


def test_similarity_of_blocks(subject: tuple[Any, Program]) -> None:
    model, program = subject
    structure = entry_structure(program, program.forward)
    edges = boundaries(structure, structure.runs[0])
    assert len(edges) == 4
    data = Ragged(lengths=(5, 5, 5), rows=3)
    found = calibrate(program, data, [Similarity(tuple(n.name for n in edges))])
    hidden = model(**data.batch(0).inputs, use_cache=False, output_hidden_states=True).hidden_states
    flat = [h.detach().flatten(0, 1) for h in hidden[:3]]  # the last one of transformers' is behind the norm
    cosine = found.mean(Similarity(tuple(n.name for n in edges)), "cosine")
    for a in range(3):
        for b in range(3):
            assert float(cosine[a, b]) == pytest.approx(float(F.cosine_similarity(flat[a], flat[b]).mean()), abs=1e-5)


def test_attention_rows_are_those_of_eager_attention(subject: tuple[Any, Program]) -> None:
    model, program = subject
    evidence = evidence_of(program, entry_structure(program, program.forward))
    data = Ragged(lengths=(6, 6), rows=2)
    found = calibrate(program, data, [statistic for _, statistic in evidence.attended])
    model.set_attn_implementation("eager")
    try:
        weights = model(**data.batch(0).inputs, use_cache=False, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")
    for layer, (_, statistic) in enumerate(evidence.attended):
        assert isinstance(statistic, Attended)
        p = weights[layer].detach().double()
        close(found[statistic]["first"], p[..., 0].sum((0, 2)))
        close(found[statistic]["entropy"], -torch.special.xlogy(p, p).sum((0, 2, 3)))
        close(found[statistic]["distance"].sum(1), torch.full((p.shape[1],), 12.0))


@pytest.mark.slow
def test_routing_is_that_of_the_routers() -> None:
    torch.manual_seed(0)
    model, inputs, axes = qwen3_moe()
    model.eval()
    program = capture_module(model, (), inputs, axes)
    evidence = evidence_of(program, entry_structure(program, program.forward))
    layers = len(model.model.layers)
    assert len(evidence.experts) == layers
    data = Ragged(lengths=(5, 3, 6, 4), rows=2)
    found = calibrate(program, data, [statistic for _, statistic in evidence.experts])
    chosen: dict[int, list[torch.Tensor]] = {k: [] for k in range(layers)}
    mask: list[torch.Tensor] = []
    for k, layer in enumerate(model.model.layers):
        layer.mlp.gate.register_forward_hook(lambda _, args, out, k=k: chosen[k].append(out[2][mask[-1]]))
    for batch in data:
        assert batch.mask is not None
        mask.append(batch.mask.flatten())
        model(**batch.inputs, use_cache=False)
    for k, (moe, statistic) in enumerate(evidence.experts):
        wanted = torch.bincount(torch.cat(chosen[k]).flatten(), minlength=moe.experts)
        assert torch.equal(found[statistic]["counts"].long(), wanted)
        assert torch.equal(found[statistic]["pairs"].diagonal().long(), wanted)


def test_gradients_are_those_of_the_module(subject: tuple[Any, Program]) -> None:
    model, program = subject
    data = Ragged(lengths=(9, 8, 7, 9, 4), rows=5)
    weight = "model.layers.1.mlp.down_proj"
    (linear,) = program.forward.weight_nodes()[f"{weight}.weight"].users
    statistic = GradientCovariance(linear.name)
    found = calibrate(program, data, [statistic], loss=Nats())
    batch = data.batch(0)
    seen: list[torch.Tensor] = []

    def keep(_: nn.Module, args: Any, out: torch.Tensor) -> None:
        out.retain_grad()
        seen.append(out)

    hook = model.get_submodule(weight).register_forward_hook(keep)
    logits = model(**batch.inputs, use_cache=False).logits
    hook.remove()
    Nats().loss({"logits": logits}, batch).backward()
    assert seen[0].grad is not None
    assert batch.mask is not None
    rows = seen[0].grad[batch.mask].double()
    close(found[statistic]["products"], rows.T @ rows)
    model.zero_grad()


def test_gradients_need_a_loss(subject: tuple[Any, Program]) -> None:
    _, program = subject
    with pytest.raises(UsageError, match="need a loss"):
        calibrate(program, Ragged(), [GradientCovariance(reads(program, "model.layers.0.mlp.down_proj.weight"))])


def everything(program: Program) -> list[Statistic]:
    evidence = list(evidence_of(program, entry_structure(program, program.forward)).statistics())
    return [*evidence, Covariance(reads(program, "model.layers.0.mlp.down_proj.weight"))]


def same(one: Sums, other: Sums) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_groups_that_fit_in_memory_have_the_same_sums(
    subject: tuple[Any, Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, program = subject
    wanted, data = everything(program), Ragged(lengths=(9,) * 16, rows=4)
    whole = calibrate(program, data, wanted)
    built: list[int] = []
    made = Interpreter.__init__
    monkeypatch.setattr(
        Interpreter, "__init__", lambda self, *args, **more: (built.append(len(args[1])), made(self, *args, **more))[1]
    )
    parts = calibrate(program, data, wanted, memory=3_000)
    assert len(built) > 3
    assert sum(built) == len(wanted)
    assert all(same(parts[statistic], whole[statistic]) for statistic in wanted)


@pytest.mark.parametrize("stop_at", [1, 2, 5])
def test_an_interrupted_run_goes_on_with_the_same_sums(
    subject: tuple[Any, Program], tmp_path: Path, stop_at: int
) -> None:
    _, program = subject
    wanted, data = everything(program), Ragged(lengths=(9, 4, 7, 9, 9, 9, 9, 9, 9, 9, 9, 9, 9), rows=2)
    whole = calibrate(program, data, wanted, memory=3_000)
    done: list[int] = []

    def stop(now: int, total: int) -> None:
        done.append(now)
        if now == stop_at:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(program, data, wanted, memory=3_000, folder=tmp_path, progress=stop)
    done.clear()
    again = calibrate(program, data, wanted, memory=3_000, folder=tmp_path, progress=lambda now, _: done.append(now))
    assert done[0] == stop_at + 1
    assert all(same(again[statistic], whole[statistic]) for statistic in wanted)
    done.clear()
    kept = calibrate(program, data, wanted, memory=3_000, folder=tmp_path, progress=lambda now, _: done.append(now))
    assert not done
    assert all(same(kept[statistic], whole[statistic]) for statistic in wanted)


def test_what_is_kept_is_of_this_model_and_this_data(subject: tuple[Any, Program], tmp_path: Path) -> None:
    _, program = subject
    wanted = [TokenLikeness(evidence_of(program, entry_structure(program, program.forward)).tokens[0][0].name)]
    other = program.clone()
    name = "model.layers.0.mlp.down_proj.weight"
    other.weights[name] = replace(other.weights[name], value=other.weights[name].value + 1)
    keys = {
        module.digest(program, Ragged(), None),
        module.digest(other, Ragged(), None),
        module.digest(program, Ragged(lengths=(4,)), None),
        module.digest(program, Ragged(), Nats()),
        module.digest(program, Ragged(), Accuracy()),
    }
    assert len(keys) == 5
    found = calibrate(program, Ragged(), wanted, folder=tmp_path)
    (kept,) = tmp_path.rglob("*.safetensors")
    kept.write_bytes(b"damaged")
    again = calibrate(program, Ragged(), wanted, folder=tmp_path)
    assert same(again[wanted[0]], found[wanted[0]])


def test_a_run_goes_on_with_more_memory(subject: tuple[Any, Program], tmp_path: Path) -> None:
    _, program = subject
    nodes = [reads(program, f"model.layers.{k}.mlp.down_proj.weight") for k in range(3)]
    wanted, data = [Moments(node) for node in nodes], Ragged(lengths=(9,) * 10, rows=2)

    def stop(now: int, total: int) -> None:
        if now == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        calibrate(program, data, wanted, folder=tmp_path, memory=1, progress=stop)
    for memory in (1 << 30, 1, 1 << 30):
        found = calibrate(program, data, wanted, folder=tmp_path, memory=memory)
        assert [int(found[statistic]["rows"]) for statistic in wanted] == [90, 90, 90]


@pytest.mark.slow
def test_an_encoder_and_a_decoder_have_masks_of_their_own() -> None:
    torch.manual_seed(0)
    model, inputs, axes = t5(2, 2)
    program = capture_module(model.eval(), (), inputs, axes)
    ids, said = torch.randint(0, 100, (3, 6)), torch.randint(0, 100, (3, 4))
    mask = torch.arange(6) < torch.tensor([[6], [2], [5]])
    data = NamedData(
        "t",
        {"input_ids": ids, "attention_mask": mask.long(), "decoder_input_ids": said},
        inputs=[declared.name for declared in program.forward.inputs],
        batch=2,
    )
    nodes = [
        reads(program, f"{part}.block.1.layer.{k}.DenseReluDense.wo.weight")
        for part, k in (("encoder", 1), ("decoder", 2))
    ]
    found = calibrate(program, data, [Moments(node) for node in nodes])
    assert [int(found[Moments(node)]["rows"]) for node in nodes] == [13, 12]


def test_one_row_a_sample_has_no_padding() -> None:
    torch.manual_seed(0)
    model, inputs, axes = bert(2)
    program = capture_module(model.eval(), (), inputs, axes)
    pooled = program.forward.weight_nodes()["pooler.dense.weight"]
    (node,) = pooled.users
    found = calibrate(program, Ragged(), [Moments(node.name), Moments(str(node.args[0]))])
    assert int(found[Moments(node.name)]["rows"]) == 4


def test_keys_as_the_attention_reads_them(subject: tuple[Any, Program]) -> None:
    model, program = subject
    evidence = evidence_of(program, entry_structure(program, program.forward))
    data = Ragged(lengths=(5, 3), rows=2)
    found = calibrate(program, data, [statistic for _, statistic in evidence.keys])
    batch = data.batch(0)
    keys = model(**batch.inputs, use_cache=True).past_key_values.layers[1].keys.detach()
    assert batch.mask is not None
    rows = keys.transpose(1, 2)[batch.mask].flatten(1)  # (rows, heads * width), heads not repeated
    sums = found[evidence.keys[1][1]]
    assert int(sums["rows"]) == 8
    close(sums["greatest"].max(), rows.abs().max())
    close(sums["squares"].mean(), rows.double().square().sum(0).mean())


def test_likeness_near_and_far(subject: tuple[Any, Program]) -> None:
    """Equal values have an angle of nothing, and small differences are told from none."""
    x = torch.randn(50, 16) * 1000
    y = x + 1e-3 * torch.randn(50, 16)
    sums = Similarity(("a", "b", "c")).sums([x[None], x[None].clone(), y[None]], Rows())
    assert float(sums["angle"][0, 1]) == 0.0 == float(sums["apart"][0, 1])
    assert float(sums["apart"][0, 2]) == pytest.approx(float((x.double() - y.double()).square().sum()), rel=1e-9)
    image = torch.randn(2, 3, 4, 5)
    cosine = Similarity(("a", "b"), channels=1).sums([image, image * 2 + 1], Rows())["cosine"][0, 1]
    assert float(cosine) == pytest.approx(
        float(F.cosine_similarity(image.double(), image.double() * 2 + 1, dim=1).sum())
    )


def test_the_first_key_is_the_first_that_is_no_padding() -> None:
    weights = torch.rand(1, 2, 4, 4).softmax(-1)
    mask = torch.tensor([[False, True, True, True]])
    sums = Attended(weights="w").sums([weights], Rows(mask))
    torch.testing.assert_close(sums["first"], weights[0, :, 1:, 1].double().sum(1))
    sink = torch.cat([weights, torch.rand(1, 2, 4, 1)], -1)
    with_sink = Attended(weights="w", sink=True).sums([sink], Rows())
    torch.testing.assert_close(with_sink["own"], weights[0].diagonal(dim1=1, dim2=2).double().sum(1))


def test_too_little_data_is_refused(subject: tuple[Any, Program]) -> None:
    _, program = subject
    with pytest.raises(UsageError, match="is empty"):
        calibrate(program, Ragged(lengths=()), [])
    node = reads(program, "model.layers.0.mlp.down_proj.weight")
    with pytest.raises(UsageError, match=r"too short: Covariance of .* needs 64 rows"):
        calibrate(program, Ragged(lengths=(9,)), [Covariance(node)])


def test_values_that_are_not_finite_name_the_place(subject: tuple[Any, Program]) -> None:
    _, program = subject
    broken = program.clone()
    name = "model.layers.1.self_attn.o_proj.weight"
    value = broken.weights[name].value.clone()
    value[0, 0] = float("nan")
    broken.weights[name] = replace(broken.weights[name], value=value)
    wanted = [Moments(reads(program, "model.layers.2.mlp.down_proj.weight"))]
    with pytest.raises(ModelError, match="not finite") as caught:
        calibrate(broken, Ragged(), wanted)
    assert "o_proj" in caught.value.where


def test_sums_that_overflow_are_none_of_the_models(subject: tuple[Any, Program]) -> None:
    _, program = subject
    broken = program.clone()
    name = "model.layers.1.mlp.up_proj.weight"
    broken.weights[name] = replace(broken.weights[name], value=broken.weights[name].value * 1e25)
    node = reads(program, "model.layers.1.mlp.down_proj.weight")
    with pytest.raises(ModelError, match="Covariance of ragged, batch 0 is not finite") as caught:
        calibrate(broken, Ragged(), [Covariance(node)])
    assert "overflow" in caught.value.why
    broken.weights[name] = replace(broken.weights[name], value=broken.weights[name].value * 1e25)
    with pytest.raises(ModelError, match="not finite") as caught:
        calibrate(broken, Ragged(), [Covariance(node)])
    assert "layers_1_mlp_up_proj" in caught.value.where, "the weight itself"


def test_ids_beyond_the_table_are_told(subject: tuple[Any, Program]) -> None:
    _, program = subject

    class Beyond(Ragged):
        def batch(self, k: int) -> Batch:
            found = super().batch(k)
            return replace(found, inputs=found.inputs | {"input_ids": found.inputs["input_ids"] + 100})

    with pytest.raises(UsageError, match="does not take these values") as caught:
        calibrate(program, Beyond(), [Moments(reads(program, "model.layers.0.mlp.down_proj.weight"))])
    assert caught.value.where == "ragged, batch 0"


@pytest.mark.parametrize("shape", [(2,), (2, 8, 1), (1, 8)])
def test_masks_of_other_shapes_are_told(subject: tuple[Any, Program], shape: tuple[int, ...]) -> None:
    class Odd(Ragged):
        def batch(self, k: int) -> Batch:
            return replace(super().batch(k), mask=torch.ones(shape, dtype=torch.bool))

    wanted = [Moments(reads(subject[1], "model.layers.0.mlp.down_proj.weight"))]
    with pytest.raises(UsageError, match="the mask must be of 2 samples"):
        calibrate(subject[1], Odd(), wanted)


def test_data_that_does_not_fit_is_refused(subject: tuple[Any, Program]) -> None:
    _, program = subject
    wanted = [Moments(reads(program, "model.layers.0.mlp.down_proj.weight"))]

    class Wrong(Ragged):
        def batch(self, k: int) -> Batch:
            found = super().batch(k)
            return Batch({"ids": found.inputs["input_ids"]}, found.mask)

    with pytest.raises(UsageError, match="'ids', which the model does not take"):
        calibrate(program, Wrong(), wanted)


def test_a_tap_that_replaces_changes_what_others_read(subject: tuple[Any, Program]) -> None:
    _, program = subject
    (linear,) = program.forward.weight_nodes()["model.layers.0.mlp.down_proj.weight"].users
    inputs = list(program.examples[0])
    plain = Interpreter(program, [])(inputs).results[0]
    same_again = Interpreter(program, [Tap((linear.name,), lambda value: value, replaces=True)])(inputs).results[0]
    other = Interpreter(program, [Tap((linear.name,), lambda value: value * 0, replaces=True)])(inputs).results[0]
    assert torch.equal(plain, same_again)
    assert not torch.equal(plain, other)
