"""Whole models: exported, read again, captured, optimised, and held against ONNX Runtime at two sizes of every axis."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from architectures import ARCHITECTURES, EIGHT, make

pytest.importorskip("onnxruntime")

import laconic
from laconic.codegen.onnx.runtime import Session
from laconic.ir.inputs import draw
from laconic.ir.onnx import read_onnx
from laconic.ir.onnx.grouped import grouped_matmul
from laconic.ir.program import Program
from laconic.ir.run import evaluate
from laconic.sources import capture_source


def sizes_of(program: Program) -> list[dict[str, int]]:
    """Two choices of sizes that differ on every axis."""
    symbols = list(program.symbols.values())
    return [{s.name: s.hint + step + k for k, s in enumerate(symbols)} for step in (1, 2)]


def held_against_runtime(program: Program, path: Path) -> None:
    session = Session(path)
    for sizes in sizes_of(program):
        case = draw(program, program.forward, sizes, seed=1)
        named = {i.name: tensor for i, tensor in zip(program.forward.inputs, case.clone(), strict=True)}
        outcome = evaluate(program, program.forward, case.clone()).tensors()
        ours = [value for key, value in outcome.items() if key.startswith("result")]
        for value, (name, wanted) in zip(ours, session.run(named).items(), strict=True):
            assert (value.dtype, value.shape) == (wanted.dtype, wanted.shape), name
            scale = float(wanted.abs().max())
            assert float((value - wanted).abs().max()) <= 1e-5 * max(scale, 1e-3), f"{name} at {sizes}"


def round_trip(table: Any, name: str, opset: int, path: Path) -> tuple[Program, Program]:
    """The original, and what was read again of its export."""
    module, inputs, axes = make(name, table)
    original = laconic.capture(module, dynamic_shapes=axes, **inputs)
    laconic.export_onnx(original, path, opset=opset)
    return original, capture_source(read_onnx(path))


def same_boundary(original: Program, program: Program) -> None:
    assert [i.name for i in program.forward.inputs] == [i.name for i in original.forward.inputs]
    assert [o.name.replace("\\", "") for o in program.forward.outputs] == [o.name for o in original.forward.outputs]
    assert [s.name for s in program.symbols.values()] == [s.name for s in original.symbols.values()]
    assert "specialized" not in program.facts


@pytest.mark.slow
@pytest.mark.parametrize("opset", [18, 20, 23])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_architectures(tmp_path: Path, name: str, opset: int) -> None:
    path = tmp_path / "model.onnx"
    original, program = round_trip(ARCHITECTURES, name, opset, path)
    same_boundary(original, program)
    held_against_runtime(program, path)
    optimised = laconic.optimize(program, "exact").program
    assert optimised.node_count() <= program.node_count()
    held_against_runtime(optimised, path)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "opset"), [("qwen3_moe", 18), ("qwen3_moe", 23), ("whisper", 20), ("mamba", 18)])
def test_other_architectures(tmp_path: Path, name: str, opset: int) -> None:
    path = tmp_path / "model.onnx"
    original, program = round_trip(EIGHT, name, opset, path)
    same_boundary(original, program)
    held_against_runtime(program, path)


@pytest.mark.slow
def test_small_convolutional_networks_that_come_with_onnx() -> None:
    """Nine networks of opset 9, whose weights are made by the graph itself."""
    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    paths = sorted(folder.glob("*.onnx"))
    assert len(paths) >= 9
    for path in paths:
        source = read_onnx(path)
        (name, image), *_ = source.kwargs.items()
        image = torch.arange(image.numel(), dtype=torch.float32).reshape(image.shape) / image.numel()
        with torch.no_grad():
            found = source.module(**{name: image})
        original = next(i.name for i in onnx.load(path).graph.input if i.name.replace("/", "_") == name)
        for value, wanted in zip(found.values(), Session(path).run({original: image}).values(), strict=True):
            torch.testing.assert_close(value, wanted, rtol=1e-4, atol=1e-6)


# ------------------------------------------------------------------------------------------------- groups of rows


def experts(rest: bool = True) -> onnx.ModelProto:
    """Rows, sorted by expert, times the expert's weight, unrolled as an exporter does it."""
    generator = np.random.default_rng(0)
    node, parts = helper.make_node, [f"part{k}" for k in range(3)]
    nodes = [node("Split", ["rows", "counts"], [*parts, *(["rest"] if rest else [])], "experts", axis=0)]
    nodes += [node("MatMul", [part, f"w.{k}"], [f"product{k}"]) for k, part in enumerate(parts)]
    nodes += [node("Concat", [f"product{k}" for k in range(3)], ["all" if rest else "y"], axis=0)]
    if rest:
        nodes += [
            node("Shape", ["rest"], ["left"], start=0, end=1),
            node("Concat", ["zeros", "left", "zero"], ["pads"], axis=0),
            node("Pad", ["all", "pads"], ["y"]),
        ]
    weights = [numpy_helper.from_array(generator.normal(size=(5, 7)).astype(np.float32), f"w.{k}") for k in range(3)]
    weights += [numpy_helper.from_array(np.array(v, dtype=np.int64), n) for n, v in (("zeros", [0, 0]), ("zero", [0]))]
    inputs = [
        helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["tokens", 5]),
        helper.make_tensor_value_info("counts", TensorProto.INT64, [3 + rest]),
    ]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["tokens", 7])]
    graph = helper.make_graph(nodes, "experts", inputs, outputs, weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)


@pytest.mark.parametrize(("counts", "rest"), [([2, 0, 3, 4], True), ([0, 0, 0, 9], True), ([4, 5, 0], False)])
def test_unrolled_products_of_groups_of_rows(tmp_path: Path, counts: list[int], rest: bool) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(experts(rest).SerializeToString())
    inputs = {"rows": torch.randn(9, 5), "counts": torch.tensor(counts)}
    with torch.no_grad():
        found = read_onnx(path).module(**inputs)["y"]
    torch.testing.assert_close(found, Session(path).run(inputs)["y"], rtol=1e-5, atol=1e-6)


def test_groups_of_rows_are_captured_with_a_dynamic_number_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(experts().SerializeToString())
    program = capture_source(read_onnx(path))
    assert [s.name for s in program.symbols.values()] == ["tokens"]


def test_a_part_that_is_read_elsewhere_is_no_group(tmp_path: Path) -> None:
    model = experts(rest=False)
    model.graph.node.append(helper.make_node("Neg", ["part1"], ["other"]))
    model.graph.output.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [None, 5]))
    path = tmp_path / "m.onnx"
    path.write_bytes(model.SerializeToString())
    source = read_onnx(path)
    assert not any(getattr(step, "kind", "") == "GroupedMatMul" for step in source.module.modules())


def test_rows_that_no_group_has_become_zeros() -> None:
    rows, weight = torch.ones(4, 2), torch.ones(2, 3)
    found = grouped_matmul(rows, torch.tensor([1, 1, 2]), weight, 2 * weight)
    assert found[:, 0].tolist() == [2, 4, 0, 0]
