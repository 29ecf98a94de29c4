"""Products with constant matrices: of one operand, done at once; scaled, scaled beforehand."""

from __future__ import annotations

from dataclasses import dataclass
from math import frexp

import numpy as np
import onnx_ir as ir

from laconic.codegen.onnx.edit import (
    Editor,
    array_of,
    attribute,
    axis_of,
    known,
    made_by,
    only_reader,
    owned,
    sizes,
    sole,
)


@dataclass(frozen=True)
class _Linear:
    """x @ weight, or x @ weight + bias; `result` is what comes out."""

    product: ir.Node
    x: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    result: ir.Value


def merge_matmuls(editor: Editor) -> int:
    """MatMul(x, q) + a, MatMul(x, k) + b, MatMul(x, v) + c  ->  Split(MatMul(x, [q k v]) + [a b c]).

    Where the products follow one another (no other product stands between), the matrices have no other reader, and
    fewer nodes come out: of three, of two with biases, or of two to whose results the same is done next. Safe: each
    column of a product depends on one column of the matrix. A bias that is missing is zero.
    """
    fired = 0
    run: list[_Linear] = []
    for node in [*editor.nodes("MatMul", "Gemm", "Conv"), None]:
        linear = None if node is None else _linear(node)
        if linear is None or (run and (linear.x is not run[0].x or linear.weight.dtype != run[0].weight.dtype)):
            fired += _merge(editor, run)
            run = []
        if linear is not None:
            run.append(linear)
    return fired


def _linear(node: ir.Node) -> _Linear | None:
    x, weight = node.inputs[:2]
    shape, product = sizes(x), node.outputs[0]
    if node.op_type != "MatMul" or x is None or shape is None or len(shape) < 2 or not owned(weight, 2):
        return None
    after = only_reader(product)
    if after is not None and after.op_type == "Add":
        bias = after.inputs[1 - list(after.inputs).index(product)]
        if owned(bias, 1) and array_of(bias).shape == array_of(weight).shape[1:]:
            return _Linear(node, x, weight, bias, after.outputs[0])
    return _Linear(node, x, weight, None, product)


def _merge(editor: Editor, run: list[_Linear]) -> int:
    """Put one product in place of several, if that is worth it; how often that was."""
    if len(run) < 2:
        return 0
    biased = [linear.bias for linear in run if linear.bias is not None]
    following = {reader.op_type if (reader := only_reader(linear.result)) else None for linear in run}
    alike = len(following) == 1 and None not in following
    if (len(run) - 1) * (2 if alike else 1) + max(0, len(biased) - 1) - 1 <= 0:  # nodes saved, less the Split
        return 0
    first, dtype = run[0].product, run[0].result.dtype
    arrays = [array_of(linear.weight) for linear in run]
    lengths = [array.shape[1] for array in arrays]
    described = [((*(sizes(run[0].x) or ())[:-1], sum(lengths)), dtype)]
    name = "+".join(str(linear.weight.name) for linear in run)
    weight = editor.constant(np.concatenate(arrays, axis=1), name, parameter=True)
    (whole,) = editor.insert(first, "MatMul", [run[0].x, weight], outputs=described)
    if biased:
        missing = [np.zeros(array.shape[1], array.dtype) for array in arrays]
        parts = [zero if r.bias is None else array_of(r.bias) for r, zero in zip(run, missing, strict=True)]
        bias = editor.constant(np.concatenate(parts), "+".join(str(b.name) for b in biased), parameter=True)
        (whole,) = editor.insert(first, "Add", [whole, bias], outputs=described)
    results = [linear.result for linear in run]
    split = [(sizes(result), dtype) for result in results]
    axis = len(described[0][0]) - 1
    made = editor.insert(first, "Split", [whole, editor.integers(lengths)], {"axis": axis}, split)
    for result, part in zip(results, made, strict=True):
        editor.replace(result, part)
    return 1


def unflatten_gemm(editor: Editor) -> int:
    """Reshape(Gemm(Reshape(x [B, S, K], [B*S, K]), w, b), [B, S, N])  ->  MatMul(x, w) + b.

    Where nothing else reads what is between, w is [K, N] and not scaled, and b is a vector. Safe: it is the product
    along the last axis, however the others are arranged; the last bits of a sum may change.
    """
    fired = 0
    for node in editor.nodes("Gemm"):
        flat, after = made_by(node.inputs[0], "Reshape"), only_reader(node.outputs[0])
        if flat is None or after is None or after.op_type != "Reshape" or not sole(flat.outputs[0]):
            continue
        given, plain = sizes(flat.inputs[0]), sizes(flat.outputs[0])
        product, wanted = sizes(node.outputs[0]), sizes(after.outputs[0])
        if given is None or plain is None or product is None or wanted is None or not known(given):
            continue
        outside = given[:-1] == wanted[:-1] and (given[-1], wanted[-1]) == (plain[-1], product[-1])
        scaled = any(attribute(node, name, 1.0) != 1.0 for name in ("alpha", "beta"))
        turned = any(attribute(node, name, 0) for name in ("transA", "transB"))
        bias = node.inputs[2] if len(node.inputs) > 2 else None
        if not outside or scaled or turned or (bias is not None and len(sizes(bias) or (None, None)) != 1):
            continue
        described = [(wanted, after.outputs[0].dtype)]
        (new,) = editor.insert(node, "MatMul", [flat.inputs[0], node.inputs[1]], outputs=described)
        if bias is not None:
            (new,) = editor.insert(node, "Add", [new, bias], outputs=described)
        editor.replace(after.outputs[0], new)
        fired += 1
    return fired


def fold_scales(editor: Editor) -> int:
    """Mul(Transpose(Reshape(MatMul(x, w) + b)), c)  ->  Transpose(Reshape(MatMul(x, w * c) + b * c)).

    Where c is one number, only this chain reads what stands in it, and w has no other reader. A Split of columns in the
    chain is followed: then only those are scaled. Safe: a product is linear; its last bits may change. In float32 and
    above, or by a power of two, since in short formats the rounding of weights shows.
    """
    fired = 0
    for node in editor.nodes("Mul"):
        for place in (0, 1):
            scale, scaled = editor.content(node.inputs[place]), node.inputs[1 - place]
            if scale is None or scale.size != 1 or scaled is None or sizes(scaled) != sizes(node.outputs[0]):
                continue
            number = float(scale.reshape(-1)[0])
            short = scale.dtype.itemsize < 4 and abs(frexp(number)[0]) != 0.5
            behind = None if short else _behind(scaled)
            if behind is not None:
                _scale(editor, behind, number)
                editor.replace(node.outputs[0], scaled)
                fired += 1
                break
    return fired


@dataclass(frozen=True)
class _Behind:
    """The operands on which a value depends linearly: node and place, and which of their columns it depends on."""

    matrix: tuple[ir.Node, int]
    bias: tuple[ir.Node, int] | None
    columns: slice


def _behind(value: ir.Value | None) -> _Behind | None:
    """The product that a value is, but for its layout, if nobody else reads what is between and its weights."""
    columns = slice(None)
    while value is not None and sole(value):
        node = made_by(value, "Transpose", "Reshape", "Unsqueeze", "Squeeze", "Split", "Add", "MatMul", "Gemm")
        if node is None:
            return None
        if node.op_type in ("Add", "MatMul", "Gemm"):
            return _linear_behind(node, columns)
        if node.op_type == "Split":
            if columns != slice(None) or (part := _columns(node, value.index() or 0)) is None:
                return None
            columns = part
        elif columns != slice(None) and not _keeps_columns(node):
            return None
        value = node.inputs[0]
    return None


def _linear_behind(node: ir.Node, columns: slice) -> _Behind | None:
    """The operands of a product, or of one that a vector is added to."""
    bias: tuple[ir.Node, int] | None = None
    if node.op_type == "Add":
        place = 0 if owned(node.inputs[0], 1) else 1
        product = made_by(node.inputs[1 - place], "MatMul")
        if product is None or not sole(product.outputs[0]):
            return None
        node, bias = product, (node, place)
    elif node.op_type == "Gemm" and len(node.inputs) > 2 and node.inputs[2] is not None:
        bias = (node, 2)
    width = (sizes(node.outputs[0]) or (None,))[-1]
    vector = bias[0].inputs[bias[1]] if bias is not None else None
    if not owned(node.inputs[1], 2) or (bias is not None and (not owned(vector, 1) or sizes(vector) != (width,))):
        return None
    return _Behind((node, 1), bias, columns)


def _columns(split: ir.Node, number: int) -> slice | None:
    """The columns that a part of a Split along the last axis holds."""
    shape = sizes(split.inputs[0])
    lengths = [part[-1] if (part := sizes(value)) else None for value in split.outputs]
    if shape is None or axis_of(split, len(shape)) != len(shape) - 1:
        return None
    numbers = [n for n in lengths if isinstance(n, int)]
    start = sum(numbers[:number])
    return slice(start, start + numbers[number]) if len(numbers) == len(lengths) else None


def _keeps_columns(node: ir.Node) -> bool:
    """Whether a node leaves the last axis as it is."""
    before, after = sizes(node.inputs[0]), sizes(node.outputs[0])
    return node.op_type == "Reshape" and before is not None and after is not None and before[-1:] == after[-1:] != ()


def _scale(editor: Editor, behind: _Behind, number: float) -> None:
    for node, place in (behind.matrix, behind.bias) if behind.bias else (behind.matrix,):
        old = node.inputs[place]
        assert old is not None
        new = array_of(old).copy()
        rows_first = node.op_type == "Gemm" and place == 1 and attribute(node, "transB", 0)
        new[(behind.columns,) if rows_first else (..., behind.columns)] *= number
        node.replace_input_with(place, editor.constant(new, str(old.name), parameter=True))
