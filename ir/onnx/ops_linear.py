"""Matrix products and normalisations."""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.ir.onnx.ops_layout import axis_of
from laconic.ir.onnx.table import Refused, op
from laconic.ir.types import same_size


@op("MatMul")
def matmul(a: Tensor, b: Tensor) -> Tensor:
    return torch.matmul(a, b)


@op("Gemm")
def gemm(
    a: Tensor,
    b: Tensor,
    c: Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    transA: Literal[0, 1] = 0,
    transB: Literal[0, 1] = 0,
) -> Tensor:
    plain = alpha == 1 and (beta == 1 or c is None) and not transA
    if plain and transB and (c is None or (c.ndim == 1 and same_size(c.shape[0], b.shape[0]))):
        return F.linear(a, b, c)
    a, b = a.t() if transA else a, b.t() if transB else b
    scales: tuple[Any, Any] = (alpha, beta) if a.is_floating_point() else (int(alpha), int(beta))
    if c is not None:
        return torch.addmm(c, a, b, alpha=scales[0], beta=scales[1])
    found = torch.mm(a, b)
    return found if alpha == 1 else found * scales[0]


@op("Einsum")
def einsum(*operands: Tensor, equation: str) -> Tensor:
    return torch.einsum(equation.replace(" ", ""), *operands)


# ------------------------------------------------------------------------------------------------- normalisation


@op("LayerNormalization")
def layer_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    axis: int = -1,
    epsilon: float = 1e-5,
    stash_type: Literal[1] = 1,
    outputs: int,
) -> Any:
    start = axis_of(axis, x.ndim)
    kept = x.shape[start:]
    fits = [_same(kept, given.shape) for given in (scale, bias) if given is not None]
    if all(fits):
        found = F.layer_norm(x, kept, scale, bias, epsilon)
    else:
        found = F.layer_norm(x, kept, None, None, epsilon) * scale
        found = found if bias is None else found + bias
    if outputs == 1:
        return found
    axes = list(range(start, x.ndim))
    wide = x.to(torch.float32)
    mean = torch.mean(wide, axes, True)
    deviation = torch.sqrt(torch.mean((wide - mean) ** 2, axes, True) + epsilon)
    return found, mean, 1 / deviation


@op("RMSNormalization")
def rms_normalization(
    x: Tensor, scale: Tensor, *, axis: int = -1, epsilon: float = 1e-5, stash_type: Literal[1] = 1
) -> Tensor:
    kept = x.shape[axis_of(axis, x.ndim) :]
    if _same(kept, scale.shape):
        return F.rms_norm(x, kept, scale, epsilon)
    return F.rms_norm(x, kept, None, epsilon) * scale


def _same(a: Any, b: Any) -> bool:
    """Whether two shapes are equal, asked without fixing a size."""
    return len(a) == len(b) and all(
        same_size(x, y) for x, y in zip(map(_expression, a), map(_expression, b), strict=True)
    )


def _expression(size: Any) -> Any:
    from laconic.ir.torch_private import expression

    return expression(size)


@op("BatchNormalization")
def batch_normalization(
    x: Tensor,
    scale: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    *,
    epsilon: float = 1e-5,
    momentum: float = 0.9,
    spatial: Literal[1] = 1,
    training_mode: Literal[0] = 0,
    outputs: int,
) -> Tensor:
    if outputs > 1:
        raise Refused("it returns statistics of the batch, as in training")
    return F.batch_norm(x, mean, variance, scale, bias, False, 1 - momentum, epsilon)


@op("InstanceNormalization")
def instance_normalization(x: Tensor, scale: Tensor, bias: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    return F.instance_norm(x, weight=scale, bias=bias, eps=epsilon)


@op("GroupNormalization", since=21)
def group_normalization(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5, stash_type: Literal[1] = 1
) -> Tensor:
    return F.group_norm(x, num_groups, scale, bias, epsilon)


@op("GroupNormalization", since=18)
def group_normalization_by_group(
    x: Tensor, scale: Tensor, bias: Tensor, *, num_groups: int, epsilon: float = 1e-5
) -> Tensor:
    each = x.shape[1] // num_groups
    return F.group_norm(x, num_groups, scale.repeat_interleave(each), bias.repeat_interleave(each), epsilon)


@op("LRN")
def local_response_normalization(
    x: Tensor, *, size: int, alpha: float = 1e-4, beta: float = 0.75, bias: float = 1.0
) -> Tensor:
    if size % 2 == 0:
        raise Refused("its window has an even size, which torch centres elsewhere")
    return F.local_response_norm(x, size, alpha, beta, bias)


@op("MeanVarianceNormalization")
def mean_variance_normalization(x: Tensor, *, axes: tuple[int, ...] = (0, 2, 3)) -> Tensor:
    mean = torch.mean(x, axes, True)
    deviation = torch.sqrt(torch.mean(x * x, axes, True) - mean * mean)
    return (x - mean) / (deviation + 1e-9)
