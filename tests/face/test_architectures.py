"""Real architectures: the exact preset against the module itself, and ONNX in ONNX Runtime."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch
import torch.utils._pytree as pytree

import laconic
from architectures import ARCHITECTURES, inputs_of, make
from laconic.ir.metrics.differences import bit_equal

SIZES = [(1, 1, 1), (2, 9, 4), (5, 13, 17)]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=pytest.mark.slow) if name in ("bert", "gpt2", "t5") else name
        for name in sorted(ARCHITECTURES)
    ],
)
def optimized(request: pytest.FixtureRequest) -> tuple[str, torch.nn.Module, dict[str, Any], laconic.Result]:
    module, inputs, axes = make(request.param)
    return request.param, module, inputs, laconic.optimize(module, inputs=inputs, dynamic_shapes=axes)


def test_exact_preset_gives_the_modules_bits_at_three_sizes(
    optimized: tuple[str, torch.nn.Module, dict[str, Any], laconic.Result],
) -> None:
    _, module, example, result = optimized
    assert result.report.verified
    assert result.report.after.nodes < result.report.before.nodes or "resnet" in type(module).__name__.lower()
    for seed, sizes in enumerate(SIZES):
        arguments = inputs_of(example, sizes, seed)
        with torch.no_grad():
            expected = [v for v in pytree.tree_leaves(module(**arguments)) if isinstance(v, torch.Tensor)]
        found = pytree.tree_leaves(result.model(**arguments))
        assert len(expected) == len(found)
        assert all(bit_equal(a, b) for a, b in zip(expected, found, strict=True)), sizes


def test_every_axis_that_was_asked_for_is_dynamic(
    optimized: tuple[str, torch.nn.Module, dict[str, Any], laconic.Result],
) -> None:
    name, _, _, result = optimized
    axes = {s.name for s in result.program.symbols.values()}
    wanted = (
        {"batch"} | ({"sequence"} if name not in ("vit", "resnet") else set()) | ({"target"} if name == "t5" else set())
    )
    assert axes == wanted
    assert "specialized" not in result.program.facts
    assert all(s.low == 1 for s in result.program.symbols.values())


def test_onnx_is_equal_in_onnx_runtime_at_two_sizes(
    optimized: tuple[str, torch.nn.Module, dict[str, Any], laconic.Result], tmp_path: Path
) -> None:
    name, module, example, result = optimized
    path = tmp_path / f"{name}.onnx"
    laconic.export_onnx(result.program, path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [i.name for i in session.get_inputs()]
    assert names == [k for k, v in example.items() if isinstance(v, torch.Tensor)]
    for seed, sizes in enumerate(SIZES[1:]):
        arguments = inputs_of(example, sizes, seed)
        with torch.no_grad():
            expected = [v for v in pytree.tree_leaves(module(**arguments)) if isinstance(v, torch.Tensor)]
        found = session.run(None, {k: arguments[k].numpy() for k in names})
        for a, b in zip(expected, found, strict=True):
            assert b.dtype == a.numpy().dtype
            np.testing.assert_allclose(b, a.numpy(), rtol=1e-4, atol=1e-5 * max(1.0, float(a.abs().max())))


def test_saved_dir_reloads_to_the_same_bits(
    optimized: tuple[str, torch.nn.Module, dict[str, Any], laconic.Result], tmp_path: Path
) -> None:
    _, _, example, result = optimized
    reloaded = laconic.load(result.save(tmp_path / "out"))
    assert str(reloaded.program) == str(result.program)
    for seed, sizes in enumerate(SIZES):
        arguments = inputs_of(example, sizes, seed)
        expected, found = pytree.tree_leaves(result.model(**arguments)), pytree.tree_leaves(reloaded(**arguments))
        assert all(bit_equal(a, b) for a, b in zip(expected, found, strict=True))
