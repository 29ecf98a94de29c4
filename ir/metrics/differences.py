"""How two results differ. Functions of tensors; undefined where dtypes or shapes differ (that raises ValueError)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from laconic.ir.memory import PIECE


def bit_equal(a: Any, b: Any) -> bool:
    """Whether two results are the same bits: -0.0 is not 0.0, a NaN equals the same NaN."""
    if not isinstance(a, torch.Tensor) or not isinstance(b, torch.Tensor):
        return type(a) is type(b) and (a == b or repr(a) == repr(b))
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    return all(torch.equal(_bits(x), _bits(y)) for x, y in _parts(a.detach(), b.detach()))


def _parts(a: torch.Tensor, b: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Two tensors of one shape, whole if that needs no copy, else piece by piece."""
    size = a.numel() * a.element_size()
    if size <= PIECE or (a.is_contiguous() and b.is_contiguous()):
        yield a, b
    elif a.shape[0] == 1:
        yield from _parts(a[0], b[0])
    else:
        rows = max(1, PIECE * a.shape[0] // size)
        for x, y in zip(torch.split(a, rows), torch.split(b, rows), strict=True):
            yield from _parts(x, y)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bool:
        return tensor
    return tensor.as_strided((tensor.numel(),), (1,)).view(torch.uint8)  # reshape may keep an odd stride of one element


def _comparable(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    wide = torch.complex128 if a.is_complex() else torch.float64
    return a.detach().to(wide).flatten(), b.detach().to(wide).flatten()


def max_abs(a: torch.Tensor, b: torch.Tensor) -> float:
    """The greatest absolute difference; 0 where both are NaN or the same infinity, inf where only one is."""
    x, y = _comparable(a, b)
    same = (x == y) | (x.isnan() & y.isnan())
    difference = torch.where(same, 0.0, (x - y).abs())
    difference = torch.where(difference.isnan(), float("inf"), difference)
    return float(difference.max()) if difference.numel() else 0.0


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """The cosine of the angle between two results, flattened; 1 for equal ones, also when both are zero."""
    x, y = _comparable(a, b)
    norms = float(x.norm() * y.norm())
    if norms == 0.0:
        return 1.0 if torch.equal(x, y) else 0.0
    return float((x @ y.conj()).real) / norms
