"""Resize: along each axis, a weighted sum of the values at a few places. And sampling at given places."""

from __future__ import annotations

from fractions import Fraction
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.ir.onnx.ops_layout import axes_of
from laconic.ir.onnx.shapes import Numbers, greatest
from laconic.ir.onnx.table import Refused, op
from laconic.ir.torch_private import is_symbolic

Coordinates = Literal["half_pixel", "pytorch_half_pixel", "align_corners", "asymmetric", "half_pixel_symmetric"]
Mode = Literal["nearest", "linear", "cubic"]
Nearest = Literal["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]
_TORCH_LINEAR = {3: "linear", 4: "bilinear", 5: "trilinear"}


@op("Resize", since=11)
def resize(
    x: Tensor,
    roi: Tensor | None = None,
    scales: Numbers | None = None,
    sizes: Numbers | None = None,
    *,
    antialias: Literal[0] = 0,
    axes: tuple[int, ...] | None = None,
    coordinate_transformation_mode: Coordinates = "half_pixel",
    cubic_coeff_a: float = -0.75,
    exclude_outside: Literal[0, 1] = 0,
    extrapolation_value: float = 0.0,
    keep_aspect_ratio_policy: Literal["stretch"] = "stretch",
    mode: Mode = "nearest",
    nearest_mode: Nearest = "round_prefer_floor",
) -> Tensor:
    chosen = axes_of(axes, x.ndim)
    wanted: list[Any]
    if sizes is not None and sizes.flat():
        wanted = sizes.flat()
        factors: list[Any] = [None] * len(wanted)
    elif scales is not None:
        factors = scales.flat()
        wanted = [_scaled(x.shape[axis], factor) for axis, factor in zip(chosen, factors, strict=True)]
    else:
        raise Refused("it has neither scales nor sizes")
    changed = [
        (axis, size, factor)
        for axis, size, factor in zip(chosen, wanted, factors, strict=True)
        if is_symbolic(size) or is_symbolic(x.shape[axis]) or size != x.shape[axis] or factor not in (None, 1)
    ]
    whole = all(factor is None or factor == int(factor) for _, _, factor in changed)
    if mode == "linear" and changed and whole and not exclude_outside:
        found = _fused(x, changed, coordinate_transformation_mode)
        if found is not None:
            return found
    y = x if x.is_floating_point() else x.to(torch.float32)
    for axis, size, factor in changed:
        places = _places(x.shape[axis], size, factor, coordinate_transformation_mode, x.device)
        if mode == "nearest":
            y = torch.index_select(y, axis, _nearest(places, nearest_mode, x.shape[axis]))
        else:
            y = _weighted(y, axis, places, mode, cubic_coeff_a, bool(exclude_outside))
    return y if x.is_floating_point() else y.to(x.dtype)


@op("Resize", "Upsample", since=9)
def resize_by_scales(x: Tensor, scales: Numbers, *, mode: Literal["nearest", "linear"] = "nearest") -> Tensor:
    """Opset 10 and before: coordinates divided by the scale, rounded down."""
    return resize(x, None, scales, mode=mode, coordinate_transformation_mode="asymmetric", nearest_mode="floor")


@op("Upsample", since=7)
def upsample(x: Tensor, *, scales: tuple[float, ...], mode: Literal["nearest", "linear"] = "nearest") -> Tensor:
    return resize_by_scales(x, Numbers.of(scales, torch.float32), mode=mode)


def _scaled(size: Any, factor: float) -> Any:
    """floor(size * factor), in whole numbers where the factor is a simple fraction."""
    simple = Fraction(factor).limit_denominator(64)
    if float(np.float32(float(simple))) == float(np.float32(factor)):
        return size * simple.numerator // simple.denominator
    if is_symbolic(size):
        raise Refused(f"an axis whose size varies is scaled by {factor}, which is no simple fraction")
    return int(np.float32(size) * np.float32(factor))


def _fused(x: Tensor, changed: list[tuple[int, Any, Any]], coordinates: str) -> Tensor | None:
    """Torch's own linear interpolation, if it says the same."""
    if x.ndim not in _TORCH_LINEAR or not x.is_floating_point() or any(axis < 2 for axis, _, _ in changed):
        return None
    if coordinates not in ("half_pixel", "align_corners"):
        return None
    target = list(x.shape[2:])
    for axis, size, _ in changed:
        target[axis - 2] = size
    return F.interpolate(x, target, mode=_TORCH_LINEAR[x.ndim], align_corners=coordinates == "align_corners")


def _places(size: Any, wanted: Any, factor: float | None, coordinates: str, device: torch.device) -> Tensor:
    """Where along an axis of `size` each of the `wanted` new values is read: float64[wanted]."""
    steps = torch.arange(wanted, dtype=torch.float64, device=device)
    exact = wanted if factor is None else size * factor
    if coordinates == "align_corners":
        return steps * (size - 1) / greatest(exact - 1, 1) if not _is_one(exact) else steps * 0
    if coordinates == "pytorch_half_pixel" and _is_one(exact):
        return steps * 0 - 0.5
    scaled = steps if coordinates == "asymmetric" else steps + 0.5
    scaled = scaled * size / wanted if factor is None else scaled / factor
    if coordinates == "asymmetric":
        return scaled
    moved = size / 2 * (1 - wanted / exact) if coordinates == "half_pixel_symmetric" and factor is not None else 0
    return scaled - 0.5 + moved


def _is_one(size: Any) -> bool:
    return not is_symbolic(size) and size == 1


def _nearest(places: Tensor, how: str, size: Any) -> Tensor:
    if how == "floor":
        found = torch.floor(places)
    elif how == "ceil":
        found = torch.ceil(places)
    else:
        found = torch.ceil(places - 0.5) if how == "round_prefer_floor" else torch.floor(places + 0.5)
    return torch.clamp(found.to(torch.int64), 0, size - 1)


def _weighted(x: Tensor, axis: int, places: Tensor, mode: str, a: float, inside: bool) -> Tensor:
    """Linear (two places) or cubic (four). Beyond the ends stand the values at the ends, with `inside` nothing."""
    low = torch.floor(places)
    ratio = places - low
    weights = _linear(ratio) if mode == "linear" else _cubic(ratio, a)
    first = 0 if mode == "linear" else -1
    where = [low.to(torch.int64) + first + k for k in range(len(weights))]
    last = x.shape[axis] - 1
    if inside:
        weights = [torch.where((p >= 0) & (p <= last), w, 0) for w, p in zip(weights, where, strict=True)]
        total = sum(weights[1:], weights[0])
        weights = [w / total for w in weights]
    shape = [-1] + [1] * (x.ndim - axis - 1)
    parts = [
        torch.index_select(x, axis, torch.clamp(p, 0, last)) * w.to(x.dtype).reshape(shape)
        for w, p in zip(weights, where, strict=True)
    ]
    return sum(parts[1:], parts[0])


def _linear(ratio: Tensor) -> list[Tensor]:
    return [1 - ratio, ratio]


def _cubic(ratio: Tensor, a: float) -> list[Tensor]:
    def near(t: Tensor) -> Tensor:
        return ((a + 2) * t - (a + 3)) * t * t + 1

    def far(t: Tensor) -> Tensor:
        return ((a * t - 5 * a) * t + 8 * a) * t - 4 * a

    return [far(ratio + 1), near(ratio), near(1 - ratio), far(2 - ratio)]


# ------------------------------------------------------------------------------------------------- sampling

_SAMPLING = {"linear": "bilinear", "cubic": "bicubic"}


@op("GridSample", since=20)
def grid_sample(
    x: Tensor,
    grid: Tensor,
    *,
    align_corners: Literal[0, 1] = 0,
    mode: Literal["linear", "nearest", "cubic"] = "linear",
    padding_mode: Literal["zeros", "border", "reflection"] = "zeros",
) -> Tensor:
    return F.grid_sample(x, grid, _SAMPLING.get(mode, mode), padding_mode, bool(align_corners))


@op("GridSample", since=16)
def grid_sample_in_torchs_words(
    x: Tensor,
    grid: Tensor,
    *,
    align_corners: Literal[0, 1] = 0,
    mode: Literal["bilinear", "nearest", "bicubic"] = "bilinear",
    padding_mode: Literal["zeros", "border", "reflection"] = "zeros",
) -> Tensor:
    return F.grid_sample(x, grid, mode, padding_mode, bool(align_corners))
