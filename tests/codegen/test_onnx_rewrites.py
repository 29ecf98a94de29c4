"""Rewrites of ONNX graphs on small graphs with dynamic sizes: each fires where it should, and not where it must not.

The oracle is ONNX Runtime without optimisations, on the graph before and after, at several sizes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

pytest.importorskip("onnxruntime")

import onnxruntime as ort

from laconic.codegen.onnx.edit import Editor, Rewrite, broadcast, sizes
from laconic.codegen.onnx.rewrites.arithmetic import divide, tanh_gelu
from laconic.codegen.onnx.rewrites.broadcasts import drop_broadcasts
from laconic.codegen.onnx.rewrites.constants import fold_layout
from laconic.codegen.onnx.rewrites.indexing import gather_rows, index_by_range
from laconic.codegen.onnx.rewrites.matmuls import fold_scales, merge_matmuls, unflatten_gemm
from laconic.codegen.onnx.rewrites.parts import hoist, regroup, slices_to_split
from laconic.codegen.onnx.rewrites.reshapes import (
    constant_shapes,
    expand_target,
    merge_reshapes,
    merge_transposes,
    reshape_target,
)
from laconic.codegen.onnx.shrink import shrink

POSITIVE = frozenset({"B", "S"})
AT = ({"B": 2, "S": 3}, {"B": 1, "S": 5})
Arrays = dict[str, np.ndarray[Any, Any]]


def weights(**shapes: tuple[int, ...]) -> Arrays:
    generator = np.random.default_rng(0)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}


def model_of(inputs: str, outputs: str, body: str, constants: Arrays | None = None, opset: int = 20) -> ir.Model:
    """A model from the text of its nodes, with sizes inferred."""
    text = f'<ir_version: 9, opset_import: ["": {opset}]> test ({inputs}) => ({outputs}) {{ {body} }}'
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(a, n) for n, a in (constants or {}).items())
    return ir.from_proto(onnx.shape_inference.infer_shapes(proto, check_type=True, strict_mode=True, data_prop=True))


def named(model: ir.Model, known: dict[str, list[int | str]]) -> ir.Model:
    """The model with sizes that torch's exporter knows and inference does not."""
    for node in model.graph:
        if node.outputs[0].name in known:
            node.outputs[0].shape = ir.Shape(known[str(node.outputs[0].name)])
    return model


def editor_of(model: ir.Model, parameters: Iterable[str] = ()) -> Editor:
    return Editor(model.graph, model.opset_imports[""], POSITIVE, set(parameters))


def ops(model: ir.Model) -> list[str]:
    return [node.op_type for node in model.graph]


def results(model: ir.Model, given: Arrays) -> list[np.ndarray[Any, Any]]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    proto = ir.to_proto(model)
    onnx.checker.check_model(proto, full_check=True)
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found: list[np.ndarray[Any, Any]] = session.run(None, given)
    return found


def drawn(model: ir.Model, named: dict[str, int], seed: int) -> Arrays:
    generator = np.random.default_rng(seed)
    arrays = {}
    for value in model.graph.inputs:
        shape = [size if isinstance(size, int) else named[str(size)] for size in sizes(value) or ()]
        kind = value.dtype
        assert kind is not None
        if kind == ir.DataType.FLOAT:
            arrays[str(value.name)] = generator.standard_normal(shape).astype(np.float32)
        else:
            arrays[str(value.name)] = generator.integers(0, 2, shape).astype(kind.numpy())
    return arrays


def fires(model: ir.Model, *rewrites: Rewrite, parameters: Iterable[str] = (), exact: bool = True) -> list[str]:
    """Apply rewrites, each of which must fire and then rest; the ops that are left."""
    before = ir.from_proto(ir.to_proto(model))
    editor = editor_of(model, parameters)
    for rewrite in rewrites:
        assert rewrite(editor) > 0, rewrite.__name__
        for _ in range(10):
            if not rewrite(editor):
                break
        else:
            pytest.fail(f"{rewrite.__name__} does not come to rest")
    assert len(list(model.graph)) <= len(list(before.graph))
    for seed, named in enumerate(AT):
        given = drawn(model, named, seed)
        for old, new in zip(results(before, given), results(model, given), strict=True):
            assert old.shape == new.shape
            np.testing.assert_allclose(new, old, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)
    return ops(model)


def stays(model: ir.Model, rewrite: Rewrite, parameters: Iterable[str] = ()) -> None:
    before = str(model.graph)
    assert rewrite(editor_of(model, parameters)) == 0
    assert str(model.graph) == before


def ints(*numbers: int) -> np.ndarray[Any, Any]:
    return np.array(numbers, np.int64)


# Sizes


def test_targets_say_every_size_without_naming_a_number() -> None:
    assert reshape_target(("B", "S", 12), ("B", "S", 3, 4), POSITIVE) == [0, 0, 3, 4]
    assert reshape_target(("B", "S", 3, 4), ("B*S", 12), POSITIVE) == [-1, 12]
    assert reshape_target(("B", 2, 2, "S"), ("B", 4, "S"), POSITIVE) == [0, 4, -1]
    assert reshape_target(("B*S", 4), ("B", "S", 4), POSITIVE) is None
    assert reshape_target(("B", None), ("B", 3), POSITIVE) is None
    assert reshape_target(("B", 2, 2, "S"), ("B", 4, "S"), frozenset({"S"})) is None  # 0 beside -1 where B may be 0
    assert expand_target(("B", 2, 1, "S"), ("B", 2, 3, "S")) == [1, 1, 3, 1]
    assert expand_target((1, "S"), ("B", "S")) is None
    assert broadcast(("B", 1), ("S",)) == ("B", "S")
    assert broadcast(("B",), ("S",)) is None
    assert broadcast((None,), (3,)) is None


SHAPE = "n = Shape(x) b = Gather(n, zero) l = Gather(n, one) s = Concat<axis = 0>(b, l, rest)"
SHAPED = {"zero": ints(0), "one": ints(1), "rest": ints(2, 4)}


def test_a_computed_shape_becomes_a_constant() -> None:
    model = model_of("float[B,S,8] x", "float[B,S,2,4] y", f"{SHAPE} y = Reshape(x, s)", SHAPED)
    assert fires(model, constant_shapes) == ["Reshape"]
    target = next(iter(model.graph)).inputs[1]
    assert target is not None
    assert target.const_value is not None
    assert target.const_value.numpy().tolist() == [0, 0, 2, 4]


def test_a_shape_that_needs_a_number_stays_computed() -> None:
    stays(
        model_of(
            "float[N,8] x, float[B,S] r",
            "float[B,S,8] y",
            "n = Shape(r) s = Concat<axis=0>(n, k) y = Reshape(x, s)",
            {"k": ints(8)},
        ),
        constant_shapes,
    )


def test_reshapes_and_transposes_are_merged() -> None:
    body = "a = Reshape(x, p) b = Reshape(a, q) y = Unsqueeze(b, r)"
    constants = {"p": ints(0, 0, 2, 4), "q": ints(0, 0, 8), "r": ints(1)}
    model = model_of("float[B,S,8] x", "float[B,1,S,8] y", body, constants)
    assert fires(model, merge_reshapes) == ["Unsqueeze"]
    model = model_of(
        "float[B,S,8] x", "float[S,B,8] y", "a = Transpose<perm=[2,0,1]>(x) y = Transpose<perm=[2,1,0]>(a)"
    )
    assert fires(model, merge_transposes) == ["Transpose"]


def test_a_transpose_that_others_read_is_not_merged() -> None:
    body = "a = Transpose<perm=[1,0]>(x) y = Transpose<perm=[1,0]>(a) z = Neg(a)"
    stays(model_of("float[B,S] x", "float[B,S] y, float[S,B] z", body), merge_transposes)


# Broadcasts


def test_an_expand_goes_where_the_other_operand_has_the_sizes() -> None:
    body = "s = Shape(x) e = Expand(m, s) w = Where(e, zero, low) y = Add(x, w)"
    constants = {"zero": np.float32(-0.0), "low": np.float32(-9.0)}
    model = model_of("float[B,2,S] x, bool[B,1,S] m", "float[B,2,S] y", body, constants)
    assert fires(model, drop_broadcasts) == ["Where", "Add"]


@pytest.mark.parametrize("last", ["y = Neg(e)", "y = CumSum(e, one)", "y = MatMul(e, x)"])
def test_an_expand_stays_that_something_needs(last: str) -> None:
    outputs = "float[B,2,2] y" if "MatMul" in last else "float[B,2,S] y"
    inputs = "float[B,S,2] x, float[B,1,S] m, float[B,2,S] r" if "MatMul" in last else "float[B,2,S] r, float[B,1,S] m"
    stays(model_of(inputs, outputs, f"s = Shape(r) e = Expand(m, s) {last}", {"one": ints(1)}), drop_broadcasts)


def test_reductions_of_what_is_repeated() -> None:
    body = "s = Shape(x) e = Expand(m, s) r = {op}<keepdims=1>(e, last) y = Mul(x, r)"
    inputs, outputs, last = "float[B,2,S] x, float[B,2,1] m", "float[B,2,S] y", {"last": ints(-1)}
    assert fires(model_of(inputs, outputs, body.format(op="ReduceMax"), last), drop_broadcasts) == ["ReduceMax", "Mul"]
    stays(model_of(inputs, outputs, body.format(op="ReduceSum"), last), drop_broadcasts)


def test_operands_that_change_nothing_go() -> None:
    body = "a = Mul(x, one) b = And(m, true) c = Where(b, a, x) d = Add(c, none) y = Where(true, d, x)"
    constants = {"one": np.ones((1, 3), np.float32), "true": np.ones((1, 3), bool), "none": np.float32(-0.0)}
    model = model_of("float[B,3] x, bool[B,3] m", "float[B,3] y", body, constants)
    assert fires(model, drop_broadcasts) == ["Where"]


def test_zero_is_not_added_for_nothing_but_minus_zero_is() -> None:
    """-0.0 + 0.0 is 0.0, whose reciprocal is another."""
    model = model_of("float[B] x", "float[B] y", "a = Add(x, zero) y = Reciprocal(a)", {"zero": np.float32(0.0)})
    stays(model, drop_broadcasts)


def test_what_a_parameter_holds_decides_nothing() -> None:
    model = model_of("float[B,3] x", "float[B,3] y", "y = Mul(x, w)", {"w": np.ones(3, np.float32)})
    stays(model, drop_broadcasts, parameters=["w"])


def test_positions_are_never_negative() -> None:
    body = """n = Shape<start=2, end=3>(m) s = Squeeze(n) r = Range(zero, s, one) u = Unsqueeze(r, axes)
              g = GreaterOrEqual(u, bound) a = And(g, m) y = Where(a, x, none)"""
    inputs, outputs = "float[B,S,S] x, bool[B,1,S] m", "float[B,S,S] y"
    constants = {"zero": np.int64(0), "one": np.int64(1), "axes": ints(1), "none": np.float32(0)}
    known = {"r": ["S"], "u": ["S", 1], "g": ["S", 1], "a": ["B", "S", "S"]}
    never = named(model_of(inputs, outputs, body, constants | {"bound": np.int64(0)}), known)
    assert fires(never, drop_broadcasts) == ["Where"]
    once = named(model_of(inputs, outputs, body, constants | {"bound": np.int64(1)}), known)
    stays(once, drop_broadcasts)


# Indices


def ranged(second: str) -> ir.Model:
    body = f"""s = Shape(x) b = Gather(s, i0) l = Gather(s, i1) p = Range(zero, b, one) q = Range({second}, l, one)
              u = Unsqueeze(p, ua) v = Unsqueeze(q, va) bb = Unsqueeze(b, z0) ll = Unsqueeze(l, z0)
              t = Concat<axis=0>(bb, k1, ll) eu = Expand(u, t) ev = Expand(v, t)
              fu = Unsqueeze(eu, m1) fv = Unsqueeze(ev, m1) j = Concat<axis=-1>(fu, fv) y = GatherND(x, j)"""
    constants = {"i0": np.int64(0), "i1": np.int64(1), "zero": np.int64(0), "one": np.int64(1), "two": np.int64(-1)}
    constants |= {"ua": ints(1, 2), "va": ints(0, 1), "z0": ints(0), "k1": ints(1), "m1": ints(-1)}
    model = model_of("float[B,S] x", "float[B,1,S] y", body, constants)
    return named(model, {"p": ["B"], "q": ["S"], "u": ["B", 1, 1], "v": [1, 1, "S"]})


def test_indexing_by_whole_ranges_is_none() -> None:
    assert fires(ranged("zero"), index_by_range) == ["Unsqueeze"]


def test_indexing_by_another_range_stays() -> None:
    stays(ranged("two"), index_by_range)


def test_one_index_for_each_row_is_a_gather() -> None:
    body = "u = Unsqueeze(i, last) y = GatherND(x, u)"
    model = model_of("float[2,4] x, int64[S] i", "float[S,4] y", body, {"last": ints(-1)})
    assert fires(model, gather_rows) == ["Gather"]


# Arithmetic


def test_a_reciprocal_that_is_multiplied_divides() -> None:
    model = model_of("float[B] x, float[B] y", "float[B] z", "r = Reciprocal(y) z = Mul(r, x)")
    assert fires(model, divide, exact=False) == ["Div"]
    stays(model_of("float[B] x, float[B] y", "float[B] z, float[B] r", "r = Reciprocal(y) z = Mul(r, x)"), divide)


GELU = """h = Mul(x, half) p = Pow(x, three) q = Mul(p, c) s = Add(x, q) t = Mul(s, root) a = Tanh(t) b = Add(a, one)
          y = Mul(h, b)"""
GELUS = {"half": 0.5, "three": 3.0, "c": 0.044715, "root": 0.7978845608, "one": 1.0}


def test_gelu_by_its_tanh_form() -> None:
    constants = {name: np.float32(number) for name, number in GELUS.items()}
    assert fires(model_of("float[B,3] x", "float[B,3] y", GELU, constants), tanh_gelu, exact=False) == ["Gelu"]
    stays(model_of("float[B,3] x", "float[B,3] y", GELU, constants, opset=18), tanh_gelu)
    stays(model_of("float[B,3] x", "float[B,3] y, float[B,3] a", GELU, constants), tanh_gelu)
    stays(model_of("float[B,3] x", "float[B,3] y", GELU, constants | {"c": np.float32(0.0447)}), tanh_gelu)


# Weights


def test_layouts_of_weights_are_stored() -> None:
    body = "t = Transpose<perm=[0,2,1]>(w) a, b = Split<axis=0, num_outputs=2>(t) c = Squeeze(a, zero) y = MatMul(x, c)"
    model = model_of("float[B,4] x", "float[B,3] y", body, weights(w=(2, 3, 4)) | {"zero": ints(0)})
    assert fires(model, fold_layout, exact=False) == ["MatMul"]


def test_a_weight_that_others_read_is_not_stored_twice() -> None:
    body = "t = Transpose<perm=[1,0]>(w) y = MatMul(x, t) z = Gather(w, i)"
    stays(model_of("float[B,8] x, int64[S] i", "float[B,6] y, float[S,8] z", body, weights(w=(6, 8))), fold_layout)


QKV = "q = MatMul(x, wq) k = MatMul(x, wk) v = MatMul(x, wv)"


def test_products_of_one_operand_are_one() -> None:
    model = model_of(
        "float[B,S,4] x",
        "float[B,S,6] q, float[B,S,2] k, float[B,S,2] v",
        QKV,
        weights(wq=(4, 6), wk=(4, 2), wv=(4, 2)),
    )
    assert fires(model, merge_matmuls, exact=False) == ["MatMul", "Split"]


def test_a_missing_bias_is_zero() -> None:
    body = "a = MatMul(x, wq) q = Add(a, bq) k = MatMul(x, wk) c = MatMul(x, wv) v = Add(bv, c)"
    model = model_of(
        "float[B,S,4] x",
        "float[B,S,6] q, float[B,S,2] k, float[B,S,2] v",
        body,
        weights(wq=(4, 6), wk=(4, 2), wv=(4, 2), bq=(6,), bv=(2,)),
    )
    assert fires(model, merge_matmuls, exact=False) == ["MatMul", "Add", "Split"]


@pytest.mark.parametrize(
    ("body", "outputs"),
    [
        ("q = MatMul(x, wq) k = MatMul(x, wk)", "float[B,S,6] q, float[B,S,2] k"),  # nothing saved
        (QKV.replace("x, wk", "z, wk"), "float[B,S,6] q, float[B,S,2] k, float[B,S,2] v"),
        (f"{QKV} e = Gather(wq, i)", "float[B,S,6] q, float[B,S,2] k, float[B,S,2] v, float[B,6] e"),
    ],
    ids=["two", "another operand", "a shared weight"],
)
def test_products_that_stay(body: str, outputs: str) -> None:
    inputs = "float[B,S,4] x, float[B,S,4] z, int64[B] i"
    model = model_of(inputs, outputs, body, weights(wq=(4, 6), wk=(4, 2), wv=(4, 2)))
    stays(model, merge_matmuls)


SCALED = "a = MatMul(x, w) b = Add(a, c) r = Reshape(b, s) t = Transpose<perm=[0,2,1,3]>(r) y = Mul(t, k)"


def test_a_scale_goes_into_the_weight() -> None:
    constants = weights(w=(4, 6), c=(6,)) | {"s": ints(0, 0, 2, 3), "k": np.float32(0.3)}
    model = model_of("float[B,S,4] x", "float[B,2,S,3] y", SCALED, constants)
    assert fires(model, fold_scales, exact=False) == ["MatMul", "Add", "Reshape", "Transpose"]


def test_a_scale_goes_into_the_columns_of_a_part() -> None:
    body = "a = Gemm<transB={t}>(x, w, c) q, v = Split<axis=1>(a, s) y = Mul(k, v)"
    for turned in (0, 1):
        constants = weights(w=(6, 4) if turned else (4, 6), c=(6,)) | {"s": ints(4, 2), "k": np.float32(0.3)}
        model = model_of("float[B,4] x", "float[B,4] q, float[B,2] y", body.replace("{t}", str(turned)), constants)
        assert fires(model, fold_scales, exact=False) == ["Gemm", "Split"]


def test_scales_that_stay() -> None:
    constants = weights(w=(4, 6), c=(6,)) | {"s": ints(0, 0, 2, 3), "k": np.float32(0.3)}
    two = model_of("float[B,S,4] x", "float[B,2,S,3] y, float[B,S,6] b", SCALED, constants)
    stays(two, fold_scales)
    shared = model_of(
        "float[B,S,4] x, int64[B] i", "float[B,2,S,3] y, float[B,6] e", f"{SCALED} e = Gather(w, i)", constants
    )
    stays(shared, fold_scales)
    stays(model_of("float[B,S,4] x", "float[B,2,S,3] y", SCALED, constants), fold_scales, parameters=["k"])


def test_a_short_format_is_scaled_by_powers_of_two_alone() -> None:
    body = "a = MatMul(x, w) y = Mul(a, k)"
    for scale, fired in ((0.3, 0), (0.25, 1)):
        constants = {"w": np.ones((4, 2), np.float16), "k": np.float16(scale)}
        model = model_of("float16[B,4] x", "float16[B,2] y", body, constants)
        assert fold_scales(editor_of(model)) == fired


def test_a_gemm_between_reshapes_is_a_matmul() -> None:
    body = (
        "f = Reshape(x, flat) g = Gemm(f, w, c) n = Shape<start=0, end=2>(x) s = Concat<axis=0>(n, k) y = Reshape(g, s)"
    )
    constants = weights(w=(4, 6), c=(6,)) | {"flat": ints(-1, 4), "k": ints(6)}
    model = model_of("float[B,S,4] x", "float[B,S,6] y", body, constants)
    assert fires(model, unflatten_gemm, exact=False) == ["MatMul", "Add"]
    scaled = model_of("float[B,S,4] x", "float[B,S,6] y", body.replace("Gemm", "Gemm<alpha=0.5>"), constants)
    stays(scaled, unflatten_gemm)
    full = model_of("float[2,3,4] x", "float[2,3,6] y", body, constants | weights(c=(6, 6)))
    stays(full, unflatten_gemm)


# Parts


def test_what_is_done_to_all_parts_is_done_once() -> None:
    body = """q, k = Split<axis=2, num_outputs=2>(x) a = Reshape(q, s) b = Reshape(k, s)
              c = Transpose<perm=[0,2,1,3]>(a) d = Transpose<perm=[0,2,1,3]>(b)
              e = Mul(c, table) f = Mul(d, table) y = Sub(e, f)"""
    constants = {"s": ints(0, 0, 2, 3)} | weights(table=(1, 1, 1, 3))
    model = model_of("float[B,S,12] x", "float[B,2,S,3] y", body, constants)
    assert fires(model, hoist) == ["Reshape", "Transpose", "Mul", "Split", "Sub"]


def test_an_operand_that_varies_along_the_parts_stays() -> None:
    body = "q, k = Split<axis=1, num_outputs=2>(x) a = Mul(q, t) b = Mul(k, t) y = Sub(a, b)"
    stays(model_of("float[B,6] x", "float[B,3] y", body, weights(t=(3,))), hoist)
    model = model_of("float[B,6] x", "float[B,3] y", body, weights(t=(1,)))
    assert fires(model, hoist) == ["Mul", "Split", "Sub"]


def test_parts_that_are_treated_differently_stay() -> None:
    body = "q, k = Split<axis=1, num_outputs=2>(x) a = Neg(q) b = Abs(k) y = Sub(a, b)"
    stays(model_of("float[B,6] x", "float[B,3] y", body), hoist)


def test_rotary_embeddings_of_queries_and_keys_are_one() -> None:
    body = """q, k, v = Split<axis=1>(x, n)
              a = Mul(q, cos) q1, q2 = Split<axis=2, num_outputs=2>(q) q3 = Neg(q2) q4 = Concat<axis=2>(q3, q1)
              b = Mul(q4, sin) c = Add(a, b)
              d = Mul(k, cos) k1, k2 = Split<axis=2, num_outputs=2>(k) k3 = Neg(k2) k4 = Concat<axis=2>(k3, k1)
              e = Mul(k4, sin) f = Add(d, e)"""
    inputs = "float[B,8,4] x, float[B,1,4] cos, float[B,1,4] sin"
    outputs = "float[B,4,4] c, float[B,2,4] f, float[B,2,4] v"
    model = model_of(inputs, outputs, body, {"n": ints(4, 2, 2)})
    left = fires(model, regroup, hoist)
    assert sorted(left) == sorted(["Split", "Split", "Mul", "Split", "Neg", "Concat", "Mul", "Add"])


def test_slices_that_are_parts_are_a_split() -> None:
    body = "a = Slice(x, z, h, ax) b = Slice(x, h, end, ax) y = Sub(b, a)"
    constants = {"z": ints(0), "h": ints(3), "end": ints(2**62), "ax": ints(1)}
    model = model_of("float[B,6] x", "float[B,3] y", body, constants)
    assert fires(model, slices_to_split) == ["Split", "Sub"]
    stays(model_of("float[B,7] x", "float[B,3] y", body, constants | {"end": ints(6)}), slices_to_split)


# All of them


def test_shrinking_leaves_no_number_for_a_name_and_nothing_unused() -> None:
    body = f"{SHAPE} r = Reshape(x, s) y = Transpose<perm=[0,2,1,3]>(r)"
    model = model_of("float[B,S,8] x", "float[B,2,S,4] y", body, SHAPED)
    before = ir.from_proto(ir.to_proto(model))
    shrink(model, POSITIVE)
    assert ops(model) == ["Reshape", "Transpose"]
    assert len(model.graph.initializers) == 1
    for seed, named in enumerate(({"B": 3, "S": 1}, {"B": 1, "S": 9})):
        given = drawn(model, named, seed)
        np.testing.assert_array_equal(results(before, given)[0], results(model, given)[0])


def test_models_of_old_opsets_get_the_common_rules_alone() -> None:
    body = "a = Slice(x, z, h, ax) b = Slice(x, h, end, ax) y = Sub(b, a)"
    constants = {"z": ints(0), "h": ints(3), "end": ints(2**62), "ax": ints(1)}
    model = model_of("float[B,6] x", "float[B,3] y", body, constants, opset=16)
    shrink(model, POSITIVE)
    assert ops(model) == ["Slice", "Slice", "Sub"]
