"""Convolutions and pooling, with ONNX's padding: before and after each axis apart, or worked out from the sizes."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.ir.onnx.shapes import greatest
from laconic.ir.onnx.table import Refused, op

AutoPad = Literal["NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]
Ints = tuple[int, ...]
_CONV: dict[int, Callable[..., Tensor]] = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
_CONV_TRANSPOSE: dict[int, Callable[..., Tensor]] = {
    1: F.conv_transpose1d,
    2: F.conv_transpose2d,
    3: F.conv_transpose3d,
}
_MAX: dict[int, Callable[..., Any]] = {1: F.max_pool1d, 2: F.max_pool2d, 3: F.max_pool3d}
_AVERAGE: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}


def _of(table: dict[int, Callable[..., Any]], rank: int) -> Callable[..., Any]:
    if rank not in table:
        raise Refused(f"it has {rank} spatial axes, and 1 to 3 are read")
    return table[rank]


def _padding(
    x: Tensor, kernel: Sequence[Any], strides: Ints, dilations: Ints, pads: Ints | None, auto_pad: str
) -> list[tuple[Any, Any]]:
    """(before, after) of each spatial axis."""
    count = len(kernel)
    if auto_pad == "VALID":
        return [(0, 0)] * count
    if auto_pad == "NOTSET":
        flat = pads or (0,) * 2 * count
        return list(zip(flat[:count], flat[count:], strict=True))
    found = []
    for n, k, s, d in zip(x.shape[2:], kernel, strides, dilations, strict=True):
        total = greatest((-(-n // s) - 1) * s + (k - 1) * d + 1 - n, 0)
        less, more = total // 2, total - total // 2
        found.append((less, more) if auto_pad == "SAME_UPPER" else (more, less))
    return found


def _padded(x: Tensor, padding: list[tuple[Any, Any]], value: Any = 0) -> tuple[Tensor, list[Any]]:
    """The input and the padding that torch can do by itself, the same before and after; else padded here."""
    if all(before == after for before, after in padding):
        return x, [before for before, _ in padding]
    return _pad(x, padding, value), [0] * len(padding)


def _pad(x: Tensor, padding: list[tuple[Any, Any]], value: Any) -> Tensor:
    return F.pad(x, [n for pair in reversed(padding) for n in pair], value=value)


def _ones(given: Ints | None, rank: int) -> Ints:
    return given or (1,) * rank


@op("Conv")
def conv(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: AutoPad = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    rank = x.ndim - 2
    steps, gaps = _ones(strides, rank), _ones(dilations, rank)
    x, padding = _padded(x, _padding(x, weight.shape[2:], steps, gaps, pads, auto_pad))
    return _of(_CONV, rank)(x, weight, bias, steps, padding, gaps, group)  # type: ignore[no-any-return]


@op("ConvTranspose")
def conv_transpose(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    auto_pad: AutoPad = "NOTSET",
    dilations: Ints | None = None,
    group: int = 1,
    kernel_shape: Ints | None = None,
    output_padding: Ints | None = None,
    output_shape: Ints | None = None,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    """The full result, then cut: what ONNX calls padding here takes away."""
    rank = x.ndim - 2
    steps, gaps, more = _ones(strides, rank), _ones(dilations, rank), output_padding or (0,) * rank
    full = [
        (n - 1) * s + (k - 1) * d + 1 for n, k, s, d in zip(x.shape[2:], weight.shape[2:], steps, gaps, strict=True)
    ]
    if output_shape is not None or auto_pad.startswith("SAME"):
        wanted = output_shape or [n * s for n, s in zip(x.shape[2:], steps, strict=True)]
        totals = [f + extra - w for f, extra, w in zip(full, more, wanted, strict=True)]
        cut = [(t // 2, t - t // 2) if auto_pad == "SAME_UPPER" else (t - t // 2, t // 2) for t in totals]
    else:
        flat = pads or (0,) * 2 * rank
        cut = list(zip(flat[:rank], flat[rank:], strict=True)) if auto_pad == "NOTSET" else [(0, 0)] * rank
    function = _of(_CONV_TRANSPOSE, rank)
    simple = all(before == after and before >= 0 for before, after in cut)
    if simple and all(extra < max(s, d) for extra, s, d in zip(more, steps, gaps, strict=True)):
        return function(x, weight, bias, steps, [c for c, _ in cut], more, group, gaps)  # type: ignore[no-any-return]
    found: Tensor = function(x, weight, None, steps, 0, 0, group, gaps)
    found = _pad(found, [(-before, extra - after) for (before, after), extra in zip(cut, more, strict=True)], 0)
    return found if bias is None else found + bias.reshape([-1] + [1] * rank)


# ------------------------------------------------------------------------------------------------- pooling


def _ceiling(x: Tensor, kernel: Ints, strides: Ints, dilations: Ints, padding: list[tuple[Any, Any]]) -> list[Any]:
    """How far the last window of a rounded-up pooling reaches over the padded end, for each axis. A window that would
    start in the padding behind is left out."""
    found = []
    for n, k, s, d, (before, after) in zip(x.shape[2:], kernel, strides, dilations, padding, strict=True):
        reach = (k - 1) * d + 1
        windows = -(-(n + before + after - reach) // s) + 1
        if (windows - 1) * s >= n + before:
            windows -= 1
        found.append(greatest((windows - 1) * s + reach - (n + before + after), 0))
    return found


@op("MaxPool")
def max_pool(
    x: Tensor,
    *,
    auto_pad: AutoPad = "NOTSET",
    ceil_mode: Literal[0, 1] = 0,
    dilations: Ints | None = None,
    kernel_shape: Ints,
    pads: Ints | None = None,
    storage_order: Literal[0] = 0,
    strides: Ints | None = None,
    outputs: int,
) -> Any:
    rank = len(kernel_shape)
    steps, gaps = _ones(strides, rank), _ones(dilations, rank)
    padding = _padding(x, kernel_shape, steps, gaps, pads, auto_pad)
    least = -math.inf if x.is_floating_point() else torch.iinfo(x.dtype).min
    same = all(before == after and 2 * before <= k for (before, after), k in zip(padding, kernel_shape, strict=True))
    function = _of(_MAX, rank)
    if same:
        ends = [before for before, _ in padding]
        given = x if x.is_floating_point() else x.to(torch.float64)
        found = function(given, kernel_shape, steps, ends, gaps, bool(ceil_mode), outputs == 2)
    elif outputs == 2:
        raise Refused("it returns the places of the greatest values, with uneven padding")
    else:
        more = _ceiling(x, kernel_shape, steps, gaps, padding) if ceil_mode else [0] * rank
        padding = [(before, after + extra) for (before, after), extra in zip(padding, more, strict=True)]
        given = x if x.is_floating_point() else x.to(torch.float64)
        found = function(_pad(given, padding, float(least)), kernel_shape, steps, 0, gaps)
    if outputs == 1:
        return found.to(x.dtype)
    values, places = found
    planes = torch.arange(x.shape[0] * x.shape[1], device=x.device).reshape([x.shape[0], x.shape[1]] + [1] * rank)
    return values.to(x.dtype), places + planes * math.prod(x.shape[2:])


@op("AveragePool")
def average_pool(
    x: Tensor,
    *,
    auto_pad: AutoPad = "NOTSET",
    ceil_mode: Literal[0, 1] = 0,
    count_include_pad: Literal[0, 1] = 0,
    dilations: Ints | None = None,
    kernel_shape: Ints,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    rank = len(kernel_shape)
    steps, gaps = _ones(strides, rank), _ones(dilations, rank)
    padding = _padding(x, kernel_shape, steps, gaps, pads, auto_pad)
    same = all(before == after and 2 * before <= k for (before, after), k in zip(padding, kernel_shape, strict=True))
    if same and not ceil_mode and set(gaps) == {1}:
        ends = [before for before, _ in padding]
        return _of(_AVERAGE, rank)(x, kernel_shape, steps, ends, False, bool(count_include_pad))  # type: ignore[no-any-return]
    counted = torch.ones_like(x[:1, :1])
    if count_include_pad:
        counted = _pad(counted, padding, 1)
    more = _ceiling(x, kernel_shape, steps, gaps, padding) if ceil_mode else [0] * rank
    whole = [(before, after + extra) for (before, after), extra in zip(padding, more, strict=True)]
    rest = [(0, extra) for extra in more] if count_include_pad else whole
    total = _window_sum(_pad(x, whole, 0), kernel_shape, steps, gaps)
    return total / _window_sum(_pad(counted, rest, 0), kernel_shape, steps, gaps)


def _window_sum(x: Tensor, kernel: Ints, strides: Ints, dilations: Ints) -> Tensor:
    """The sum over each window, as shifted slices added up."""
    total: Any = None
    for offset in itertools.product(*(range(k) for k in kernel)):
        index: list[Any] = [slice(None), slice(None)]
        for o, n, k, s, d in zip(offset, x.shape[2:], kernel, strides, dilations, strict=True):
            windows = (n - (k - 1) * d - 1) // s + 1
            index.append(slice(o * d, o * d + (windows - 1) * s + 1, s))
        part = x[tuple(index)]
        total = part if total is None else total + part
    assert isinstance(total, Tensor)
    return total


@op("LpPool")
def lp_pool(
    x: Tensor,
    *,
    auto_pad: AutoPad = "NOTSET",
    ceil_mode: Literal[0, 1] = 0,
    dilations: Ints | None = None,
    kernel_shape: Ints,
    p: int = 2,
    pads: Ints | None = None,
    strides: Ints | None = None,
) -> Tensor:
    rank = len(kernel_shape)
    steps, gaps = _ones(strides, rank), _ones(dilations, rank)
    padding = _padding(x, kernel_shape, steps, gaps, pads, auto_pad)
    more = _ceiling(x, kernel_shape, steps, gaps, padding) if ceil_mode else [0] * rank
    whole = [(before, after + extra) for (before, after), extra in zip(padding, more, strict=True)]
    return _window_sum(_pad(torch.abs(x) ** p, whole, 0), kernel_shape, steps, gaps) ** (1 / p)


@op("GlobalAveragePool")
def global_average_pool(x: Tensor) -> Tensor:
    return torch.mean(x, list(range(2, x.ndim)), True)


@op("GlobalMaxPool")
def global_max_pool(x: Tensor) -> Tensor:
    return torch.amax(x, list(range(2, x.ndim)), True)


@op("GlobalLpPool")
def global_lp_pool(x: Tensor, *, p: int = 2) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, p, list(range(2, x.ndim)), True)
    return norm
