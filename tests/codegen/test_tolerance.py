"""What ONNX Runtime is held to: right exports pass with a margin, planted faults are refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
import torch
import transformers as hf
from torch import nn
from torch.export import Dim

pytest.importorskip("onnxruntime")

from laconic.codegen.onnx import write, write_onnx
from laconic.ir.capture import capture_module
from laconic.ir.errors import VerificationError
from laconic.ir.precise import Deviation, pooled
from laconic.ir.program import Program


def seen(model: nn.Module) -> Program:
    axes = {"pixel_values": {0: Dim("batch")}}
    return capture_module(model.eval(), (), {"pixel_values": torch.randn(3, 3, 32, 32)}, axes)


def convnext() -> Program:
    config = hf.ConvNextConfig(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 2, 1], image_size=32, num_labels=3)
    return seen(hf.ConvNextForImageClassification(config))


def bert() -> Program:
    """With biases that are not zero, so that dropping one is a fault."""
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100
    )
    model = hf.BertModel(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, float(parameter.detach().mean()), 0.1)
    axes = {"input_ids": {0: Dim("batch"), 1: Dim("sequence", max=64)}}
    return capture_module(model.eval(), (), {"input_ids": torch.randint(0, 100, (3, 7))}, axes)


@pytest.mark.parametrize("seed", [0, pytest.param(7, marks=pytest.mark.slow)])
def test_a_few_small_results_are_not_judged_by_one_draw(tmp_path: Path, seed: int) -> None:
    """Three numbers for each image: torch's error on a single case is luck, and ONNX Runtime's may be larger."""
    torch.manual_seed(seed)
    assert write_onnx(convnext(), tmp_path / "m.onnx").worst < 0.9


def scaled(model: ir.Model) -> None:
    change(model, "embeddings.position_embeddings.weight", 1 + 1e-4)


def unbiased(model: ir.Model) -> None:
    """Without the bias of queries, keys and values, which are computed together."""
    bias = "encoder.layer.0.attention.self.query.bias"
    change(model, next(name for name in model.graph.initializers if name.startswith(bias)), 0.0)


def change(model: ir.Model, name: str, factor: float) -> None:
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(value.const_value.numpy() * np.float32(factor), name=name)


def loosened(model: ir.Model) -> None:
    node = next(node for node in model.graph if node.op_type == "LayerNormalization")
    node.attributes["epsilon"] = ir.AttrFloat32("epsilon", 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("plant", [scaled, unbiased, loosened])
def test_planted_faults_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, plant: Callable[[ir.Model], None]
) -> None:
    torch.manual_seed(1)
    program = bert()
    real = write.to_onnx

    def faulty(given: Program, opset: int) -> Any:
        model = real(given, opset)
        plant(model)
        return model

    assert write_onnx(program, tmp_path / "right.onnx").worst < 0.9
    monkeypatch.setattr(write, "to_onnx", faulty)
    with pytest.raises(VerificationError, match="nothing was written"):
        write_onnx(program, tmp_path / "wrong.onnx")
    assert not (tmp_path / "wrong.onnx").exists()


def row(found: float, original: float, scale: float) -> Deviation:
    return Deviation("y", 0.0, found, original, max(2 * original, 4e-7 * scale), scale)


def test_a_lucky_case_is_allowed_what_the_others_show() -> None:
    lucky, plain = pooled([row(3e-6, 1e-7, 1.0), row(3e-6, 2e-6, 1.0)])
    assert lucky.ok
    assert plain.ok
    assert lucky.allowed == plain.allowed == 4e-6
    assert not pooled([row(5e-6, 1e-7, 1.0), row(3e-6, 2e-6, 1.0)])[0].ok


def test_smaller_values_are_allowed_less() -> None:
    small, _ = pooled([row(0.0, 0.0, 0.1), row(0.0, 2e-6, 1.0)])
    assert small.allowed == pytest.approx(4e-7)


def test_a_case_that_cancels_does_not_loosen_the_others() -> None:
    """An error of the size of its values: a relative error of 1, of which nothing follows for values of size 1."""
    plain, _ = pooled([row(1e-3, 1e-7, 1.0), row(0.0, 1e-6, 1e-6)])
    assert not plain.ok
    assert plain.allowed == 2e-6


def test_a_case_without_a_finite_error_tells_nothing() -> None:
    rows = pooled([row(1.0, 1e-7, 1.0), row(float("inf"), float("inf"), 1.0)])
    assert [r.allowed for r in rows] == [4e-7, float("inf")]
    integers = pooled([Deviation("y", 1.0, float("inf"), 0.0, 0.0), Deviation("y", 0.0, 0.0, 0.0, 0.0)])
    assert [r.ok for r in integers] == [False, True]
