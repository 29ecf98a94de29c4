"""The parser of the text form: text and a table of tensors in, a Program out.

Nothing is evaluated: ops are looked up by name among what torch has registered, sizes go through a small expression
parser. Every op is held to what may stand in a program before its type is recomputed with fake tensors and compared
with the declared one, so damage is reported at its line and column. What has no place in the text, such as a size
decided by its example, is the verifier's to find: `laconic.ir.store.read_program` calls it. Text that is known to be
what was written and verified may be believed what it declares, which takes a fraction of the time.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import torch

from laconic.ir.lexer import MAX_DEPTH, Cursor, Token
from laconic.ir.parse_entry import EntryParser, FunctionParser
from laconic.ir.parse_types import MAX_SIZE, TypeParser
from laconic.ir.program import Alias, Kind, Program, Site, Weight
from laconic.ir.text import VERSION
from laconic.ir.types import (
    TensorType,
    same_type,
    type_of,
    type_text,
)

#: How many calls the site lines of a text may speak of.
MAX_SITES = 1_000_000

#: Gives the tensor of a row, by name and declared type.
Lookup = Callable[[str, TensorType], torch.Tensor]


def parse_program(text: str, lookup: Lookup, source: str = "<text>", *, recompute: bool = True) -> Program:
    """The program that `text` says, with the tensors that `lookup` gives.

    Without `recompute` calls are believed the tensor types that the text declares. Raises ParseError with line and
    column, and whatever `lookup` raises but KeyError. `source` names the text in errors.
    """
    return _Parser(text, lookup, source, recompute).program()


class _Parser:
    def __init__(self, text: str, lookup: Lookup, source: str, recompute: bool) -> None:
        self.at = Cursor(text, source)
        self.lookup, self.recompute = lookup, recompute
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
            "function": self.function,
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
        if "forward" not in self.result.entries:
            at.fail("the text holds no entry 'forward'")
        return self.result

    # Declarations

    def fact(self) -> None:
        self.at.advance()
        token = self.at.next
        key = self.at.take_name("the name of a fact")
        if key in self.result.facts:
            self.at.fail(f"fact {key!r} is given twice", token)
        self.at.expect("=")
        raw, first = self.at.rest_of_line()
        try:
            value = json.loads(raw)
        except (ValueError, RecursionError) as problem:
            self.at.fail(f"not a JSON value: {problem}", first)
        if _depth(value) > MAX_DEPTH:
            self.at.fail(f"nested more than {MAX_DEPTH} levels deep", first)
        self.result.facts[key] = value

    def size(self) -> None:
        at = self.at
        at.advance()
        token = at.next
        name = at.take_name("the name of a size")
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
        if max(low, hint, high or 0) >= MAX_SIZE:
            at.fail("sizes are less than 2**62", token)
        self.types.sizes[name] = self.result.add_symbol(name, low, high, hint)

    def weight(self) -> None:
        at = self.at
        kind = Kind(at.advance().text)
        token = at.next
        name = at.take_row()
        at.expect(":")
        declared = self.types.type()
        if not isinstance(declared, TensorType) or not all(
            isinstance(s, int) for s in (*declared.shape, *declared.stride)
        ):
            at.fail(f"{name!r} must be a tensor of fixed sizes", token)
        trainable, transient = at.accept("trainable"), at.accept("transient")
        if name in self.result.weights or name in self.result.aliases:
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
        if name in self.result.weights or name in self.result.aliases:
            at.fail(f"{name!r} is declared twice", token)
        at.expect("=")
        self.result.aliases[name] = Alias(None) if at.accept("none") else self.view(name, token)

    def view(self, name: str, token: Token) -> Alias:
        """A row, rows and columns of one, or the transpose of either."""
        at = self.at
        transposed = at.accept("transpose")
        target = at.take_row()
        windows: list[tuple[int, int] | None] = []
        if at.accept("["):
            windows.append(self.window())
            if at.accept(","):
                windows.append(self.window())
            at.expect("]")
        if target not in self.result.weights:
            at.fail(f"the alias {name!r} points at {target!r}, which is not declared", token)
        shape = self.result.weights[target].value.shape
        for axis, (window, what) in enumerate(zip(windows, ("rows", "columns"), strict=False)):
            if window and not (axis < len(shape) and window[0] <= window[1] <= shape[axis]):
                at.fail(f"{target!r} has no {what} {window[0]} to {window[1]}", token)
        if len(shape) != 2 and (transposed or len(windows) == 2):
            at.fail(f"{target!r} is no matrix, and only a matrix has columns or a transpose", token)
        rows, columns = [*windows, None, None][:2]
        return Alias(target, rows, columns, transposed)

    def window(self) -> tuple[int, int] | None:
        """`a:b`, or `:` for all."""
        if self.at.accept(":"):
            return None
        start = self.at.take_int()
        self.at.expect(":")
        return (start, self.at.take_int())

    def site(self) -> None:
        at = self.at
        at.advance()
        first = at.take_int()
        at.expect("..")
        last = at.take_int()
        if last < first or last - first + len(self.result.sites) >= MAX_SITES:
            at.fail(f"{first}..{last} is no range of sites, or there are more than {MAX_SITES}")
        at.expect("=")
        place = Site(at.take_string("a module path"), at.take_string("a source line"))
        for number in range(first, last + 1):
            self.result.sites[number] = place

    # Entries

    def entry(self) -> None:
        at = self.at
        at.advance()
        token = at.next
        name = at.take_name("the name of an entry")
        if name in self.result.entries:
            at.fail(f"entry {name!r} is declared twice", token)
        at.expect("{")
        at.end_line()
        self.result.entries[name] = EntryParser(at, self.types, self.result, self.recompute, name).entry()

    def function(self) -> None:
        at = self.at
        at.advance()
        token = at.next
        name = at.take_name("the name of a function")
        if name in self.result.functions:
            at.fail(f"function {name!r} is declared twice", token)
        at.expect("{")
        at.end_line()
        self.result.functions[name] = FunctionParser(at, self.types, self.result, self.recompute).function(name)


def _depth(value: Any) -> int:
    """How deep a JSON value nests."""
    depth, level = 0, [value]
    while level:
        depth += 1
        nests = [v for v in level if isinstance(v, (dict, list))]
        level = [child for nest in nests for child in (nest.values() if isinstance(nest, dict) else nest)]
    return depth
