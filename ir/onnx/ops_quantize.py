"""Quantisation: to and from few bits, and products of whole numbers, computed exactly in float64."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from laconic.ir.onnx.dtypes import dtype_of
from laconic.ir.onnx.ops_conv import AutoPad, Ints, conv
from laconic.ir.onnx.ops_elementwise import cast
from laconic.ir.onnx.ops_layout import axis_of
from laconic.ir.onnx.shapes import tensor_of
from laconic.ir.onnx.table import Refused, op


def _spread(value: Tensor, x: Tensor, axis: int, block: int) -> Tensor:
    """A scale or zero point as it broadcasts over x: one for all, one for each index of an axis, one for a block."""
    if value.ndim == 0 or (value.ndim == 1 and not block and value.shape[0] == 1):
        return value.reshape(())
    along = axis_of(axis, x.ndim)
    if value.ndim == 1 and not block:
        return value.reshape([-1] + [1] * (x.ndim - along - 1))
    return value.repeat_interleave(block, along).narrow(along, 0, x.shape[along])


@op("QuantizeLinear", since=10)
def quantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
    saturate: Literal[1] = 1,
) -> Tensor:
    dtype = zero_point.dtype if zero_point is not None else dtype_of(output_dtype) if output_dtype else torch.uint8
    if dtype is None:
        raise Refused(f"it quantises to the ONNX element type {output_dtype}")
    scaled = x / _spread(scale, x, axis, block_size).to(x.dtype)
    if dtype.is_floating_point:
        return tensor_of(cast(scaled, dtype))
    found = torch.round(scaled).to(torch.float32)
    if zero_point is not None:
        found = found + _spread(zero_point.to(torch.float32), x, axis, block_size)
    limits = torch.iinfo(dtype)
    return torch.clamp(found, limits.min, limits.max).to(torch.int32).to(dtype)


@op("DequantizeLinear", since=10)
def dequantize(
    x: Tensor,
    scale: Tensor,
    zero_point: Tensor | None = None,
    *,
    axis: int = 1,
    block_size: int = 0,
    output_dtype: int = 0,
) -> Tensor:
    found = x.to(torch.float32)
    if zero_point is not None:
        found = found - _spread(zero_point.to(torch.float32), x, axis, block_size)
    found = found * _spread(scale, x, axis, block_size)
    return found.to((dtype_of(output_dtype) if output_dtype else None) or scale.dtype)


@op("DynamicQuantizeLinear")
def dynamic_quantize(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    low, high = torch.clamp(torch.amin(x), max=0), torch.clamp(torch.amax(x), min=0)
    scale = (high - low) / 255
    zero = torch.clamp(torch.round(-low / scale), 0, 255)
    return torch.clamp(torch.round(x / scale) + zero, 0, 255).to(torch.uint8), scale, zero.to(torch.uint8)


@op("MatMulInteger")
def matmul_integer(a: Tensor, b: Tensor, a_zero: Tensor | None = None, b_zero: Tensor | None = None) -> Tensor:
    first, second = a.to(torch.float64), b.to(torch.float64)
    if a_zero is not None:
        first = first - (a_zero.to(torch.float64).unsqueeze(-1) if a_zero.ndim == 1 else a_zero.to(torch.float64))
    if b_zero is not None:
        second = second - b_zero.to(torch.float64)
    return torch.matmul(first, second).to(torch.int32)


@op("ConvInteger")
def conv_integer(
    x: Tensor,
    weight: Tensor,
    x_zero: Tensor | None = None,
    weight_zero: Tensor | None = None,
    *,
    auto_pad: AutoPad = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    first, second = x.to(torch.float64), weight.to(torch.float64)
    if x_zero is not None:
        first = first - x_zero.to(torch.float64)
    if weight_zero is not None:
        zero = weight_zero.to(torch.float64)
        second = second - (zero.reshape([-1] + [1] * (weight.ndim - 1)) if zero.ndim == 1 else zero)
    found = conv(first, second, auto_pad=auto_pad, dilations=dilations, group=group, pads=pads, strides=strides)
    return found.to(torch.int32)


@op("QLinearMatMul", since=10)
def quantized_matmul(
    a: Tensor,
    a_scale: Tensor,
    a_zero: Tensor,
    b: Tensor,
    b_scale: Tensor,
    b_zero: Tensor,
    y_scale: Tensor,
    y_zero: Tensor,
) -> Tensor:
    if any(value.ndim > 0 and value.shape != (1,) for value in (a_scale, b_scale, y_scale)):
        raise Refused("it has a scale for each row or column")
    product = matmul_integer(a, b, a_zero.reshape(()), b_zero.reshape(())).to(torch.float64)
    scale = a_scale.to(torch.float64) * b_scale.to(torch.float64) / y_scale.to(torch.float64)
    limits = torch.iinfo(y_zero.dtype)
    found = torch.round(product * scale) + y_zero.to(torch.float64)
    return torch.clamp(found, limits.min, limits.max).to(torch.int32).to(y_zero.dtype)
