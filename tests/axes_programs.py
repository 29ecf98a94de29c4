"""Little programs, one for each thing that rules of axes must get right: weights by shape, a function, which axes are
free and what pins others."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F

from laconic.ir.axes.dims import Pin

X = (5, 8)


@dataclass(frozen=True)
class Case:
    """Weights by shape, a function of them and of inputs of these shapes; the sizes of the axes that are free, and what
    pins others, by size."""

    name: str
    weights: dict[str, tuple[int, ...]]
    function: Callable[..., Any]
    free: tuple[int, ...]
    pinned: dict[int, set[Pin]] = field(default_factory=dict)
    inputs: tuple[tuple[int, ...], ...] = (X,)
    symmetric: tuple[int, ...] = ()  # axes of these sizes may be permuted in one weight alone too


def mlp(act: Callable[..., Any]) -> Callable[..., Any]:
    return lambda w, x: F.linear(act(F.linear(x, w.a, w.b)), w.c)


MLP = {"a": (12, 8), "b": (12,), "c": (4, 12)}
ONE = {"a": (12, 8), "c": (4, 12)}


def through(middle: Callable[..., Any], out: int = 12) -> Callable[..., Any]:
    """x -> a -> something -> c."""
    return lambda w, x: F.linear(middle(w, F.linear(x, w.a)), w.c)


def rotate_half(x: torch.Tensor) -> torch.Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([-b, a], -1)


def angles(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x.cos(), x.sin()], -1)


def put_back(x: torch.Tensor, chosen: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rows in the order of what was chosen for them, times theirs in a table, and back."""
    order = chosen.argsort(stable=True)
    return (x[order] * table[chosen[order]])[order.argsort()]


CASES = [
    Case("relu", MLP, mlp(F.relu), (12,)),
    Case("gelu", MLP, mlp(F.gelu), (12,)),
    Case("matmul", ONE, lambda w, x: x @ w.a.t() @ w.c.t(), (12,)),
    Case("addmm", MLP, lambda w, x: torch.addmm(w.b, x, w.a.t()) @ w.c.t(), (12,)),
    Case("einsum", ONE, lambda w, x: torch.einsum("bi,hi,oh->bo", x, w.a, w.c), (12,)),
    Case("softmax", ONE, through(lambda w, h: h.softmax(-1)), (12,)),
    Case(
        "layer norm",
        {**MLP, "g": (12,)},
        lambda w, x: F.linear(F.layer_norm(F.linear(x, w.a), (12,), w.g, w.b), w.c),
        (12,),
    ),
    Case("rms norm", {**ONE, "g": (12,)}, through(lambda w, h: F.rms_norm(h, (12,), w.g)), (12,)),
    Case("group norm", {**ONE, "g": (12,)}, through(lambda w, h: F.group_norm(h[..., None], 3, w.g)[..., 0]), (3, 4)),
    Case(
        "heads",
        ONE,
        through(lambda w, h: h.reshape(5, 3, 4).transpose(0, 1).relu().transpose(0, 1).reshape(5, 12)),
        (3, 4),
    ),
    Case(
        "heads summed",
        {"a": (12, 8), "c": (4, 4)},
        through(lambda w, h: h.reshape(5, 3, 4).sum(1)),
        (3, 4),
        symmetric=(3,),
    ),
    Case(
        "per head weights",
        {**ONE, "g": (3, 1)},
        through(lambda w, h: (h.reshape(5, 3, 4) * w.g).reshape(5, 12)),
        (3, 4),
    ),
    Case(
        "misaligned views",
        ONE,
        through(lambda w, h: h.reshape(5, 3, 4).sum(0).reshape(4, 3).sum(1).expand(5, 4).repeat(1, 3)),
        (3,),
        {4: {Pin.MISALIGNED}},
        symmetric=(3,),
    ),
    Case(
        "gate and up stacked", {"a": (24, 8), "c": (4, 12)}, through(lambda w, h: F.silu(h[:, :12]) * h[:, 12:]), (12,)
    ),
    Case(
        "gate and up in chunks", {"a": (24, 8), "c": (4, 12)}, through(lambda w, h: torch.mul(*h.chunk(2, -1))), (12,)
    ),
    Case("glu", {"a": (24, 8), "c": (4, 12)}, through(lambda w, h: F.glu(h)), (12,)),
    Case(
        "gate and up interleaved",
        {"a": (24, 8), "c": (4, 12)},
        through(lambda w, h: F.silu(h[:, ::2]) * h[:, 1::2]),
        (12,),
    ),
    Case("halves added", {"a": (12, 8), "c": (4, 6)}, through(lambda w, h: h[:, :6] + h[:, 6:]), (6,)),
    Case("unequal parts", ONE, through(lambda w, h: torch.cat([h[:, :5].relu(), h[:, 5:].tanh()], -1)), (5, 7)),
    Case("parts swapped", ONE, through(lambda w, h: torch.cat([h[:, 5:], h[:, :5]], -1)), (5, 7)),
    Case(
        "split",
        ONE,
        through(lambda w, h: torch.cat([p * (k + 1) for k, p in enumerate(h.split([3, 4, 5], -1))], -1)),
        (3, 4, 5),
    ),
    Case(
        "split evenly",
        ONE,
        through(lambda w, h: torch.cat([p * (k + 1) for k, p in enumerate(h.split(4, -1))], -1)),
        (4, 4, 4),
    ),
    Case("rotate half", {"a": (12, 8), "g": (12,), "c": (4, 12)}, through(lambda w, h: h + rotate_half(h) * w.g), (6,)),
    Case("overlapping slices", ONE, through(lambda w, h: torch.cat([h[:, :8] + h[:, 4:], h[:, 8:]], -1)), (4,)),
    Case("shifted slices", {"a": (12, 8), "c": (4, 11)}, through(lambda w, h: h[:, 1:] - h[:, :-1]), (), {}),
    Case("differences", {"a": (12, 8), "c": (4, 11)}, through(lambda w, h: h.diff(dim=-1)), (), {12: {Pin.ORDER}}),
    Case("flip", ONE, through(lambda w, h: h + h.flip(-1)), (), {12: {Pin.ORDER}}),
    Case("roll", ONE, through(lambda w, h: h + h.roll(1, -1)), (), {12: {Pin.ORDER}}),
    Case("cumsum", ONE, through(lambda w, h: h.cumsum(-1)), (), {12: {Pin.ORDER}}),
    Case("sort", ONE, through(lambda w, h: h.sort(-1).values), (12,), {12: {Pin.ARRANGED}}, symmetric=(12,)),
    Case(
        "topk",
        {"a": (12, 8), "c": (4, 3)},
        through(lambda w, h: h.topk(3).values),
        (12,),
        {3: {Pin.ARRANGED}},
        symmetric=(12,),
    ),
    Case(
        "argmax into a table",
        {"a": (12, 8), "e": (12, 4)},
        lambda w, x: F.embedding(F.linear(x, w.a).argmax(-1), w.e),
        (12,),
    ),
    Case(
        "argmax as a number", {"a": (12, 8)}, lambda w, x: F.linear(x, w.a).argmax(-1) * 2.0, (), {12: {Pin.OBSERVED}}
    ),
    Case("argmax returned", {"a": (12, 8)}, lambda w, x: F.linear(x, w.a).argmax(-1), (), {12: {Pin.OBSERVED}}),
    Case(
        "arange into a table",
        {"a": (12, 8), "e": (12, 3)},
        lambda w, x: F.linear(x, w.a) @ F.embedding(torch.arange(12), w.e),
        (12,),
    ),
    Case("arange as data", ONE, through(lambda w, h: h * torch.arange(12)), (12,)),
    Case(
        "arange as both",
        {"a": (12, 8), "e": (12, 3)},
        lambda w, x: (F.linear(x, w.a) * (r := torch.arange(12))) @ F.embedding(r, w.e),
        (),
        {12: {Pin.ARANGE_BOTH}},
    ),
    Case("Gram matrix", {"a": (12, 8)}, lambda w, x: F.linear(x, w.a) @ F.linear(x, w.a).t(), (12,), symmetric=(12,)),
    Case(
        "a matrix and its transpose",
        {"a": (8, 8)},
        lambda w, x: x + F.linear(x, w.a) + F.linear(x, w.a.t()),
        (),
        {8: {Pin.IO}},
    ),
    Case(
        "residual",
        {"a": (12, 8), "r": (12, 12), "c": (4, 12)},
        through(lambda w, h: h + F.linear(h.relu(), w.r)),
        (12,),
    ),
    Case(
        "two sizes that are equal",
        {"a": (12, 8), "r": (12, 12), "c": (4, 12)},
        through(lambda w, h: F.linear(h.relu(), w.r)),
        (12, 12),
    ),
    Case("repeat", {"a": (6, 8), "c": (4, 12)}, through(lambda w, h: h.repeat(1, 2)), (2, 6), symmetric=(2,)),
    Case(
        "repeat interleave",
        {"a": (6, 8), "c": (4, 12)},
        through(lambda w, h: h.repeat_interleave(2, -1)),
        (2, 6),
        symmetric=(2,),
    ),
    Case(
        "expand",
        {"a": (6, 8), "c": (4, 12)},
        through(lambda w, h: h[:, :, None].expand(5, 6, 2).reshape(5, 12)),
        (2, 6),
        symmetric=(2,),
    ),
    Case(
        "stack",
        {"a": (6, 8), "b": (6, 8), "c": (4, 12)},
        lambda w, x: F.linear(torch.stack([F.linear(x, w.a), F.linear(x, w.b)], 1).flatten(1), w.c),
        (6,),
    ),
    Case("unbind", ONE, through(lambda w, h: torch.cat(h.reshape(5, 3, 4).unbind(1)[::-1], -1)), (4,)),
    Case(
        "select", {"a": (12, 8), "c": (4, 4)}, through(lambda w, h: h.reshape(5, 3, 4)[:, -1]), (2, 4), symmetric=(2,)
    ),
    Case("mean", {"a": (12, 8)}, lambda w, x: F.linear(x, w.a).mean(-1), (12,), symmetric=(12,)),
    Case("norm of a vector", {"a": (12, 8)}, lambda w, x: F.linear(x, w.a).norm(dim=-1), (12,), symmetric=(12,)),
    Case("pad", {"a": (6, 8), "c": (4, 12)}, through(lambda w, h: F.pad(h, (2, 4))), (6,), {2: {Pin.ENUM}}),
    Case(
        "depthwise",
        {"a": (12, 8), "k": (12, 1, 3), "c": (4, 12)},
        through(lambda w, h: F.conv1d(h.t()[None], w.k, padding=1, groups=12)[0].t()),
        (12,),
        {3: {Pin.ORDER}},
    ),
    Case(
        "convolution",
        {"k": (6, 3, 3, 3), "l": (2, 6, 1, 1)},
        lambda w, x: F.conv2d(F.conv2d(x, w.k).relu(), w.l),
        (6,),
        inputs=((1, 3, 7, 7),),
    ),
    Case(
        "groups",
        {"k": (6, 3, 1), "g": (8, 3, 1), "l": (2, 8, 1)},
        lambda w, x: F.conv1d(F.conv1d(F.conv1d(x, w.k).relu(), w.g, groups=2), w.l),
        (2, 3, 4),
        inputs=((1, 3, 7),),
    ),
    Case(
        "transposed",
        {"k": (3, 6, 3, 3), "l": (2, 6, 1, 1)},
        lambda w, x: F.conv2d(F.conv_transpose2d(x, w.k).relu(), w.l),
        (6,),
        inputs=((1, 3, 4, 4),),
    ),
    Case(
        "pooling",
        {"k": (6, 3, 3, 3), "l": (2, 6)},
        lambda w, x: F.linear(F.adaptive_avg_pool2d(F.max_pool2d(F.conv2d(x, w.k), 2), 1).flatten(1), w.l),
        (6,),
        inputs=((1, 3, 8, 8),),
    ),
    Case(
        "batch norm",
        {"k": (6, 3, 1), "g": (6,), "b": (6,), "m": (6,), "l": (2, 6, 1)},
        lambda w, x: F.conv1d(F.batch_norm(F.conv1d(x, w.k), w.m, w.m * w.m + 1, w.g, w.b), w.l),
        (6,),
        inputs=((2, 3, 7),),
    ),
    Case(
        "attention",
        dict.fromkeys("qkv", (12, 8)) | {"o": (8, 12)},
        lambda w, x: F.linear(_attend(w, x), w.o),
        (3, 4, 4),
    ),
    Case(
        "shared keys",
        {"q": (12, 8), "k": (4, 8), "v": (4, 8), "o": (8, 12)},
        lambda w, x: F.linear(_shared(w, x), w.o),
        (3, 4, 4),
    ),
    Case(
        "a mask for each head",
        dict.fromkeys("qkv", (12, 8)) | {"o": (8, 12), "m": (3, 5, 5)},
        lambda w, x: F.linear(_attend(w, x, mask=w.m), w.o),
        (3, 4, 4),
    ),
    Case(
        "a state",
        {"a": (6, 8), "state": (7, 6), "c": (4, 6)},
        lambda w, x: F.linear(w.state.index_copy_(0, torch.arange(5), F.linear(x, w.a)), w.c),
        (6,),
        {7: {Pin.DATA_INDEX}},
    ),
    Case(
        "a state written over",
        {"a": (6, 8), "state": (5, 6), "c": (4, 6)},
        lambda w, x: (F.linear(w.state.clone(), w.c), w.state.copy_(F.linear(x, w.a)))[0],
        (6,),
        symmetric=(),
    ),
    Case(
        "a tied weight",
        {"a": (12, 8), "g": (12,)},
        lambda w, x: F.linear(F.linear(x, w.a).relu() * w.g, w.a.t()),
        (12,),
    ),
    Case(
        "how often each was chosen",
        {"r": (6, 8), "c": (4, 6)},
        lambda w, x: F.linear(F.linear(x, w.r).topk(2).indices.reshape(-1).float().histc(6, 0, 5), w.c),
        (6,),
    ),
    Case(
        "argmax of what may be equal",
        {"r": (6, 8), "t": (6, 4)},
        lambda w, x: F.embedding(F.linear(x, w.r).relu().argmax(-1), w.t),
        (),
        {6: {Pin.TIES}},
    ),
    Case(
        "positions in an outer product",
        {"l": (6, 8), "v": (4,)},
        lambda w, x: x @ (w.l * angles(torch.outer(torch.arange(6.0), w.v))).T @ w.l,
        (6,),
    ),
    Case(
        "positions through a product",
        {"a": (8, 6), "t": (6, 8)},
        lambda w, x: x @ w.t.t() @ w.t + F.linear(torch.arange(6.0), w.a),
        (6, 6),
        symmetric=(6,),
    ),
    Case(
        "sorted by what was chosen, and returned so",
        {"r": (6, 8)},
        lambda w, x: x[F.linear(x, w.r).argmax(-1).argsort(stable=True)],
        (),
        {6: {Pin.OBSERVED}},
    ),
    Case(
        "sorted by what was chosen, and put back",
        {"r": (6, 8), "t": (6, 8)},
        lambda w, x: put_back(x, F.linear(x, w.r).argmax(-1), w.t),
        (6,),
    ),
    Case(
        "the greatest of what was chosen",
        {"r": (6, 8)},
        lambda w, x: F.linear(x, w.r).topk(2).indices.topk(1).values,
        (),
        {6: {Pin.OBSERVED}},
    ),
    Case(
        "a softmax of what was chosen",
        {"r": (6, 8)},
        lambda w, x: F.linear(x, w.r).topk(2).indices.float().softmax(-1),
        (),
        {6: {Pin.OBSERVED}},
    ),
    Case(
        "interleaved rotation",
        {"a": (12, 8), "s": (6,), "c": (4, 12)},
        through(lambda w, h: torch.stack([h[:, ::2] * w.s, h[:, 1::2] / (1 + w.s.abs())], -1).flatten(1)),
        (6,),
    ),
    Case(
        "index of a table by data",
        {"e": (9, 6), "c": (4, 6)},
        lambda w, x: F.linear(F.embedding(x.abs().long() % 9, w.e), w.c),
        (6,),
        {9: {Pin.DATA_INDEX}},
    ),
    Case(
        "an op without a rule",
        ONE,
        through(lambda w, h: torch.fft.rfft(h).real.repeat(1, 2)[:, :12]),
        (),
        {12: {Pin.OPAQUE}},
    ),
    Case(
        "scatter of what was chosen",
        ONE,
        through(lambda w, h: h.masked_fill(torch.zeros_like(h).scatter(-1, h.topk(4).indices, 1.0) == 0, 0.0)),
        (12,),
    ),
    Case(
        "gather of what was chosen",
        {"a": (12, 8), "g": (12,)},
        lambda w, x: (s := F.linear(x, w.a)).gather(-1, (s + w.g).topk(3).indices).sum(-1),
        (12,),
    ),
    Case("slice scatter", ONE, through(lambda w, h: torch.slice_scatter(h, h[:, :4] * 2, 1, 0, 4)), (4, 8)),
    Case("tril", {"a": (5, 8), "c": (4, 5)}, through(lambda w, h: h.tril()), (), {5: {Pin.ORDER}}),
    Case(
        "outer", {"a": (6, 8), "c": (4, 6)}, lambda w, x: torch.outer(x[0], w.a[:, 0]) @ w.c.t(), (6, 7), symmetric=(7,)
    ),  # seven columns are not read
    Case(
        "bmm", {"a": (3, 8, 6), "c": (3, 6, 2)}, lambda w, x: x.expand(3, 5, 8).bmm(w.a).relu().bmm(w.c).sum(0), (3, 6)
    ),
    Case("prod", {"a": (6, 8)}, lambda w, x: F.linear(x, w.a).prod(-1), (6,), symmetric=(6,)),
    Case("logsumexp", {"a": (6, 8)}, lambda w, x: F.linear(x, w.a).logsumexp(-1), (6,), symmetric=(6,)),
    Case("max over", {"a": (6, 8)}, lambda w, x: F.linear(x, w.a).max(-1).values, (6,), symmetric=(6,)),
    Case("where", {"a": (6, 8), "g": (6,), "c": (4, 6)}, through(lambda w, h: torch.where(w.g > 0, h, -h)), (6,)),
    Case(
        "squeezed",
        {"a": (6, 8), "c": (4, 6)},
        through(lambda w, h: h[:, None].squeeze(1).unsqueeze(-1).squeeze(-1)),
        (6,),
    ),
    Case("permute", {"a": (6, 8), "c": (4, 6)}, through(lambda w, h: h[None].permute(2, 0, 1).movedim(0, 2)[0]), (6,)),
    Case(
        "channel shuffle",
        {"a": (12, 8), "c": (4, 12)},
        through(lambda w, h: h.reshape(5, 3, 4).transpose(1, 2).reshape(5, 12)),
        (3, 4),
    ),
    Case(
        "channel shuffle and residual",
        {"a": (12, 8), "c": (4, 12)},
        through(lambda w, h: h + h.reshape(5, 3, 4).transpose(1, 2).reshape(5, 12)),
        (),
    ),
]


def _heads(x: torch.Tensor, count: int) -> torch.Tensor:
    return x.reshape(1, x.shape[0], count, -1).transpose(1, 2)


def _attend(w: Any, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    q, k, v = (_heads(F.linear(x, m), 3) for m in (w.q, w.k, w.v))
    return F.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None).transpose(1, 2).reshape(x.shape[0], 12)


def _shared(w: Any, x: torch.Tensor) -> torch.Tensor:
    q, k, v = _heads(F.linear(x, w.q), 3), _heads(F.linear(x, w.k), 1), _heads(F.linear(x, w.v), 1)
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True).transpose(1, 2).reshape(x.shape[0], 12)
