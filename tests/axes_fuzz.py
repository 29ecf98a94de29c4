"""Random programs for axes, the same for a seed: a linear map of x (2, 5, 8), three to eight steps, one more map."""

from __future__ import annotations

import random
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F

from axes_oracles import captured
from laconic.ir.program import Program

T: TypeAlias = torch.Tensor
WIDTHS = (4, 6, 8, 12)


class Weights:
    """Weights as they are asked for: noted in a first run, read from a module in the second."""

    def __init__(self, source: Any = None) -> None:
        self.source, self.shapes, self.count = source, dict[str, tuple[int, ...]](), 0

    def __call__(self, *shape: int) -> T:
        name = f"w{self.count}"
        self.count += 1
        self.shapes[name] = shape
        return torch.ones(shape) if self.source is None else getattr(self.source, name)


class Run:
    """One run: the values so far, and the steps that may come next."""

    def __init__(self, seed: int, weights: Weights) -> None:
        self.draw, self.w, self.values = random.Random(seed), weights, list[T]()

    def __call__(self, x: T) -> T:
        h = self.linear(x)
        for _ in range(self.draw.randint(3, 8)):
            self.values.append(h)
            h = getattr(self, self.draw.choice(STEPS))(h)
            if h.shape[-1] > 48:
                h = self.linear(h)
        return F.linear(h, self.w(4, h.shape[-1]))

    def linear(self, h: T) -> T:
        width = self.draw.choice(WIDTHS)
        return F.linear(h, self.w(width, h.shape[-1]), self.w(width) if self.draw.random() < 0.5 else None)

    def activation(self, h: T) -> T:
        return self.draw.choice([F.relu, F.gelu, torch.tanh, torch.sigmoid, F.silu])(h)

    def two(self, h: T) -> tuple[int, int]:
        """A width as a product."""
        width = h.shape[-1]
        first = self.draw.choice([n for n in range(1, width + 1) if width % n == 0])
        return first, width // first

    def shuffled(self, h: T) -> T:
        return h.reshape(2, 5, *self.two(h)).transpose(-1, -2).reshape(h.shape)

    def halves_added(self, h: T) -> T:
        half = h.shape[-1] // 2
        return h if not half else h[..., :half] + h[..., half : 2 * half]

    def parts_joined(self, h: T) -> T:
        return torch.cat([h, self.draw.choice(self.values)], -1)

    def rotated(self, h: T) -> T:
        if h.shape[-1] % 2:
            return h
        a, b = h.chunk(2, -1)
        return h * self.w(h.shape[-1]) + torch.cat([-b, a], -1)

    def with_an_earlier_one(self, h: T) -> T:
        others = [v for v in self.values if v.shape == h.shape]
        other = self.draw.choice(others)
        return h + other if self.draw.random() < 0.5 else h * other

    def in_heads(self, h: T) -> T:
        heads, width = self.two(h)
        return (
            (h.reshape(2, 5, heads, width).transpose(1, 2) @ self.w(heads, width, width))
            .transpose(1, 2)
            .reshape(h.shape)
        )

    def attended(self, h: T) -> T:
        heads, width = self.two(h)
        q, k, v = (F.linear(h, self.w(h.shape[-1], h.shape[-1])) for _ in range(3))
        q, k, v = (y.reshape(2, 5, heads, width).transpose(1, 2) for y in (q, k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.draw.random() < 0.5)
        return mixed.transpose(1, 2).reshape(h.shape)

    def summed(self, h: T) -> T:
        return h.reshape(2, 5, *self.two(h)).sum(self.draw.choice([-1, -2])).reshape(2, 5, -1)

    def softmax(self, h: T) -> T:
        return h.reshape(2, 5, *self.two(h)).softmax(self.draw.choice([-1, -2])).reshape(h.shape)

    def gated(self, h: T) -> T:
        width = self.draw.choice(WIDTHS)
        y = F.linear(h, self.w(2 * width, h.shape[-1]))
        return self.draw.choice(
            [
                lambda: F.glu(y),
                lambda: F.silu(y[..., ::2]) * y[..., 1::2],
                lambda: F.silu(y[..., :width]) * y[..., width:],
            ]
        )()

    def normed(self, h: T) -> T:
        size = (h.shape[-1],)
        return F.layer_norm(h, size, self.w(*size), self.w(*size)) if self.draw.random() < 0.5 else F.rms_norm(h, size)

    def in_order(self, h: T) -> T:
        return self.draw.choice([lambda: h.cumsum(-1), lambda: h.flip(-1) + h, lambda: h.roll(1, -1) * h])()

    def best(self, h: T) -> T:
        return h.gather(-1, h.topk(self.draw.randint(1, h.shape[-1]), -1).indices)

    def repeated(self, h: T) -> T:
        return h.repeat(1, 1, 2) if self.draw.random() < 0.5 else h.repeat_interleave(2, -1)

    def convolved(self, h: T) -> T:
        width, groups = h.shape[-1], self.two(h)[0]
        return F.conv1d(h.transpose(1, 2), self.w(width, width // groups, 3), padding=1, groups=groups).transpose(1, 2)

    def gram(self, h: T) -> T:
        return h @ (h.transpose(1, 2) @ h)

    def part(self, h: T) -> T:
        start = self.draw.randint(0, h.shape[-1] - 1)
        return h[..., start:]

    def some(self, h: T) -> T:
        return h[..., :: self.draw.randint(1, 3)]

    def restacked(self, h: T) -> T:
        parts = h.reshape(2, 5, *self.two(h)).unbind(-2)
        return torch.stack([p * p.mean() for p in reversed(parts)], -2).reshape(h.shape)

    def looked_up(self, h: T) -> T:
        return h * F.embedding(torch.arange(h.shape[-1]), self.w(h.shape[-1], 1))[:, 0]

    def counted(self, h: T) -> T:
        return h * torch.arange(h.shape[-1])

    def padded(self, h: T) -> T:
        return F.pad(h, (self.draw.randint(0, 2), self.draw.randint(0, 2)))


STEPS = [name for name in vars(Run) if not name.startswith("_") and name not in ("two",)]


def program_of(seed: int) -> Program:
    """The program of a seed, captured."""
    torch.manual_seed(seed)
    noted = Weights()
    Run(seed, noted)(torch.zeros(2, 5, 8))
    return captured(noted.shapes, lambda w, x: Run(seed, Weights(w))(x), [torch.randn(2, 5, 8)])
