"""ONNX of whole models: attention as torch computes it, experts, node counts, local functions."""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import pytest
import torch
import transformers as hf
import transformers.integrations.moe
from torch import nn
from torch.export import Dim

pytest.importorskip("onnxruntime")

import laconic
from laconic.codegen.onnx import OnnxReport, write_onnx
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
def small(name: str, layers: int = 2) -> Program:
    model, inputs, axes = module(name, layers)
    return laconic.optimize(model.eval(), "exact", inputs=inputs, dynamic_shapes=axes).program


# Attention


class Attention(nn.Module):
    def __init__(self, **given: Any) -> None:
        super().__init__()
        self.given = given

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, **self.given)


def attention(tmp_path: Path, opset: int, mask: torch.Tensor | None, heads: int = 2, **given: Any) -> None:
    """Write a call with a dynamic batch, and compare it on the mask as it is, which drawn inputs are not like."""
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 5, 8), torch.randn(3, heads, 4, 8), torch.randn(3, heads, 4, 6)
    if given.get("is_causal"):
        q = q[:, :, :4].clone()
    model = Attention(**given)
    axes = {"q": {0: BATCH}, "k": {0: BATCH}, "v": {0: BATCH}}
    shapes = axes | {"mask": None if mask is None or mask.shape[0] != 3 else {0: BATCH}}
    program = capture_module(model, (), {"q": q, "k": k, "v": v, "mask": mask}, shapes)
    path = write_onnx(program, tmp_path / "m.onnx", opset=opset).path
    feeds = {"q": q, "k": k, "v": v} | ({} if mask is None else {"mask": mask})
    (found,) = Session(path).run(feeds).values()
    torch.testing.assert_close(found, model(q, k, v, mask), rtol=1e-5, atol=1e-5)


def masks() -> dict[str, torch.Tensor]:
    seen = torch.tensor([[1, 1, 1, 0], [1, 0, 1, 0], [0, 0, 0, 0]], dtype=torch.bool)[:, None, None]
    rows = torch.rand(5, 4) > 0.4
    rows[2] = False
    return {
        "keys": seen,
        "rows": rows,
        "added": torch.where(rows, torch.randn(5, 4), -math.inf),
        "lowered": torch.where(seen, 0.0, torch.finfo(torch.float32).min),
    }


@pytest.mark.parametrize("opset", [20, 23])
@pytest.mark.parametrize("kind", ["keys", "rows", "added", "lowered"])
def test_rows_in_which_all_is_masked_are_torchs(tmp_path: Path, kind: str, opset: int) -> None:
    torch.manual_seed(1)
    attention(tmp_path, opset, masks()[kind])


@pytest.mark.parametrize("opset", [18, 23])
def test_causal_scaled_and_grouped_attention(tmp_path: Path, opset: int) -> None:
    attention(tmp_path, opset, None, is_causal=True)
    attention(tmp_path / "scaled", opset, None, scale=0.3) if (tmp_path / "scaled").mkdir() is None else None
    (tmp_path / "grouped").mkdir()
    attention(tmp_path / "grouped", opset, None, heads=1, enable_gqa=True)


def test_attention_in_three_dimensions(tmp_path: Path) -> None:
    class Flat(nn.Module):
        def forward(self, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
            return nn.functional.scaled_dot_product_attention(q, k, k)

    program = capture_module(Flat(), (), {"q": torch.randn(3, 5, 8), "k": torch.randn(3, 4, 8)}, {"q": {0: BATCH}, "k": {0: BATCH}})
    assert write_onnx(program, tmp_path / "m.onnx").worst <= 1


# Experts


class Experts(nn.Module):
    """Rows sorted by expert, times a matrix for each."""

    def __init__(self, op: Any, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.op = op
        self.weight = nn.Parameter(torch.randn(4, 6, 8).to(dtype))

    def forward(self, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        return self.op(rows, self.weight.transpose(-2, -1), ends)


def grouped(op: Any, dtype: torch.dtype = torch.float32) -> tuple[Experts, Program]:
    torch.manual_seed(0)
    module = Experts(op, dtype)
    inputs = {"rows": torch.randn(16, 8).to(dtype), "ends": torch.tensor([3, 3, 10, 16], dtype=torch.int32)}
    return module, capture_module(module, (), inputs, {"rows": {0: Dim("rows")}, "ends": {}})


ENDS = [[0, 0, 0, 0], [5, 5, 5, 5], [0, 2, 2, 5], [0, 0, 0, 5], [1, 2, 3, 4]]


def test_experts_without_rows_and_rows_without_an_expert(tmp_path: Path) -> None:
    module, program = grouped(torch.ops.transformers.grouped_mm_fallback)
    report = write_onnx(program, tmp_path / "m.onnx", opset=20) if False else None
    model = to_onnx(program, 20)
    assert [node.op_type for node in model.graph].count("MatMul") == 4
    assert sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value) < 900
    del report
