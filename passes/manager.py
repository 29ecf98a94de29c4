"""The manager: runs a pipeline pass by pass, verifies each result, checks its contract, and writes the ledger.

A pass is trusted with nothing. `modified` is compared with a hash of the program, the rewritten program is verified
against the one before it, weights must not have been written into, and outputs are compared on several inputs and sizes
as the pass's contract says. The first failure stops the run with the pass, its place and what ran before it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import ParamSpec, TypeVar

import torch

from laconic.ir.calibration import Calibration
from laconic.ir.errors import LaconicError, UsageError, VerificationError
from laconic.ir.inputs import Case, cases, cases_beside
from laconic.ir.outcomes import Outcomes
from laconic.ir.outline import inline
from laconic.ir.program import Program
from laconic.ir.signature import checksum, fingerprint
from laconic.ir.verify import verify, verify_rewrite, verify_sizes
from laconic.passes.base import Needs, Pass, PassResult, Plan
from laconic.passes.contracts import check, check_weights, distance
from laconic.passes.ledger import Ledger, Row, measure
from laconic.passes.pipeline import print_pipeline

P = ParamSpec("P")
T = TypeVar("T")
Fingerprint = Hashable


class Phase(StrEnum):
    """What the manager spends time on: a pass's own two steps, and the two ways of holding it to its word."""

    PLAN = "plan"
    APPLY = "apply"
    VERIFY = "verify"
    CHECK = "check"


class Instrument:
    """Observes a run, and may keep passes from running; subclasses override what they need.

    A run is: `started`; for each pass `should_run`, then `skipped_pass`, or `before_pass` and one of `after_pass` and
    `failed_pass`; `finished`. `spent` comes in between, and before the first pass for the captured program.
    """

    def started(self, program: Program, passes: Sequence[Pass]) -> None: ...

    def should_run(self, position: int, item: Pass) -> str | None:
        """Why this pass is not to run, or None. The first instrument that names a reason is the last one asked."""

    def skipped_pass(self, position: int, item: Pass, reason: str) -> None: ...

    def before_pass(self, position: int, item: Pass, program: Program) -> None: ...

    def spent(self, phase: Phase, seconds: float) -> None: ...

    def after_pass(self, position: int, item: Pass, result: PassResult) -> None: ...

    def failed_pass(self, position: int, item: Pass, problem: LaconicError) -> str | None:
        """What the user can do next, for the error message, or None."""

    def finished(self, program: Program, ledger: Ledger) -> None: ...


@dataclass
class Contents:
    """Checksums of all weights seen in a run. Writes through `.data` or numpy leave no other trace."""

    known: dict[str, tuple[torch.Tensor, bytes]] = field(default_factory=dict)

    def hold(self, program: Program) -> None:
        """Raise VerificationError if a weight that was seen before holds other bytes now; note new ones."""
        for name, weight in program.weights.items():
            tensor, before = self.known.get(name, (None, b""))
            now = checksum(weight.value)
            if tensor is weight.value and now != before:
                raise VerificationError(f"the weight {name!r} was written into in place")
            self.known[name] = (weight.value, now)


@dataclass
class Run:
    """What a pipeline gave: the program, the ledger, and each pass's plan in order."""

    program: Program
    ledger: Ledger
    plans: list[Plan] = field(default_factory=list)
    contents: Contents = field(default_factory=Contents, repr=False)


@dataclass
class _State:
    """A run under way, and what is known of its program: its fingerprint, and its outcomes beside the captured ones;
    and what its passes decide on."""

    run: Run
    fingerprint: Fingerprint
    captured: Outcomes | None
    known: Outcomes | None
    calibration: Calibration | None


def no_metrics(program: Program) -> Mapping[str, float]:
    """Judges nothing."""
    return {}


@dataclass
class PassManager:
    """A pipeline ready to run. `verify_each` and `check_contracts` are on unless switched off for speed; what they did
    not see is not called verified. With `plans`, one for each pass, nothing is decided again. `judge` gives the metrics
    that the ledger tells after each pass that changes something; `calibration` is what passes that need any decide on.
    Raises UsageError for plans of other passes."""

    passes: Sequence[Pass]
    verify_each: bool = True
    check_contracts: bool = True
    instruments: Sequence[Instrument] = ()
    plans: Sequence[Plan] = ()
    judge: Callable[[Program], Mapping[str, float]] = no_metrics
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        if self.plans and [plan.spec for plan in self.plans] != [item.spec for item in self.passes]:
            raise UsageError("the plans are those of other passes", where=print_pipeline(self.passes))

    def run(self, program: Program, inputs: Sequence[Case] | None = None) -> Run:
        """Run all passes on `program`, inlined; it is left as it is.

        Contracts are checked on `inputs`, else on the captured examples and drawn ones at other sizes, by the entry
        `forward`; other entries on drawn inputs, one after another, with the states that the one before left. Raises
        VerificationError if a pass breaks a rule or its contract.
        """
        self._refuse_unmet_needs()
        program = inline(program)
        for instrument in self.instruments:
            instrument.started(program, self.passes)
        self._timed(Phase.VERIFY, verify, program)
        captured = None
        if self.check_contracts:
            chosen = [*(inputs or cases(program, program.forward)), *cases_beside(program)]
            captured = self._timed(Phase.CHECK, Outcomes.of, program, chosen)
        model = str(program.facts.get("model", "program"))
        before = measure(program, 0.0 if captured else None, self.judge(program))
        ledger = Ledger(model, print_pipeline(self.passes), before)
        decided = None if self.calibration is None else replace(self.calibration, original=program)
        state = _State(Run(program, ledger), fingerprint(program), captured, captured, decided)
        if self.verify_each:
            self._timed(Phase.VERIFY, state.run.contents.hold, program)
        for position, item in enumerate(self.passes):
            reason = self._reason_to_skip(position, item)
            if reason is None:
                self._step(state, position, item)
            else:
                self._skip(state.run, position, item, reason)
        ledger.verified = self.verify_each and self.check_contracts
        ledger.checked = [str(case) for case in captured.cases] if captured else []
        for instrument in self.instruments:
            instrument.finished(state.run.program, ledger)
        return state.run

    def _refuse_unmet_needs(self) -> None:
        if self.plans or self.calibration is not None:
            return
        for item in self.passes:
            if item.needs is not Needs.NOTHING:
                raise UsageError(
                    f"the pass {item.spec!r} needs {item.needs}, and there is no data to decide on",
                    hint="add --calibration D, or optimize(..., calibration=D)",
                )

    def _timed(self, phase: Phase, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        """Do the work and tell the instruments how long it took, whether it failed or not."""
        start = time.perf_counter()
        try:
            return work(*args, **kwargs)
        finally:
            seconds = time.perf_counter() - start
            for instrument in self.instruments:
                instrument.spent(phase, seconds)

    def _reason_to_skip(self, position: int, item: Pass) -> str | None:
        reasons = (instrument.should_run(position, item) for instrument in self.instruments)
        return next((reason for reason in reasons if reason is not None), None)

    def _skip(self, run: Run, position: int, item: Pass, reason: str) -> None:
        said = f"skipped: {reason}"
        run.ledger.rows.append(
            Row(item.name, item.spec, item.contract, False, said, 0.0, run.ledger.after, skipped=True)
        )
        run.plans.append(Plan(item.spec, reason=said))
        for instrument in self.instruments:
            instrument.skipped_pass(position, item, reason)

    def _step(self, state: _State, position: int, item: Pass) -> None:
        """One pass: plan, apply, verify, check, record."""
        run = state.run
        for instrument in self.instruments:
            instrument.before_pass(position, item, run.program)
        start, planned = time.perf_counter(), False
        try:
            plan = self.plans[position] if self.plans else None
            plan = plan or self._timed(Phase.PLAN, item.plan, run.program, state.calibration)
            planned = True
            result = self._timed(Phase.APPLY, item.apply, run.program, plan)
            seconds = time.perf_counter() - start
            self._timed(Phase.VERIFY, self._verify, state, item, result)
            gap = self._timed(Phase.CHECK, self._check, state, item, result)
        except LaconicError as problem:
            refused = not planned and isinstance(problem, UsageError)
            raise self._blame(problem, position, item, run, refused=refused) from problem
        except Exception as problem:  # a pass that crashes, or leaves what cannot be printed or run
            crash = VerificationError(f"{type(problem).__name__}: {problem}")
            if self.plans and isinstance(problem, KeyError):
                crash = VerificationError(f"the program has no {problem}", why="the plan was made for another one")
            raise self._blame(crash, position, item, run) from problem
        metrics = self.judge(result.program) if result.modified else run.ledger.after.metrics
        sizes = measure(result.program, gap, metrics)
        run.ledger.rows.append(
            Row(item.name, item.spec, item.contract, result.modified, result.reason, seconds, sizes, result.actions)
        )
        run.program = result.program
        run.plans.append(plan)
        for instrument in self.instruments:
            instrument.after_pass(position, item, result)

    def _verify(self, state: _State, item: Pass, result: PassResult) -> None:
        """Hold the pass to the rules: it left alone what it was given, and made a program of the same interface."""
        before = state.run.program
        if fingerprint(before) != state.fingerprint:
            raise VerificationError("it wrote into the program it was given, or into a weight in place")
        if self.verify_each:
            state.run.contents.hold(before)
            verify_sizes(before)
            if result.program is not before:
                verify_rewrite(before, result.program)
                check_weights(item.contract, before, result.program, result.moves)
        state.fingerprint = _check_modified(result, before, state.fingerprint)

    def _check(self, state: _State, item: Pass, result: PassResult) -> float | None:
        """Hold the pass to its contract. Returns the distance from the captured program, None if nothing is checked."""
        if state.captured is None or state.known is None:
            return None
        if result.modified:
            after = state.known.again(result.program, result.moves)
            _check_cases(state.captured, after)
            check(item.contract, state.run.program, state.known, after, result.program, result.moves)
            state.known, state.captured = after, state.captured.moved(result.moves)
        return distance(state.captured, state.known)

    def _blame(
        self, problem: LaconicError, position: int, item: Pass, run: Run, *, refused: bool = False
    ) -> LaconicError:
        """What stopped a pass, said with its place in the pipeline; `refused` is what it cannot do for its user."""
        ran = ", ".join(row.spec for row in run.ledger.rows if not row.skipped) or "nothing"
        others = print_pipeline([p for k, p in enumerate(self.passes) if k != position])
        hints = [problem.hint] if refused and problem.hint else []
        hints += [f"to go on without it: -p '{others or 'none'}'"]
        for instrument in self.instruments:
            hint = instrument.failed_pass(position, item, problem)
            hints += [hint] if hint else []
        blamed = type(problem) if refused or not isinstance(problem, UsageError) else VerificationError
        where = f"pass {position + 1} of {len(self.passes)}, after {ran}"
        if blamed.__init__ is not LaconicError.__init__:
            blamed = VerificationError
        return blamed(
            f"the pass {item.spec!r} {'cannot do this' if refused else 'failed'}: {problem.what}",
            where=f"{where}; {problem.where}" if problem.where else where,
            why=problem.why,
            hint="\n".join(hints),
        )


def _check_cases(captured: Outcomes, now: Outcomes) -> None:
    ran = {id(case) for case in now.cases}
    for case in captured.cases:
        if id(case) not in ran:
            raise VerificationError("the rewritten program does not run any more", where=str(case))


def _check_modified(result: PassResult, before: Program, known: Fingerprint) -> Fingerprint:
    """Compare `modified` with what happened, given the fingerprint of `before`. Returns that of the result."""
    now = known if result.program is before else fingerprint(result.program)
    changed = now != known
    if changed != result.modified:
        said = "modified" if result.modified else "unmodified"
        raise VerificationError(
            f"it says the program is {said}, which is not so",
            why="the program's text or weights differ" if changed else "text and weights are the same",
        )
    if not changed and not result.reason:
        raise VerificationError("it changed nothing and does not say why")
    return now
