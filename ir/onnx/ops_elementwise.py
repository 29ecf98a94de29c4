"""Arithmetic, comparisons, logic, casts and activations."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import reduce
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from laconic.ir.onnx.dtypes import dtype_of
from laconic.ir.onnx.shapes import ROUNDING, WHOLE, Numbers, Value, compare, elementwise, known, tensor_of, truncated
from laconic.ir.onnx.table import Refused, add, op

# ------------------------------------------------------------------------------------------------- two operands


def _operands(a: Value, b: Value) -> tuple[Tensor, Any]:
    """A tensor, and beside it a tensor or, where that broadcasts alike, a number of the graph."""
    first = tensor_of(a)
    literal = isinstance(b, Numbers) and b.values.size == 1 and b.ndim <= first.ndim
    return first, b.item() if literal and isinstance(b, Numbers) else tensor_of(b)


def _binary(
    name: str,
    on_tensors: Callable[..., Tensor],
    on_numbers: Callable[..., Any],
    swapped: Callable[..., Tensor] | None = None,
) -> None:
    """Arithmetic; `swapped` is the tensor function with its operands exchanged, where there is one."""

    def function(a: Value, b: Value) -> Value:
        if isinstance(a, Numbers) and isinstance(b, Numbers):
            found = elementwise(on_numbers, a.dtype, a, b)
            if found is not None:
                return found
        if isinstance(a, Numbers) and swapped is not None:
            return swapped(*_operands(b, a))
        return on_tensors(*_operands(a, b))

    add(name, function)


def _comparison(
    name: str, on_tensors: Callable[..., Tensor], on_numbers: Callable[..., Any], swapped: Callable[..., Tensor]
) -> None:
    def function(a: Value, b: Value) -> Value:
        if isinstance(a, Numbers) and isinstance(b, Numbers):
            return compare(on_numbers, a, b)
        if isinstance(a, Numbers):
            return swapped(*_operands(b, a))
        return on_tensors(*_operands(a, b))

    add(name, function)


def _divide(a: Tensor, b: Any) -> Tensor:
    return torch.div(a, b, rounding_mode=None if a.is_floating_point() else "trunc")


def _divide_numbers(a: Any, b: Any) -> Any:
    return a / b if isinstance(a, float) else truncated(a, b)


_binary("Add", torch.add, operator.add, torch.add)
_binary("Sub", torch.sub, operator.sub)
_binary("Mul", torch.mul, operator.mul, torch.mul)
_binary("Div", _divide, _divide_numbers)
_comparison("Equal", torch.eq, operator.eq, torch.eq)
_comparison("Greater", torch.gt, operator.gt, torch.lt)
_comparison("GreaterOrEqual", torch.ge, operator.ge, torch.le)
_comparison("Less", torch.lt, operator.lt, torch.gt)
_comparison("LessOrEqual", torch.le, operator.le, torch.ge)


def _logical(name: str, on_tensors: Callable[[Tensor, Tensor], Tensor], on_numbers: Callable[..., Any]) -> None:
    def function(a: Value, b: Value) -> Value:
        if isinstance(a, Numbers) and isinstance(b, Numbers):
            return compare(on_numbers, a, b)
        return on_tensors(tensor_of(a), tensor_of(b))

    add(name, function)


_logical("And", torch.logical_and, lambda a, b: a and b)
_logical("Or", torch.logical_or, lambda a, b: a or b)
_logical("Xor", torch.logical_xor, operator.ne)


@op("Pow")
def power(a: Value, b: Value) -> Tensor:
    base, exponent = _operands(a, b)
    if isinstance(exponent, Tensor):
        return torch.pow(base, exponent).to(base.dtype)
    if isinstance(b, Numbers) and b.dtype not in WHOLE and not base.is_floating_point():
        return torch.pow(base.to(b.dtype), exponent).to(base.dtype)
    return torch.pow(base, exponent)


@op("Mod")
def modulo(a: Value, b: Value, *, fmod: Literal[0, 1] = 0) -> Value:
    if isinstance(a, Numbers) and isinstance(b, Numbers) and a.dtype in WHOLE and not fmod:
        found = elementwise(operator.mod, a.dtype, a, b)
        if found is not None:
            return found
    first, second = _operands(a, b)
    return torch.fmod(first, second) if fmod else torch.remainder(first, second)


@op("BitShift")
def bit_shift(a: Tensor, b: Tensor, *, direction: Literal["LEFT", "RIGHT"]) -> Tensor:
    shifted = torch.bitwise_left_shift if direction == "LEFT" else torch.bitwise_right_shift
    if a.dtype in (torch.uint16, torch.uint32):  # torch has no kernels of these
        return shifted(a.to(torch.int64), b.to(torch.int64)).to(a.dtype)
    if a.dtype is torch.uint64:
        raise Refused("torch does not shift uint64")
    return shifted(a, b)


def _folded(name: str, on_tensors: Callable[..., Tensor], on_numbers: Callable[..., Any]) -> None:
    """An operator of any number of operands."""

    def function(*operands: Value) -> Value:
        if operands and known(*operands):
            numbers = [operand for operand in operands if isinstance(operand, Numbers)]
            found = elementwise(lambda *values: reduce(on_numbers, values), numbers[0].dtype, *numbers)
            if found is not None:
                return found
        return reduce(on_tensors, map(tensor_of, operands))

    add(name, function)


_folded("Max", torch.maximum, torch.sym_max)
_folded("Min", torch.minimum, torch.sym_min)
_folded("Sum", torch.add, operator.add)


@op("Mean")
def mean(*operands: Tensor) -> Tensor:
    return reduce(torch.add, operands) / len(operands)


@op("PRelu")
def prelu(x: Tensor, slope: Tensor) -> Tensor:
    return torch.where(x < 0, x * slope, x)


@op("Where")
def where(condition: Value, a: Value, b: Value) -> Value:
    if isinstance(condition, Numbers) and isinstance(a, Numbers) and isinstance(b, Numbers) and a.dtype in WHOLE:
        chosen = compare(bool, condition)
        found = elementwise(lambda c, x, y: x if c else y, a.dtype, Numbers(chosen.values, a.dtype), a, b)
        if found is not None:
            return found
    return torch.where(tensor_of(condition), tensor_of(a), tensor_of(b))


def _bitwise(name: str, on_tensors: Callable[[Tensor, Tensor], Tensor]) -> None:
    def function(a: Tensor, b: Tensor) -> Tensor:
        return on_tensors(a, b)

    add(name, function)


_bitwise("BitwiseAnd", torch.bitwise_and)
_bitwise("BitwiseOr", torch.bitwise_or)
_bitwise("BitwiseXor", torch.bitwise_xor)


# ------------------------------------------------------------------------------------------------- casts


def cast(x: Value, dtype: torch.dtype) -> Value:
    """`x` in another dtype. Sizes that vary are numbers in a whole dtype alone."""
    if isinstance(x, Numbers) and dtype in (torch.bool, *WHOLE, *ROUNDING):
        found = elementwise(_converter(dtype), dtype, x)
        if found is not None:
            return found
    tensor = tensor_of(x)
    if tensor.is_floating_point() and dtype in _NARROW:  # torch is undefined where a negative number becomes unsigned
        return tensor.to(torch.int64).to(dtype)
    if dtype in _FLOAT8:  # what is too large becomes the largest
        limits = torch.finfo(dtype)
        tensor = torch.clamp(tensor, limits.min, limits.max)
    return tensor.to(dtype)


#: Unsigned dtypes to which torch converts a floating number in one way or another.
_NARROW = (torch.uint8, torch.uint16, torch.uint32)
_FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)


def _converter(dtype: torch.dtype) -> Callable[[Any], Any]:
    def convert(number: Any) -> Any:
        if dtype in WHOLE:
            return math.trunc(number) if isinstance(number, float) else number + 0
        return number != 0 if dtype is torch.bool else float(number)

    return convert


@op("Cast")
def cast_to(x: Value, *, to: int, saturate: Literal[1] = 1, round_mode: Literal["up"] = "up") -> Value:
    return cast(x, _dtype(to))


@op("CastLike")
def cast_like(x: Value, like: Value, *, saturate: Literal[1] = 1, round_mode: Literal["up"] = "up") -> Value:
    return cast(x, like.dtype)


def _dtype(number: int) -> torch.dtype:
    found = dtype_of(number)
    if found is None:
        raise Refused(f"there is no tensor of the ONNX element type {number} here")
    return found


# ------------------------------------------------------------------------------------------------- one operand


def _unary(name: str, on_tensors: Callable[[Tensor], Tensor], on_numbers: Callable[[Any], Any] | None = None) -> None:
    def function(x: Value) -> Value:
        if isinstance(x, Numbers) and on_numbers is not None and x.dtype is not torch.bool:
            found = elementwise(on_numbers, x.dtype, x)
            if found is not None:
                return found
        return on_tensors(tensor_of(x))

    add(name, function)


_SAME_NAME = """
    Acos Acosh Asin Asinh Atan Atanh Cos Cosh Det Erf Exp Log Reciprocal Relu Round Sigmoid Sign Sin Sinh Tan Tanh
"""
for _name in _SAME_NAME.split():
    _unary(_name, getattr(torch, _name.lower()))
_unary("Abs", torch.abs, abs)
_unary("Neg", torch.neg, operator.neg)
_unary("Ceil", torch.ceil, math.ceil)
_unary("Floor", torch.floor, math.floor)
_unary("Sqrt", torch.sqrt, math.sqrt)
_unary("BitwiseNot", torch.bitwise_not)
_unary("IsNaN", torch.isnan)
_unary("Softplus", F.softplus)
_unary("Softsign", F.softsign)
_unary("HardSwish", F.hardswish)
_unary("Mish", F.mish)


@op("Identity")
def identity(x: Value) -> Value:
    return x


@op("Not")
def logical_not(x: Value) -> Value:
    return compare(operator.not_, x) if isinstance(x, Numbers) else torch.logical_not(x)


@op("IsInf")
def is_infinite(x: Tensor, *, detect_negative: Literal[0, 1] = 1, detect_positive: Literal[0, 1] = 1) -> Tensor:
    if detect_negative and detect_positive:
        return torch.isinf(x)
    if not detect_negative and not detect_positive:
        return torch.zeros_like(x, dtype=torch.bool)
    return torch.isposinf(x) if detect_positive else torch.isneginf(x)


# ------------------------------------------------------------------------------------------------- activations


@op("Gelu")
def gelu(x: Tensor, *, approximate: Literal["none", "tanh"] = "none") -> Tensor:
    return F.gelu(x, approximate=approximate)


@op("Elu")
def elu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.elu(x, alpha)


@op("Celu")
def celu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.celu(x, alpha)


@op("Selu")
def selu(x: Tensor, *, alpha: float = 1.67326319217681884765625, gamma: float = 1.05070102214813232421875) -> Tensor:
    return gamma * F.elu(x, alpha)


@op("LeakyRelu")
def leaky_relu(x: Tensor, *, alpha: float = 0.01) -> Tensor:
    return F.leaky_relu(x, alpha)


@op("ThresholdedRelu")
def thresholded_relu(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return torch.where(x > alpha, x, 0)


@op("HardSigmoid")
def hard_sigmoid(x: Tensor, *, alpha: float = 0.2, beta: float = 0.5) -> Tensor:
    return torch.clamp(x * alpha + beta, 0, 1)


@op("Shrink")
def shrink(x: Tensor, *, bias: float = 0.0, lambd: float = 0.5) -> Tensor:
    moved = torch.where(x < -lambd, x + bias, torch.where(x > lambd, x - bias, 0))
    return moved.to(x.dtype)


@op("Swish")
def swish(x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return F.silu(x) if alpha == 1 else x * torch.sigmoid(alpha * x)


@op("SwiGLU")
def swiglu(gate: Tensor, x: Tensor, *, alpha: float = 1.0) -> Tensor:
    return swish(gate, alpha=alpha) * x


@op("Clip", since=11)
def clip(x: Tensor, low: Value | None = None, high: Value | None = None) -> Tensor:
    if low is None and high is None:
        return x
    if known(low, high):
        bounds = [bound.item() if isinstance(bound, Numbers) else None for bound in (low, high)]
        return torch.clamp(x, *bounds)
    if low is not None:
        x = torch.maximum(x, tensor_of(low))
    return x if high is None else torch.minimum(x, tensor_of(high))


@op("Clip")
def clip_attributes(x: Tensor, *, min: float = -math.inf, max: float = math.inf) -> Tensor:
    return torch.clamp(x, min, max)


@op("Dropout", since=12)
def dropout(
    x: Value, ratio: Value | None = None, training: Numbers | None = None, *, seed: int | None = None, outputs: int
) -> Any:
    if training is not None and training.item():
        raise Refused("it drops at random, as in training")
    return (x, torch.ones_like(tensor_of(x), dtype=torch.bool)) if outputs == 2 else x


@op("Dropout")
def dropout_attributes(x: Value, *, ratio: float = 0.5, outputs: int) -> Any:
    return (x, torch.ones_like(tensor_of(x), dtype=torch.bool)) if outputs == 2 else x
