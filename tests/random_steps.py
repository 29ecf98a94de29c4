"""The steps that random modules are made of. Each function tries to add one to a builder; it need not fit."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F

if TYPE_CHECKING:
    from random_modules import Builder

Chooser = Callable[["Builder"], Any]


def is_float(t: torch.Tensor) -> bool:
    return t.is_floating_point()


def _floats(t: torch.Tensor) -> bool:
    return t.dtype == torch.float32


def _fixed_last(t: torch.Tensor) -> bool:
    return _floats(t) and t.dim() >= 2 and t.shape[-1] in (2, 4, 6, 8, 12, 24)


def plant_weights(b: Builder) -> None:
    """Weights equal to others: whole or in part, tied, and some that must not be merged."""
    b.weight(b.normal(6, 6), "parameter")
    b.weight(b.normal(6), "buffer")
    if "same weights" in b.traits:
        first = b.normal(6, 6)
        for _ in range(b.dice.randint(2, 3)):
            b.weight(first.clone(), "parameter")
        kind = b.dice.choice(["buffer", "parameter"])
        b.weight(b.weights["b1"].clone(), kind)
        zeros = torch.zeros(6)
        b.weight(zeros, "buffer")
        b.weight(-zeros, "buffer")
    if "rows of weights" in b.traits:
        whole = b.normal(70, 24)
        start = b.dice.choice([0, 2, 8, 3, 16])
        b.weight(whole, "parameter", "table")
        b.weight(whole[start : start + 48].clone(), "parameter", "part")
    if "state" in b.traits:
        b.weight(b.normal(6), "state", "state0")
        b.weight(b.normal(4, 6), "state", "state1")


def choose(b: Builder) -> Chooser:
    """The next step's function, by the module's traits."""
    options: list[Chooser] = [pointwise, pointwise, binary, binary, linear, view, view, reduction, join]
    extra: dict[str, list[Chooser]] = {
        "repeats": [repeated, repeated],
        "no-ops": [no_op, no_op],
        "constants": [constant, constant],
        "same weights": [weighted, weighted],
        "rows of weights": [rows],
        "random": [draw],
        "state": [state],
        "in-place": [in_place, in_place],
        "input written": [write_input],
        "integers": [integer, integer],
    }
    for trait in sorted(b.traits):
        options += extra.get(trait, [])
    return b.dice.choice(options)


def repeated(b: Builder) -> bool:
    return b.repeat()


def pointwise(b: Builder) -> bool:
    functions: list[Callable[[torch.Tensor], torch.Tensor]] = [
        torch.tanh, torch.sigmoid, torch.relu, torch.neg, torch.abs, torch.sin, F.gelu, F.softplus,
        lambda t: t * 2.0, lambda t: t * 2, lambda t: t + 1, lambda t: 1.5 - t, lambda t: t / 3, lambda t: -t * True,
        lambda t: t.clamp(-1, 1), lambda t: (t + 0.0), lambda t: t.double() * 0.5, lambda t: t**2.0, lambda t: t**2,
    ]  # fmt: skip
    return b.add(b.dice.choice(functions), b.pick(is_float))


def binary(b: Builder) -> bool:
    functions: list[Callable[..., torch.Tensor]] = [
        torch.add, torch.sub, torch.mul, torch.maximum,
        lambda p, q: torch.add(p, q, alpha=2),
        lambda p, q: torch.where(p > q, p, q * 0.5),
        lambda p, q: p * q.unsqueeze(0),
    ]  # fmt: skip
    return b.add(b.dice.choice(functions), b.pick(_floats), b.pick(_floats))


def linear(b: Builder) -> bool:
    name = b.pick(_fixed_last)
    if name is None:
        return False
    size = b.values[name][0].shape[-1]
    fits = [n for n, k in b.kinds.items() if k == "parameter" and b.values[n][0].shape[-1:] == (size,)]
    weight = b.dice.choice(fits) if fits and b.dice.random() < 0.6 else b.weight(b.normal(6, size), "parameter")
    if b.dice.random() < 0.3:
        return b.add(lambda t, w: t @ w.transpose(-1, -2), name, weight)
    if b.dice.random() < 0.5:
        return b.add(F.linear, name, weight, b.weight(b.normal(b.values[weight][0].shape[0]), "parameter"))
    return b.add(F.linear, name, weight)


def view(b: Builder) -> bool:
    name = b.pick(lambda t: t.dim() >= 1)
    if name is None:
        return False
    rank = b.values[name][0].dim()
    i, j = b.dice.randrange(rank), b.dice.randrange(rank)
    order = b.dice.sample(range(rank), rank)
    start = b.dice.randrange(2)
    functions: list[Callable[[torch.Tensor], Any]] = [
        lambda t: t.transpose(i, j),
        lambda t: t.permute(order),
        lambda t: t.unsqueeze(i),
        lambda t: t.unsqueeze(i).expand(*t.shape[:i], 2, *t.shape[i:]),
        lambda t: t.flatten(max(0, rank - 2)),
        lambda t: t.reshape(t.shape[0], -1),
        lambda t: t.transpose(i, j).reshape(t.shape[0], -1),
        lambda t: t.unflatten(-1, (2, t.shape[-1] // 2)),
        lambda t: t[..., start:4],
        lambda t: t.narrow(-1, start, 2),
        lambda t: t.select(-1, start),
        lambda t: t.chunk(2, -1),
        lambda t: t[..., ::2],
        lambda t: t[None, ..., 1:],
        lambda t: t.unsqueeze(-1).squeeze(-1),
        lambda t: t.unbind(-1)[start],
        lambda t: t.view(t.shape),
    ]
    return b.add(b.dice.choice(functions), name)


def reduction(b: Builder) -> bool:
    functions: list[Callable[[torch.Tensor], Any]] = [
        lambda t: t.sum(-1), lambda t: t.mean(-1, keepdim=True), lambda t: t.amax(-1), lambda t: t.softmax(-1),
        lambda t: t.cumsum(-1), lambda t: F.layer_norm(t, t.shape[-1:]), lambda t: t.max(-1),
        lambda t: t.log_softmax(-1), lambda t: t.sort(-1),
    ]  # fmt: skip
    return b.add(b.dice.choice(functions), b.pick(_fixed_last))


def join(b: Builder) -> bool:
    p, q = b.pick(is_float), b.pick(is_float)
    functions: list[Callable[..., torch.Tensor]] = [
        lambda s, t: torch.cat([s, t], -1),
        lambda s, t: torch.stack([s, t, s], 0),
        lambda s, t: torch.cat([s, t[..., :1]], dim=-1),
    ]
    return b.add(b.dice.choice(functions), p, p if b.dice.random() < 0.3 else q)


def no_op(b: Builder) -> bool:
    name = b.pick(lambda t: t.dtype != torch.bool)
    functions: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t * 1, lambda t: t - 0, lambda t: t + 0, lambda t: t / 1, lambda t: t**1, lambda t: t * 1.0,
        lambda t: t.clone(), lambda t: t.clone().clone(), lambda t: (t * 1).clone(), lambda t: t.to(t.dtype, copy=True),
        lambda t: t.contiguous(), lambda t: t[:], lambda t: t.reshape(t.shape), lambda t: t[..., : t.shape[-1]],
        lambda t: t.transpose(0, -1).transpose(0, -1), lambda t: t.clone().transpose(0, -1).clone(),
        lambda t: t.float().float(), lambda t: -t.relu() + 0, lambda t: t.mul(-0.0) + 0,
        lambda t: t.unsqueeze(0).squeeze(0).clone(), lambda t: t.expand(t.shape),
    ]  # fmt: skip
    return b.add(b.dice.choice(functions), name)


def constant(b: Builder) -> bool:
    size = b.dice.choice([4, 6])
    makers: list[Callable[[], torch.Tensor]] = [
        lambda: torch.arange(size) * 0.1 + 1,
        lambda: torch.full((size,), 0.5) - 1,
        lambda: torch.tensor([0.5, -0.0, 2.0, 0.25, -1.0, 3.0][:size]),
        lambda: torch.ones(size).cumsum(0) / size,
        lambda: torch.linspace(0, 1, size).sin(),
        lambda: torch.zeros(size) * -1.0,
    ]
    make = b.dice.choice(makers)
    name = b.pick(lambda t: _floats(t) and t.shape[-1:] == (size,))
    if b.dice.random() < 0.15:
        return b.add(make)
    if b.dice.random() < 0.3:
        row = b.dice.choice([n for n, k in b.kinds.items() if k == "buffer"])
        return b.add(lambda t, v: t * (v.exp() - v * 2), name, row)
    likes: list[Callable[[torch.Tensor], torch.Tensor]] = [
        lambda t: t + torch.zeros_like(t) + torch.full_like(t, 0.5),
        lambda t: t.masked_fill(torch.ones(t.shape[-1], dtype=torch.bool).logical_not(), 1.0),
        lambda t: t * t.new_ones(t.shape[-1]),
        lambda t: t + torch.arange(t.shape[0]).sum(),
        lambda t: t * make(), lambda t: t + make(), lambda t: make() - t,
    ]  # fmt: skip
    return b.add(b.dice.choice(likes), name)


def weighted(b: Builder) -> bool:
    """One of the planted weights at work."""
    row = b.dice.choice(list(b.weights))
    if b.values[row][0].dim() == 2:
        return b.add(F.linear, b.pick(lambda t: _floats(t) and t.shape[-1:] == (6,)), row)
    return b.add(torch.mul, b.pick(_floats), row)


def rows(b: Builder) -> bool:
    def index(t: torch.Tensor) -> bool:
        return t.dtype == torch.int64 and t.dim() <= 2 and bool((t >= 0).all()) and bool((t < 48).all())

    if b.dice.random() < 0.6:
        return b.add(lambda i, w, p: w[i] + p[i], b.pick(index), "table", "part")
    return b.add(lambda t, w, p: t + (w[:48] * p).sum(), b.pick(_floats), "table", "part")


def draw(b: Builder) -> bool:
    functions: list[Callable[[torch.Tensor], torch.Tensor]] = [
        torch.rand_like, torch.randn_like, lambda t: F.dropout(t, 0.3, training=True),
        lambda t: torch.bernoulli(torch.sigmoid(t)), lambda t: t + torch.rand(t.shape[-1]),
        lambda t: t + torch.rand_like(t) * torch.rand_like(t),
    ]  # fmt: skip
    return b.add(b.dice.choice(functions), b.pick(_floats), pure=False)


def state(b: Builder) -> bool:
    name = b.dice.choice(["state0", "state1"])
    value = b.pick(lambda t: _floats(t) and t.shape[-1:] == (6,) and t.dim() >= 2)
    writes: list[Callable[..., Any]] = [
        lambda s, t: s.add_(1),
        lambda s, t: s.mul_(0.9).add_(t.flatten(0, -2).mean(0)),
        lambda s, t: s.copy_(torch.tanh(t.flatten(0, -2).sum(0).expand(s.shape))),
        lambda s, t: s[..., 1:3].copy_(t.flatten(0, -2).amax(0)[:2]),
        lambda s, t: s[..., :2].add_(0.5),
        lambda s, t: s.zero_(),
    ]
    write = b.dice.choice(writes)

    def run(s: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        old = s.clone() if b_reads_old else s * 1
        write(s, t)
        return old + s if b_reads_new else old

    b_reads_old, b_reads_new = b.dice.random() < 0.5, b.dice.random() < 0.7
    return b.add(run, name, value, pure=False)


def in_place(b: Builder) -> bool:
    """Write into a fresh copy through a view of it, or into a value made before."""
    name = b.pick(lambda t: _floats(t) and t.dim() >= 2)
    if name is None:
        return False
    writes: list[Callable[[torch.Tensor], Any]] = [
        lambda t: t.add_(1), lambda t: t.mul_(0.5), lambda t: t[..., 0].add_(1), lambda t: t[..., 1:].mul_(-1),
        lambda t: t.transpose(0, -1).add_(0.25), lambda t: t[..., :1].copy_(t[..., -1:]), lambda t: t.relu_(),
        lambda t: t.flatten().mul_(2), lambda t: t.select(-1, 0).zero_(), lambda t: t.unsqueeze(0).sub_(0),
    ]  # fmt: skip
    write = b.dice.choice(writes)
    if b.dice.random() < 0.5 and b.owned(name):
        return b.add(lambda t: (write(t), t * 1)[1], name, pure=False)

    def run(t: torch.Tensor) -> torch.Tensor:
        mine = t.clone()
        write(mine)
        return mine

    return b.add(run, name)


def write_input(b: Builder) -> bool:
    name = b.dice.choice(["x", "y"])
    writes: list[Callable[[torch.Tensor], Any]] = [
        lambda t: t.add_(1),
        lambda t: t[..., 0].mul_(2),
        lambda t: t.tanh_(),
    ]
    write = b.dice.choice(writes)
    return b.add(lambda t: (write(t), t * 2)[1], name, pure=False)


def integer(b: Builder) -> bool:
    ints = b.pick(lambda t: t.dtype == torch.int64, recent=False)
    floats = b.pick(_floats)
    unary: list[Callable[[torch.Tensor], Any]] = [
        lambda t: t + 0, lambda t: t * 1, lambda t: t - 0, lambda t: t // 2, lambda t: t % 3, lambda t: t + 1,
        lambda t: t * 1.0, lambda t: t / 1, lambda t: t.float(), lambda t: (t > 1) & True, lambda t: (t > 1) | False,
        lambda t: (t > 1) & torch.ones(t.shape[-1], dtype=torch.bool), lambda t: t == 2, lambda t: t.clone(),
    ]  # fmt: skip
    mixed: list[Callable[[torch.Tensor], Any]] = [
        lambda t: t.argmax(-1), lambda t: (t > 0).long(), lambda t: torch.where(t > 0, t, 0.0),
        lambda t: (t * 4).long(),
        lambda t: t.gather(-1, t.argmax(-1, keepdim=True)), lambda t: t * (t > 0), lambda t: t[..., [1, 0]],
    ]  # fmt: skip
    if b.dice.random() < 0.2:
        return b.add(lambda i, w: w[i % 6], ints, "p0")
    return b.add(b.dice.choice(unary), ints) if b.dice.random() < 0.5 else b.add(b.dice.choice(mixed), floats)
