"""The body of an entry in the text form: inputs, arguments, calls, updates and results."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from laconic.ir.errors import LaconicError
from laconic.ir.lexer import Cursor, Token
from laconic.ir.parse_types import TypeParser
from laconic.ir.program import Entry, Input, Kind, Output, Program, Role
from laconic.ir.propagate import recompute
from laconic.ir.rewrite import fake_weight, placeholder_name
from laconic.ir.text import LAYOUTS, MEMORY_FORMATS
from laconic.ir.traits import find_op
from laconic.ir.tree import CONSTANTS, Leaf, Tree, leaves
from laconic.ir.types import DTYPES, TensorType, same_type, type_of, type_text

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


class EntryParser:
    """Reads the body of one entry into a graph over the program's rows."""

    def __init__(self, at: Cursor, types: TypeParser, program: Program, name: str) -> None:
        self.at, self.types, self.program, self.name = at, types, program, name
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
            declared, node = self.input()
            inputs.append(declared)
            nodes.append(node)
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

    def input(self) -> tuple[Input, fx.Node]:
        at = self.at
        at.advance()
        label, token = self.label()
        at.expect(":")
        kind = self.types.type()
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
        return Input(name, low, high), node

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
        declared = self.types.type()
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
