"""Numbers that are known while a model is traced: sizes, what a graph computes of them, and constants.

In ONNX a shape is a tensor. Were it one here, `Reshape(x, Concat(Shape(x)[0:1], [-1]))` would depend on tensor values,
and no axis could stay dynamic. So `Shape` gives `Numbers`, an array of Python ints and SymInts, and the ops that
graphs compute sizes with are written once for both: what `Numbers` shares with a tensor is `shape`, `ndim`, `dtype`,
indexing, `reshape`, `permute` and `expand`. It becomes a tensor where an op takes tensors only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from laconic.ir.torch_private import is_symbolic

#: What numbers are computed in, each with the least and greatest whole number or the numpy type that rounds as it does.
WHOLE = {torch.int64: (-(2**63), 2**63 - 1), torch.int32: (-(2**31), 2**31 - 1)}
ROUNDING: dict[torch.dtype, Callable[[float], Any]] = {
    torch.float64: np.float64,
    torch.float32: np.float32,
    torch.float16: np.float16,
}
KNOWN = (torch.bool, *WHOLE, *ROUNDING)
#: Arrays of more elements are tensors.
MOST = 64


@dataclass(frozen=True, eq=False, slots=True)
class Numbers:
    """An array (dtype object) of ints and SymInts, of floats, or of bools, with the dtype that ONNX gives it.

    `home` is the weight that holds these values, if there is one.
    """

    values: npt.NDArray[np.object_]
    dtype: torch.dtype
    home: Tensor | None = None

    @classmethod
    def of(cls, numbers: Iterable[Any], dtype: torch.dtype = torch.int64) -> Numbers:
        """A vector."""
        listed = list(numbers)
        values = np.empty(len(listed), dtype=object)
        for k, number in enumerate(listed):
            values[k] = number
        return cls(values, dtype)

    @classmethod
    def scalar(cls, number: Any, dtype: torch.dtype = torch.int64) -> Numbers:
        return cls.of([number], dtype).reshape(())

    @classmethod
    def read(cls, tensor: Tensor, home: Tensor | None = None) -> Numbers:
        """The values of a real tensor."""
        values = np.array(tensor.tolist(), dtype=object).reshape(tuple(tensor.shape))
        return cls(values, tensor.dtype, home)

    @property
    def shape(self) -> tuple[int, ...]:
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim

    @property
    def symbolic(self) -> bool:
        return any(map(is_symbolic, self.values.flat))

    def flat(self) -> list[Any]:
        return list(self.values.flat)

    def item(self) -> Any:
        """The one number. Raises ValueError if there are more or none."""
        if self.values.size != 1:
            raise ValueError(f"expected one number, found {self.values.size}")
        return self.values.flat[0]

    def _like(self, values: Any) -> Numbers:
        made = np.empty((), dtype=object)
        if isinstance(values, np.ndarray):
            made = values
        else:  # numpy unpacks an array without axes
            made[()] = values
        return Numbers(made, self.dtype)

    def __getitem__(self, index: Any) -> Numbers:
        return self._like(self.values[index])

    def reshape(self, shape: Sequence[int]) -> Numbers:
        return self._like(self.values.reshape(tuple(shape)))

    def permute(self, order: Sequence[int]) -> Numbers:
        return self._like(self.values.transpose(tuple(order)))

    def expand(self, shape: Sequence[int]) -> Numbers:
        return self._like(np.broadcast_to(self.values, tuple(shape)))

    def tensor(self) -> Tensor:
        """The same as a tensor: the weight that holds it, else one that is made."""
        if self.home is not None:
            return self.home
        numbers = self.flat()
        alike = bool(numbers) and not self.symbolic and all(n == numbers[0] for n in numbers)
        if self.ndim == 0 or alike:
            return torch.full(self.shape, numbers[0], dtype=self.dtype)
        if not self.symbolic:
            return torch.tensor(self.values.tolist(), dtype=self.dtype).reshape(self.shape)
        return torch.stack([torch.full((), n, dtype=self.dtype) for n in numbers]).reshape(self.shape)


Value: TypeAlias = Tensor | Numbers


def tensor_of(value: Value) -> Tensor:
    return value.tensor() if isinstance(value, Numbers) else value


def known(*values: Value | None) -> bool:
    """Whether all that is given are numbers."""
    return all(value is None or isinstance(value, Numbers) for value in values)


def elementwise(function: Callable[..., Any], dtype: torch.dtype, *operands: Numbers) -> Numbers | None:
    """`function` on each element, with broadcasting, rounded to `dtype` as a tensor of it is.

    None where a tensor must compute it: floating point on sizes that vary, and what does not fit into the dtype.
    """
    symbolic = any(operand.symbolic for operand in operands)
    if symbolic and not (dtype in WHOLE and all(operand.dtype in WHOLE for operand in operands)):
        return None
    try:
        raw = np.frompyfunc(function, len(operands), 1)(*(operand.values for operand in operands))
    except (ArithmeticError, ValueError):  # a division by zero, say, which is an infinity in a tensor
        return None
    found = operands[0]._like(raw)
    if found.values.size > MOST:
        return None
    rounded = Numbers(np.empty(found.shape, dtype=object), dtype)
    for k, number in enumerate(found.values.flat):
        fitting = _rounded(number, dtype)
        if fitting is None:
            return None
        rounded.values.flat[k] = fitting
    return rounded


def _rounded(number: Any, dtype: torch.dtype) -> Any:
    """The number as the dtype holds it; None if it does not."""
    if is_symbolic(number):
        return number
    if dtype is torch.bool:
        return bool(number)
    if dtype in WHOLE:
        low, high = WHOLE[dtype]
        return int(number) if low <= number <= high else None  # neither holds of a NaN
    if dtype not in ROUNDING:
        return None
    with np.errstate(over="ignore"):
        return float(ROUNDING[dtype](number))


def compare(function: Callable[..., Any], *operands: Numbers) -> Numbers:
    """`function` on each element, whose truth is asked now: of sizes that vary, that may fix what torch assumes."""
    raw = np.frompyfunc(lambda *numbers: bool(function(*numbers)), len(operands), 1)
    return Numbers(operands[0]._like(raw(*(operand.values for operand in operands))).values, torch.bool)


def greatest(a: Any, b: Any) -> Any:
    """The greater of two numbers, either of which may be symbolic."""
    return torch.sym_max(a, b)  # type: ignore[no-untyped-call]


def truncated(a: Any, b: Any) -> Any:
    """a / b rounded towards zero, as ONNX divides whole numbers."""
    if is_symbolic(a) or is_symbolic(b):
        return a // b if a >= 0 and b > 0 else -(-a // b)
    quotient = abs(a) // abs(b)
    return quotient if (a < 0) == (b < 0) else -quotient
