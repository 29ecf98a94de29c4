"""The parser of the text form: text and a table of tensors in, a verified Program out.

Nothing is evaluated: ops are looked up by name among what torch has registered, sizes go through a small expression
parser. Every node's type is recomputed as it is read and compared with the declared one, so damage is reported at its
line and column.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from laconic.ir.errors import LaconicError
from laconic.ir.lexer import Cursor, Token
from laconic.ir.program import Alias, Entry, Input, Kind, Output, Program, Role, Site, Weight
from laconic.ir.propagate import recompute
from laconic.ir.rewrite import fake_weight, placeholder_name
from laconic.ir.text import LAYOUTS, MEMORY_FORMATS, VERSION
from laconic.ir.torch_private import SIZE_FUNCTIONS, expression
from laconic.ir.traits import find_op
from laconic.ir.tree import CONSTANTS, Leaf, Tree, leaves
from laconic.ir.types import (
    DTYPES,
    NumberType,
    TensorType,
    TupleType,
    ValueType,
    contiguous_stride,
    same_type,
    type_of,
    type_text,
)

#: Gives the tensor of a row, by name and declared type.
Lookup = Callable[[str, TensorType], torch.Tensor]

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


def parse_program(text: str, lookup: Lookup, source: str = "<text>") -> Program:
    """The program that `text` says, with the tensors that `lookup` gives.

    Raises ParseError with line and column. `source` names the text in errors.
    """
    return _Parser(text, lookup, source).program()


class _Parser:
    def __init__(self, text: str, lookup: Lookup, source: str) -> None:
        self.at = Cursor(text, source)
        self.lookup = lookup
        self.result = Program({}, {})
        self.sizes: dict[str, sympy.Symbol] = {}

    def program(self) -> Program:
        at = self.at
        at.skip_newlines()
        at.expect("laconic")
        at.expect("program")
        token = at.next
        if at.take_int("the format's version") != VERSION:
            at.fail(f"this is version {token.text} of the text form; this laconic reads version {VERSION}", token)
        at.end_line()
        readers = {
            "fact": self.fact,
            "size": self.size,
            "alias": self.alias,
            "entry": self.entry,
            "site": self.site,
            **dict.fromkeys(("parameter", "buffer", "constant", "state"), self.weight),
        }
        while at.next.kind != "end":
            token = at.next
            reader = readers.get(token.text)
            if token.kind != "word" or reader is None:
                at.fail(f"expected one of {', '.join(readers)}, found {token.text!r}")
            reader()
            at.end_line()
        if not self.result.entries:
            at.fail("the text holds no entry")
        return self.result

    # Declarations

    def fact(self) -> None:
        self.at.advance()
        key = self.at.take_word("the name of a fact")
        self.at.expect("=")
        raw, first = self.at.rest_of_line()
        try:
            self.result.facts[key] = json.loads(raw)
        except ValueError as problem:
            self.at.fail(f"not a JSON value: {problem}", first)

    def size(self) -> None:
        at = self.at
        at.advance()
        token = at.next
        name = at.take_word("the name of a size")
        at.expect("in")
        at.expect("[")
        low = at.take_int()
        at.expect(",")
        high = None if at.accept("inf") else at.take_int()
        at.expect("]")
        at.expect("like")
        hint = at.take_int()
        if name in self.sizes:
            at.fail(f"size {name!r} is declared twice", token)
        if not (low <= hint and (high is None or hint <= high)):
            at.fail(f"size {name!r} has an example outside its range", token)
        self.sizes[name] = self.result.add_symbol(name, low, high, hint)

    def weight(self) -> None:
        at = self.at
        kind = Kind(at.advance().text)
        token = at.next
        name = at.take_row()
        at.expect(":")
        declared = self.type()
        if not isinstance(declared, TensorType) or not all(isinstance(s, int) for s in declared.shape):
            at.fail(f"{name!r} must be a tensor of fixed sizes", token)
        trainable, transient = at.accept("trainable"), at.accept("transient")
        if name in self.result.weights:
            at.fail(f"{name!r} is declared twice", token)
        try:
            value = self.lookup(name, declared)
        except KeyError:
            at.fail(f"there are no values for {name!r}", token)
        found = type_of(value)
        if not same_type(found, declared):
            at.fail(
                f"{name!r} is declared {type_text(declared, {})} but its values are {type_text(found, {})}",
                token,
            )
        self.result.weights[name] = Weight(name, value, kind, trainable, not transient)

    def alias(self) -> None:
        at = self.at
        at.advance()
        token = at.next
        name = at.take_row()
        at.expect("=")
        rows = None
        if at.accept("none"):
            target = None
        else:
            target = at.take_row()
            if at.accept("["):
                start = at.take_int()
                at.expect(":")
                rows = (start, at.take_int())
                at.expect("]")
            if target not in self.result.weights:
                at.fail(f"the alias {name!r} points at {target!r}, which is not declared", token)
        self.result.aliases[name] = Alias(target, rows)

    def site(self) -> None:
        at = self.at
        at.advance()
        first = at.take_int()
        at.expect("..")
        last = at.take_int()
        if last < first or last - first > 10_000_000:
            at.fail(f"{first}..{last} is no range of sites")
        at.expect("=")
        place = Site(at.take_string("a module path"), at.take_string("a source line"))
        for number in range(first, last + 1):
            self.result.sites[number] = place

    # Entries

    def entry(self) -> None:
        at = self.at
        at.advance()
        token = at.next
        name = at.take_word("the name of an entry")
        if name in self.result.entries:
            at.fail(f"entry {name!r} is declared twice", token)
        at.expect("{")
        at.end_line()
        self.result.entries[name] = _EntryParser(self, name).entry()

    # Types and sizes

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


class _EntryParser:
    """The body of one entry."""

    def __init__(self, outer: _Parser, name: str) -> None:
        self.outer, self.at, self.program, self.name = outer, outer.at, outer.result, name
        self.graph = fx.Graph()
        self.values: dict[str, fx.Node] = {}
        self.rows: dict[str, fx.Node] = {}
        for weight in self.program.weights.values():
            label = placeholder_name(weight.name)
            node = self.graph.create_node("placeholder", label, name=label)
            node.target = node.name
            node.meta.update(kind=weight.kind, name=weight.name, val=fake_weight(self.program, weight))
            self.rows[weight.name] = node

    def entry(self) -> Entry:
        at = self.at
        inputs: list[Input] = []
        nodes: list[fx.Node] = []
        arguments: dict[str, Tree] = {}
        while at.peek("input"):
            inputs.append(self.input())
            nodes.append(next(reversed(self.graph.nodes)))
            at.end_line()
        while at.accept("argument"):
            name = at.take_word("an argument's name")
            at.expect("=")
            arguments[name] = self.tree(nodes)
            at.end_line()
        while at.next.kind == "value":
            self.call()
            at.end_line()
        outputs: list[Output] = []
        values: list[Any] = []
        while at.accept("update"):
            if at.next.kind == "row":
                outputs.append(Output(Role.UPDATE, at.take_row()))
            else:
                outputs.append(Output(Role.INPUT_UPDATE, at.take_string("a state (@name) or an input's name")))
            at.expect("=")
            values.append(self.value())
            at.end_line()
        at.expect("return")
        given: list[Any] = []
        results = self.tree(given, collect=True)
        at.end_line()
        at.expect("}")
        outputs += [Output(Role.RESULT, path or "output") for path, leaf in leaves(results) if isinstance(leaf, Leaf)]
        self.graph.output(tuple(values + given))
        for node in self.rows.values():
            if not node.users:
                self.graph.erase_node(node)
        return Entry(self.name, self.graph, inputs, outputs, arguments, results)

    def input(self) -> Input:
        at = self.at
        at.advance()
        label, token = self.label()
        at.expect(":")
        kind = self.outer.type()
        at.expect("in")
        at.expect("[")
        low = self.value()
        at.expect(",")
        high = self.value()
        at.expect("]")
        name = at.take_string() if at.accept("named") else label
        node = self.graph.create_node("placeholder", label, name=label)
        if isinstance(kind, TensorType):
            value: Any = self.program.fake(kind)
        else:
            at.fail("an input must be a tensor", token)
        self.define(node, label, token)
        node.meta.update(kind=Kind.INPUT, name=name, val=value)
        return Input(name, low, high)

    def label(self) -> tuple[str, Token]:
        token = self.at.take("value", "a value (%name)")
        return token.text[1:], token

    def define(self, node: fx.Node, label: str, token: Token) -> None:
        if label in self.values:
            self.at.fail(f"%{label} is defined twice", token)
        if node.name != label:
            self.at.fail(f"%{label} may not be used as a name", token)
        self.values[label] = node

    def call(self) -> None:
        at = self.at
        label, token = self.label()
        at.expect(":")
        declared = self.outer.type()
        at.expect("=")
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
        node = self.graph.create_node("call_function", target, tuple(args), kwargs, name=label)
        self.define(node, label, token)
        if at.next.kind == "site":
            node.meta["site"] = int(at.advance().text[1:])
        if at.accept("by"):
            node.meta["by"] = at.take_word("the name of a pass")
        try:
            node.meta["val"] = recompute(self.program, node)
        except LaconicError as problem:
            at.fail(f"{problem.what}: {problem.why}", op_token)
        found = type_of(node.meta["val"])
        if not same_type(found, declared):
            names = self.program.names
            at.fail(
                f"%{label} is declared {type_text(declared, names)} but computes {type_text(found, names)}",
                token,
            )

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
            number = self.value()
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                at.fail("expected a number behind '-'", token)
            return -number
        if token.kind == "number":
            at.advance()
            return int(token.text) if token.text.isdigit() else float(token.text)
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
            except RuntimeError:
                at.fail(f"{text!r} is no device", token)
        if word == "complex" and at.accept("("):
            items, _ = self.sequence(")")
            if len(items) != 2:
                at.fail("a complex number has two parts", token)
            return complex(*items)
        if word not in _WORDS:
            at.fail(f"{word!r} is no value", token)
        return _WORDS[word]

    def tree(self, values: list[Any], collect: bool = False) -> Tree:
        """A tree whose `%x` and `@x` leaves index `values`: found there, or appended in order if `collect`."""
        at = self.at
        if at.accept("{"):
            result: dict[str, Tree] = {}
            while not at.peek("}"):
                key = at.take_string("a key")
                at.expect(":")
                result[key] = self.tree(values, collect)
                if not at.accept(","):
                    break
            at.expect("}")
            return result
        for opening, closing in (("[", "]"), ("(", ")")):
            if at.accept(opening):
                items: list[Tree] = []
                while not at.peek(closing):
                    items.append(self.tree(values, collect))
                    if not at.accept(","):
                        break
                at.expect(closing)
                return items if opening == "[" else tuple(items)
        token = at.next
        value = self.value()
        if isinstance(value, fx.Node):
            if collect:
                values.append(value)
                return Leaf(len(values) - 1)
            if value not in values:
                at.fail("an argument's leaves are the entry's inputs", token)
            return Leaf(values.index(value))
        if not isinstance(value, CONSTANTS):
            at.fail("a tree holds values and plain constants", token)
        return value


__all__ = ["Lookup", "expression", "parse_program"]
