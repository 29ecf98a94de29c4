"""Types and sizes in the text form: `f32[batch, 2*n]{1, 4}`, `int(batch)`, `float(?)`, `(T, T)`, `none`.

And which calls may stand in a program, by their op and the types of their operands.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from typing import Any

import sympy
import torch
from torch import fx

from laconic.ir.lexer import Cursor, Token
from laconic.ir.torch_private import SIZE_FUNCTIONS, is_symbolic
from laconic.ir.traits import ASSERTIONS, PYTHON_NAMES
from laconic.ir.types import DTYPES, NumberType, TensorType, TupleType, ValueType, contiguous_stride, type_of

#: Sizes, strides and whole numbers that stand for them stay below this.
MAX_SIZE = 2**62
#: The greatest exponent, and the greatest degree of a size as a polynomial.
MAX_DEGREE = 16
#: Stands for a float or bool that depends on sizes: its value is recomputed and not written.
SYMBOLIC = sympy.Symbol("?")
#: What an op may return; all else is no value of a program.
_RETURNS = {
    *("Tensor", "List[Tensor]", "Optional[Tensor]", "List[Optional[Tensor]]"),
    *("int", "float", "bool", "number", "SymInt", "SymFloat", "SymBool"),
}
#: Types of arguments that torch also takes as bare numbers, unchecked.
_SETTINGS: dict[str, type] = {
    "ScalarType": torch.dtype,
    "Layout": torch.layout,
    "MemoryFormat": torch.memory_format,
    "Device": torch.device,
}
#: The greatest exponent or shift on numbers: a larger one makes numbers that no size is.
MAX_EXPONENT = 64
#: Into how many values an op may take a tensor apart.
MAX_PARTS = 2**16


class TypeParser:
    """Reads types at a cursor; `sizes` are the symbols declared so far, by display name."""

    def __init__(self, at: Cursor) -> None:
        self.at = at
        self.sizes: dict[str, sympy.Symbol] = {}

    def type(self) -> ValueType | None:
        at = self.at
        if at.accept("none"):
            return None
        if at.accept("("):
            parts: list[ValueType | None] = []
            with at.nested():
                while not at.peek(")"):
                    parts.append(self.type())
                    if not at.accept(","):
                        break
            at.expect(")")
            return TupleType(tuple(parts))
        token = at.next
        word = at.take_word("a type")
        if word in ("int", "float") or (word == "bool" and at.peek("(")):
            at.expect("(")
            value = self.number_value(word)
            at.expect(")")
            return NumberType(word, value)
        if word not in DTYPES:
            at.fail(f"{word!r} is no dtype", token)
        at.expect("[")
        shape = self.size_list("]")
        stride = self.size_list("}") if at.accept("{") else contiguous_stride(shape)
        if len(stride) != len(shape):
            at.fail("as many strides as sizes are needed", token)
        if any(isinstance(n, int) and not 0 <= n < MAX_SIZE for n in (*shape, *stride)):
            at.fail("sizes and strides are not negative, and less than 2**62", token)
        return TensorType(DTYPES[word], shape, stride, self.device())

    def device(self) -> str:
        """The device behind `@`, which must be there: values live on it. The CPU if none is named."""
        at = self.at
        token = at.next
        if not (token.kind == "row" or at.peek("@")):
            return "cpu"
        name = at.advance().text.lstrip("@")
        if at.accept(":"):
            name += f":{at.take_int()}"
        try:
            device = torch.device(name)
            if device.type not in ("cpu", "meta"):
                module = torch.get_device_module(device)
                if not module.is_available() or (device.index or 0) >= module.device_count():
                    at.fail(f"there is no device {name!r} here", token)
        except (RuntimeError, ValueError, AttributeError) as problem:
            at.fail(f"{name!r} is no device: {str(problem).splitlines()[0]}", token)
        return name

    def number_value(self, kind: str) -> Any:
        at = self.at
        if kind == "int":
            return self.expression()
        if at.accept("?"):
            return SYMBOLIC
        if kind == "bool":
            if at.next.text not in ("True", "False"):
                at.fail("expected True, False or ?")
            return at.advance().text == "True"
        sign = -1.0 if at.accept("-") else 1.0
        if at.next.kind != "number" and at.next.text not in ("inf", "nan"):
            at.fail("expected a number or ?")
        return sign * float(at.advance().text)

    def size_list(self, close: str) -> tuple[Any, ...]:
        sizes: list[Any] = []
        while not self.at.peek(close):
            sizes.append(self.expression())
            if not self.at.accept(","):
                break
        self.at.expect(close)
        return tuple(sizes)

    def expression(self) -> Any:
        """A size: an int, a declared size, or sums, products and the like of these."""
        token = self.at.next
        with self.at.nested():
            value = self.sum()
        if not value.free_symbols and not value.is_Integer:
            self.at.fail(f"{value} is no whole number", token)
        return int(value) if value.is_Integer else value

    def sum(self) -> Any:
        value = self.product()
        while self.at.peek("+") or self.at.peek("-"):
            token = self.at.advance()
            function = operator.add if token.text == "+" else operator.sub
            value = self.combine(token, function, value, self.product())
        return value

    def product(self) -> Any:
        value = self.factor()
        while self.at.peek("*") or self.at.peek("//"):
            token = self.at.advance()
            function = operator.mul if token.text == "*" else SIZE_FUNCTIONS["FloorDiv"]
            value = self.combine(token, function, value, self.factor())
        return value

    def factor(self) -> Any:
        at = self.at
        if at.accept("-"):
            with at.nested():
                return -self.factor()
        token = at.next
        if at.accept("("):
            with at.nested():
                value = self.sum()
            at.expect(")")
        elif token.kind == "number":
            value = sympy.Integer(at.take_int())
        else:
            name = at.take_name("a size")
            if token.kind == "word" and name in SIZE_FUNCTIONS and at.accept("("):
                arguments = [sympy.sympify(a) for a in self.size_list(")")]
                value = self.combine(token, SIZE_FUNCTIONS[name], *arguments)
            elif name in self.sizes:
                value = self.sizes[name]
            else:
                at.fail(f"size {name!r} is not declared", token, hint="known: " + ", ".join(self.sizes))
        if at.accept("**"):
            token = at.next
            exponent = at.take_int("an exponent")
            if exponent > MAX_DEGREE:
                at.fail(f"an exponent of a size is at most {MAX_DEGREE}", token)
            value = self.combine(token, lambda a: a**exponent, value)
        return value

    def combine(self, token: Token, function: Callable[..., Any], *operands: Any) -> Any:
        """The size that `function` makes; refused if there is none, or if it is out of all proportion."""
        try:
            value = sympy.sympify(function(*operands))
        except Exception as problem:  # noqa: BLE001 - sympy's and torch's own checks: any type
            self.at.fail(f"{token.text!r} makes no size of its operands: {problem}", token)
        if (value.is_Integer and abs(int(value)) >= 2 * MAX_SIZE) or _degree(value) > MAX_DEGREE:
            self.at.fail("this size is out of all proportion", token)
        return value


def _degree(value: Any) -> int:
    """The degree of a size as a polynomial; what a function returns counts as its operands together."""
    if isinstance(value, sympy.Symbol):
        return 1
    if isinstance(value, sympy.Pow):
        base, exponent = value.args
        return _degree(base) * (int(exponent) if exponent.is_Integer and int(exponent) > 0 else MAX_DEGREE + 1)
    degrees = [_degree(a) for a in value.args]
    return max(degrees, default=0) if isinstance(value, sympy.Add) else sum(degrees)


def illegal(target: Any, args: list[Any], kwargs: dict[str, Any]) -> str:
    """Why this call may not stand in a program, "" if it may: asked before it is computed, as that calls it.

    An op writes nowhere, returns values, and takes a tensor or makes one, or is an assertion.
    """
    operands = [*args, *kwargs.values()]
    flat = list(_flat(operands))
    if not isinstance(target, torch._ops.OpOverload):
        return _illegal_function(target, flat)
    schema = target._schema
    if schema.is_mutable:
        return "writes into an operand, and a program is functional"
    if schema.name in ASSERTIONS:
        return ""
    if not schema.returns or not all(str(r.type) in _RETURNS for r in schema.returns):
        return "returns no value that a program can hold"
    given = {**dict(zip((a.name for a in schema.arguments), args, strict=False)), **kwargs}
    for argument in schema.arguments:
        kind = _SETTINGS.get(str(argument.real_type).removeprefix("Optional[").removesuffix("]"))
        value = given.get(argument.name)
        if kind is not None and value is not None and not isinstance(value, kind):
            return f"takes a {kind.__name__} as {argument.name!r}"
    makes = any(a.name == "device" for a in schema.arguments) and schema.name != "aten::from_file"
    takes = any(isinstance(o, fx.Node) and not _is_number(o) for o in flat)
    if not takes and not makes:
        return "takes no tensor and makes none"
    for operand in flat:
        if isinstance(operand, int) and abs(operand) >= 2**64:
            return "takes whole numbers of at most 64 bits"
    parts = _parts(schema.name, operands)
    return f"makes {parts} values, more than {MAX_PARTS}" if parts > MAX_PARTS else ""


def _illegal_function(function: Any, operands: list[Any]) -> str:
    """Why a Python function may not be called on these operands: it is there for numbers that depend on sizes."""
    if function is operator.getitem:
        fits = len(operands) == 2 and isinstance(operands[0], fx.Node) and type(operands[1]) is int
        return "" if fits and isinstance(operands[0].meta["val"], (tuple, list)) else "takes several values and a place"
    if not any(isinstance(o, fx.Node) for o in operands):
        return "takes plain numbers only: write what they make"
    if not all(_is_number(o) for o in operands):
        return "takes numbers only"
    if PYTHON_NAMES[function] in ("operator.pow", "operator.lshift", "operator.rshift"):
        by = operands[-1]
        if isinstance(by, fx.Node) or abs(by) > MAX_EXPONENT:
            return f"takes a plain number of at most {MAX_EXPONENT} as its second operand"
    return ""


def _parts(name: str, operands: list[Any]) -> int:
    """At most how many values an op that takes a tensor apart makes, 0 for other ops. Asked before it makes them."""
    if name.partition("::")[2] not in ("unbind", "split", "unsafe_split", "chunk", "unsafe_chunk", "tensor_split"):
        return 0
    kinds = [type_of(o.meta["val"]) for o in operands if isinstance(o, fx.Node)]
    axes = [n for k in kinds if isinstance(k, TensorType) for n in k.shape if isinstance(n, int)]
    given = [abs(o) for o in operands[1:2] if isinstance(o, int)]
    longest = max(axes, default=0)
    if name.endswith("split") and "tensor" not in name and given:
        return longest // max(1, given[0])
    return longest if name.endswith("unbind") else max(given, default=0)


def _flat(operands: Any) -> Iterator[Any]:
    for operand in operands:
        if isinstance(operand, (list, tuple)):
            yield from _flat(operand)
        else:
            yield operand


def _is_number(operand: Any) -> bool:
    value = operand.meta["val"] if isinstance(operand, fx.Node) else operand
    return isinstance(value, (bool, int, float)) or bool(is_symbolic(value))
