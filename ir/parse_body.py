"""The calls of a body in the text form, which an entry and a function have in common: values, arguments, types."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from laconic.ir.errors import LaconicError
from laconic.ir.lexer import Cursor, Token
from laconic.ir.parse_types import MAX_SIZE, TypeParser, illegal
from laconic.ir.program import Program
from laconic.ir.propagate import recompute
from laconic.ir.text import LAYOUTS, MEMORY_FORMATS
from laconic.ir.torch_private import is_symbolic, sym_int
from laconic.ir.traits import find_op
from laconic.ir.types import DTYPES, NumberType, TensorType, ValueType, same_type, type_of, type_text

_WORDS: dict[str, Any] = {
    "None": None,
    "True": True,
    "False": False,
    "inf": float("inf"),
    "nan": float("nan"),
    **MEMORY_FORMATS,
    **LAYOUTS,
    **DTYPES,
}


@dataclass(frozen=True)
class Binder:
    """A name that a line gives a value: its declared type, and where it stands."""

    label: str
    type: ValueType | None
    token: Token


class BodyParser:
    """Reads calls into a graph; `values` are what is defined so far, `rows` the weights that may be named. Without
    `recompute` a call is believed the tensor type that it declares."""

    def __init__(self, at: Cursor, types: TypeParser, program: Program, recompute: bool) -> None:
        self.at, self.types, self.program, self.recompute = at, types, program, recompute
        self.graph = fx.Graph()
        self.values: dict[str, fx.Node] = {}
        self.rows: dict[str, fx.Node] = {}

    def label(self) -> tuple[str, Token]:
        token = self.at.take("value", "a value (%name)")
        return token.text[1:], token

    def define(self, node: fx.Node, label: str, token: Token) -> None:
        if label in self.values:
            self.at.fail(f"%{label} is defined twice", token)
        if node.name != label:
            self.at.fail(f"%{label} may not be used as a name", token)
        self.values[label] = node

    def binder(self) -> Binder:
        """A name with its type, in front of what gives it its value."""
        label, token = self.label()
        self.at.expect(":")
        return Binder(label, self.types.type(), token)

    def call(self) -> None:
        binder = self.binder()
        self.at.expect("=")
        self.operation(binder)

    def operation(self, binder: Binder) -> None:
        """A call of an op, its site and the pass that made it."""
        at = self.at
        op_token = at.next
        try:
            target = find_op(at.take_word("an op"))
        except KeyError:
            at.fail(
                f"no loaded library registers the op {op_token.text!r}",
                op_token,
                hint="if it is a custom op, import the library that registers it first",
            )
        args, kwargs = self.arguments()
        problem = illegal(target, args, kwargs)
        if problem:
            at.fail(f"{op_token.text!r} {problem}", op_token)
        node = self.graph.create_node("call_function", target, tuple(args), kwargs, name=binder.label)
        self.define(node, binder.label, binder.token)
        if at.next.kind == "site":
            site = at.advance()
            node.meta["site"] = at.whole(site, site.text[1:])
        if at.accept("by"):
            node.meta["by"] = at.take_name("the name of a pass")
        self.compute(node, binder, op_token)

    def compute(self, node: fx.Node, binder: Binder, op_token: Token) -> None:
        """The value of a call, whose type must be the declared one."""
        at, label = self.at, binder.label
        if not self.recompute and isinstance(binder.type, TensorType):
            node.meta["val"] = self.fake(binder)
            return
        try:
            node.meta["val"] = recompute(self.program, node)
            found = type_of(node.meta["val"])
        except LaconicError as problem:
            at.fail(f"{problem.what}: {problem.why}", op_token)
        except TypeError as problem:
            at.fail(f"%{label} computes {problem}, which is no value of a program", op_token)
        if isinstance(found, NumberType) and _example(node.meta["val"]) >= MAX_SIZE:
            at.fail(f"%{label} is a whole number of 2**62 or more", binder.token)
        self.hold(binder, found)

    def fake(self, binder: Binder) -> Any:
        """A fake tensor or number of a name's declared type."""
        kind = binder.type
        try:
            if isinstance(kind, TensorType):
                return self.program.fake(kind)
            if isinstance(kind, NumberType) and kind.kind == "int":
                return sym_int(self.program.mode, kind.value)
        except (RuntimeError, ValueError, OverflowError, TypeError) as problem:  # torch's own checks of sizes
            self.at.fail(f"no value has this type: {first_line(problem)}", binder.token)
        self.at.fail("a slot is a tensor or a whole number", binder.token)

    def hold(self, binder: Binder, found: ValueType | None) -> None:
        """A name's declared type must be what it computes."""
        if not self.agree(found, binder.type):
            names = self.program.names
            self.at.fail(
                f"%{binder.label} is declared {type_text(binder.type, names)} but computes {type_text(found, names)}",
                binder.token,
            )

    def agree(self, found: ValueType | None, declared: ValueType | None) -> bool:
        """Whether two types are one in text: values that depend on sizes and are no sizes are written `float(?)`."""
        names = self.program.names
        return same_type(found, declared) or type_text(found, names) == type_text(declared, names)

    def arguments(self) -> tuple[list[Any], dict[str, Any]]:
        at = self.at
        args: list[Any] = []
        kwargs: dict[str, Any] = {}
        at.expect("(")
        while not at.peek(")"):
            if at.next.kind == "word" and at.peek("=", ahead=1):
                key = at.take_word()
                if key in kwargs:
                    at.fail(f"argument {key!r} is given twice")
                at.expect("=")
                kwargs[key] = self.value()
            elif kwargs:
                at.fail("positional arguments stand before named ones")
            else:
                args.append(self.value())
            if not at.accept(","):
                break
        at.expect(")")
        return args, kwargs

    def value(self) -> Any:
        at = self.at
        token = at.next
        if token.kind == "value":
            label, _ = self.label()
            if label not in self.values:
                at.fail(f"%{label} is not defined above", token)
            return self.values[label]
        if token.kind == "row":
            name = at.take_row()
            if name not in self.rows:
                at.fail(f"{name!r} is not declared", token)
            return self.rows[name]
        if token.kind == "string":
            return at.take_string()
        if at.accept("-"):
            with at.nested():
                number = self.value()
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                at.fail("expected a number behind '-'", token)
            return -number
        if token.kind == "number":
            at.advance()
            return at.whole(token, token.text) if token.text.isdigit() else float(token.text)
        if at.accept("["):
            return self.sequence("]")[0]
        if at.accept("("):
            items, comma = self.sequence(")")
            if len(items) == 1 and not comma:
                at.fail("a tuple of one is written (x,)", token)
            return tuple(items)
        return self.word()

    def sequence(self, close: str) -> tuple[list[Any], bool]:
        """Items up to `close`, and whether a comma stood behind the last."""
        items: list[Any] = []
        comma = False
        while not self.at.peek(close):
            with self.at.nested():
                items.append(self.value())
            comma = self.at.accept(",")
            if not comma:
                break
        self.at.expect(close)
        return items, comma

    def word(self) -> Any:
        at = self.at
        token = at.next
        word = at.take_word("a value")
        if word == "device" and at.accept("("):
            text = at.take_string("a device")
            at.expect(")")
            try:
                return torch.device(text)
            except (RuntimeError, ValueError):
                at.fail(f"{text!r} is no device", token)
        if word == "complex" and at.accept("("):
            items, _ = self.sequence(")")
            if len(items) != 2 or not all(type(i) in (int, float) for i in items):
                at.fail("a complex number has two parts, both numbers", token)
            return complex(*items)
        if word not in _WORDS:
            at.fail(f"{word!r} is no value", token)
        return _WORDS[word]


def _example(value: Any) -> float:
    """How large a number is for the example's sizes; 0 for what only running the model can tell."""
    number = value.node.hint if is_symbolic(value) else value
    return abs(number) if isinstance(number, int) else 0


def first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
