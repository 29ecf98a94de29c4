"""Ops that make one of many positions: products, convolutions, attention, reductions, pooling."""

from __future__ import annotations

import torch
from torch import fx

from laconic.ir.axes.held.table import Asked, Held, rule
from laconic.ir.traits import traits


def zero_where(asked: Asked, *found: Held | None) -> Held | None:
    """Zero where any of these is: products have a zero there."""
    zeros = [h.at(0).expand(asked.size) for h in found if h]
    return Held.where(torch.stack(zeros).any(0), 0, asked.kind.dtype) if zeros else None


@rule("aten.linear")
def linear(asked: Asked) -> Held | None:
    x, weight, bias = asked.given("input"), asked.given("weight"), asked.given("bias")
    if asked.axis == asked.rank - 1 and len(asked.shape(weight)) == 2:
        rows = asked.known.weight(weight)
        inputs = asked.of(x, len(asked.shape(x)) - 1)
        if rows is not None and inputs and len(inputs.known) == rows.shape[1]:
            return _shifted(asked, _constant_rows(asked, rows, inputs), bias)
        return _shifted(asked, zero_where(asked, asked.of(weight, 0)), bias)
    found = asked.of(x, asked.axis)
    return _shifted(asked, zero_where(asked, found, asked.of(weight, None)), bias)


def _constant_rows(asked: Asked, rows: torch.Tensor, inputs: Held) -> Held:
    """Rows that have zeros wherever their input is not known: (outputs, inputs) by what the inputs hold."""
    known = (rows[:, ~inputs.known] == 0).all(1)
    value = rows[:, inputs.known].double() @ inputs.value[inputs.known].double()
    return Held(known & torch.isfinite(value), value.to(asked.kind.dtype))


def _shifted(asked: Asked, found: Held | None, bias: object) -> Held | None:
    """The same with a bias added, which stands along the last axis."""
    if not isinstance(bias, fx.Node) or not found:
        return found
    shift = asked.aligned(bias)
    return Held(found.known & shift.known, found.value + shift.value) if shift else None


@rule("aten.matmul", "aten.mm", "aten.bmm", "aten.mv", "aten.dot")
def matmul(asked: Asked) -> Held | None:
    a, b = asked.node.args[:2]
    return _product(asked, a, b)  # type: ignore[arg-type]


@rule("aten.addmm", "aten.baddbmm")
def addmm(asked: Asked) -> Held | None:
    bias, a, b = asked.node.args[:3]
    return _shifted(asked, _product(asked, a, b), bias) if asked.given("beta") == 1 else None  # type: ignore[arg-type]


def _product(asked: Asked, a: fx.Node, b: fx.Node) -> Held | None:
    """Rows are those of `a`, columns those of `b`; in front of them both stand."""
    whole = (asked.of(a, None), asked.of(b, None))
    wide, high = len(asked.shape(b)) > 1, len(asked.shape(a)) > 1
    if asked.axis is None or not (wide and high):
        return zero_where(asked, *whole)
    last = len(asked.shape(b)) - 1
    if asked.axis == asked.rank - 1:
        matrix, inputs = asked.known.weight(b), asked.of(a, len(asked.shape(a)) - 1)
        if matrix is not None and matrix.dim() == 2 and inputs and len(inputs.known) == len(matrix):
            return _constant_rows(asked, matrix.t(), inputs)
        return zero_where(asked, asked.of(b, last), whole[0])
    if asked.axis == asked.rank - 2:
        return zero_where(asked, asked.of(a, len(asked.shape(a)) - 2), whole[1])
    return zero_where(asked, asked.aligned(a), asked.aligned(b))


@rule("aten.einsum")
def einsum(asked: Asked) -> Held | None:
    inputs, arrow, output = str(asked.given("equation")).replace(" ", "").partition("->")
    if not arrow or "." in inputs:
        return None
    pairs = list(zip(inputs.split(","), asked.given("tensors"), strict=True))
    if asked.axis is None:
        return zero_where(asked, *(asked.of(v, None) for _, v in pairs))
    letter = output[asked.axis]
    return zero_where(asked, *(asked.of(v, term.index(letter)) for term, v in pairs if letter in term))


@rule("aten._grouped_mm", "transformers.grouped_mm_fallback")
def grouped_mm(asked: Asked) -> Held | None:
    rows, matrices = asked.node.all_input_nodes[:2]
    if len(asked.shape(rows)) != 2 or len(asked.shape(matrices)) != 3 or asked.axis == 0:
        return None
    axis = None if asked.axis is None else 2
    return zero_where(asked, asked.of(matrices, axis), asked.of(rows, None))


@rule("aten.scaled_dot_product_attention", "aten._scaled_dot_product_flash_attention_for_cpu")
def attention(asked: Asked) -> Held | None:
    """What all values hold, their weighted means hold; with a mask a row may have no weights at all, so zeros only."""
    value, query = asked.given("value"), asked.given("query")
    if asked.output or asked.axis == asked.rank - 2 or not traits(asked.node).pure:
        return None
    found = asked.of(value, asked.axis)
    if found and asked.axis is not None:
        times = int(asked.shape(query)[asked.axis]) // len(found.known) if asked.axis == asked.rank - 3 else 1
        found = Held(found.known.repeat_interleave(times), found.value.repeat_interleave(times))
    if not found:
        return None
    return found if asked.given("attn_mask") is None else Held.where(found.at(0), 0, asked.kind.dtype)


@rule("aten.conv1d", "aten.conv2d", "aten.conv3d", "aten.convolution")
def convolution(asked: Asked) -> Held | None:
    """A channel of which the kernels are zero, or read zeros alone, holds its bias."""
    x, weight, bias = asked.given("input"), asked.given("weight"), asked.given("bias")
    channel = asked.rank - len(asked.shape(weight)) + 1
    turned = asked.op == "convolution" and asked.given("transposed")
    if asked.axis != channel or turned:
        return None
    kernels, inputs = asked.known.weight(weight), asked.of(x, channel)
    if kernels is not None and inputs and len(inputs.known) == kernels.shape[1] == asked.shape(x)[channel]:
        rest = kernels.flatten(2)[:, ~inputs.at(0)]
        found: Held | None = Held.where((rest == 0).flatten(1).all(1), 0, asked.kind.dtype)
    elif inputs and kernels is not None and kernels.shape[1] == 1 and len(kernels) == len(inputs.known):
        found = zero_where(asked, asked.of(weight, 0), inputs)
    else:
        found = zero_where(asked, asked.of(weight, 0))
    if not found or not isinstance(bias, fx.Node):
        return found
    shift = asked.of(bias, 0)
    return Held(found.known & shift.known, found.value + shift.value) if shift else None


@rule("aten.sum", "aten.mean", "aten.amax", "aten.amin", "aten.nansum")
def reduced(asked: Asked) -> Held | None:
    """A mean or an extreme of equals is what they are; a sum of zeros is zero."""
    value = asked.operand
    rank = len(asked.shape(value))
    said = asked.given("dim") if any(a.name == "dim" for a in asked.node.target._schema.arguments) else None  # type: ignore[union-attr]
    axes = {int(k) % max(rank, 1) for k in ([said] if isinstance(said, int) else said or range(rank))}
    axis = asked.axis
    if axis is not None and asked.rank < rank:
        axis = [k for k in range(rank) if k not in axes][axis]
    found = asked.of(value, None if axis in axes else axis)
    if not found or "sum" not in asked.op:
        return found and Held(found.known, found.value.to(asked.kind.dtype))
    return Held.where(found.at(0), 0, asked.kind.dtype)


@rule(*(f"aten.{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "_adaptive_avg") for n in (1, 2, 3)))
@rule(*(f"aten.max_pool{n}d_with_indices" for n in (1, 2, 3)), "aten.adaptive_max_pool2d")
def pooled(asked: Asked) -> Held | None:
    """A mean or an extreme of equals, zeros alone where zeros are padded."""
    value = asked.operand
    space = int(next(c for c in asked.op if c.isdigit()))
    if asked.output or (asked.axis is not None and asked.axis >= asked.rank - space):
        return None
    found = asked.of(value, asked.axis)
    return found if found is None or not asked.op.startswith("avg") else Held.where(found.at(0), 0, asked.kind.dtype)
