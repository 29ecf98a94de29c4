"""Types and sizes in the text form: `f32[batch, 2*n]{1, 4}`, `int(batch)`, `(T, T)`, `none`."""

from __future__ import annotations

from typing import Any

import sympy

from laconic.ir.lexer import Cursor
from laconic.ir.torch_private import SIZE_FUNCTIONS
from laconic.ir.types import DTYPES, NumberType, TensorType, TupleType, ValueType, contiguous_stride


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
        if any(isinstance(n, int) and n < 0 for n in (*shape, *stride)):
            at.fail("sizes and strides are not negative", token)
        device = "cpu"
        if at.next.kind == "row" or at.peek("@"):
            device = at.advance().text.lstrip("@")
            if at.accept(":"):
                device += f":{at.take_int()}"
        return TensorType(DTYPES[word], shape, stride, device)

    def number_value(self, kind: str) -> Any:
        at = self.at
        if kind == "int":
            return self.expression()
        if kind == "bool" and at.next.text in ("True", "False"):
            return at.advance().text == "True"
        raw, depth = "", 0
        while at.next.kind not in ("newline", "end") and not (depth == 0 and at.peek(")")):
            token = at.advance()
            depth += {"(": 1, ")": -1}.get(token.text, 0)
            raw += token.text
        try:
            return float(raw)
        except ValueError:
            at.fail(f"symbolic {kind} values have no text form yet: {raw}")

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
        value = self.sum()
        return int(value) if getattr(value, "is_Integer", False) else value

    def sum(self) -> Any:
        value = self.product()
        while self.at.peek("+") or self.at.peek("-"):
            value = value + self.product() if self.at.advance().text == "+" else value - self.product()
        return value

    def product(self) -> Any:
        value = self.factor()
        while self.at.peek("*") or self.at.peek("//"):
            if self.at.advance().text == "*":
                value = value * self.factor()
            else:
                value = SIZE_FUNCTIONS["FloorDiv"](value, self.factor())
        return value

    def factor(self) -> Any:
        at = self.at
        if at.accept("-"):
            return -self.factor()
        if at.accept("("):
            value = self.sum()
            at.expect(")")
        elif at.next.kind == "number":
            value = sympy.Integer(at.take_int())
        else:
            token = at.next
            word = at.take_word("a size")
            if word in SIZE_FUNCTIONS and at.accept("("):
                value = SIZE_FUNCTIONS[word](*self.size_list(")"))
            elif word in self.sizes:
                value = self.sizes[word]
            else:
                at.fail(f"size {word!r} is not declared", token, hint="known: " + ", ".join(self.sizes))
        if at.accept("**"):
            value = value ** at.take_int("an exponent")
        return value
