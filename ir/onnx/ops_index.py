"""Gathering and scattering. ONNX counts negative indices from the end everywhere; torch's gather and scatter do not."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor

from laconic.ir.onnx.ops_layout import axis_of
from laconic.ir.onnx.shapes import Numbers, Value, tensor_of
from laconic.ir.onnx.table import op

Reduction = Literal["none", "add", "mul", "max", "min"]
_REDUCE = {"add": "sum", "mul": "prod", "max": "amax", "min": "amin"}


def _wrapped(indices: Value, size: Any) -> Tensor:
    """Indices counted from the front."""
    if isinstance(indices, Numbers) and not indices.symbolic and all(n >= 0 for n in indices.flat()):
        return indices.tensor().to(torch.int64)
    whole = tensor_of(indices).to(torch.int64)
    return torch.where(whole < 0, whole + size, whole)


@op("Gather")
def gather(x: Value, indices: Value, *, axis: int = 0) -> Value:
    before: tuple[Any, ...] = (slice(None),) * axis_of(axis, x.ndim)
    if isinstance(indices, Numbers) and not indices.symbolic:
        if isinstance(x, Numbers):
            return x[(*before, indices.values.astype(int))]
        if indices.ndim == 0:
            return torch.select(x, len(before), indices.item())
    return tensor_of(x)[(*before, tensor_of(indices).to(torch.int64))]


@op("GatherElements")
def gather_elements(x: Tensor, indices: Value, *, axis: int = 0) -> Tensor:
    return torch.gather(x, axis, _wrapped(indices, x.shape[axis]))


@op("GatherND")
def gather_nd(x: Tensor, indices: Tensor, *, batch_dims: int = 0) -> Tensor:
    batch = [
        torch.arange(n, device=x.device).reshape([-1] + [1] * (indices.ndim - 2 - k))
        for k, n in enumerate(x.shape[:batch_dims])
    ]
    return x[(*batch, *indices.to(torch.int64).unbind(-1))]


@op("Scatter")
def scatter(x: Tensor, indices: Value, updates: Tensor, *, axis: int = 0) -> Tensor:
    return scatter_elements(x, indices, updates, axis=axis)


@op("ScatterElements")
def scatter_elements(
    x: Tensor, indices: Value, updates: Tensor, *, axis: int = 0, reduction: Reduction = "none"
) -> Tensor:
    where = _wrapped(indices, x.shape[axis])
    if reduction == "none":
        return torch.scatter(x, axis, where, updates)
    return torch.scatter_reduce(x, axis, where, updates, _REDUCE[reduction])


@op("ScatterND")
def scatter_nd(x: Tensor, indices: Tensor, updates: Tensor, *, reduction: Reduction = "none") -> Tensor:
    where = indices.to(torch.int64).unbind(-1)
    if reduction in ("none", "add"):
        return torch.index_put(x, where, updates, accumulate=reduction == "add")
    depth, kept = len(where), x.shape[len(where) :]
    row: Any = torch.zeros_like(where[0])
    for index, n in zip(where, x.shape[:depth], strict=True):
        row = row * n + torch.where(index < 0, index + n, index)
    flat = x.reshape([math.prod(x.shape[:depth]), math.prod(kept)])
    source = updates.reshape([-1, flat.shape[1]])
    places = row.reshape(-1, 1).expand(-1, flat.shape[1])
    return torch.scatter_reduce(flat, 0, places, source, _REDUCE[reduction]).reshape(x.shape)
