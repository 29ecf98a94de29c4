"""Reductions, positions of extremes, running sums, sorting and softmax."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor

from laconic.ir.onnx.ops_layout import axes_of, axis_of
from laconic.ir.onnx.shapes import WHOLE, Numbers, Value, tensor_of
from laconic.ir.onnx.table import add, op

Flag = Literal[0, 1]
Reducer = Callable[[Tensor, list[int], bool], Tensor]


def _sum(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    return torch.sum(x, axes, keep, dtype=x.dtype)


def _mean(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    if x.is_floating_point():
        return torch.mean(x, axes, keep)
    return torch.mean(x.to(torch.float64), axes, keep).to(x.dtype)


def _prod(x: Tensor, axes: list[int], keep: bool) -> Tensor:
    for axis in sorted(axes, reverse=True):
        x = torch.prod(x, axis, keep, dtype=x.dtype)
    return x


def _extreme(largest: bool) -> Reducer:
    def extreme(x: Tensor, axes: list[int], keep: bool) -> Tensor:
        if x.dtype is torch.bool:
            return torch.any(x, axes, keep) if largest else torch.all(x, axes, keep)
        if any(isinstance(n, int) and n == 0 for n in (x.shape[axis] for axis in axes)):
            return torch.full_like(_sum(x, axes, keep), _neutral(x.dtype, largest))
        return torch.amax(x, axes, keep) if largest else torch.amin(x, axes, keep)

    return extreme


def _neutral(dtype: torch.dtype, largest: bool) -> Any:
    if dtype.is_floating_point:
        return -math.inf if largest else math.inf
    limits = torch.iinfo(dtype)
    return limits.min if largest else limits.max


def _reduction(name: str, on_tensors: Reducer, on_numbers: Any = None, start: int = 0, since: int = 18) -> None:
    """A reduction, whose axes are an attribute and from opset `since` on an input."""

    def reduced(x: Value, axes: Sequence[int], keep: bool) -> Value:
        if isinstance(x, Numbers) and on_numbers is not None and x.dtype in WHOLE and list(axes) == [0]:
            found = reduce(on_numbers, x.flat(), start) if start or x.flat() else reduce(on_numbers, x.flat())
            return Numbers.of([found], x.dtype).reshape([1] if keep else [])
        return on_tensors(tensor_of(x), list(axes), keep)

    def by_input(x: Value, axes: Numbers | None = None, *, keepdims: Flag = 1, noop_with_empty_axes: Flag = 0) -> Value:
        if axes is None or not axes.flat():
            return x if noop_with_empty_axes else reduced(x, axes_of(None, x.ndim), bool(keepdims))
        return reduced(x, axes_of(axes, x.ndim), bool(keepdims))

    def by_attribute(x: Value, *, axes: tuple[int, ...] | None = None, keepdims: Flag = 1) -> Value:
        return reduced(x, axes_of(axes, x.ndim), bool(keepdims))

    add(name, by_attribute)
    add(name, by_input, since)


_reduction("ReduceSum", _sum, operator.add, since=13)
_reduction("ReduceMean", _mean)
_reduction("ReduceProd", _prod, operator.mul, 1)
_reduction("ReduceMax", _extreme(True))
_reduction("ReduceMin", _extreme(False))
_reduction("ReduceL1", lambda x, axes, keep: _sum(torch.abs(x), axes, keep))
_reduction("ReduceL2", lambda x, axes, keep: torch.sqrt(_sum(x * x, axes, keep)))
_reduction("ReduceSumSquare", lambda x, axes, keep: _sum(x * x, axes, keep))
_reduction("ReduceLogSum", lambda x, axes, keep: torch.log(_sum(x, axes, keep)))
_reduction("ReduceLogSumExp", lambda x, axes, keep: torch.logsumexp(x, axes, keep))


def _position(name: str, function: Callable[..., Tensor]) -> None:
    def position(x: Tensor, *, axis: int = 0, keepdims: Flag = 1, select_last_index: Flag = 0) -> Tensor:
        if not select_last_index:
            return function(x, axis, bool(keepdims))
        return x.shape[axis] - 1 - function(torch.flip(x, [axis]), axis, bool(keepdims))

    add(name, position)


_position("ArgMax", torch.argmax)
_position("ArgMin", torch.argmin)


def _running(name: str, function: Callable[..., Tensor], neutral: int) -> None:
    """A running sum or product; an exclusive one leaves out the element itself."""

    def running(x: Tensor, axis: Numbers, *, exclusive: Flag = 0, reverse: Flag = 0) -> Tensor:
        along = axis_of(axis.item(), x.ndim)
        turned = torch.flip(x, [along]) if reverse else x
        found = function(turned, along, dtype=x.dtype)
        if exclusive:
            first = torch.full_like(torch.narrow(found, along, 0, 1), neutral)
            found = torch.cat([first, torch.narrow(found, along, 0, x.shape[along] - 1)], along)
        return torch.flip(found, [along]) if reverse else found

    add(name, running)


_running("CumSum", torch.cumsum, 0)
_running("CumProd", torch.cumprod, 1)


@op("TopK", since=10)
def top_k(x: Tensor, k: Numbers, *, axis: int = -1, largest: Flag = 1, sorted: Flag = 1) -> tuple[Tensor, Tensor]:
    """Of equal values ONNX takes the first, which torch.topk does not promise; always sorted, which is allowed."""
    values, indices = torch.sort(x, stable=True, dim=axis, descending=bool(largest))
    return torch.narrow(values, axis, 0, k.item()), torch.narrow(indices, axis, 0, k.item())


@op("TopK")
def top_k_attribute(x: Tensor, *, k: int, axis: int = -1) -> tuple[Tensor, Tensor]:
    return top_k(x, Numbers.scalar(k), axis=axis)


def _normalised(name: str, function: Callable[..., Tensor]) -> None:
    """Softmax and its like; before opset 13 over all axes from `axis` on, taken together."""

    def along(x: Tensor, *, axis: int = -1) -> Tensor:
        return function(x, axis)

    def together(x: Tensor, *, axis: int = 1) -> Tensor:
        cut = axis_of(axis, x.ndim)
        return function(x.reshape([math.prod(x.shape[:cut]), math.prod(x.shape[cut:])]), -1).reshape(x.shape)

    add(name, together)
    add(name, along, 13)


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, torch.argmax(x, axis, True), 1)


_normalised("Softmax", torch.softmax)
_normalised("LogSoftmax", torch.log_softmax)
_normalised("Hardmax", _hardmax)


@op("LpNormalization")
def lp_normalization(x: Tensor, *, axis: int = -1, p: Literal[1, 2] = 2) -> Tensor:
    norm = torch.linalg.vector_norm(x, p, axis, True)
    return torch.where(norm == 0, 0, x / norm).to(x.dtype)
