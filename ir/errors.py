"""What can go wrong, as the user reads it: what failed, where, why, what to do next.

Every error that is the user's to read derives from `LaconicError`; its class fixes the exit code of the command line.
This module imports nothing, so that the command line can report errors without loading torch.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import ClassVar


class LaconicError(Exception):
    """A failure with a place, a reason and a next step.

    `what` is one sentence; `where` names a pass, node, file or source line; `why` gives the evidence; `hint` says what
    to do next. All but `what` may be empty.
    """

    exit_code: ClassVar[int] = 1

    def __init__(self, what: str, *, where: str = "", why: str = "", hint: str = "") -> None:
        self.what, self.where, self.why, self.hint = what, where, why, hint
        super().__init__(self.render())

    def render(self) -> str:
        lines = [self.what]
        for label, text in (("where", self.where), ("why", self.why), ("next", self.hint)):
            if text:
                lines.append(f"  {label}: " + text.replace("\n", "\n         "))
        return "\n".join(lines)


class ModelError(LaconicError):
    """The model's files or weights are missing, damaged or not finite."""


class UsageError(LaconicError):
    """An unknown name, option or form of input, or an output that is in the way."""

    exit_code = 2


class VerificationError(LaconicError):
    """A Program breaks a rule, or a pass broke its contract."""

    exit_code = 3


class UnsupportedError(LaconicError):
    """The model cannot be captured or exported, and why."""

    exit_code = 4


class FixedAxisError(UnsupportedError):
    """The model fixes, or constrains, an axis that was asked to be dynamic."""


class MissingDependencyError(LaconicError):
    """An optional dependency or a compiler is not there."""

    exit_code = 5


class ParseError(LaconicError):
    """Text that does not parse: a program, a pipeline or a pass specification. `text` shows the place."""

    def __init__(self, message: str, *, source: str, line: int, column: int, text: str = "", hint: str = "") -> None:
        self.line, self.column = line, column
        super().__init__(message, where=f"{source}:{line}:{column}", why=text, hint=hint)


class PipelineError(ParseError):
    """A pipeline or pass specification that does not parse, or names what does not exist."""

    exit_code = 2


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown `name`: the closest known ones, else all of them."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(repr(c) for c in close) + "?"
    return "known: " + ", ".join(known) if known else ""
