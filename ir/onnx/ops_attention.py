"""Attention, rotary embedding and cache writes of opsets 23 and later."""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.ir.onnx.dtypes import dtype_of
from laconic.ir.onnx.ops_layout import axis_of
from laconic.ir.onnx.table import Refused, op

Flag = Literal[0, 1]


@op("Attention", since=23)
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    past_key: Tensor | None = None,
    past_value: Tensor | None = None,
    kept: Tensor | None = None,
    *,
    is_causal: Flag = 0,
    kv_num_heads: int | None = None,
    q_num_heads: int | None = None,
    qk_matmul_output_mode: Literal[0, 1, 2, 3] = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    softmax_precision: int | None = None,
    left_window_size: int = -1,
    right_window_size: int = -1,
    outputs: int,
) -> Any:
    """`kept`: how many keys of each batch row are no padding. Torch's fused attention where it says all of it."""
    flat = q.ndim == 3
    if flat:
        q, k, v = _heads(q, q_num_heads), _heads(k, kv_num_heads), _heads(v, kv_num_heads)
    before = past_key.shape[2] if past_key is not None else 0
    if past_key is not None and past_value is not None:
        k, v = torch.cat([past_key, k], 2), torch.cat([past_value, v], 2)
    window = (left_window_size, right_window_size)
    plain_causal = bool(is_causal) and mask is None and past_key is None and kept is None and window == (-1, -1)
    if not plain_causal:
        offset = before if kept is None else (kept.to(torch.int64) - q.shape[2]).reshape(-1, 1, 1, 1)
        mask = _mask(q, k, mask, bool(is_causal), window, offset, kept)
    precise = softmax_precision is None or dtype_of(softmax_precision) == q.dtype
    if softcap == 0 and outputs < 4 and precise:
        shared = int(q.shape[1]) != int(k.shape[1])
        y = F.scaled_dot_product_attention(q, k, v, mask, 0.0, plain_causal, scale=scale, enable_gqa=shared)
        seen = None
    else:
        if plain_causal:
            mask = _mask(q, k, None, True, window, 0, None)
        wide = q.dtype if softmax_precision is None else dtype_of(softmax_precision)
        y, seen = _explicit(q, k, v, mask, scale, softcap, wide or q.dtype, qk_matmul_output_mode)
    if flat:
        y = y.transpose(1, 2).flatten(2)
    return (y, k, v, seen)[:outputs]


def _heads(x: Tensor, count: int | None) -> Tensor:
    if not count:
        raise Refused("it does not say how many heads its inputs with three axes have")
    return x.reshape([x.shape[0], x.shape[1], count, x.shape[2] // count]).transpose(1, 2)


def _mask(
    q: Tensor, k: Tensor, mask: Tensor | None, causal: bool, window: tuple[int, int], offset: Any, kept: Tensor | None
) -> Tensor | None:
    """All that keeps a query from a key as one mask: of bools (True: seen), or of numbers to be added."""
    keys = k.shape[2]
    if mask is not None and kept is not None:
        missing = keys - mask.shape[-1]
        mask = F.pad(mask, (0, missing), value=False if mask.dtype is torch.bool else -math.inf)
    allowed: list[Tensor] = [] if mask is None or mask.dtype is not torch.bool else [mask]
    ahead = torch.arange(keys, device=q.device) - torch.arange(q.shape[2], device=q.device)[:, None] - offset
    if causal:
        allowed.append(ahead <= 0)
    if window[0] >= 0:
        allowed.append(ahead >= -window[0])
    if window[1] >= 0:
        allowed.append(ahead <= window[1])
    if kept is not None:
        allowed.append(torch.arange(keys, device=q.device) < kept.reshape(-1, 1, 1, 1))
    if not allowed:
        return mask
    seen = allowed[0]
    for more in allowed[1:]:
        seen = torch.logical_and(seen, more)
    if mask is None or mask.dtype is torch.bool:
        return seen
    return torch.where(seen, mask, -math.inf)


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    scale: float | None,
    softcap: float,
    wide: torch.dtype,
    mode: int,
) -> tuple[Tensor, Tensor]:
    """Step by step, with what it shows of the scores."""
    repeats = int(q.shape[1]) // int(k.shape[1])
    if repeats > 1:
        k, v = k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)
    root = math.sqrt(1 / math.sqrt(q.shape[3]) if scale is None else scale)
    scores = torch.matmul(q * root, k.transpose(2, 3) * root)
    shown = [scores]
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    shown.append(scores)
    if mask is not None:
        bias = torch.where(mask, 0.0, -math.inf).to(q.dtype) if mask.dtype is torch.bool else mask
        scores = scores + bias
        weights = torch.softmax(scores.to(wide), -1)
        weights = torch.where(torch.amax(bias, -1, True) == -math.inf, 0, weights)  # a query that sees nothing
    else:
        weights = torch.softmax(scores.to(wide), -1)
    weights = weights.to(q.dtype)
    shown += [scores, weights]
    return torch.matmul(weights, v), shown[mode]


@op("RotaryEmbedding", since=23)
def rotary_embedding(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor | None = None,
    *,
    interleaved: Flag = 0,
    num_heads: int | None = None,
    rotary_embedding_dim: int = 0,
) -> Tensor:
    flat = x.ndim == 3
    heads = (_heads(x, num_heads) if flat else x).transpose(1, 2)
    size = rotary_embedding_dim or heads.shape[3]
    turned, rest = heads[..., :size], heads[..., size:]
    if positions is not None:
        cos, sin = cos[positions], sin[positions]
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    a, b = (turned[..., 0::2], turned[..., 1::2]) if interleaved else turned.chunk(2, -1)
    real, imaginary = cos * a - sin * b, sin * a + cos * b
    found = torch.stack([real, imaginary], -1).flatten(-2) if interleaved else torch.cat([real, imaginary], -1)
    if rotary_embedding_dim and rotary_embedding_dim != heads.shape[3]:
        found = torch.cat([found, rest], -1)
    return found.flatten(2) if flat else found.transpose(1, 2)


@op("TensorScatter", since=24)
def tensor_scatter(
    past: Tensor,
    update: Tensor,
    starts: Tensor | None = None,
    *,
    axis: int = -2,
    mode: Literal["linear", "circular"] = "linear",
) -> Tensor:
    along = axis_of(axis, past.ndim)
    where = torch.arange(update.shape[along], device=past.device).reshape([-1] + [1] * (past.ndim - along - 1))
    if starts is not None:
        where = where + starts.reshape([-1] + [1] * (past.ndim - 1))
    if mode == "circular":
        where = torch.remainder(where, past.shape[along])
    return torch.scatter(past, along, where.to(torch.int64).expand(update.shape), update)
