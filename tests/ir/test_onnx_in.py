"""Reading .onnx: names, constants, sizes that stay symbolic, what is refused, data beside the model."""

import copy
import os
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch.export import Dim

from laconic.ir.errors import ModelError, UnsupportedError
from laconic.ir.inputs import draw
from laconic.ir.onnx import read_onnx
from laconic.ir.program import Kind, Program
from laconic.ir.run import evaluate
from laconic.sources import capture_source

F32, I64 = TensorProto.FLOAT, TensorProto.INT64


def info(name: str, *shape: Any, dtype: int = F32) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, dtype, shape)


def array(name: str, values: Any, dtype: Any = np.float32) -> TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype=dtype), name)


def build(
    nodes: list[onnx.NodeProto],
    inputs: list[onnx.ValueInfoProto],
    outputs: list[onnx.ValueInfoProto],
    weights: list[TensorProto] | None = None,
    opset: int = 18,
    **extra: Any,
) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", inputs, outputs, weights or [])
    opsets = [helper.make_opsetid("", opset), *extra.pop("opsets", [])]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10, **extra)


def save(model: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(model.SerializeToString())
    return path


def block(width: int = 8, heads: int = 2) -> onnx.ModelProto:
    """An attention block as older exporters write it: sizes by Shape, Gather, Unsqueeze and Concat, a causal mask by
    Range, Expand by way of ConstantOfShape, Equal and Where."""
    generator = np.random.default_rng(0)
    node = helper.make_node
    nodes = [
        node("Gather", ["embed.weight", "ids"], ["x"]),
        node("Shape", ["ids"], ["shape"]),
        node("Gather", ["shape", "zero"], ["batch"]),
        node("Gather", ["shape", "one"], ["length"]),
        node("Unsqueeze", ["batch", "axis"], ["batch1"]),
        node("Unsqueeze", ["length", "axis"], ["length1"]),
        node("Concat", ["batch1", "length1", "heads", "rest"], ["split"], axis=0),
        node("Concat", ["batch1", "length1", "width"], ["joined"], axis=0),
        node("MatMul", ["x", "proj/w:0"], ["p"]),
        node("Reshape", ["p", "split"], ["h"]),
        node("Transpose", ["h"], ["q"], perm=[0, 2, 1, 3]),
        node("Transpose", ["h"], ["k"], perm=[0, 2, 3, 1]),
        node("MatMul", ["q", "k"], ["raw"]),
        node("Div", ["raw", "root"], ["scores"]),
        node("Range", ["zero", "length", "one"], ["place"]),
        node("Unsqueeze", ["place", "one1"], ["row"]),
        node("LessOrEqual", ["place", "row"], ["seen"]),
        node("Concat", ["batch1", "one1", "minus", "length1"], ["asked"], axis=0),
        node("Shape", ["asked"], ["rank"]),
        node("ConstantOfShape", ["rank"], ["ones"], value=array("v", [1], np.int64)),
        node("Mul", ["ones", "minus"], ["negative"]),
        node("Equal", ["asked", "negative"], ["free"]),
        node("Where", ["free", "ones", "asked"], ["target"]),
        node("Expand", ["seen", "target"], ["mask"]),
        node("Where", ["mask", "scores", "far"], ["masked"]),
        node("Softmax", ["masked"], ["weights"], axis=-1),
        node("MatMul", ["weights", "q"], ["mixed"]),
        node("Transpose", ["mixed"], ["back"], perm=[0, 2, 1, 3]),
        node("Reshape", ["back", "joined"], ["y"]),
    ]
    weights = [
        array("embed.weight", generator.normal(size=(20, width))),
        array("proj/w:0", generator.normal(size=(width, width))),
        array("root", np.sqrt(width / heads)),
        array("far", -1e9),
        *(array(name, n, np.int64) for name, n in (("zero", 0), ("one", 1), ("axis", [0]), ("one1", [1]))),
        *(array(name, [n], np.int64) for name, n in (("heads", heads), ("rest", -1), ("minus", -1), ("width", width))),
    ]
    outputs = [info("y", "batch", "sequence", width)]
    return build(nodes, [info("ids", "batch", "sequence", dtype=I64)], outputs, weights)


def runtime(path: Path, program: Program, sizes: dict[str, int]) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """(ours, ONNX Runtime's) of each output, on drawn inputs of these sizes; all inputs keep their names."""
    from laconic.codegen.onnx.runtime import Session

    case = draw(program, program.forward, sizes, seed=3)
    ours = [v for k, v in evaluate(program, program.forward, case.clone()).tensors().items() if k.startswith("result")]
    named = {i.name: tensor for i, tensor in zip(program.forward.inputs, case.clone(), strict=True)}
    return list(zip(ours, Session(path).run(named).values(), strict=True))


def test_a_block_keeps_names_and_axes_and_computes_what_onnx_runtime_does(tmp_path: Path) -> None:
    """And its size arithmetic leaves no tensors behind; the one that is made is what a masked score becomes."""
    pytest.importorskip("onnxruntime")
    path = save(block(), tmp_path / "block.onnx")
    source = read_onnx(path)
    assert source.name == "block"
    assert list(source.kwargs) == ["ids"]
    assert int(source.kwargs["ids"].max()) < 20  # the table has 20 rows
    program = capture_source(source)
    assert [s.name for s in program.symbols.values()] == ["batch", "sequence"]
    assert "specialized" not in program.facts
    assert {n: w.kind for n, w in program.weights.items()} == dict.fromkeys(
        ("embed.weight", "proj/w:0"), Kind.PARAMETER
    )
    assert list(program.forward.results) == ["y"]
    assert any("MatMul" in str(site) or "nodes" in site.module for site in program.sites.values())
    ops = [str(node.target) for node in program.forward.calls()]
    assert not any(name in op for op in ops for name in ("cat", "stack", "eq.", "item"))
    assert sum("full" in op for op in ops) == 1
    assert len(ops) <= 22
    for sizes in ({"batch": 2, "sequence": 5}, {"batch": 4, "sequence": 9}):
        for ours, theirs in runtime(path, program, sizes):
            assert ours.shape == (sizes["batch"], sizes["sequence"], 8)
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_constants_that_are_scalars_or_short_lists_stand_in_the_code(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Mul", ["x", "half"], ["a"]),
        helper.make_node("Add", ["a", "row"], ["b"]),
        helper.make_node("Gather", ["b", "which"], ["y"], axis=1),
    ]
    weights = [array("half", 0.5), array("row", [1, 2, 3]), array("which", [2, -1], np.int64)]
    path = save(build(nodes, [info("x", "n", 3)], [info("y", "n", 2)], weights), tmp_path / "m.onnx")
    source = read_onnx(path)
    assert dict(source.module.named_parameters()).keys() == {"row"}
    assert all(p.requires_grad for p in source.module.parameters())
    x = torch.arange(6.0).reshape(2, 3)
    with torch.no_grad():
        y = source.module(x=x)["y"]
    torch.testing.assert_close(y, (x * 0.5 + torch.tensor([1.0, 2.0, 3.0]))[:, [2, -1]])


def test_nothing_is_computed_of_weights_while_reading(tmp_path: Path) -> None:
    """`1 + weight` stays a node, however small the weight is."""
    nodes = [helper.make_node("Add", ["w", "one"], ["v"]), helper.make_node("Mul", ["x", "v"], ["y"])]
    weights = [array("w", [1, 2, 3]), array("one", 1)]
    source = read_onnx(save(build(nodes, [info("x", "n", 3)], [info("y", "n", 3)], weights), tmp_path / "m.onnx"))
    program = capture_source(source)
    assert list(program.weights) == ["w"]
    assert [str(n.target) for n in program.forward.calls()] == ["aten.add.Tensor", "aten.mul.Tensor"]


def test_statistics_of_a_batch_normalisation_are_buffers(tmp_path: Path) -> None:
    names = ["scale", "bias", "mean", "var"]
    nodes = [helper.make_node("BatchNormalization", ["x", *names], ["y"])]
    weights = [array(name, [1, 2, 3]) for name in names]
    path = save(build(nodes, [info("x", 2, 3, 4)], [info("y", 2, 3, 4)], weights), tmp_path / "m.onnx")
    module = read_onnx(path).module
    assert {n for n, _ in module.named_parameters()} == {"scale", "bias"}
    assert {n for n, _ in module.named_buffers()} == {"mean", "var"}


@pytest.mark.parametrize("name", ["a.b", "onnx::MatMul_1", "w/0:0", "weight", "nodes.x", "a..b", ".", "type", "Ä b"])
def test_weights_keep_their_names(tmp_path: Path, name: str) -> None:
    nodes = [helper.make_node("MatMul", ["x", name], ["y"])]
    path = save(build(nodes, [info("x", 2, 3)], [info("y", 2, 3)], [array(name, np.eye(3) * 2)]), tmp_path / "m.onnx")
    source = read_onnx(path)
    held = {"nodes.x": "nodes_.x", "a..b": "a._.b", ".": "_._", "type": "type_"}.get(name, name)  # what no module holds
    assert [key for key, _ in source.module.named_parameters()] == [held]
    x = torch.randn(2, 3)
    torch.testing.assert_close(source.module(x=x)["y"], 2 * x)
    if name == "w/0:0":
        assert list(capture_source(source).weights) == [held]


def test_weights_one_of_whose_names_begins_with_the_other(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "a"], ["t"]), helper.make_node("MatMul", ["t", "a.b"], ["y"])]
    weights = [array("a", np.eye(3)), array("a.b", np.eye(3) * 3)]
    path = save(build(nodes, [info("x", 2, 3)], [info("y", 2, 3)], weights), tmp_path / "m.onnx")
    source = read_onnx(path)
    assert {n for n, _ in source.module.named_parameters()} == {"a", "a_.b"}
    x = torch.randn(2, 3)
    torch.testing.assert_close(source.module(x=x)["y"], 3 * x)


def test_inputs_that_python_cannot_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    nodes = [helper.make_node("Add", ["x.1", "class"], ["t"]), helper.make_node("Add", ["t", "x_1"], ["out:0"])]
    inputs = [info("x.1", "n"), info("class", "n"), info("x_1", "n")]
    source = read_onnx(save(build(nodes, inputs, [info("out:0", "n")]), tmp_path / "m.onnx"))
    assert list(source.kwargs) == ["x_1", "class_", "x_1_"]
    assert "'x.1' is 'x_1'" in caplog.text
    program = capture_source(source)
    assert list(program.forward.results) == ["out:0"]
    assert [s.name for s in program.symbols.values()] == ["n"]


def test_an_input_called_self(tmp_path: Path) -> None:
    nodes = [helper.make_node("Neg", ["self"], ["y"])]
    source = read_onnx(save(build(nodes, [info("self", 2)], [info("y", 2)]), tmp_path / "m.onnx"))
    assert source.module(self_=torch.ones(2))["y"].tolist() == [-1, -1]


def test_a_copy_of_the_module_is_a_copy(tmp_path: Path) -> None:
    nodes = [helper.make_node("Mul", ["x", "w"], ["y"])]
    path = save(build(nodes, [info("x", 2)], [info("y", 2)], [array("w", [1, 2])]), tmp_path / "m.onnx")
    module = read_onnx(path).module
    other = copy.deepcopy(module)
    with torch.no_grad():
        other.get_parameter("w").zero_()
    assert other(x=torch.ones(2))["y"].tolist() == [0, 0]
    assert module(x=torch.ones(2))["y"].tolist() == [1, 2]


def test_axes_that_are_computed_of_others_or_have_no_name(tmp_path: Path) -> None:
    nodes = [helper.make_node("Concat", ["past", "x"], ["t"], axis=1), helper.make_node("Mul", ["t", "mask"], ["y"])]
    inputs = [info("past", "b", "p"), info("x", "b", "s"), info("mask", "b", "p + s"), info("free", None, 2)]
    nodes.append(helper.make_node("Neg", ["free"], ["z"]))
    outputs = [info("y", "b", None), info("z", None, 2)]
    source = read_onnx(save(build(nodes, inputs, outputs), tmp_path / "m.onnx"))
    sizes = {name: tuple(t.shape) for name, t in source.kwargs.items()}
    assert sizes["mask"] == (sizes["past"][0], sizes["past"][1] + sizes["x"][1])
    assert source.dynamic_shapes["mask"][1] is Dim.AUTO
    program = capture_source(source)
    names = [s.name for s in program.symbols.values()]
    assert {"b", "p", "s"} <= set(names)
    assert "specialized" not in program.facts


def test_an_axis_with_a_bound_keeps_its_name(tmp_path: Path) -> None:
    """A table of 6 positions, cut to the length of the input: torch wants the bound told, and the axis stays."""
    nodes = [
        helper.make_node("Shape", ["x"], ["n"], start=1, end=2),
        helper.make_node("Slice", ["table", "zero", "n", "zero"], ["part"]),
        helper.make_node("Add", ["x", "part"], ["y"]),
    ]
    weights = [array("table", np.arange(40)), array("zero", [0], np.int64)]
    inputs = [info("x", "batch", "sequence")]
    source = read_onnx(save(build(nodes, inputs, [info("y", "batch", "sequence")], weights), tmp_path / "m.onnx"))
    program = capture_source(source)
    assert [(s.name, s.high) for s in program.symbols.values()] == [("batch", None), ("sequence", 40)]
    assert "specialized" not in program.facts


def test_local_functions_are_inlined(tmp_path: Path) -> None:
    body = [helper.make_node("Mul", ["a", "a"], ["s"]), helper.make_node("Add", ["s", "b"], ["c"])]
    function = helper.make_function("mine", "Square", ["a", "b"], ["c"], body, [helper.make_opsetid("", 18)])
    nodes = [
        helper.make_node("Square", ["x", "w"], ["t"], domain="mine"),
        helper.make_node("Square", ["t", "w"], ["y"], domain="mine"),
    ]
    model = build(
        nodes,
        [info("x", 3)],
        [info("y", 3)],
        [array("w", [1, 2, 3])],
        functions=[function],
        opsets=[helper.make_opsetid("mine", 1)],
    )
    x = torch.tensor([1.0, 2.0, 3.0])
    y = read_onnx(save(model, tmp_path / "m.onnx")).module(x=x)["y"]
    torch.testing.assert_close(y, (x * x + x) ** 2 + x)


# ------------------------------------------------------------------------------------------------- refusals


def test_all_unread_operators_are_named_at_once(tmp_path: Path) -> None:
    domains = [helper.make_opsetid("com.microsoft", 1)]
    nodes = [
        helper.make_node("FusedMatMul", ["x", "x"], ["a"], "fused/1", domain="com.microsoft"),
        helper.make_node("FusedMatMul", ["a", "x"], ["b"], "fused/2", domain="com.microsoft"),
        helper.make_node("NonZero", ["b"], ["c"], "where"),
        helper.make_node("Resize", ["b", "", "scales"], ["d"], "picture", antialias=1, mode="linear"),
        helper.make_node("Shape", ["c"], ["y"]),
    ]
    model = build(nodes, [info("x", 3, 3)], [info("y", None, dtype=I64)], [array("scales", [1, 2])], opsets=domains)
    with pytest.raises(UnsupportedError) as refused:
        read_onnx(save(model, tmp_path / "m.onnx"))
    said = str(refused.value)
    assert "m.onnx uses 3 operators that are not read" in said
    assert "com.microsoft.FusedMatMul (opset 1): 2 nodes, first fused/1" in said
    assert "ai.onnx.NonZero (opset 18): 1 node, first where" in said
    assert "ai.onnx.Resize (opset 18) with antialias=1: 1 node, first picture" in said


def test_a_size_that_depends_on_values_names_the_node(tmp_path: Path) -> None:
    nodes = [helper.make_node("Reshape", ["x", "sizes"], ["y"], "cut")]
    model = build(nodes, [info("x", 6), info("sizes", 2, dtype=I64)], [info("y", None, None)])
    source = read_onnx(save(model, tmp_path / "m.onnx"))
    with pytest.raises(UnsupportedError, match="depends on the values of tensors") as refused:
        capture_source(source)
    assert "Reshape 'cut'" in str(refused.value)


def test_operands_that_do_not_fit_name_the_node(tmp_path: Path) -> None:
    nodes = [helper.make_node("MatMul", ["x", "w"], ["y"], "product")]
    model = build(nodes, [info("x", 2, 3)], [info("y", 2, 2)], [array("w", np.ones((2, 2)))])
    with pytest.raises(UnsupportedError, match=r"MatMul 'product'[\s\S]*float32\[2, 3\], float32\[2, 2\]"):
        capture_source(read_onnx(save(model, tmp_path / "m.onnx")))


@pytest.mark.parametrize("opset", [6, 99])
def test_other_opsets_are_refused(tmp_path: Path, opset: int) -> None:
    model = build([helper.make_node("Relu", ["x"], ["y"])], [info("x", 2)], [info("y", 2)], opset=opset)
    with pytest.raises(UnsupportedError, match=f"is written in opset {opset}"):
        read_onnx(save(model, tmp_path / "m.onnx"))


def test_inputs_that_are_no_tensors_are_refused(tmp_path: Path) -> None:
    sequence = helper.make_tensor_sequence_value_info("x", F32, [2])
    model = build([helper.make_node("Identity", ["x"], ["y"])], [sequence], [info("y", 2)])
    with pytest.raises(UnsupportedError, match="the input 'x' is Sequence"):
        read_onnx(save(model, tmp_path / "m.onnx"))


# ------------------------------------------------------------------------------------------------- other files


def external(location: str, offset: int = 0, length: int | None = None) -> onnx.ModelProto:
    weight = TensorProto(name="w", data_type=F32, dims=[4, 4], data_location=TensorProto.EXTERNAL)
    entries = {"location": location, "offset": str(offset), **({} if length is None else {"length": str(length)})}
    for key, value in entries.items():
        weight.external_data.add(key=key, value=value)
    return build([helper.make_node("MatMul", ["x", "w"], ["y"])], [info("x", 2, 4)], [info("y", 2, 4)], [weight])


def test_weights_beside_the_model(tmp_path: Path) -> None:
    values = np.arange(16, dtype=np.float32).reshape(4, 4)
    (tmp_path / "m.data").write_bytes(b"12345678" + values.tobytes())
    source = read_onnx(save(external("m.data", 8, 64), tmp_path / "m.onnx"))
    x = torch.randn(2, 4)
    torch.testing.assert_close(source.module(x=x)["y"], x @ torch.from_numpy(values))


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("/etc/passwd", "outside its folder"),
        ("../secret", "outside its folder"),
        ("sub/../../secret", "outside its folder"),
        ("link", "outside its folder"),
        ("", "outside its folder"),
        ("missing", "missing is missing"),
        ("sub", "is missing"),
    ],
)
def test_data_outside_the_folder_is_refused(tmp_path: Path, location: str, said: str) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    (tmp_path / "secret").write_bytes(bytes(64))
    os.symlink(tmp_path / "secret", folder / "link")
    with pytest.raises(ModelError, match=said):
        read_onnx(save(external(location), folder / "m.onnx"))


@pytest.mark.parametrize(("offset", "length"), [(4, None), (-1, None), (0, 32), (2**62, None)])
def test_data_that_is_too_short_is_refused(tmp_path: Path, offset: int, length: int | None) -> None:
    (tmp_path / "m.data").write_bytes(bytes(64))
    with pytest.raises(ModelError, match=r"w'"):
        read_onnx(save(external("m.data", offset, length), tmp_path / "m.onnx"))


def test_resolving_a_file(tmp_path: Path) -> None:
    from laconic.sources import resolve

    source = resolve(str(save(block(), tmp_path / "block.onnx")))
    assert not isinstance(source, Program)
    assert source.name == "block"
