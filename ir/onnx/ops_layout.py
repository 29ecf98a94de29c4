"""Ops that rearrange, cut and make tensors. Those that graphs compute sizes with take numbers too."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.ir.onnx.dtypes import dtype_of
from laconic.ir.onnx.shapes import MOST, WHOLE, Numbers, Value, greatest, known, tensor_of
from laconic.ir.onnx.table import Refused, op
from laconic.ir.torch_private import is_symbolic


def axis_of(axis: int, rank: int) -> int:
    """An axis counted from the front. Raises IndexError if there is none."""
    if not -rank <= axis < max(rank, 1):
        raise IndexError(f"axis {axis} of a tensor with {rank} axes")
    return axis % rank if rank else 0


def axes_of(axes: Numbers | Sequence[int] | None, rank: int) -> list[int]:
    """Axes counted from the front, in order; all of them for None."""
    if axes is None:
        return list(range(rank))
    listed = axes.flat() if isinstance(axes, Numbers) else axes
    return [axis_of(int(axis), rank) for axis in listed]


def _fixed(sizes: Sequence[Any]) -> bool:
    return not any(map(is_symbolic, sizes))


# ------------------------------------------------------------------------------------------------- sizes


@op("Shape", since=15)
def shape(x: Value, *, start: int = 0, end: int | None = None) -> Numbers:
    return Numbers.of(x.shape[start:end])


@op("Shape")
def whole_shape(x: Value) -> Numbers:
    return Numbers.of(x.shape)


@op("Size")
def size(x: Value) -> Numbers:
    return Numbers.scalar(math.prod(x.shape))


@op("Reshape")
def reshape(x: Value, sizes: Numbers, *, allowzero: Literal[0, 1] = 0) -> Value:
    wanted = sizes.flat()
    if not allowzero:
        wanted = [x.shape[k] if not is_symbolic(n) and n == 0 else n for k, n in enumerate(wanted)]
    return x.reshape(wanted) if _fixed(wanted) else tensor_of(x).reshape(wanted)


@op("Flatten")
def flatten(x: Value, *, axis: int = 1) -> Value:
    cut = axis if axis == x.ndim else axis_of(axis, x.ndim)
    wanted = [math.prod(x.shape[:cut]), math.prod(x.shape[cut:])]
    return x.reshape(wanted) if _fixed(wanted) else tensor_of(x).reshape(wanted)


@op("Transpose")
def transpose(x: Value, *, perm: tuple[int, ...] | None = None) -> Value:
    return x.permute(perm if perm is not None else tuple(range(x.ndim - 1, -1, -1)))


@op("Squeeze", since=13)
def squeeze(x: Value, axes: Numbers | None = None) -> Value:
    return squeeze_attributes(x, axes=None if axes is None else tuple(axes.flat()))


@op("Squeeze")
def squeeze_attributes(x: Value, *, axes: tuple[int, ...] | None = None) -> Value:
    if axes is None:
        chosen = [axis for axis, n in enumerate(x.shape) if not is_symbolic(n) and n == 1]
    else:
        chosen = axes_of(axes, x.ndim)
    wrong = [axis for axis in chosen if x.shape[axis] != 1]
    if wrong:
        raise ValueError(f"axis {wrong[0]} has the size {x.shape[wrong[0]]}, and only a size of 1 can be taken away")
    if isinstance(x, Numbers):
        return x.reshape([n for axis, n in enumerate(x.shape) if axis not in chosen])
    return torch.squeeze(x, chosen) if chosen else x


@op("Unsqueeze", since=13)
def unsqueeze(x: Value, axes: Numbers) -> Value:
    return unsqueeze_attributes(x, axes=tuple(axes.flat()))


@op("Unsqueeze")
def unsqueeze_attributes(x: Value, *, axes: tuple[int, ...]) -> Value:
    for axis in sorted(axes_of(axes, x.ndim + len(axes))):
        x = x.reshape([*x.shape[:axis], 1, *x.shape[axis:]]) if isinstance(x, Numbers) else torch.unsqueeze(x, axis)
    return x


@op("Expand")
def expand(x: Value, sizes: Numbers) -> Value:
    asked = sizes.flat()
    rank = max(len(asked), x.ndim)
    asked, own = [1] * (rank - len(asked)) + asked, [1] * (rank - x.ndim) + list(x.shape)
    wanted = [theirs if not is_symbolic(mine) and mine == 1 else mine for mine, theirs in zip(own, asked, strict=True)]
    for mine, theirs in zip(own, asked, strict=True):
        if _fixed((mine, theirs)) and mine != theirs and 1 not in (mine, theirs):
            raise ValueError(f"a size of {mine} does not broadcast to {theirs}")
    if isinstance(x, Numbers) and _fixed(wanted) and math.prod(wanted) <= MOST:
        return x.expand(wanted)
    return tensor_of(x).expand(wanted)


# ------------------------------------------------------------------------------------------------- parts


@op("Concat")
def concat(*parts: Value, axis: int) -> Value:
    if known(*parts) and sum(math.prod(part.shape) for part in parts) <= MOST:
        arrays = [part.values for part in parts if isinstance(part, Numbers)]
        return Numbers(np.concatenate(arrays, axis=axis), parts[0].dtype)
    return torch.cat([tensor_of(part) for part in parts], axis)


@op("Split", since=18)
def split(
    x: Value, sizes: Numbers | None = None, *, axis: int = 0, num_outputs: int | None = None, outputs: int
) -> tuple[Value, ...]:
    if sizes is not None:
        return _split(x, sizes.flat(), axis)
    count = num_outputs or outputs
    whole = x.shape[axis]
    step = -(-whole // count)
    return _split(x, [step] * (count - 1) + [whole - step * (count - 1)], axis)


@op("Split", since=13)
def split_evenly(x: Value, sizes: Numbers | None = None, *, axis: int = 0, outputs: int) -> tuple[Value, ...]:
    return split(x, sizes, axis=axis, outputs=outputs)


@op("Split")
def split_attributes(
    x: Value, *, axis: int = 0, split: tuple[int, ...] | None = None, outputs: int
) -> tuple[Value, ...]:
    return split_evenly(x, None if split is None else Numbers.of(split), axis=axis, outputs=outputs)


def _split(x: Value, sizes: list[Any], axis: int) -> tuple[Value, ...]:
    if isinstance(x, Numbers) and _fixed(sizes):
        stops = np.cumsum(sizes)
        return tuple(
            x[(slice(None),) * axis_of(axis, x.ndim) + (slice(b - n, b),)] for n, b in zip(sizes, stops, strict=True)
        )
    return tuple(torch.split(tensor_of(x), sizes, axis))


@op("Slice", since=10)
def slice_(
    x: Value, starts: Numbers, ends: Numbers, axes: Numbers | None = None, steps: Numbers | None = None
) -> Value:
    chosen = axes_of(axes, x.ndim) if axes is not None else list(range(len(starts.flat())))
    jumps = steps.flat() if steps is not None else [1] * len(chosen)
    for axis, start, end, step in zip(chosen, starts.flat(), ends.flat(), jumps, strict=True):
        x = _cut(x, axis, start, end, step)
    return x


@op("Slice")
def slice_attributes(
    x: Value, *, starts: tuple[int, ...], ends: tuple[int, ...], axes: tuple[int, ...] | None = None
) -> Value:
    return slice_(x, Numbers.of(starts), Numbers.of(ends), None if axes is None else Numbers.of(axes))


def _cut(x: Value, axis: int, start: Any, end: Any, step: Any) -> Value:
    """One axis of a slice; bounds mean what they mean in Python."""
    before = (slice(None),) * axis
    if isinstance(x, Numbers) and _fixed((start, end, step)):
        return x[(*before, slice(start, end, step))]
    tensor = tensor_of(x)
    if is_symbolic(step) or step == 0:
        raise Refused("its step is not a fixed number other than 0")
    if step > 0:
        if not is_symbolic(start) and start == 0 and not is_symbolic(end) and end >= 2**31 - 1 and step == 1:
            return tensor
        return tensor[(*before, slice(start, end, step))]
    whole = tensor.shape[axis]
    if is_symbolic(whole) or not _fixed((start, end)):
        if _fixed((start, end)) and (start == -1 or start >= 2**31 - 1) and end < -(2**31) + 2 and step == -1:
            return tensor.flip(axis)
        raise Refused("it goes backwards over a part of an axis whose size varies")
    chosen = range(*slice(start, end, step).indices(whole))
    if not chosen:
        return tensor[(*before, slice(0, 0))]
    return tensor[(*before, slice(chosen[-1], chosen[0] + 1, -step))].flip(axis)


@op("Tile")
def tile(x: Tensor, repeats: Numbers) -> Tensor:
    return x.repeat(*repeats.flat()) if x.ndim else x


# ------------------------------------------------------------------------------------------------- padding


PadMode = Literal["constant", "reflect", "edge", "wrap"]


@op("Pad", since=11)
def pad(
    x: Tensor, pads: Numbers, value: Value | None = None, axes: Numbers | None = None, *, mode: PadMode = "constant"
) -> Tensor:
    chosen = axes_of(axes, x.ndim)
    flat = pads.flat()
    ends = {axis: (flat[k], flat[k + len(chosen)]) for k, axis in enumerate(chosen)}
    if mode == "constant":
        amount = [n for axis in range(x.ndim - 1, -1, -1) for n in ends.get(axis, (0, 0))]
        if value is None or isinstance(value, Numbers):
            return F.pad(x, amount, value=0 if value is None else value.item())
        inside = F.pad(torch.ones_like(x, dtype=torch.bool), amount, value=False)
        return torch.where(inside, F.pad(x, amount), value)
    for axis, (low, high) in ends.items():
        x = _pad_axis(x, axis, low, high, mode)
    return x


@op("Pad", since=2)
def pad_attributes(
    x: Tensor, *, pads: tuple[int, ...], value: float = 0.0, mode: Literal["constant", "reflect", "edge"] = "constant"
) -> Tensor:
    return pad(x, Numbers.of(pads), Numbers.scalar(value, x.dtype), mode=mode)


def _pad_axis(x: Tensor, axis: int, low: Any, high: Any, mode: str) -> Tensor:
    """Padding along one axis by reading from where the values come from."""
    if _fixed((low, high)) and low == 0 and high == 0:
        return x
    last = x.shape[axis] - 1
    where = torch.arange(-low, x.shape[axis] + high, device=x.device)
    if mode == "edge":
        where = torch.clamp(where, 0, last)
    elif mode == "wrap":
        where = torch.remainder(where, last + 1)
    else:
        where = last - torch.abs(last - torch.remainder(where, greatest(2 * last, 1)))
    return torch.index_select(x, axis, where)


# ------------------------------------------------------------------------------------------------- made tensors

#: A range of no more elements may be a list of axes.
_FEW = 8


@op("ConstantOfShape")
def constant_of_shape(sizes: Numbers, *, value: Numbers | None = None) -> Value:
    filled = value if value is not None else Numbers.scalar(0.0, torch.float32)
    wanted = sizes.flat()
    if _fixed(wanted) and filled.dtype in WHOLE and 0 <= math.prod(wanted) <= MOST:
        return filled.reshape(()).expand(wanted)
    return torch.full(wanted, filled.item(), dtype=filled.dtype)


@op("Range")
def range_(start: Numbers, limit: Numbers, delta: Numbers, *, stash_type: Literal[1] = 1) -> Value:
    bounds = [start.item(), limit.item(), delta.item()]
    if start.dtype in WHOLE and _fixed(bounds) and len(range(*bounds)) <= _FEW:
        return Numbers.of(range(*bounds), start.dtype)
    return torch.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


@op("Trilu")
def trilu(x: Tensor, k: Numbers | None = None, *, upper: Literal[0, 1] = 1) -> Tensor:
    diagonal = 0 if k is None else k.item()
    return torch.triu(x, diagonal) if upper else torch.tril(x, diagonal)


@op("EyeLike")
def eye_like(x: Tensor, *, dtype: int | None = None, k: int = 0) -> Tensor:
    wanted = x.dtype if dtype is None else dtype_of(dtype)
    if wanted is None:
        raise Refused(f"there is no tensor of the ONNX element type {dtype} here")
    rows, columns = (torch.arange(n, device=x.device) for n in x.shape)
    return (rows[:, None] + k == columns).to(wanted)


@op("OneHot")
def one_hot(indices: Tensor, depth: Numbers, values: Tensor, *, axis: int = -1) -> Tensor:
    count = int(depth.item()) if _fixed(depth.flat()) else depth.item()
    whole = indices.to(torch.int64)
    wrapped = torch.where(whole < 0, whole + count, whole)
    place = axis_of(axis, indices.ndim + 1)
    row = torch.arange(count, device=indices.device).reshape([-1] + [1] * (indices.ndim - place))
    return torch.where(wrapped.unsqueeze(place) == row, values[1], values[0])


@op("DepthToSpace")
def depth_to_space(x: Tensor, *, blocksize: int, mode: Literal["DCR", "CRD"] = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    if mode == "CRD":
        return x.reshape(n, c // b**2, b, b, h, w).permute(0, 1, 4, 2, 5, 3).reshape(n, c // b**2, h * b, w * b)
    return x.reshape(n, b, b, c // b**2, h, w).permute(0, 3, 4, 1, 5, 2).reshape(n, c // b**2, h * b, w * b)


@op("SpaceToDepth")
def space_to_depth(x: Tensor, *, blocksize: int, mode: Literal["DCR", "CRD"] = "DCR") -> Tensor:
    n, c, h, w = x.shape
    b = blocksize
    cut = x.reshape(n, c, h // b, b, w // b, b)
    order = (0, 3, 5, 1, 2, 4) if mode == "DCR" else (0, 1, 3, 5, 2, 4)
    return cut.permute(order).reshape(n, c * b**2, h // b, w // b)
