"""Progress on stderr: a bar for passes and a line for what is being done; plain lines where there is no terminal."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

#: Styles of the lines of a diff, by their first character.
_DIFF = {"-": "red", "+": "green", "@": "cyan", "*": "bold"}


def wide_console(*, stderr: bool) -> Console:
    """Stdout or stderr; as wide as the terminal, else wide enough for a ledger."""
    found = Console(stderr=stderr, highlight=False, markup=False, emoji=False)
    if found.is_terminal or "COLUMNS" in os.environ:
        return found
    return Console(stderr=stderr, highlight=False, markup=False, emoji=False, width=120)


class Display:
    """A context in which `stage` says what is being done. Leaving it, by whatever way, restores the terminal."""

    def __init__(self, *, shown: bool = True) -> None:
        self.shown = shown
        self._console = wide_console(stderr=True)
        self._live = shown and self._console.is_terminal
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=self._console,
            transient=True,
            disable=not self._live,
        )
        self._task: Any = None

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def stage(self, text: str) -> None:
        """Name what is being done now."""
        if not self.shown:
            return
        if not self._live:
            self._console.print(f"laconic: {text}", highlight=False, markup=False, soft_wrap=True)
            return
        if self._task is not None:
            self._progress.remove_task(self._task)
        self._task = self._progress.add_task(text, total=None)

    def write(self, text: str) -> None:
        """Print something that was asked for: to stderr as it is, above the progress display."""
        self._console.print(Text(text), soft_wrap=True)

    def write_diff(self, text: str) -> None:
        """The same for a text diff, in colours where the terminal has them."""
        coloured = Text()
        for line in text.splitlines(keepends=True):
            coloured.append(line, style=_DIFF.get(line[:1], ""))
        self._console.print(coloured, soft_wrap=True)

    def table(self, table: Table) -> None:
        self._console.print(table)

    def items(self, text: str, total: int) -> Any:
        """A bar of `total` items; call the result to advance it."""
        if not self._live:
            self.stage(f"{text} ({total})")
            return lambda: None
        task = self._progress.add_task(text, total=total)
        return lambda: self._progress.advance(task)

    def counted(self, text: str) -> Callable[[int, int], None]:
        """A bar for what tells how many items are done, and of how many; a line where there is no terminal."""
        advance: Any = None

        def note(done: int, total: int) -> None:
            nonlocal advance
            if advance is None:
                advance = self.items(text, total)
            advance()

        return note

    def instrument(self) -> Any:
        """An instrument that shows a pipeline's passes as a bar."""
        from laconic.ir.program import Program
        from laconic.passes.base import Pass, PassResult
        from laconic.passes.manager import Instrument

        display = self

        class Bar(Instrument):
            def started(self, program: Program, passes: Sequence[Pass]) -> None:
                self.advance = display.items("passes", len(passes))

            def before_pass(self, position: int, item: Pass, program: Program) -> None:
                display.stage(f"{item.spec} on {program.node_count()} nodes")

            def after_pass(self, position: int, item: Pass, result: PassResult) -> None:
                self.advance()

            def skipped_pass(self, position: int, item: Pass, reason: str) -> None:
                self.advance()

        return Bar()
