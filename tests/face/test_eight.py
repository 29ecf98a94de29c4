"""Eight architectures: structure as their configuration says, the exact preset's bits, ONNX; and blocks that take
turns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.utils._pytree as pytree

import laconic
from architectures import BY_TURNS, EIGHT, inputs_of, make
from laconic.ir.capture import capture_module
from laconic.ir.metrics.differences import bit_equal
from laconic.ir.program import Program
from laconic.ir.structure import BranchKind, EntryStructure, find_structure

SIZES = [(1, 1, 1), (2, 9, 4), (5, 13, 17)]
ATTENTION, MLP, MOE, MIXER = BranchKind.ATTENTION, BranchKind.MLP, BranchKind.MOE, BranchKind.MIXER
#: A configuration's name of an activation, and what its values are.
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh"}

Captured = tuple[str, torch.nn.Module, dict[str, Any], Program]


def fixed_inputs(program: Program) -> set[str]:
    """The inputs whose second axis is a number."""
    return {n.meta["name"] for n in program.forward.input_nodes() if isinstance(n.meta["val"].shape[1], int)}


#: One stands in the fast tier; `tests/ir/test_structure.py` has small modules of all kinds.
SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in sorted(EIGHT.keys() - {"llama"})]


@pytest.fixture(scope="module", params=["llama", *SLOW])
def captured(request: pytest.FixtureRequest) -> Captured:
    module, inputs, axes = make(request.param, EIGHT)
    program = capture_module(module, (), inputs, axes, check=request.param != "llama")
    return request.param, module, inputs, program


@pytest.fixture(scope="module")
def optimized(captured: Captured) -> laconic.Result:
    return laconic.optimize(captured[3])


@pytest.fixture(params=["captured", pytest.param("optimised", marks=pytest.mark.slow)])
def structure(request: pytest.FixtureRequest, captured: Captured) -> EntryStructure:
    program = captured[3] if request.param == "captured" else request.getfixturevalue("optimized").program
    return find_structure(program)["forward"]


def field(config: Any, *names: str) -> Any:
    """The first of these fields that a configuration has."""
    return next(getattr(config, name) for name in names if getattr(config, name, None) is not None)


def layers(config: Any) -> list[tuple[list[BranchKind], int]]:
    """The branches of a layer and the number of layers, of each stream."""
    if config.model_type == "mamba":
        return [([MIXER], config.num_hidden_layers)]
    feed = MOE if getattr(config, "num_experts", None) else MLP
    if config.is_encoder_decoder:
        decoders = field(config, "num_decoder_layers", "decoder_layers")
        encoders = config.num_layers if config.model_type == "t5" else config.encoder_layers
        return [([ATTENTION, feed], encoders), ([ATTENTION, ATTENTION, feed], decoders)]
    return [([ATTENTION, feed], config.num_hidden_layers)]


def test_streams_and_runs_are_the_layers_of_the_configuration(captured: Captured, structure: EntryStructure) -> None:
    expected = layers(captured[1].config)
    assert [[b.kind for b in s.branches] for s in structure.streams] == [kinds * n for kinds, n in expected]
    assert [(r.stream, r.first, r.period, r.count, r.turns) for r in structure.runs] == [
        (k, 0, len(kinds), count, 1) for k, (kinds, count) in enumerate(expected)
    ]
    for run in structure.runs:
        blocks = [node for k in range(run.count) for node in run.block(k)]
        assert len(blocks) == len(set(blocks)) == run.count * run.repeat.period
        assert [str(n.target) for n in run.block(0)] == [str(n.target) for n in run.block(run.count - 1)]


def test_attentions_are_those_of_the_configuration(captured: Captured, structure: EntryStructure) -> None:
    name, module, *_ = captured
    config = module.config
    if name == "mamba":
        assert structure.attentions == ()
        return
    heads = field(config, "num_attention_heads", "encoder_attention_heads")
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = field(config, "hidden_size", "d_model")
    head_dim = getattr(config, "head_dim", None) or getattr(config, "d_kv", None) or width // heads
    decoder = name in ("gpt2", "llama", "qwen3_moe")
    assert len(structure.attentions) == sum(kinds.count(ATTENTION) * count for kinds, count in layers(config))
    for site in structure.attentions:
        assert (site.heads, site.kv_heads, site.head_dim, site.value_dim) == (heads, kv_heads, head_dim, head_dim)
        assert site.scale == pytest.approx(1.0 if name == "t5" else head_dim**-0.5)
        assert (site.fused, site.cached, site.window) == (True, False, None)
        assert site.rotary is (name in ("llama", "qwen3_moe"))
        assert site.qk_norm is (name == "qwen3_moe")
        assert site.o is not None
        assert (site.o.inputs, site.o.outputs) == (heads * head_dim, width)
        for part, count in ((site.q, heads), (site.k, kv_heads), (site.v, kv_heads)):
            assert part is not None
            low, high = part.columns or (0, part.outputs)
            assert (part.inputs, high - low) == (width, count * head_dim)
    crosses = [site.cross for site in structure.attentions]
    causal = [site.causal for site in structure.attentions]
    if config.is_encoder_decoder:
        (_, encoders), (_, decoders) = layers(config)
        assert crosses == [False] * encoders + [False, True] * decoders
        assert causal == [False] * encoders + [True, False] * decoders
    else:
        assert crosses == [False] * len(crosses)
        assert causal == [decoder] * len(causal)


def test_mlps_and_experts_are_those_of_the_configuration(captured: Captured, structure: EntryStructure) -> None:
    name, module, *_ = captured
    config = module.config
    width = field(config, "hidden_size", "d_model")
    expected = layers(config)
    if name == "mamba":
        assert structure.mlps == structure.moes == ()
        assert all("no attention, MLP or MoE" in b.reason for s in structure.streams for b in s.branches)
        return
    named = field(config, "hidden_act", "activation_function", "dense_act_fn")
    activation = ACTIVATIONS.get(named, named)
    if name == "qwen3_moe":
        assert structure.mlps == ()
        assert len(structure.moes) == config.num_hidden_layers
        for site in structure.moes:
            assert (site.experts, site.top_k) == (config.num_experts, config.num_experts_per_tok)
            assert (site.hidden, site.width) == (width, config.moe_intermediate_size)
            assert (site.activation, site.gated, site.score) == (activation, True, "softmax")
            assert site.renormalised is config.norm_topk_prob
            assert (site.impl, site.layout, site.transposed, site.shared) == ("grouped", "concatenated", False, ())
            assert (site.router.inputs, site.router.outputs) == (width, config.num_experts)
        return
    inner = {getattr(config, n, None) for n in ("intermediate_size", "n_inner", "d_ff", "encoder_ffn_dim")} - {None}
    assert structure.moes == ()
    assert len(structure.mlps) == sum(kinds.count(MLP) * count for kinds, count in expected)
    for mlp in structure.mlps:
        assert (mlp.hidden, mlp.width) == (width, inner.pop() if len(inner) == 1 else 4 * width)
        assert (mlp.activation, mlp.gated, mlp.packed) == (activation, name == "llama", False)
        assert mlp.down.outputs == width
        inner.add(mlp.width)


def test_norms_are_those_of_the_configuration(captured: Captured, structure: EntryStructure) -> None:
    name, module, *_ = captured
    config = module.config
    # A norm for each branch and one at the end (before the first branch, in BERT) of each stream; two in queries and
    # keys of Qwen3.
    branches = sum(len(kinds) * count for kinds, count in layers(config))
    extra = 2 * config.num_hidden_layers if name == "qwen3_moe" else 0
    assert len(structure.norms) == branches + len(structure.streams) + extra
    eps = {getattr(config, n, None) for n in ("layer_norm_eps", "rms_norm_eps", "layer_norm_epsilon")} - {None}
    kind = "rms" if name in ("llama", "qwen3_moe", "t5", "mamba") else "layer"
    assert {site.kind for site in structure.norms} == {kind}
    assert {site.eps for site in structure.norms} == (eps or {1e-5})
    assert all(site.weight is not None and (site.bias is not None) is (kind == "layer") for site in structure.norms)


@pytest.mark.slow
def test_exact_preset_gives_the_modules_bits_at_three_sizes(captured: Captured, optimized: laconic.Result) -> None:
    (name, module, example, program), result = captured, optimized
    assert result.report.verified
    assert result.report.after.nodes < result.report.before.nodes
    assert (fixed_inputs(program) == {"input_ids"}) is (name == "mamba")
    for seed, sizes in enumerate(SIZES):
        arguments = inputs_of(example, sizes, seed, fixed_inputs(program))
        with torch.no_grad():
            expected = [v for v in pytree.tree_leaves(module(**arguments)) if isinstance(v, torch.Tensor)]
        found = pytree.tree_leaves(result.model(**arguments))
        assert len(expected) == len(found)
        assert all(bit_equal(a, b) for a, b in zip(expected, found, strict=True)), sizes


@pytest.mark.slow
def test_onnx_is_equal_in_onnx_runtime_at_two_sizes(
    captured: Captured, optimized: laconic.Result, tmp_path: Path
) -> None:
    (name, module, example, program), result = captured, optimized
    path = tmp_path / f"{name}.onnx"
    laconic.export_onnx(result.program, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    assert names == [k for k, v in example.items() if isinstance(v, torch.Tensor)]
    for seed, sizes in enumerate(SIZES[1:]):
        arguments = inputs_of(example, sizes, seed, fixed_inputs(program))
        with torch.no_grad():
            expected = [v for v in pytree.tree_leaves(module(**arguments)) if isinstance(v, torch.Tensor)]
        found = session.run(None, {k: arguments[k].numpy() for k in names})
        for a, b in zip(expected, found, strict=True):
            assert b.dtype == a.numpy().dtype
            np.testing.assert_allclose(b, a.numpy(), rtol=1e-4, atol=1e-5 * max(1.0, float(a.abs().max())))


@pytest.fixture(scope="module")
def sparse() -> tuple[Any, Program]:
    module, inputs, axes = make("sparse", BY_TURNS)
    return module.config, laconic.capture(module, dynamic_shapes=axes, **inputs)


@pytest.mark.slow
def test_experts_in_every_second_layer_are_blocks_of_two_layers(sparse: tuple[Any, Program]) -> None:
    config, program = sparse
    for each in (program, laconic.optimize(program, check=False).program):
        found = find_structure(each)["forward"]
        kinds = [b.kind for b in found.streams[0].branches]
        step = config.decoder_sparse_step
        feeds = [MOE if (k + 1) % step == 0 else MLP for k in range(config.num_hidden_layers)]
        assert kinds == [kind for feed in feeds for kind in (ATTENTION, feed)]
        assert [(r.first, r.period, r.count) for r in found.runs] == [(0, 2 * step, config.num_hidden_layers // step)]
        assert [site.renormalised for site in found.moes] == [config.norm_topk_prob] * feeds.count(MOE)
        assert {site.width for site in found.mlps} == {config.intermediate_size}


@pytest.mark.slow
def test_local_and_global_attention_take_turns_in_one_run() -> None:
    """The two kinds of layer differ in what they are given, masks and rotary tables, not in what they do."""
    module, inputs, axes = make("local", BY_TURNS)
    config = module.config
    program = laconic.capture(module, dynamic_shapes=axes, **inputs)
    for each in (program, laconic.optimize(program, check=False).program):
        found = find_structure(each)["forward"]
        assert [(r.period, r.count, r.turns) for r in found.runs] == [(2, config.num_hidden_layers, 2)]
        windows = [config.sliding_window if t == "sliding_attention" else None for t in config.layer_types]
        assert [site.window for site in found.attentions] == windows
        assert all(site.causal and site.rotary and site.qk_norm for site in found.attentions)
        assert {site.activation for site in found.mlps} == {ACTIVATIONS[config.hidden_activation]}
        assert {(norm.kind, norm.offset) for norm in found.norms} == {("rms", 1.0)}


@pytest.mark.slow
def test_audit_of_a_model_whose_experts_take_turns(sparse: tuple[Any, Program]) -> None:
    config, program = sparse
    before = str(program)
    found = laconic.audit(program)
    assert str(program) == before
    (entry,) = found.entries
    (run,) = entry.runs
    pairs = config.num_hidden_layers // config.decoder_sparse_step
    assert run.equal == ()
    assert len(run.likeness) == pairs * (pairs - 1) // 2
    assert found.outlined < found.nodes - run.run.repeat.saved // 2
