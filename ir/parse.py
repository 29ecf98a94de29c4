"""The parser of the text form: text and a table of tensors in, a verified Program out.

Nothing is evaluated: ops are looked up by name among what torch has registered, sizes go through a small expression
parser. Every node's type is recomputed as it is read and compared with the declared one, so damage is reported at its
line and column.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import torch

from laconic.ir.lexer import Cursor
from laconic.ir.parse_entry import EntryParser
from laconic.ir.parse_types import TypeParser
from laconic.ir.program import Alias, Kind, Program, Site, Weight
from laconic.ir.text import VERSION
from laconic.ir.types import (
    TensorType,
    same_type,
    type_of,
    type_text,
)

#: Gives the tensor of a row, by name and declared type.
Lookup = Callable[[str, TensorType], torch.Tensor]


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
        self.types = TypeParser(self.at)

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
        if name in self.types.sizes:
            at.fail(f"size {name!r} is declared twice", token)
        if not (low <= hint and (high is None or hint <= high)):
            at.fail(f"size {name!r} has an example outside its range", token)
        self.types.sizes[name] = self.result.add_symbol(name, low, high, hint)

    def weight(self) -> None:
        at = self.at
        kind = Kind(at.advance().text)
        token = at.next
        name = at.take_row()
        at.expect(":")
        declared = self.types.type()
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
        self.result.entries[name] = EntryParser(at, self.types, self.result, name).entry()
