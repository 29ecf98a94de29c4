"""Damaged .onnx files: a reason each time, never a crash, and nothing that is not checked reaches native code."""

import random
import time
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

from laconic.ir.errors import LaconicError, ModelError
from laconic.ir.onnx import read_onnx
from laconic.ir.onnx.load import load
from laconic.ir.onnx.module import Step
from laconic.sources import capture_source

SEED, MUTATIONS = 0, 300


def tiny() -> bytes:
    """A model most of whose bytes are structure."""

    def array(name: str, values: object, dtype: type) -> TensorProto:
        return numpy_helper.from_array(np.asarray(values, dtype=dtype), name)

    weights = [
        array("w.0", np.arange(12).reshape(4, 3) / 7, np.float32),
        array("shape", [0, -1, 3], np.int64),
        array("b", [1, 2, 3], np.float32),
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "w.0"], ["m"], "first"),
        helper.make_node("Add", ["m", "b"], ["a"]),
        helper.make_node("LayerNormalization", ["a", "b"], ["n"], axis=-1, epsilon=1e-5),
        helper.make_node("Reshape", ["n", "shape"], ["r"], allowzero=0),
        helper.make_node("Softmax", ["r"], ["y"], axis=-1),
        helper.make_node("Transpose", ["y"], ["z"], perm=[0, 2, 1]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "rows", 4])]
    outputs = [
        helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", "rows", 3]),
        helper.make_tensor_value_info("z", TensorProto.FLOAT, ["batch", 3, "rows"]),
    ]
    graph = helper.make_graph(nodes, "tiny", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=9)
    return model.SerializeToString()


def mutated(data: bytes, generator: random.Random) -> bytes:
    """One damage: cut short, bytes put in, a bit turned, or a few bytes changed."""
    changed = bytearray(data)
    kind = generator.choice(["cut", "insert", "bit", "bit", "bit", "bytes"])
    place = generator.randrange(len(changed))
    if kind == "cut":
        del changed[place:]
    elif kind == "insert":
        changed[place:place] = generator.randbytes(generator.randrange(1, 5))
    elif kind == "bit":
        changed[place] ^= 1 << generator.randrange(8)
    else:
        for _ in range(generator.randrange(1, 4)):
            changed[generator.randrange(len(changed))] = generator.randrange(256)
    return bytes(changed)


def outcome(path: Path, capture: bool) -> str:
    """What becomes of a file: the error's class, or "read"."""
    try:
        source = read_onnx(path)
        if capture:
            capture_source(source)
        else:
            with torch.no_grad():
                source.module(**source.kwargs)
    except LaconicError as problem:
        return type(problem).__name__ if problem.what else "an error that says nothing"
    return "read"


def test_mutations_give_a_reason_or_a_model(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")
    data, generator, path = tiny(), random.Random(SEED), tmp_path / "m.onnx"
    seen: dict[str, int] = {}
    for number in range(MUTATIONS):
        path.write_bytes(mutated(data, generator))
        found = outcome(path, capture=number % 60 == 0)
        seen[found] = seen.get(found, 0) + 1
    assert sum(seen.values()) == MUTATIONS
    assert seen["read"] > 20
    assert seen["ModelError"] > 100
    assert seen["UnsupportedError"] > 5
    assert set(seen) == {"read", "ModelError", "UnsupportedError"}
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]


@pytest.mark.slow
def test_many_mutations_captured(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("CRITICAL")
    data, generator, path = tiny(), random.Random(SEED + 1), tmp_path / "m.onnx"
    read = 0
    for _ in range(MUTATIONS):
        path.write_bytes(mutated(data, generator))
        read += outcome(path, capture=True) == "read"
    assert read > 20


def parsed() -> onnx.ModelProto:
    return onnx.load_model_from_string(tiny())


def refused(model: onnx.ModelProto | bytes, path: Path, said: str) -> None:
    path.write_bytes(model if isinstance(model, bytes) else model.SerializeToString())
    with pytest.raises(ModelError, match=said):
        read_onnx(path)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "empty"),
        (b"version https://git-lfs.github.com/spec/v1", "no valid ONNX model"),
        (b"\x80\x04\x95pickle", "does not parse"),
        (b"PK\x03\x04zip", "no valid ONNX model"),
        (onnx.ModelProto(ir_version=9).SerializeToString(), "no graph"),
    ],
)
def test_files_that_are_something_else(tmp_path: Path, data: bytes, said: str) -> None:
    refused(data, tmp_path / "m.onnx", said)


def test_a_file_cut_short_at_every_place(tmp_path: Path) -> None:
    data, path = tiny(), tmp_path / "m.onnx"
    for length in range(len(data)):
        path.write_bytes(data[:length])
        with pytest.raises(LaconicError):
            read_onnx(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="missing"):
        read_onnx(tmp_path / "none.onnx")
    with pytest.raises(ModelError, match="not a file"):
        read_onnx(tmp_path)


def test_a_cycle_is_refused(tmp_path: Path) -> None:
    model = parsed()
    model.graph.node[0].input[0] = "z"
    refused(model, tmp_path / "m.onnx", "topologically sorted|nothing before it makes")


def test_a_missing_initializer_is_refused(tmp_path: Path) -> None:
    model = parsed()
    del model.graph.initializer[0]
    refused(model, tmp_path / "m.onnx", r"w\.0")


def test_an_output_that_nothing_makes_is_refused(tmp_path: Path) -> None:
    model = parsed()
    model.graph.output[0].name = "lost"
    refused(model, tmp_path / "m.onnx", "lost")


def test_two_initializers_of_one_name_are_refused(tmp_path: Path) -> None:
    model = parsed()
    model.graph.initializer[1].name = "w.0"
    refused(model, tmp_path / "m.onnx", "two initializers are called 'w.0'")


@pytest.mark.parametrize("dims", [[4, 4], [2**40, 2**40], [-4, -3], [0]])
def test_weights_that_are_not_their_shape_are_refused(tmp_path: Path, dims: list[int]) -> None:
    model = parsed()
    model.graph.initializer[0].dims[:] = dims
    refused(model, tmp_path / "m.onnx", r"'w\.0'")


def test_weights_without_values_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    model = parsed()
    model.graph.initializer[0].CopyFrom(TensorProto(name="w.0", data_type=TensorProto.FLOAT, dims=[2**50]))
    refused(model, tmp_path / "m.onnx", "holds 0 bytes")


@pytest.mark.parametrize("kind", [0, 99, TensorProto.UINT64])
def test_values_in_the_field_of_another_type_are_refused(tmp_path: Path, kind: int) -> None:
    model = parsed()
    weight = TensorProto(name="w.0", data_type=TensorProto.FLOAT, dims=[4, 3], float_data=[1.0] * 12)
    weight.data_type = kind
    model.graph.initializer[0].CopyFrom(weight)
    refused(model, tmp_path / "m.onnx", r"no valid ONNX model")


def test_names_that_are_no_text_are_refused(tmp_path: Path) -> None:
    refused(tiny().replace(b"Softmax", b"Soft\xff\xffx"), tmp_path / "m.onnx", "no UTF-8 text")


def test_an_input_too_large_to_draw_is_refused(tmp_path: Path) -> None:
    model = parsed()
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2**40
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(LaconicError, match="too large to draw"):
        read_onnx(tmp_path / "m.onnx")


def doubling(count: int, recursive: bool = False, times: int = 2) -> onnx.ModelProto:
    """A model of `count` functions that each call the one before it `times` times: 2 ** (count - 1) nodes if twice."""
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("own", 1)]

    def function(k: int) -> onnx.FunctionProto:
        op, domain = (f"f{k - 1}", "own") if k else ("f0" if recursive else "Relu", "own" if recursive else "")
        nodes = [helper.make_node(op, ["x"], ["h" if k and times > 1 else "y"], domain=domain)]
        if k and times > 1:
            nodes.append(helper.make_node(op, ["h"], ["y"], domain=domain))
        return helper.make_function("own", f"f{k}", ["x"], ["y"], nodes, opsets)

    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [2]) for name in "xy"]
    graph = helper.make_graph(
        [helper.make_node(f"f{count - 1}", ["x"], ["y"], domain="own")], "g", *([v] for v in values)
    )
    functions = [function(k) for k in range(count)]
    return helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=9)


@pytest.mark.parametrize("count", [30, 5000])
def test_functions_that_expand_without_end_are_refused(tmp_path: Path, count: int) -> None:
    refused(doubling(count), tmp_path / "m.onnx", "expands to more than 100,000 nodes")


def test_functions_that_call_themselves_are_refused(tmp_path: Path) -> None:
    refused(doubling(2, recursive=True), tmp_path / "m.onnx", "'f0' calls itself")


def test_functions_that_double_a_few_times_are_read(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(doubling(5).SerializeToString())
    source = read_onnx(tmp_path / "m.onnx")
    assert sum(isinstance(module, Step) for module in source.module.modules()) == 16
    x = torch.tensor([-1.0, 2.0])
    assert torch.equal(source.module(x=x)["y"], x.relu())


def test_functions_of_nameless_calls_are_inlined_in_no_time(tmp_path: Path) -> None:
    (tmp_path / "m.onnx").write_bytes(doubling(13).SerializeToString())
    started = time.process_time()
    assert len(load(tmp_path / "m.onnx").model.graph) == 4096
    assert time.process_time() - started < 15  # 0.6 s; 35 s where names are tried one after another


@pytest.mark.parametrize("count", [90, 101])
def test_functions_nested_deeply(tmp_path: Path, count: int) -> None:
    (tmp_path / "m.onnx").write_bytes(doubling(count, times=1).SerializeToString())
    if count > 100:
        with pytest.raises(ModelError, match="101 levels deep"):
            load(tmp_path / "m.onnx")
    else:
        assert [node.op_type for node in load(tmp_path / "m.onnx").model.graph] == ["Relu"]
