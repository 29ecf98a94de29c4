"""Tokens of the text form, with a cursor that knows line and column for every error."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NoReturn

from laconic.ir.errors import ParseError

_TOKEN = re.compile(
    r"""
    (?P<space>[ \t]+)
  | (?P<newline>\n)
  | (?P<string>"(?:[^"\\\n]|\\.)*")
  | (?P<value>%[A-Za-z_]\w*)
  | (?P<row>@(?:[A-Za-z_0-9][\w.]*|"(?:[^"\\\n]|\\.)*"))
  | (?P<shift>![+-]\d+)
  | (?P<site>!\d+)
  | (?P<number>(?:\d+\.\d*(?:e[+-]?\d+)?|\d+e[+-]?\d+|\d+)(?![\w]))
  | (?P<word>[A-Za-z_][\w.]*)
  | (?P<mark>//|\*\*|\.\.|[-+*=:,(){}\[\]@?])
    """,
    re.VERBOSE | re.ASCII,
)

#: How deep values, types and sizes may nest, and how many digits a whole number may have (2**64 has 20).
MAX_DEPTH = 64
MAX_DIGITS = 20


@dataclass(frozen=True)
class Token:
    kind: str
    text: str
    line: int
    column: int


class Cursor:
    """A place in the tokens of a text. All `take_*` methods raise ParseError at the token that does not fit."""

    def __init__(self, text: str, source: str) -> None:
        self.source = source
        self._lines = text.split("\n")
        self._tokens = self._scan(text)
        self._at = 0
        self._depth = 0

    def _scan(self, text: str) -> list[Token]:
        tokens, at, line, start = [], 0, 1, 0
        while at < len(text):
            # A range such as 0..4: the dots are no decimal point.
            found = _TOKEN.match(text, at)
            if found is None:
                self.fail(f"unexpected character {text[at]!r}", Token("", "", line, at - start + 1))
            kind, word = str(found.lastgroup), found.group()
            if kind == "number" and text.startswith("..", at + len(word) - 1) and word.endswith("."):
                word = word[:-1]
            if kind != "space":
                tokens.append(Token(kind, word, line, at - start + 1))
            at += len(word)
            if kind == "newline":
                line, start = line + 1, at
        tokens.append(Token("end", "", line, at - start + 1))
        return tokens

    @property
    def next(self) -> Token:
        return self._tokens[self._at]

    def fail(self, message: str, token: Token | None = None, hint: str = "") -> NoReturn:
        token = token or self.next
        text = self._lines[token.line - 1] if token.line <= len(self._lines) else ""
        lead = max(0, token.column - 60)
        raise ParseError(
            message,
            source=self.source,
            line=token.line,
            column=token.column,
            text="\n".join([text[lead : lead + 100], " " * (token.column - 1 - lead) + "^"]),
            hint=hint,
        )

    def peek(self, text: str, ahead: int = 0) -> bool:
        token = self._tokens[min(self._at + ahead, len(self._tokens) - 1)]
        return token.text == text and token.kind in ("mark", "word")

    def accept(self, text: str) -> bool:
        if self.peek(text):
            self._at += 1
            return True
        return False

    def expect(self, text: str) -> Token:
        if not self.peek(text):
            self.fail(f"expected {text!r}, found {self._shown()}")
        return self.advance()

    def advance(self) -> Token:
        token = self.next
        self._at += 1
        return token

    def take(self, kind: str, what: str) -> Token:
        if self.next.kind != kind:
            self.fail(f"expected {what}, found {self._shown()}")
        return self.advance()

    def take_word(self, what: str = "a word") -> str:
        return self.take("word", what).text

    def take_name(self, what: str) -> str:
        """A name: a word, or in quotes what is none."""
        return self.take_string(what) if self.next.kind == "string" else self.take_word(what)

    def take_int(self, what: str = "a whole number") -> int:
        token = self.take("number", what)
        if not token.text.isdigit():
            self.fail(f"expected {what}, found {token.text}", token)
        return self.whole(token, token.text)

    def whole(self, token: Token, digits: str) -> int:
        if len(digits) > MAX_DIGITS:
            self.fail(f"a whole number has at most {MAX_DIGITS} digits, not {len(digits)}", token)
        return int(digits)

    @contextmanager
    def nested(self) -> Iterator[None]:
        """One level deeper; refuses a text that nests without end."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            self.fail(f"nested more than {MAX_DEPTH} levels deep")
        try:
            yield
        finally:
            self._depth -= 1

    def take_string(self, what: str = "a string") -> str:
        token = self.take("string", what)
        return str(self.unquote(token, token.text))

    def take_row(self) -> str:
        token = self.take("row", "a weight (@name)")
        text = token.text[1:]
        return str(self.unquote(token, text)) if text.startswith('"') else text

    def unquote(self, token: Token, text: str) -> str:
        try:
            return str(json.loads(text))
        except ValueError:
            self.fail("not a valid string", token)

    def end_line(self) -> None:
        if self.next.kind not in ("newline", "end"):
            self.fail(f"expected the end of the line, found {self._shown()}")
        self.skip_newlines()

    def skip_newlines(self) -> None:
        while self.next.kind == "newline":
            self._at += 1

    def rest_of_line(self) -> tuple[str, Token]:
        """The raw text up to the end of the line, and its first token."""
        first = self.next
        while self.next.kind not in ("newline", "end"):
            self._at += 1
        return self._lines[first.line - 1][first.column - 1 :], first

    def _shown(self) -> str:
        return {"newline": "the end of the line", "end": "the end of the text"}.get(
            self.next.kind, repr(self.next.text)
        )
