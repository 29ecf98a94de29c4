"""The type of a value: dtype, sizes, strides and device, with sizes as ints or sympy expressions.

Types are read off fake tensors without guarding, compared, and written as text (`f32[batch, 384]`). They are what the
verifier recomputes and what the text form declares.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias

import sympy
import torch

from laconic.ir.torch_private import expression

Size: TypeAlias = Any  # int | sympy.Expr
_WORD = re.compile(r"[A-Za-z_][\w.]*\Z", re.ASCII)

DTYPE_NAMES: dict[torch.dtype, str] = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float8_e4m3fn: "f8e4m3fn",
    torch.float8_e5m2: "f8e5m2",
    torch.complex64: "c64",
    torch.complex128: "c128",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int16: "i16",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.uint16: "u16",
    torch.uint32: "u32",
    torch.uint64: "u64",
    torch.bool: "bool",
}
DTYPES = {name: dtype for dtype, name in DTYPE_NAMES.items()}


@dataclass(frozen=True)
class TensorType:
    """A tensor's dtype, sizes, strides (in elements) and device."""

    dtype: torch.dtype
    shape: tuple[Size, ...]
    stride: tuple[Size, ...]
    device: str = "cpu"

    @property
    def contiguous(self) -> bool:
        return all(
            same_size(s, c) or n == 1
            for n, s, c in zip(self.shape, self.stride, contiguous_stride(self.shape), strict=True)
        )


@dataclass(frozen=True)
class NumberType:
    """A Python number (`kind` is int, float or bool) with its symbolic or constant value."""

    kind: str
    value: Any


@dataclass(frozen=True)
class TupleType:
    """Several values of one node; None stands for an absent one."""

    parts: tuple[ValueType | None, ...]


ValueType = TensorType | NumberType | TupleType


def type_of(value: Any) -> ValueType | None:
    """The type of a fake or real value; None for None.

    Raises TypeError for what is no tensor, number or sequence of these.
    """
    if value is None:
        return None
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            raise TypeError(f"a tensor with layout {value.layout}")
        return TensorType(
            value.dtype,
            tuple(expression(s) for s in value.shape),
            tuple(expression(s) for s in value.stride()),
            str(value.device),
        )
    if isinstance(value, (bool, torch.SymBool)):
        return NumberType("bool", expression(value))
    if isinstance(value, (int, torch.SymInt)):
        return NumberType("int", expression(value))
    if isinstance(value, (float, torch.SymFloat)):
        return NumberType("float", expression(value))
    if isinstance(value, (tuple, list)):
        return TupleType(tuple(type_of(v) for v in value))
    raise TypeError(f"a value of type {type(value).__name__}")


def contiguous_stride(shape: tuple[Size, ...]) -> tuple[Size, ...]:
    """The strides of a dense row-major tensor, as torch counts them (a size of 0 or 1 counts as 1)."""
    strides: list[Size] = []
    step: Size = 1
    for size in reversed(shape):
        strides.append(step)
        step = step * (size if not isinstance(size, int) or size > 1 else 1)
    return tuple(reversed(strides))


def same_size(a: Any, b: Any) -> bool:
    """Whether two sizes are equal for every value of their symbols; never guards."""
    if a is b or a == b:
        return True
    if isinstance(a, int) and isinstance(b, int):
        return False
    difference = sympy.sympify(a) - sympy.sympify(b)
    return bool(difference == 0 or sympy.expand(difference) == 0)


def same_type(a: ValueType | None, b: ValueType | None, *, strides: bool = True) -> bool:
    """Whether two types agree. Strides of axes of size 1 carry no meaning and are not compared."""
    if isinstance(a, TensorType) and isinstance(b, TensorType):
        return (
            a.dtype == b.dtype
            and a.device == b.device
            and len(a.shape) == len(b.shape)
            and all(same_size(x, y) for x, y in zip(a.shape, b.shape, strict=True))
            and (
                not strides
                or all(n == 1 or same_size(x, y) for n, x, y in zip(a.shape, a.stride, b.stride, strict=True))
            )
        )
    if isinstance(a, NumberType) and isinstance(b, NumberType):
        return a.kind == b.kind and (same_size(a.value, b.value) if a.kind == "int" else a.value == b.value)
    if isinstance(a, TupleType) and isinstance(b, TupleType):
        return len(a.parts) == len(b.parts) and all(
            same_type(x, y, strides=strides) for x, y in zip(a.parts, b.parts, strict=True)
        )
    return a is None and b is None


def name_text(name: str) -> str:
    """The name of a size, argument, entry or fact: bare if it is a plain word, else in quotes."""
    return name if _WORD.match(name) else json.dumps(name)


def size_text(size: Any, names: Mapping[str, str]) -> str:
    """A size as text, with symbols under their display names."""
    if isinstance(size, sympy.Expr):
        return str(size.xreplace({s: sympy.Symbol(name_text(names.get(s.name, s.name))) for s in size.free_symbols}))
    return str(size)


def number_text(kind: NumberType, names: Mapping[str, str]) -> str:
    """A number: a constant or a size as it is, any other value that depends on sizes as `float(?)`, `bool(?)`."""
    if kind.kind == "int" or not isinstance(kind.value, sympy.Basic):
        return f"{kind.kind}({size_text(kind.value, names)})"
    if kind.value.free_symbols:
        return f"{kind.kind}(?)"
    return f"{kind.kind}({float(kind.value) if kind.kind == 'float' else bool(kind.value)})"


def type_text(kind: ValueType | None, names: Mapping[str, str]) -> str:
    """A type as text: `f32[batch, 8]`, with strides in braces unless the tensor is contiguous."""
    if kind is None:
        return "none"
    if isinstance(kind, TensorType):
        dtype = DTYPE_NAMES.get(kind.dtype, str(kind.dtype).removeprefix("torch."))
        text = f"{dtype}[{', '.join(size_text(s, names) for s in kind.shape)}]"
        if not kind.contiguous:
            text += "{" + ", ".join(size_text(s, names) for s in kind.stride) + "}"
        return text if kind.device == "cpu" else f"{text}@{kind.device}"
    if isinstance(kind, NumberType):
        return number_text(kind, names)
    return "(" + ", ".join(type_text(p, names) for p in kind.parts) + ")"


def value_text(value: Any, names: Mapping[str, str]) -> str:
    return type_text(type_of(value), names)


def nbytes(tensor: torch.Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def is_dense(tensor: torch.Tensor) -> bool:
    """Whether each element has bytes of its own and none lie between them, in whatever order of axes."""
    expected = 1
    for size, stride in sorted(zip(tensor.shape, tensor.stride(), strict=True), key=lambda pair: pair[1]):
        if size == 1:
            continue
        if stride != expected:
            return False
        expected *= size
    return tensor.numel() > 0
