"""Instruments: what a person sees of a run, and how they keep passes from running. Each is one flag of `optimize`.

All are told by the manager and know nothing of it. `Write` takes a text of one or several lines.
"""

from __future__ import annotations

import difflib
import logging
import re
import shlex
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from laconic.ir.errors import LaconicError, UsageError
from laconic.ir.files import place_directory, refuse_existing, temporary_beside
from laconic.ir.program import Program
from laconic.ir.store import PROGRAM, WEIGHTS, write_program
from laconic.passes.base import Pass, PassResult
from laconic.passes.ledger import Ledger
from laconic.passes.manager import Instrument, Phase

log = logging.getLogger(__name__)

Write = Callable[[str], None]

#: The name of a dump: its number, and the pass it was written after.
_DUMP = re.compile(r"\d{3,}-[A-Za-z][\w-]*")


@dataclass
class Skip(Instrument):
    """Keeps the passes at these positions from running, each for its reason (`--disable-pass`, `--stop-after`)."""

    reasons: Mapping[int, str]

    def should_run(self, position: int, item: Pass) -> str | None:
        return self.reasons.get(position)


@dataclass
class Bisect(Instrument):
    """Runs the first `limit` passes, all if it is negative, and says which: halving the limit finds a faulty pass.

    Passes that an earlier instrument skips are not counted, so that numbers stay the same from run to run.
    """

    limit: int
    write: Write
    count: int = 0

    def started(self, program: Program, passes: Sequence[Pass]) -> None:
        self.count = 0

    def should_run(self, position: int, item: Pass) -> str | None:
        self.count += 1
        runs = self.limit < 0 or self.count <= self.limit
        self.write(f"BISECT: {'running' if runs else 'NOT running'} pass ({self.count}) {item.spec} on program")
        return None if runs else f"--bisect-limit {self.limit}"


class _Numbered(Instrument):
    """Knows how many passes there are."""

    total = 0

    def started(self, program: Program, passes: Sequence[Pass]) -> None:
        self.total = len(passes)

    def title(self, position: int, item: Pass, remark: str = "") -> str:
        return f"*** after {item.spec} ({position + 1} of {self.total}){': ' if remark else ''}{remark} ***"


@dataclass
class PrintAfter(_Numbered):
    """Prints the program after the passes at these positions; None: after every one."""

    write: Write
    positions: Collection[int] | None = None

    def after_pass(self, position: int, item: Pass, result: PassResult) -> None:
        if self.positions is None or position in self.positions:
            self.write(f"{self.title(position, item)}\n{str(result.program).rstrip()}")

    def skipped_pass(self, position: int, item: Pass, reason: str) -> None:
        if self.positions is None or position in self.positions:
            self.write(self.title(position, item, f"skipped: {reason}"))


@dataclass
class PrintChanged(_Numbered):
    """Prints what each pass changed in the program's text as a unified diff, and a line for a pass that did not."""

    write: Write
    context: int = 1
    _before: list[str] = field(default_factory=list)

    def before_pass(self, position: int, item: Pass, program: Program) -> None:
        self._before = str(program).splitlines()

    def after_pass(self, position: int, item: Pass, result: PassResult) -> None:
        if not result.modified:
            return self.write(self.title(position, item, "no change"))
        after = str(result.program).splitlines()
        changes = list(difflib.unified_diff(self._before, after, lineterm="", n=self.context))[2:]
        return self.write("\n".join([self.title(position, item), *changes]))

    def skipped_pass(self, position: int, item: Pass, reason: str) -> None:
        self.write(self.title(position, item, f"skipped: {reason}"))


@dataclass
class Dump(Instrument):
    """Writes the program as captured and after each pass into numbered folders, each of them a MODEL:
    `000-captured`, `001-simplify` ... A dump whose weights are those of the one before shares its file with it.

    `options` are those of the command line that the line which reproduces a failure must repeat.
    """

    folder: Path
    force: bool = False
    options: Sequence[str] = ()
    latest: Path | None = None
    _stored: dict[str, torch.Tensor] = field(default_factory=dict)

    def started(self, program: Program, passes: Sequence[Pass]) -> None:
        refuse_dumps(self.folder, self.force)
        with temporary_beside(self.folder) as empty:
            empty.mkdir()
            place_directory(empty, self.folder, self.force)
        self.latest = None
        self._write(0, "captured", program)

    def after_pass(self, position: int, item: Pass, result: PassResult) -> None:
        self._write(position + 1, item.name, result.program)

    def failed_pass(self, position: int, item: Pass, problem: LaconicError) -> str | None:
        command = ["laconic", "optimize", str(self.latest), "-p", item.spec, "--dry-run", *self.options]
        return f"to reproduce it: {shlex.join(command)}"

    def _write(self, number: int, name: str, program: Program) -> None:
        final = self.folder / f"{number:03d}-{name}"
        rows = {row: weight.value for row, weight in program.weights.items()}
        same = rows.keys() == self._stored.keys() and all(rows[row] is t for row, t in self._stored.items())
        with temporary_beside(final) as temporary:
            temporary.mkdir()
            weights = self.latest / WEIGHTS if self.latest and same else None
            write_program(program, temporary, weights, outlined=False)  # flat, as passes see it
            place_directory(temporary, final, force=False)
        self.latest, self._stored = final, rows


@dataclass
class Advice(Instrument):
    """Says what to do next when a pass fails."""

    text: str

    def failed_pass(self, position: int, item: Pass, problem: LaconicError) -> str | None:
        return self.text


def refuse_dumps(folder: Path, force: bool) -> None:
    """Raise UsageError if dumps cannot be written there: it exists, or `force` would replace what is no dump."""
    refuse_existing(folder, force)
    if folder.is_dir():
        foreign = [p.name for p in folder.iterdir() if not (_DUMP.fullmatch(p.name) and (p / PROGRAM).is_file())]
        if foreign:
            raise UsageError(
                f"{folder} is not replaced: it holds {sorted(foreign)[0]!r}, which is no dump",
                hint="choose another name, or remove the folder yourself",
            )


@dataclass
class Times:
    """Seconds spent on the captured program or on a pass, by phase."""

    name: str
    phases: dict[Phase, float] = field(default_factory=lambda: dict.fromkeys(Phase, 0.0))

    @property
    def total(self) -> float:
        return sum(self.phases.values())


@dataclass
class Timing(Instrument):
    """Seconds of each pass and phase. `wall` is the whole run, with what instruments and the ledger took."""

    rows: list[Times] = field(default_factory=list)
    wall: float = 0.0

    def started(self, program: Program, passes: Sequence[Pass]) -> None:
        self.rows = [Times("captured")]
        self.wall = -time.perf_counter()

    def before_pass(self, position: int, item: Pass, program: Program) -> None:
        self.rows.append(Times(item.spec))

    def spent(self, phase: Phase, seconds: float) -> None:
        self.rows[-1].phases[phase] += seconds

    def finished(self, program: Program, ledger: Ledger) -> None:
        self.wall += time.perf_counter()
