"""The body of an entry in the text form: inputs, arguments, calls, updates and results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from laconic.ir.errors import LaconicError
from laconic.ir.lexer import Cursor, Token
from laconic.ir.parse_types import MAX_SIZE, TypeParser, illegal
from laconic.ir.program import Entry, Input, Kind, Output, Program, Role
from laconic.ir.propagate import recompute
from laconic.ir.rewrite import fake_weight, placeholder_name
from laconic.ir.text import LAYOUTS, MEMORY_FORMATS
from laconic.ir.torch_private import is_symbolic
from laconic.ir.traits import find_op
from laconic.ir.tree import CONSTANTS, Leaf, Tree, leaves
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
            token = at.next
            name = at.take_name("an argument's name")
            if name in arguments:
                at.fail(f"argument {name!r} is declared twice", token)
            at.expect("=")
            arguments[name] = self.tree(nodes)
            at.end_line()
        while at.next.kind == "value":
            self.call()
            at.end_line()
        outputs: list[Output] = []
        values: list[Any] = []
        while at.accept("update"):
            output, value = self.update({i.name: n for i, n in zip(inputs, nodes, strict=True)}, outputs)
            outputs.append(output)
            values.append(value)
            at.end_line()
        token = at.expect("return")
        given: list[Any] = []
        results = self.tree(given, collect=True)
        at.end_line()
        at.expect("}")
        outputs += [Output(Role.RESULT, path or "output") for path, leaf in leaves(results) if isinstance(leaf, Leaf)]
        results_named = {o.name for o in outputs if o.role is Role.RESULT}
        for output in outputs:
            if not results_named.issuperset(output.seen):
                at.fail(f"{output} is seen in {', '.join(output.seen)}, and not all of these are results", token)
        self.graph.output(tuple(values + given))
        for node in self.rows.values():
            if not node.users and node.meta["kind"] is not Kind.STATE:
                self.graph.erase_node(node)
        return Entry(self.name, self.graph, inputs, outputs, arguments, results)

    def update(self, inputs: dict[str, fx.Node], before: list[Output]) -> tuple[Output, fx.Node]:
        """What a state or an input becomes: a value of its dtype and sizes."""
        at = self.at
        token = at.next
        if token.kind == "row":
            output = Output(Role.UPDATE, at.take_row())
            home = self.rows.get(output.name)
            if home is None or home.meta["kind"] is not Kind.STATE:
                at.fail(f"{output.name!r} is no state", token)
        else:
            output = Output(Role.INPUT_UPDATE, at.take_string("a state (@name) or an input's name"))
            home = inputs.get(output.name)
            if home is None:
                at.fail(f"{output.name!r} is no input", token)
        if any((o.role, o.name) == (output.role, output.name) for o in before):
            at.fail(f"{output.name!r} is updated twice", token)
        at.expect("=")
        token = at.next
        value = self.value()
        found = type_of(value.meta["val"]) if isinstance(value, fx.Node) else None
        declared = type_of(home.meta["val"])
        if not isinstance(value, fx.Node) or not same_type(found, declared, strides=False):
            names = self.program.names
            at.fail(f"{output.name!r} is {type_text(declared, names)} and becomes {type_text(found, names)}", token)
        return replace(output, seen=self.seen()), value

    def seen(self) -> tuple[str, ...]:
        """The results that are the written tensor itself, behind an update."""
        if not self.at.accept("seen"):
            return ()
        names = [self.at.take_string("a result's path")]
        while self.at.accept(","):
            names.append(self.at.take_string("a result's path"))
        return tuple(names)

    def input(self) -> tuple[Input, fx.Node]:
        at = self.at
        at.advance()
        label, token = self.label()
        at.expect(":")
        kind = self.types.type()
        if not isinstance(kind, TensorType):
            at.fail("an input must be a tensor", token)
        low, high = self.range(kind)
        name = at.take_string() if at.accept("named") else label
        if any(n.meta.get("kind") is Kind.INPUT and n.meta["name"] == name for n in self.graph.nodes):
            at.fail(f"a second input is named {name!r}", token)
        node = self.graph.create_node("placeholder", label, name=label)
        try:
            value = self.program.fake(kind)
        except Exception as problem:  # noqa: BLE001 - torch's own checks of sizes: any type
            at.fail(f"no tensor has this type: {_first_line(problem)}", token)
        self.define(node, label, token)
        node.meta.update(kind=Kind.INPUT, name=name, val=value)
        return Input(name, low, high), node

    def range(self, kind: TensorType) -> tuple[float, float]:
        """The range that an input's values were seen in."""
        at = self.at
        at.expect("in")
        token = at.expect("[")
        low = self.value()
        at.expect(",")
        high = self.value()
        at.expect("]")
        if not isinstance(low, (bool, int, float)) or not isinstance(high, (bool, int, float)) or not low <= high:
            at.fail("a range is two numbers, the lower one first", token)
        real = kind.dtype.is_floating_point or kind.dtype.is_complex
        if not real and not (isinstance(low, int) and isinstance(high, int) and low >= -(2**63) and high < 2**64):
            at.fail("the range of an input of whole numbers is two whole numbers of 64 bits", token)
        return low, high

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
        problem = illegal(target, args, kwargs)
        if problem:
            at.fail(f"{op_token.text!r} {problem}", op_token)
        node = self.graph.create_node("call_function", target, tuple(args), kwargs, name=label)
        self.define(node, label, token)
        if at.next.kind == "site":
            site = at.advance()
            node.meta["site"] = at.whole(site, site.text[1:])
        if at.accept("by"):
            node.meta["by"] = at.take_name("the name of a pass")
        self.compute(node, declared, token, op_token)

    def compute(self, node: fx.Node, declared: ValueType | None, token: Token, op_token: Token) -> None:
        """The value of a call, whose type must be the declared one."""
        at, label, names = self.at, node.name, self.program.names
        try:
            node.meta["val"] = recompute(self.program, node)
            found = type_of(node.meta["val"])
        except LaconicError as problem:
            at.fail(f"{problem.what}: {problem.why}", op_token)
        except TypeError as problem:
            at.fail(f"%{label} computes {problem}, which is no value of a program", op_token)
        if isinstance(found, NumberType) and _example(node.meta["val"]) >= MAX_SIZE:
            at.fail(f"%{label} is a whole number of 2**62 or more", token)
        # Values that depend on sizes and are no sizes are written as `float(?)`: alike in text is alike.
        if not same_type(found, declared) and type_text(found, names) != type_text(declared, names):
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

    def tree(self, values: list[Any], collect: bool = False) -> Tree:
        """A tree whose `%x` and `@x` leaves index `values`: found there, or appended in order if `collect`."""
        at = self.at
        if at.accept("{"):
            result: dict[str, Tree] = {}
            while not at.peek("}"):
                token = at.next
                key = at.take_string("a key")
                if key in result:
                    at.fail(f"key {key!r} is given twice", token)
                at.expect(":")
                with at.nested():
                    result[key] = self.tree(values, collect)
                if not at.accept(","):
                    break
            at.expect("}")
            return result
        for opening, closing in (("[", "]"), ("(", ")")):
            if at.accept(opening):
                items: list[Tree] = []
                while not at.peek(closing):
                    with at.nested():
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


def _example(value: Any) -> float:
    """How large a number is for the example's sizes; 0 for what only running the model can tell."""
    number = value.node.hint if is_symbolic(value) else value
    return abs(number) if isinstance(number, int) else 0


def _first_line(problem: Exception) -> str:
    return (str(problem).strip() or type(problem).__name__).splitlines()[0]
