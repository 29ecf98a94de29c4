"""ONNX of whole models: attention as torch computes it, experts, node counts, local functions."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx.inliner
import onnx_ir as ir
import pytest
import torch
import transformers as hf
import transformers.integrations.moe
from onnx.reference import ReferenceEvaluator
from torch import nn
from torch.export import Dim

pytest.importorskip("onnxruntime")

import onnxruntime as ort

import laconic
from laconic.codegen.onnx import write_onnx
from laconic.codegen.onnx.convert import to_onnx
from laconic.codegen.onnx.functions import count, inlined_nodes, outline
from laconic.codegen.onnx.runtime import Session, default_opset
from laconic.ir.capture import capture_module
from laconic.ir.errors import UnsupportedError
from laconic.ir.program import Program

BATCH, SEQUENCE = Dim("batch"), Dim("sequence", max=64)
LAYERS = 12

#: Nodes at opset 20: at most so many for 12 layers, so many for each.
LIMITS = {"bert": (315, 24), "gpt2": (507, 25), "llama": (772, 48), "vit": (294, 22)}


def sequences(**extra: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs = {"input_ids": torch.randint(0, 100, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
    axes: dict[str, Any] = {name: {0: BATCH, 1: SEQUENCE} for name in inputs}
    return inputs | extra, axes | dict.fromkeys(extra)


def module(name: str, layers: int) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    torch.manual_seed(0)
    sizes = {"hidden_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 512}
    if name == "bert":
        return hf.BertModel(hf.BertConfig(**sizes, vocab_size=1000)), *sequences()
    if name == "gpt2":
        config = hf.GPT2Config(n_embd=128, n_layer=layers, n_head=4, vocab_size=1000, bos_token_id=0, eos_token_id=0)
        return hf.GPT2LMHeadModel(config), *sequences(use_cache=False)
    if name == "llama":
        config = hf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=1000)
        return hf.LlamaForCausalLM(config), *sequences(use_cache=False)
    model = hf.ViTModel(hf.ViTConfig(**sizes, image_size=64, patch_size=8))
    return model, {"pixel_values": torch.randn(3, 3, 64, 64)}, {"pixel_values": {0: BATCH}}


@cache
def captured(name: str, layers: int = 2) -> Program:
    model, inputs, axes = module(name, layers)
    return capture_module(model.eval(), (), inputs, axes)


# Attention


class Attention(nn.Module):
    """Calls with each of the given masks and keyword arguments."""

    def __init__(self, *calls: dict[str, Any]) -> None:
        super().__init__()
        self.calls = calls

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, masks: dict[str, torch.Tensor]) -> Any:
        attend = nn.functional.scaled_dot_product_attention
        results = [attend(q, k, v, attn_mask=mask) for mask in masks.values()]
        for given in self.calls:
            heads = 1 if "enable_gqa" in given else None
            results.append(attend(q, k[:, :heads], v[:, :heads], **given))
        return [*results, attend(q[:, 0], k[:, 0], v[:, 0])]


def check_attention(path: Path, opset: int, masks: dict[str, torch.Tensor], *calls: dict[str, Any]) -> None:
    """Write calls with a dynamic batch, and compare them on the masks as they are, which drawn ones are not like."""
    torch.manual_seed(0)
    inputs = {"q": torch.randn(3, 2, 5, 8), "k": torch.randn(3, 2, 4, 8), "v": torch.randn(3, 2, 4, 6)}
    axes: dict[str, Any] = {name: {0: BATCH} for name in inputs}
    axes["masks"] = {name: {0: BATCH} if mask.shape[0] == 3 else {} for name, mask in masks.items()}
    model = Attention(*calls)
    program = capture_module(model, (), {**inputs, "masks": masks}, axes)
    write_onnx(program, path, opset=opset)
    found = Session(path).run(inputs | {f"masks.{name}": mask for name, mask in masks.items()})
    for result, wanted in zip(found.values(), model(**inputs, masks=masks), strict=True):
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("opset", [20, 23])
def test_rows_in_which_all_is_masked_are_torchs(tmp_path: Path, opset: int) -> None:
    torch.manual_seed(1)
    keys = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)[:, None, None]
    rows = torch.rand(5, 4) > 0.4
    rows[2] = False
    masks = {
        "keys": keys,
        "rows": rows,
        "added": torch.where(rows, torch.randn(5, 4), -math.inf),
        "lowered": torch.where(keys, 0.0, torch.finfo(torch.float32).min),
    }
    check_attention(tmp_path / "m.onnx", opset, masks)


@pytest.mark.parametrize("opset", [pytest.param(18, marks=pytest.mark.slow), 23])
def test_causal_scaled_and_grouped_attention(tmp_path: Path, opset: int) -> None:
    check_attention(tmp_path / "m.onnx", opset, {}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True})


# Experts


class Experts(nn.Module):
    """Rows sorted by expert, times a matrix for each; `ends` are given, or counted from the experts of the rows."""

    def __init__(self, op: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.op = op
        self.weight = nn.Parameter(torch.randn(4, 16, 8).to(dtype))

    def forward(self, rows: torch.Tensor, ends: torch.Tensor | None, ids: torch.Tensor | None) -> torch.Tensor:
        if ids is not None:
            ends = torch.histc(ids.sort().values.float(), 4, 0, 3).cumsum(0, dtype=torch.int32)
        product: torch.Tensor = self.op(rows, self.weight.transpose(-2, -1), ends)
        return product


ROWS = Dim("rows", max=1000)
ENDS = [[0, 0, 0, 0], [5, 5, 5, 5], [0, 2, 2, 5], [0, 0, 0, 5], [1, 2, 3, 4]]


def run(model: ir.Model, given: dict[str, np.ndarray[Any, Any]]) -> np.ndarray[Any, Any]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found: np.ndarray[Any, Any] = session.run(None, given)[0]
    return found


def test_experts_without_rows_and_rows_without_an_expert() -> None:
    torch.manual_seed(0)
    module = Experts(torch.ops.transformers.grouped_mm_fallback)
    inputs = {"rows": torch.randn(16, 8), "ends": torch.tensor([3, 3, 10, 16], dtype=torch.int32), "ids": None}
    program = capture_module(module, (), inputs, {"rows": {0: ROWS}, "ends": {}, "ids": None})
    model = to_onnx(program, 20)
    assert [node.op_type for node in model.graph].count("MatMul") == 4
    matrices = [v.const_value for v in model.graph.initializers.values() if v.const_value and v.const_value.size > 8]
    assert [list(matrix.shape) for matrix in matrices] == [[8, 16]] * 4
    for ends in ENDS:
        rows, stops = torch.randn(5, 8), torch.tensor(ends, dtype=torch.int32)
        found = run(model, {"rows": rows.numpy(), "ends": stops.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), module(rows, stops, None), rtol=1e-5, atol=1e-5)


def test_experts_in_bfloat16() -> None:
    """ONNX Runtime has no such product on the CPU: the op by op reference of ONNX computes it."""
    torch.manual_seed(0)
    module = Experts(torch._grouped_mm, torch.bfloat16)
    inputs = {"rows": torch.randn(16, 8).bfloat16(), "ends": None, "ids": torch.arange(16) % 4}
    program = capture_module(module, (), inputs, {"rows": {0: ROWS}, "ends": None, "ids": {0: ROWS}})
    reference = ReferenceEvaluator(ir.to_proto(to_onnx(program, 20)))
    for ids in ([1, 1, 1, 3, 3], [0, 1, 2, 3, 3, 3], [2]):
        rows, experts = torch.randn(len(ids), 8).bfloat16(), torch.tensor(ids)
        given = {"rows": rows.float().numpy().astype(ml_dtypes.bfloat16), "ids": experts.numpy()}
        (found,) = reference.run(None, given)
        wanted = module(rows, None, experts).float()
        torch.testing.assert_close(torch.from_numpy(found.astype(np.float32)), wanted, rtol=2e-2, atol=2e-2)


def test_forms_of_grouped_products_that_are_refused(tmp_path: Path) -> None:
    class Dense(nn.Module):
        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return torch._grouped_mm(a, b)

    program = capture_module(Dense(), (torch.randn(2, 8, 8).bfloat16(), torch.randn(2, 8, 8).bfloat16()), {})
    with pytest.raises(UnsupportedError, match=r"(?s)_grouped_mm.*two dimensions"):
        write_onnx(program, tmp_path / "m.onnx")


def mixture(name: str) -> tuple[nn.Module, dict[str, Any], dict[str, Any]]:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 64, "vocab_size": 100, "num_experts_per_tok": 2}
    if name == "mixtral":
        return hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, num_local_experts=4)), *sequences(use_cache=False)
    config = hf.Qwen3MoeConfig(**sizes, head_dim=8, moe_intermediate_size=16, num_experts=8)
    return hf.Qwen3MoeForCausalLM(config), *sequences(use_cache=False)


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in ("mixtral", "qwen3-moe")])
def test_mixtures_of_experts(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    model, inputs, axes = mixture(name)
    program = capture_module(model.eval(), (), inputs, axes)
    session = Session(write_onnx(program, tmp_path / "m.onnx", opset=20).path)
    for batch, length in ((1, 1), (2, 9)):
        ids = torch.randint(0, 100, (batch, length))
        mask = torch.ones_like(ids)
        with torch.no_grad():
            wanted = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
        found = session.run({"input_ids": ids, "attention_mask": mask})["logits"]
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


# Node counts


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama", "gpt2", "vit", "bert"])
def test_nodes_of_one_layer(name: str) -> None:
    limit, each = LIMITS[name]
    graph = to_onnx(captured(name, 1), 20).graph
    assert len(list(graph)) + (LAYERS - 1) * each <= limit
    assert {node.domain for node in graph} == {""}


def test_axes_and_source_lines_are_kept(tmp_path: Path) -> None:
    report = write_onnx(captured("bert"), tmp_path / "m.onnx", opset=20)
    limit, each = LIMITS["bert"]
    assert report.nodes + (LAYERS - 2) * each <= limit
    assert report.nodes == report.stored_nodes
    assert (report.functions, report.calls) == (0, 0)
    graph = onnx.load(report.path).graph
    shapes = {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.input}
    shapes |= {v.name: [d.dim_param or d.dim_value for d in v.type.tensor_type.shape.dim] for v in graph.output}
    assert shapes == {
        "input_ids": ["batch", "sequence"],
        "attention_mask": ["batch", "sequence"],
        "last_hidden_state": ["batch", "sequence", 128],
        "pooler_output": ["batch", 128],
    }
    told = [node for node in graph.node if any(entry.key == "source" for entry in node.metadata_props)]
    assert len(told) >= 0.9 * len(graph.node)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(LIMITS))
def test_nodes_of_twelve_layers(tmp_path: Path, name: str) -> None:
    limit, each = LIMITS[name]
    program = laconic.optimize(captured(name, LAYERS), "exact").program
    flat = write_onnx(program, tmp_path / "flat.onnx", opset=20)
    assert flat.nodes <= limit
    assert flat.nodes - len(list(to_onnx(captured(name, 1), 20).graph)) <= (LAYERS - 1) * each
    called = write_onnx(program, tmp_path / "called.onnx", opset=20, functions=True)
    assert (called.nodes, called.functions, called.calls) == (flat.nodes, 1, LAYERS)
    assert called.stored_nodes < flat.nodes / 4
    newest = write_onnx(program, tmp_path / "newest.onnx")
    assert newest.opset == default_opset()
    assert newest.nodes <= flat.nodes


# Functions


def test_repeated_blocks_are_functions(tmp_path: Path) -> None:
    program = captured("bert")
    report = laconic.export_onnx(program, tmp_path / "m.onnx", opset=20, functions=True)
    assert (report.functions, report.calls) == (1, 2)
    model = onnx.load(report.path)
    (function,) = model.functions
    assert (function.domain, {node.domain for node in function.node}) == ("laconic", {""})
    assert report.stored_nodes == len(model.graph.node) + len(function.node) < report.nodes
    inlined = onnx.inliner.inline_local_functions(model)
    assert len(inlined.graph.node) == report.nodes
    assert [v.name for v in model.graph.output] == ["last_hidden_state", "pooler_output"]
    session = Session(report.path)
    ids, mask = torch.randint(0, 1000, (2, 11)), torch.ones(2, 11, dtype=torch.long)
    onnx.save(inlined, tmp_path / "inlined.onnx")
    given = {"input_ids": ids, "attention_mask": mask}
    for name, value in Session(tmp_path / "inlined.onnx").run(given).items():
        torch.testing.assert_close(session.run(given)[name], value, rtol=1e-5, atol=1e-5)


def test_a_model_without_repeats_has_no_functions(tmp_path: Path) -> None:
    program = capture_module(nn.Linear(4, 4), (torch.randn(3, 4),), {}, ({0: BATCH},))
    report = write_onnx(program, tmp_path / "m.onnx", functions=True)
    assert (report.functions, report.calls, report.nodes) == (0, 0, report.stored_nodes)


class Stack(nn.Module):
    def __init__(self, *blocks: nn.Module) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x: torch.Tensor) -> list[torch.Tensor]:
        kept = []
        for block in self.blocks:
            x = x + block(x)
            kept.append(x)
        return kept


def layer(activation: nn.Module | None = None) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 16), activation or nn.GELU(), nn.Linear(16, 8))


def test_results_inside_blocks_are_results_of_calls() -> None:
    program = capture_module(Stack(*(layer() for _ in range(4))), (torch.randn(3, 8),), {}, ({0: BATCH},))
    model = to_onnx(program, 20)
    before, names = run_all(model), [value.name for value in model.graph.outputs]
    outline(model)
    assert [value.name for value in model.graph.outputs] == names
    assert count(model).calls == 4
    for old, new in zip(before, run_all(model), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)


def test_blocks_that_differ_in_an_attribute_share_no_function() -> None:
    blocks = [layer(nn.GELU()), layer(nn.GELU(approximate="tanh"))]
    program = capture_module(Stack(*blocks), (torch.randn(3, 8),), {}, ({0: BATCH},))
    model = to_onnx(program, 20)
    nodes = [node.op_type for node in model.graph]
    outline(model)
    assert not model.functions
    assert inlined_nodes(model) == len(nodes)


def run_all(model: ir.Model) -> list[np.ndarray[Any, Any]]:
    session = ort.InferenceSession(ir.to_proto(model).SerializeToString(), providers=["CPUExecutionProvider"])
    found: list[np.ndarray[Any, Any]] = session.run(None, {"x": np.ones((2, 8), np.float32)})
    return found


def test_a_structure_does_not_hang_on_what_weights_hold() -> None:
    """Biases that are zero, as in models before training, are kept."""
    module = Stack(layer())
    graphs = []
    for number in (0.0, 0.5):
        for name, parameter in module.named_parameters():
            if name.endswith("bias"):
                nn.init.constant_(parameter, number)
        program = capture_module(module, (torch.randn(3, 8),), {}, ({0: BATCH},))
        graphs.append([(node.op_type, len(node.inputs)) for node in to_onnx(program, 20).graph])
    assert graphs[0] == graphs[1]
    assert ("Gemm", 3) in graphs[0]
