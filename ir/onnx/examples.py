"""Example inputs for a graph: sizes for its axes, and numbers that it can take.

A whole-numbered input that reaches the indices of a `Gather` along an axis of a known size is drawn below that size,
as token ids are; any other is drawn as a mask of ones and zeros. Axes of one name have one size.
"""

from __future__ import annotations

import ast
import logging
import math
import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx_ir
import torch
from torch.export import Dim

from laconic.ir.errors import UnsupportedError
from laconic.ir.onnx.dtypes import dtype_of

log = logging.getLogger(__name__)

#: Sizes of the dynamic axes, in the order in which they appear; of those of pictures, and the most that is drawn.
_SIZES, _PIXELS = (3, 7, 5, 11, 13, 17, 19, 23), 64
_MOST = 1 << 28
#: Through these, indices stay what they are.
_PASSING = ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze", "Flatten", "Transpose", "Expand", "Slice", "Clip")
_OPERATORS: dict[type[ast.operator], Any] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv,
    ast.Div: operator.floordiv,
}


def examples(
    inputs: Mapping[str, onnx_ir.Value], weights: Mapping[str, torch.Tensor], path: Path, seed: int
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors, and torch.export's dynamic shapes, by parameter name.

    Raises UnsupportedError for an input that is no tensor of a known dtype and rank, or too large to be drawn.
    """
    generator = torch.Generator().manual_seed(seed)
    axes = _Axes(inputs.values())
    kwargs: dict[str, torch.Tensor] = {}
    shapes: dict[str, Any] = {}
    for name, value in inputs.items():
        dtype = _dtype(value, path)
        sizes = [axes.size(value, axis) for axis in range(len(value.shape or ()))]
        if math.prod(sizes) > _MOST:
            raise UnsupportedError(f"the input {value.name!r} is too large to draw", where=str(path), why=f"{sizes}")
        kwargs[name] = _drawn(value, dtype, sizes, weights, generator)
        dims = {axis: dim for axis in range(len(sizes)) if (dim := axes.dim(value, axis)) is not None}
        shapes[name] = dims or None
    return kwargs, shapes


def _dtype(value: onnx_ir.Value, path: Path) -> torch.dtype:
    dtype = dtype_of(value.dtype) if isinstance(value.type, onnx_ir.TensorType) and value.dtype is not None else None
    if dtype is None or value.shape is None:
        kind = value.type if dtype is None else "a tensor of unknown rank"
        raise UnsupportedError(
            f"the input {value.name!r} is {kind}",
            where=str(path),
            why="inputs are tensors of a known dtype and rank",
            hint="state its type and shape: onnx.helper.make_tensor_value_info",
        )
    return dtype


# ------------------------------------------------------------------------------------------------- sizes


class _Axes:
    """Sizes and Dims of the axes of the graph's inputs."""

    def __init__(self, inputs: Any) -> None:
        self.sizes: dict[str, int] = {}
        self.dims: dict[str, Any] = {}
        self.taken: set[str] = set()
        for value in inputs:
            for axis, size in enumerate(value.shape or ()):
                said = _said(size)
                if said.isidentifier() and said not in self.sizes:
                    self.sizes[said] = _PIXELS if _is_pixel(value, axis) else _SIZES[len(self.sizes) % len(_SIZES)]

    def size(self, value: onnx_ir.Value, axis: int) -> int:
        assert value.shape is not None
        size = value.shape[axis]
        if isinstance(size, int) and size >= 0:
            return size
        said = _said(size)
        if said in self.sizes:
            return self.sizes[said]
        found = _evaluated(said, self.sizes) if said else None
        if found is None:
            found = _PIXELS if _is_pixel(value, axis) else _SIZES[axis % len(_SIZES)]
            if said:
                self.sizes[said] = found
        return found

    def dim(self, value: onnx_ir.Value, axis: int) -> Any:
        """A Dim under the axis's name; AUTO for an axis that has none, or is computed of others."""
        assert value.shape is not None
        size = value.shape[axis]
        if isinstance(size, int) and size >= 0:
            return None
        said = _said(size)
        if not said or (
            not said.isidentifier() and _evaluated(said, self.sizes) is not None and said not in self.sizes
        ):
            return Dim.AUTO
        if said not in self.dims:
            self.dims[said] = Dim(self._free(re.sub(r"\W", "_", said, flags=re.ASCII)), min=1)
        return self.dims[said]

    def _free(self, stem: str) -> str:
        name = stem if stem.isidentifier() else f"axis_{stem}"
        while name in self.taken:
            name += "_"
        self.taken.add(name)
        return name


def _said(size: Any) -> str:
    """What the file calls an axis; "" for a fixed or nameless one (some write -1 for it)."""
    return "" if isinstance(size, int) else str(size.value or "").strip()


def _is_pixel(value: onnx_ir.Value, axis: int) -> bool:
    return (
        axis >= 2 and len(value.shape or ()) in (4, 5) and value.dtype is not None and value.dtype.is_floating_point()
    )


def _evaluated(said: str, sizes: Mapping[str, int]) -> int | None:
    """The value of an expression of sizes, such as `past_sequence + 1`; None for what is none."""

    def value(node: ast.AST) -> int:
        if isinstance(node, ast.Constant) and type(node.value) is int:
            return node.value
        if isinstance(node, ast.Name) and node.id in sizes:
            return sizes[node.id]
        if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
            return int(_OPERATORS[type(node.op)](value(node.left), value(node.right)))
        raise ValueError(ast.dump(node))

    try:
        found = value(ast.parse(said, mode="eval").body)
    except (ValueError, SyntaxError, ZeroDivisionError, RecursionError, MemoryError):
        return None
    return found if 0 < found < 2**31 else None


# ------------------------------------------------------------------------------------------------- numbers


def _drawn(
    value: onnx_ir.Value,
    dtype: torch.dtype,
    sizes: list[int],
    weights: Mapping[str, torch.Tensor],
    generator: torch.Generator,
) -> torch.Tensor:
    if dtype.is_floating_point or dtype.is_complex:
        return torch.randn(sizes, generator=generator, dtype=_wide(dtype)).to(dtype)
    limit = _index_limit(value, weights, set())
    if limit is not None:
        return torch.randint(0, max(1, min(limit, _highest(dtype))), sizes, generator=generator).to(dtype)
    if dtype in (torch.uint8, torch.int8):
        return torch.randint(0, _highest(dtype), sizes, generator=generator).to(dtype)
    if not sizes or 0 in sizes:
        return torch.ones(sizes, dtype=dtype)
    kept = torch.randint(1, sizes[-1] + 1, [*sizes[:-1], 1], generator=generator)
    kept.view(-1)[0] = sizes[-1]
    return (torch.arange(sizes[-1]) < kept).to(dtype)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype.itemsize >= 4 else torch.float32


def _highest(dtype: torch.dtype) -> int:
    return 2 if dtype is torch.bool else min(torch.iinfo(dtype).max, 2**62)


def _index_limit(value: onnx_ir.Value, weights: Mapping[str, torch.Tensor], seen: set[int]) -> int | None:
    """The least size of an axis that these numbers are indices of; None if they are none, as far as can be seen."""
    if id(value) in seen:
        return None
    seen.add(id(value))
    found: list[int] = []
    for node, place in value.uses():
        limit: int | None = None
        if node.op_type == "Gather" and place == 1:
            limit = _axis_size(node, weights)
        elif node.op_type in _PASSING and place == 0:
            limit = _index_limit(node.outputs[0], weights, seen)
        if limit is not None:
            found.append(limit)
    return min(found, default=None)


def _axis_size(node: onnx_ir.Node, weights: Mapping[str, torch.Tensor]) -> int | None:
    """The size of the axis that a Gather reads along, if the file states it."""
    data, given = node.inputs[0], node.attributes.get("axis")
    axis = given.as_int() if given is not None else 0
    if data is None:
        return None
    known: list[Any] = list(weights[str(data.name)].shape) if data.name in weights else list(data.shape or ())
    if not -len(known) <= axis < len(known):
        return None
    return known[axis] if isinstance(known[axis], int) and known[axis] > 0 else None
