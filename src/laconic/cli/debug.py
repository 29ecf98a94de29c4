"""The debug flags of `laconic optimize`, named as LLVM and MLIR name them: each becomes an instrument."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from laconic.cli.progress import Display
    from laconic.passes.base import Pass
    from laconic.passes.instruments import Timing
    from laconic.passes.manager import Instrument

PrintAfter = Annotated[
    list[str] | None,
    typer.Option("--print-after", metavar="P", help="Print the program after each run of this pass (repeatable)."),
]
PrintAfterAll = Annotated[bool, typer.Option("--print-after-all", help="Print the program after every pass.")]
PrintChanged = Annotated[bool, typer.Option("--print-changed", help="Print what each pass changed, as a text diff.")]
DumpDir = Annotated[
    Path | None,
    typer.Option("--dump-dir", metavar="D", help="Write the program after every pass into D/001-simplify ..."),
]
TimePasses = Annotated[bool, typer.Option("--time-passes", help="Print the time spent on each pass, by phase.")]
BisectLimit = Annotated[
    int | None,
    typer.Option("--bisect-limit", metavar="N", min=-1, help="Run the first N passes only, and say so; -1: all."),
]
DisablePass = Annotated[
    list[str] | None, typer.Option("--disable-pass", metavar="P", help="Do not run this pass (repeatable).")
]
StopAfter = Annotated[str | None, typer.Option("--stop-after", metavar="P", help="Run no pass behind this one.")]


@dataclass(frozen=True)
class Debug:
    """The flags as given."""

    print_after: Sequence[str] = ()
    print_after_all: bool = False
    print_changed: bool = False
    dump_dir: Path | None = None
    time_passes: bool = False
    bisect_limit: int | None = None
    disable_pass: Sequence[str] = ()
    stop_after: str | None = None

    def instruments(self, passes: Sequence[Pass], shown: Display, force: bool, repeated: list[str]) -> list[Instrument]:
        """An instrument per flag, those first that keep passes from running. `repeated`: options of the run that a line
        which reproduces a failure must repeat.

        Raises UsageError for what names no pass of the pipeline, and for a dump folder that is in the way.
        """
        from laconic.passes import instruments as made
        from laconic.passes.pipeline import positions

        found: list[Instrument] = []
        if skipped := self._skipped(passes):
            found.append(made.Skip(skipped))
        if self.bisect_limit is not None:
            found.append(made.Bisect(self.bisect_limit, shown.write))
        if self.time_passes:
            found.append(made.Timing())
        if self.print_after_all:
            found.append(made.PrintAfter(shown.write))
        elif self.print_after:
            chosen = set().union(*(positions(text, passes) for text in self.print_after))
            found.append(made.PrintAfter(shown.write, chosen))
        if self.print_changed:
            found.append(made.PrintChanged(shown.write_diff))
        if self.dump_dir is None:
            return [*found, made.Advice("for the program before it, and a line that reproduces it: --dump-dir D")]
        made.refuse_dumps(self.dump_dir, force)
        return [*found, made.Dump(self.dump_dir, force, repeated)]

    def _skipped(self, passes: Sequence[Pass]) -> dict[int, str]:
        """The positions that these flags skip, and why."""
        from laconic.passes.pipeline import positions

        reasons: dict[int, str] = {}
        if self.stop_after is not None:
            last = min(positions(self.stop_after, passes))
            reasons = dict.fromkeys(range(last + 1, len(passes)), f"--stop-after {self.stop_after}")
        for text in self.disable_pass:
            reasons.update(dict.fromkeys(positions(text, passes), f"--disable-pass {text}"))
        return reasons


def timing_of(instruments: Sequence[Instrument]) -> Timing | None:
    """The one among them that kept time."""
    from laconic.passes.instruments import Timing

    return next((i for i in instruments if isinstance(i, Timing)), None)
