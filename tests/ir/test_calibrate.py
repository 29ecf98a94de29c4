"""Calibration: the statistics that plain hooks on the module give, whatever the batches, and however often stopped."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from architectures import llama, qwen3_moe
from laconic.ir import calibrate as module
from laconic.ir.calibrate import calibrate
from laconic.ir.capture import capture_module
from laconic.ir.data import Batch, Data
from laconic.ir.errors import ModelError, UsageError
from laconic.ir.evidence import boundaries, evidence_of
from laconic.ir.interpret import Interpreter, Tap
from laconic.ir.metrics.quality import Nats
from laconic.ir.program import Program
from laconic.ir.quality import named_results
from laconic.ir.statistics.attention import Attended
from laconic.ir.statistics.base import Statistic, Sums
from laconic.ir.statistics.likeness import Similarity, TokenLikeness
from laconic.ir.statistics.moments import Covariance, GradientCovariance, Moments
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


def loss(program: Program) -> Callable[[list[Any], Batch], torch.Tensor]:
    return lambda results, batch: Nats().loss(named_results(program.forward, results), batch)


def test_gradients_are_those_of_the_module(subject: tuple[Any, Program]) -> None:
    model, program = subject
    data = Ragged(lengths=(9, 8, 7, 9, 4), rows=5)
    weight = "model.layers.1.mlp.down_proj"
    (linear,) = program.forward.weight_nodes()[f"{weight}.weight"].users
    statistic = GradientCovariance(linear.name)
    found = calibrate(program, data, [statistic], loss=loss(program))
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
        module.digest(program, Ragged(), wanted),
        module.digest(other, Ragged(), wanted),
        module.digest(program, Ragged(lengths=(4,)), wanted),
        module.digest(program, Ragged(), [*wanted, *wanted]),
    }
    assert len(keys) == 4


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
