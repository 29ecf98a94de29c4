"""Translations of our own for ops that torch's exporter lacks, or writes at length or wrongly.

Each function is called as the ATen op is, with ONNX values for tensors, while torch's exporter records what it makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch

from laconic.ir.torch_private import record_onnx_node

Translation = Callable[..., Any]

#: The operator set that has Attention.
ATTENTION = 23


def translations(opset: int) -> dict[Any, Translation]:
    """The table for `torch.onnx.export(custom_translation_table=...)`, for models of this standard opset."""
    from onnxscript.values import Opset

    op = Opset("", max(opset, 18))
    table: dict[Any, Translation] = {
        torch.ops.aten.scaled_dot_product_attention.default: partial(attention, op),
        torch.ops.aten._grouped_mm.default: partial(grouped_mm, op),
    }
    if hasattr(torch.ops.transformers, "grouped_mm_fallback"):  # registered by transformers, once imported
        table[torch.ops.transformers.grouped_mm_fallback.default] = partial(grouped_mm, op)
    return table


def attention(
    op: Any,
    query: ir.Value,
    key: ir.Value,
    value: ir.Value,
    attn_mask: ir.Value | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> ir.Value:
    """softmax(q @ k^T * scale + mask) @ v, for q [..., L, E], k [..., S, E] and v [..., S, D].

    As `Attention` where the opset has it and the operands are 4-D; its mask is expanded to [..., L, S], since ONNX
    Runtime takes none that it would have to broadcast over queries. Otherwise in single ops: one scale, on q, which is
    smaller than the scores and can often be folded into a weight; k transposed once. Masked scores are lowered by half
    the greatest finite number, which leaves nothing of them after the softmax and cannot overflow, and rows in which
    all is masked, where torch returns zeros, are multiplied by zero. What depends on the mask alone is merged over the
    layers later.

    Raises ValueError for dropout.
    """
    if dropout_p:
        raise ValueError(f"attention with dropout {dropout_p} draws random numbers")
    if op.version >= ATTENTION and _takes_attention(query, key, value, enable_gqa):
        given = {} if scale is None else {"scale": scale}
        mask = None if attn_mask is None else _expanded_mask(op, _floored(op, attn_mask), query, key)
        found: ir.Value = op.Attention(query, key, value, mask, is_causal=int(is_causal), **given)[0]
        return found
    rank = _rank(key)
    if enable_gqa:
        key, value = _repeat_heads(op, key, query), _repeat_heads(op, value, query)
    turned = op.Transpose(key, perm=[*range(rank - 2), rank - 1, rank - 2])
    scores = op.MatMul(op.Mul(query, _scale(op, query, scale)), turned)
    bias, alive = _mask(op, attn_mask, query.dtype)
    if is_causal:
        bias = _causal_bias(op, query, key)
    weights = op.Softmax(scores if bias is None else op.Add(scores, bias), axis=-1)
    result: ir.Value = op.MatMul(weights, value)
    return result if alive is None else op.Mul(result, alive)


def _rank(value: ir.Value) -> int:
    if value.shape is None:
        raise ValueError(f"{value.name} has no known rank")
    return len(value.shape)


def _takes_attention(query: ir.Value, key: ir.Value, value: ir.Value, grouped: bool) -> bool:
    """Whether `Attention` has a meaning for these operands: 4-D, of one batch, with heads that agree."""
    shapes = [query.shape, key.shape, value.shape]
    if any(shape is None or len(shape) != 4 for shape in shapes):
        return False
    q, k, v = (list(shape) for shape in shapes if shape is not None)
    heads = q[1] == k[1] or (grouped and isinstance(q[1], int) and isinstance(k[1], int) and q[1] % k[1] == 0)
    return q[0] == k[0] == v[0] and heads and k[1:3] == v[1:3]


def _floored(op: Any, mask: ir.Value) -> ir.Value:
    """A mask that is added, its finite numbers kept away from the least one, which ONNX Runtime takes for -inf: rows
    full of it would come out as zeros, where they are means."""
    if mask.dtype == ir.DataType.BOOL:
        return mask
    assert mask.dtype is not None
    above = op.Max(mask, _scalar(op, _lowered(mask.dtype), mask.dtype))
    floored: ir.Value = op.Where(op.IsInf(mask, detect_positive=0), mask, above)
    floored.shape = mask.shape
    return floored


def _expanded_mask(op: Any, mask: ir.Value, query: ir.Value, key: ir.Value) -> ir.Value:
    """The mask as [..., L, S]; itself if it is that."""
    assert query.shape is not None
    assert key.shape is not None
    if _rank(mask) >= 2 and list(mask.shape or ())[-2:] == [query.shape[-2], key.shape[-2]]:
        return mask
    sizes = [op.Constant(value_ints=[1] * max(0, _rank(mask) - 2))] if _rank(mask) > 2 else []
    sizes += [op.Shape(query, start=-2, end=-1), op.Shape(key, start=-2, end=-1)]
    expanded: ir.Value = op.Expand(mask, op.Concat(*sizes, axis=0))
    return expanded


def _scalar(op: Any, number: float, dtype: ir.DataType) -> ir.Value:
    made: ir.Value = op.Constant(value=ir.tensor(np.array(number, dtype.numpy())))
    return made


def _scale(op: Any, query: ir.Value, scale: float | None) -> ir.Value:
    """1 / sqrt(E) unless given, as a scalar of q's dtype."""
    assert query.shape is not None
    width, dtype = query.shape[-1], query.dtype
    assert dtype is not None
    if scale is not None or isinstance(width, int):
        return _scalar(op, 1 / math.sqrt(width) if scale is None else scale, dtype)  # type: ignore[arg-type]
    root = op.Sqrt(op.Cast(op.Squeeze(op.Shape(query, start=-1)), to=dtype))
    made: ir.Value = op.Reciprocal(root)
    return made


def _mask(op: Any, mask: ir.Value | None, dtype: ir.DataType | None) -> tuple[ir.Value | None, ir.Value | None]:
    """What is added to the scores for a mask, and 1 for rows in which something is left, 0 for others."""
    if mask is None:
        return None, None
    assert dtype is not None
    least = _scalar(op, _lowered(dtype), dtype)
    last = op.Constant(value_ints=[-1])
    if mask.dtype == ir.DataType.BOOL:
        nothing = _scalar(op, -0.0, dtype)
        return op.Where(mask, nothing, least), op.ReduceMax(op.Cast(mask, to=dtype), last, keepdims=1)
    added = op.Cast(mask, to=dtype) if mask.dtype != dtype else mask
    all_masked = _scalar(op, -math.inf, dtype)
    return op.Max(added, least), op.Cast(op.Greater(op.ReduceMax(added, last, keepdims=1), all_masked), to=dtype)


def _lowered(dtype: ir.DataType) -> float:
    """What is added to a masked score."""
    return float(torch.finfo(ir.tensor_adapters.to_torch_dtype(dtype)).min) / 2


def _causal_bias(op: Any, query: ir.Value, key: ir.Value) -> ir.Value:
    """[L, S]: 0 where the key is not behind the query, else far below; the first key is always seen."""
    dtype = query.dtype
    assert dtype is not None
    least = _scalar(op, _lowered(dtype), dtype)
    sizes = op.Concat(op.Shape(query, start=-2, end=-1), op.Shape(key, start=-2, end=-1), axis=0)
    made: ir.Value = op.Trilu(op.Expand(least, sizes), op.Constant(value_int=1), upper=1)
    return made


def _repeat_heads(op: Any, value: ir.Value, query: ir.Value) -> ir.Value:
    """k or v [..., h, S, E] with each head said as often as q has heads for it."""
    assert query.shape is not None
    assert value.shape is not None
    heads, kept, rank = query.shape[-3], value.shape[-3], _rank(value)
    if not isinstance(heads, int) or not isinstance(kept, int) or rank != 4:
        raise ValueError("grouped heads whose numbers are not known")
    times = op.Constant(value_ints=[1, 1, heads // kept, 1, 1])
    expanded = op.Expand(op.Unsqueeze(value, op.Constant(value_ints=[2])), times)
    width = value.shape[-1]
    shape = [0, heads, -1, width] if isinstance(width, int) else None
    if shape is None:
        raise ValueError("a head whose width is not known")
    made: ir.Value = op.Reshape(expanded, op.Constant(value_ints=shape))
    return made


def grouped_mm(
    op: Any,
    rows: ir.Value,
    weight: ir.Value,
    offs: ir.Value | None = None,
    bias: ir.Value | None = None,
    out_dtype: int | None = None,
) -> ir.Value:
    """rows [S, K], sorted by expert, times weight [E, K, N], expert e having the rows up to offs[e]: [S, N].

    Split by counts that are computed, E MatMuls, Concat. An expert without rows multiplies an empty matrix, which costs
    nothing. Rows behind the last offset, which no expert has, become zeros.

    Why unrolled: each expert's weight is a matrix of its own, which runtimes pack once and which is not touched when
    the expert has no rows; a Loop would slice, so copy, all of them in every call; gathering a weight for each row
    takes S/E times the memory of all experts; masks compute all experts on all rows.

    Raises ValueError for the forms of `_grouped_mm` other than 2-D by 3-D.
    """
    if _rank(rows) != 2 or _rank(weight) != 3 or offs is None or bias is not None:
        raise ValueError("grouped_mm is written for rows in two dimensions, weights in three, offsets and no bias")
    assert weight.shape is not None
    experts = weight.shape[0]
    if not isinstance(experts, int):
        raise ValueError("a number of experts that is not known")
    ends = op.Cast(offs, to=ir.DataType.INT64)
    counts = op.Sub(
        op.Concat(ends, op.Shape(rows, start=0, end=1), axis=0), op.Concat(op.Constant(value_ints=[0]), ends, axis=0)
    )
    *parts, rest = _split(rows, counts, experts + 1)
    matrices = op.Split(weight, axis=0, num_outputs=experts) if experts > 1 else [weight]
    first = op.Constant(value_ints=[0])
    products = [op.MatMul(part, op.Squeeze(matrix, first)) for part, matrix in zip(parts, matrices, strict=True)]
    ends_of_pads = op.Concat(op.Constant(value_ints=[0, 0]), op.Shape(rest, start=0, end=1), first, axis=0)
    result: ir.Value = op.Pad(op.Concat(*products, axis=0), ends_of_pads)
    return result if out_dtype is None else op.Cast(result, to=out_dtype)


def _split(value: ir.Value, sizes: ir.Value, parts: int) -> list[ir.Value]:
    """Split along the first axis into parts whose sizes are computed; onnxscript has no call for that."""
    node = ir.node("Split", [value, sizes], {"axis": 0}, num_outputs=parts)
    for output in node.outputs:
        output.type = value.type
    record_onnx_node(node)
    return list(node.outputs)
