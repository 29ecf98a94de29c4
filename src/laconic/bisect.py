"""What makes a model bad: the first pass of a pipeline, the first of its actions, and the other pass it takes for it.

Candidates are runs of the manager: the first passes of the pipeline with the plans they had, the last one with the
first of its actions, or two passes alone. Halving finds the culprit in about log2 of the passes and of its actions.
"""

from __future__ import annotations

import shlex
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from typing import Any

from laconic.artefact import save
from laconic.figures import Judge
from laconic.ir.calibration import Calibration
from laconic.ir.errors import LaconicError, UsageError
from laconic.ir.inputs import Case
from laconic.ir.program import Program
from laconic.passes.base import Pass, Plan
from laconic.passes.manager import PassManager, Run
from laconic.passes.pipeline import print_pipeline


class Verdict(StrEnum):
    GOOD = "good"
    BAD = "bad"
    SKIP = "skip"


@dataclass(frozen=True)
class Trial:
    """A candidate in words, and what was said of it: a metric's value or an exit code in `measured`."""

    candidate: str
    verdict: Verdict
    measured: float | None


#: Says whether a run's program is good, and what was measured.
Tester = Callable[[Run], tuple[Verdict, float | None]]


@dataclass
class Finding:
    """What was found; `culprit` is None if the whole pipeline is good. So many of its first `actions` make the model
    bad, the last of which is `action`. `alone` says whether the culprit is bad on its own; if not, `partner` is the
    pass that makes it so, if it is one."""

    trials: list[Trial] = field(default_factory=list)
    culprit: Pass | None = None
    position: int | None = None
    actions: int | None = None
    action: Mapping[str, Any] | None = None
    alone: bool | None = None
    partner: Pass | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "culprit": self.culprit.spec if self.culprit else None,
            "position": self.position,
            "actions": self.actions,
            "action": dict(self.action) if self.action else None,
            "alone": self.alone,
            "partner": self.partner.spec if self.partner else None,
            "trials": [vars(trial) for trial in self.trials],
        }


class Bisection:
    """A search among the passes of a pipeline, which decide on `calibration` if they need any. `progress` is told each
    candidate before it is tested."""

    def __init__(
        self,
        program: Program,
        passes: Sequence[Pass],
        test: Tester,
        *,
        inputs: Sequence[Case] | None = None,
        calibration: Calibration | None = None,
        progress: Callable[[str], None] = lambda candidate: None,
    ) -> None:
        self._program, self._passes, self._test = program, list(passes), test
        self._inputs, self._calibration, self._progress = inputs, calibration, progress
        self._found = Finding()

    def search(self) -> Finding:
        """Raises UsageError if the model is bad before any pass, and what a pass that breaks its contract raises."""
        whole = PassManager(self._passes, calibration=self._calibration).run(self._program, self._inputs)
        self._plans = whole.plans
        changed = [k for k, row in enumerate(whole.ledger.rows, start=1) if row.modified]
        if self._verdict(PassManager([]).run(self._program, self._inputs), "no pass") is not Verdict.GOOD:
            raise UsageError("the model is not good before any pass", hint="allow more, or test for something else")
        if not changed:
            return self._found
        verdict = self._verdict(whole, "all passes")
        if verdict is Verdict.SKIP:
            raise UsageError("whether the model is good with all passes cannot be told", hint="test for something else")
        if verdict is Verdict.GOOD:
            return self._found
        k = changed[_first_bad(len(changed), lambda n: self._prefix(changed[n - 1])) - 1]
        self._found.culprit, self._found.position = self._passes[k - 1], k
        self._search_actions(k)
        self._search_partner(k, [j for j in changed if j < k])
        return self._found

    def _search_actions(self, k: int) -> None:
        actions = self._plans[k - 1].actions
        n = _first_bad(len(actions), lambda m: self._prefix(k, actions=m))
        self._found.actions, self._found.action = n, actions[n - 1]

    def _search_partner(self, k: int, earlier: Sequence[int]) -> None:
        self._found.alone = self._subset([k]) is Verdict.BAD if earlier else True
        if not self._found.alone:
            partners = (j for j in reversed(earlier) if self._subset([j, k]) is Verdict.BAD)
            j = next(partners, None)
            self._found.partner = self._passes[j - 1] if j is not None else None

    def _prefix(self, k: int, actions: int | None = None) -> Verdict:
        """The first k passes as they were decided, of the last one only the first `actions`."""
        plans, said = self._plans[:k], f"passes 1 to {k}"
        if actions is not None:
            plans = [*plans[:-1], replace(plans[-1], actions=plans[-1].actions[:actions])]
            said += f", of the last one {actions} of {len(self._plans[k - 1].actions)} actions"
        return self._run(self._passes[:k], plans, said)

    def _subset(self, positions: Sequence[int]) -> Verdict:
        """These passes alone, deciding anew."""
        passes = [self._passes[k - 1] for k in positions]
        return self._run(passes, (), f"{print_pipeline(passes)} alone")

    def _run(self, passes: Sequence[Pass], plans: Sequence[Plan], said: str) -> Verdict:
        try:
            run = PassManager(passes, plans=plans, calibration=self._calibration).run(self._program, self._inputs)
        except LaconicError:  # what cannot be made cannot be judged
            self._found.trials.append(Trial(said, Verdict.SKIP, None))
            return Verdict.SKIP
        return self._verdict(run, said)

    def _verdict(self, run: Run, said: str) -> Verdict:
        self._progress(said)
        verdict, measured = self._test(run)
        self._found.trials.append(Trial(said, verdict, measured))
        return verdict


def _first_bad(count: int, verdict: Callable[[int], Verdict]) -> int:
    """The least n in 1..count that is bad, if all below it are good and all behind it bad; `count` itself is known to
    be. Where some cannot be judged, the least that is known to be bad."""
    good, bad = 0, count
    skipped: set[int] = set()
    while open_ := [n for n in range(good + 1, bad) if n not in skipped]:
        n = min(open_, key=lambda n: abs(n - (good + bad) / 2))
        found = verdict(n)
        if found is Verdict.SKIP:
            skipped.add(n)
        elif found is Verdict.BAD:
            bad = n
        else:
            good = n
    return bad


def by_metric(judge: Judge, program: Program, most: float) -> Tester:
    """Bad is what makes the judge's first metric worse than the program's by more than `most`, or not a number."""
    before = judge(program)

    def test(run: Run) -> tuple[Verdict, float | None]:
        after = judge(run.program)
        drop = judge.drop(before, after)
        return Verdict.GOOD if drop <= most else Verdict.BAD, after[judge.metrics[0].name]

    return test


def by_command(command: str, seed: int) -> Tester:
    """Bad is what the command says of the candidate's DIR, which stands in it as `{}` or comes last: as for `git bisect
    run`, it exits with 0 for good, 125 for what cannot be told, up to 127 for bad. What it prints goes to stderr.
    Raises UsageError for other codes, and for a command that cannot be started."""
    try:
        words = shlex.split(command)
    except ValueError as problem:
        raise UsageError(f"--check {command!r} cannot be read", why=str(problem)) from problem
    if not words:
        raise UsageError("--check names no command", hint="give a command that exits with 0 if the model is good")
    words = words if any("{}" in word for word in words) else [*words, "{}"]

    def test(run: Run) -> tuple[Verdict, float | None]:
        with tempfile.TemporaryDirectory() as folder:
            path = save(run.program, run.ledger, run.plans, Path(folder) / "candidate", seed=seed)
            try:
                given = [word.replace("{}", str(path)) for word in words]
                code = subprocess.run(given, stdout=2, check=False).returncode
            except OSError as problem:
                raise UsageError(f"{words[0]!r} cannot be started", why=str(problem)) from problem
        if not 0 <= code <= 127:
            raise UsageError(f"the command ended with {code}", hint="0 says good, 125 skip, other codes to 127 bad")
        return {0: Verdict.GOOD, 125: Verdict.SKIP}.get(code, Verdict.BAD), float(code)

    return test
