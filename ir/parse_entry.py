"""Functions and entries in the text form: slots or inputs and arguments, calls, updates and results."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from laconic.ir.lexer import Cursor, Token
from laconic.ir.outline import Label, add_call, label_of, results_of, shifted
from laconic.ir.parse_body import Binder, BodyParser, first_line
from laconic.ir.parse_types import TypeParser
from laconic.ir.program import Entry, Function, Input, Kind, Output, Program, Role
from laconic.ir.rewrite import fake_weight, placeholder_name
from laconic.ir.tree import CONSTANTS, Leaf, Tree, leaves
from laconic.ir.types import TensorType, TupleType, same_type, type_of, type_text


class FunctionParser(BodyParser):
    """Reads a function: slots, calls and results."""

    def function(self, name: str) -> Function:
        at = self.at
        while at.accept("slot"):
            self.slot()
            at.end_line()
        first = at.next
        while at.next.kind == "value":
            self.call()
            at.end_line()
        if not any(node.op == "call_function" for node in self.graph.nodes):
            at.fail("a function says something", first)
        at.expect("return")
        token = at.next
        results = self.value()
        made = isinstance(results, tuple) and results
        if not made or not all(isinstance(r, fx.Node) and r.op == "call_function" for r in results):
            at.fail("a function returns a tuple of what it computes", token)
        if len(set(results)) < len(results) or any(not _crosses(r) for r in results):
            at.fail("a function returns tensors and whole numbers, each once", token)
        at.end_line()
        at.expect("}")
        self.graph.output(results)
        return Function(name, self.graph)

    def slot(self) -> None:
        """A placeholder of the declared type."""
        binder = self.binder()
        node = self.graph.create_node("placeholder", binder.label, name=binder.label)
        node.meta["val"] = self.fake(binder)
        self.define(node, binder.label, binder.token)


def _crosses(node: fx.Node) -> bool:
    return not isinstance(type_of(node.meta["val"]), TupleType | None)


class EntryParser(BodyParser):
    """Reads the body of one entry into a graph over the program's rows."""

    def __init__(self, at: Cursor, types: TypeParser, program: Program, recompute: bool, name: str) -> None:
        super().__init__(at, types, program, recompute)
        self.name = name
        self.inlined = fx.Graph()  # the names of all nodes, those that calls stand for included
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

    def call(self) -> None:
        binders = [self.binder()]
        while self.at.accept(","):
            binders.append(self.binder())
        self.at.expect("=")
        if self.at.accept("call"):
            return self.function_call(binders)
        if len(binders) > 1:
            self.at.fail("an op gives one value; several are given by a function: call NAME(...)")
        return self.operation(binders[0])

    def function_call(self, binders: list[Binder]) -> None:
        """A call of a function that stands above; operands and results are of the types that it says."""
        at, names = self.at, self.program.names
        token = at.next
        function = self.program.functions.get(at.take_name("a function"))
        if function is None:
            at.fail("no function of this name stands above", token)
        args, kwargs = self.arguments()
        slots, results = function.slots(), function.results
        if kwargs or len(args) != len(slots) or not all(isinstance(a, fx.Node) for a in args):
            at.fail(f"{function.name} takes {len(slots)} values", token)
        for slot, given in zip(slots, args, strict=True):
            wanted, found = type_of(slot.meta["val"]), type_of(given.meta["val"])
            if not self.agree(found, wanted):
                at.fail(f"slot %{slot.name} is {type_text(wanted, names)}, not {type_text(found, names)}", token)
        if len(binders) != len(results):
            at.fail(f"{function.name} gives {len(results)} values, not {len(binders)}", token)
        for binder, result in zip(binders, results, strict=True):
            self.hold(binder, type_of(result.meta["val"]))
        body = function.calls()
        labels = self.labels(body)
        made = [labels[body.index(result)][0] for result in results]
        if made != [binder.label for binder in binders]:
            at.fail(f"these results are called {', '.join(f'%{name}' for name in made)} there", binders[0].token)
        named = [b.label for b in binders]
        for label, _ in labels:
            if label not in named:
                self.reserve(label, token)
        call = add_call(self.graph, function, args, labels, results, named)
        for binder, node in zip(binders, results_of(call), strict=True):
            self.define(node, binder.label, binder.token)

    def labels(self, body: list[fx.Node]) -> list[Label]:
        """The names and sites of the nodes that a call stands for: `!+47` behind those of the function, or a list."""
        at = self.at
        if at.next.kind == "shift":
            token = at.advance()
            by = at.whole(token, token.text[2:]) * (-1 if token.text[1] == "-" else 1)
            found = [shifted(label_of(node), by) for node in body]
            if None in found:
                at.fail("the names of the function's nodes do not tell their sites: list them, as [%NAME !SITE, ...]")
            return [label for label in found if label is not None]
        token = at.expect("as")
        at.expect("[")
        listed: list[Label] = []
        while not at.peek("]"):
            name, _ = self.label()
            site = at.advance() if at.next.kind == "site" else None
            listed.append((name, None if site is None else at.whole(site, site.text[1:])))
            if not at.accept(","):
                break
        at.expect("]")
        if len(listed) != len(body):
            at.fail(f"the function has {len(body)} nodes, not {len(listed)}", token)
        return listed

    def define(self, node: fx.Node, label: str, token: Token) -> None:
        super().define(node, label, token)
        self.reserve(label, token)

    def reserve(self, label: str, token: Token) -> None:
        """No two nodes have one name, those that calls stand for included."""
        if self.inlined.create_node("placeholder", label, name=label).name != label:
            self.at.fail(f"%{label} stands for two nodes, or may not be used as a name", token)

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
            at.fail(f"no tensor has this type: {first_line(problem)}", token)
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
