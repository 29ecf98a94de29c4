"""The manager: runs a pipeline pass by pass, verifies each result, checks its contract, and writes the ledger.

A pass is trusted with nothing. `modified` is compared with a hash of the program, the rewritten program is verified
against the one before it, weights must not have been written into, and outputs are compared on several inputs and sizes
as the pass's contract says. The first failure stops the run with the pass, its place and what ran before it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from laconic.ir.errors import LaconicError, UsageError, VerificationError
from laconic.ir.inputs import Case, cases
from laconic.ir.outcomes import Outcomes
from laconic.ir.program import Program
from laconic.ir.signature import checksum, fingerprint
from laconic.ir.verify import verify, verify_rewrite, verify_sizes
from laconic.passes.base import Needs, Pass, PassResult, Plan
from laconic.passes.contracts import check, check_weights, distance
from laconic.passes.ledger import Ledger, Row, measure
from laconic.passes.pipeline import print_pipeline

log = logging.getLogger(__name__)


class Instrument:
    """Observes a run; subclasses override what they need (progress, timing, dumps)."""

    def started(self, program: Program, passes: Sequence[Pass]) -> None: ...

    def before_pass(self, position: int, item: Pass, program: Program) -> None: ...

    def after_pass(self, position: int, item: Pass, result: PassResult) -> None: ...

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
class PassManager:
    """A pipeline ready to run. `verify_each` and `check_contracts` are on unless switched off for speed; what they did
    not see is not called verified."""

    passes: Sequence[Pass]
    verify_each: bool = True
    check_contracts: bool = True
    instruments: Sequence[Instrument] = ()

    def run(self, program: Program, inputs: Sequence[Case] | None = None) -> Run:
        """Run all passes on `program`, which is left as it is.

        Contracts are checked on `inputs`, else on the captured examples and drawn ones at other sizes. Raises
        VerificationError if a pass breaks a rule or its contract.
        """
        self._refuse_unmet_needs()
        for instrument in self.instruments:
            instrument.started(program, self.passes)
        verify(program)
        captured = Outcomes.of(program, inputs or cases(program, program.forward)) if self.check_contracts else None
        model = str(program.facts.get("model", "program"))
        ledger = Ledger(model, print_pipeline(self.passes), measure(program, 0.0 if captured else None))
        run, known = Run(program, ledger), captured
        if self.verify_each:
            run.contents.hold(program)
        for position, item in enumerate(self.passes):
            known = self._step(run, position, item, captured, known)
        ledger.verified = self.verify_each and self.check_contracts
        ledger.checked = [str(case) for case in captured.cases] if captured else []
        for instrument in self.instruments:
            instrument.finished(run.program, ledger)
        return run

    def _refuse_unmet_needs(self) -> None:
        for item in self.passes:
            if item.needs is not Needs.NOTHING:
                raise UsageError(f"the pass {item.spec!r} needs {item.needs}, which nothing provides yet")

    def _step(
        self, run: Run, position: int, item: Pass, captured: Outcomes | None, known: Outcomes | None
    ) -> Outcomes | None:
        """One pass: plan, apply, verify, check, record. Returns the outcomes after it."""
        for instrument in self.instruments:
            instrument.before_pass(position, item, run.program)
        before, print_before = run.program, fingerprint(run.program)
        start = time.perf_counter()
        try:
            plan = item.plan(before)
            result = item.apply(before, plan)
            seconds = time.perf_counter() - start
            if fingerprint(before) != print_before:
                raise VerificationError("it wrote into the program it was given, or into a weight in place")
            if self.verify_each:
                run.contents.hold(before)
                verify_sizes(before)
                if result.program is not before:
                    verify_rewrite(before, result.program)
                    check_weights(item.contract, before, result.program)
            _check_modified(result, print_before)
            after = known
            if known is not None and captured is not None and result.modified:
                after = Outcomes.of(result.program, captured.cases)
                _check_cases(captured, after)
                check(item.contract, before, known, after)
        except LaconicError as problem:
            raise self._blame(problem, position, item, run) from problem
        except Exception as problem:  # a pass that crashes, or leaves what cannot be printed or run
            crash = VerificationError(f"{type(problem).__name__}: {problem}")
            raise self._blame(crash, position, item, run) from problem
        gap = distance(captured, after) if captured is not None and after is not None else None
        sizes = measure(result.program, gap)
        run.ledger.rows.append(
            Row(item.name, item.spec, item.contract, result.modified, result.reason, seconds, sizes, result.actions)
        )
        run.program = result.program
        run.plans.append(plan)
        for instrument in self.instruments:
            instrument.after_pass(position, item, result)
        return after

    def _blame(self, problem: LaconicError, position: int, item: Pass, run: Run) -> LaconicError:
        ran = ", ".join(row.spec for row in run.ledger.rows) or "nothing"
        others = print_pipeline([p for k, p in enumerate(self.passes) if k != position])
        blamed = type(problem) if not isinstance(problem, UsageError) else VerificationError
        where = f"pass {position + 1} of {len(self.passes)}, after {ran}"
        if blamed.__init__ is not LaconicError.__init__:
            blamed = VerificationError
        return blamed(
            f"the pass {item.spec!r} failed: {problem.what}",
            where=f"{where}; {problem.where}" if problem.where else where,
            why=problem.why,
            hint=f"to go on without it: -p '{others or 'none'}'",
        )


def _check_cases(captured: Outcomes, now: Outcomes) -> None:
    ran = {id(case) for case in now.cases}
    for case in captured.cases:
        if id(case) not in ran:
            raise VerificationError("the rewritten program does not run any more", where=str(case))


def _check_modified(result: PassResult, print_before: object) -> None:
    changed = fingerprint(result.program) != print_before
    if changed != result.modified:
        said = "modified" if result.modified else "unmodified"
        raise VerificationError(
            f"it says the program is {said}, which is not so",
            why="the program's text or weights differ" if changed else "text and weights are the same",
        )
    if not changed and not result.reason:
        raise VerificationError("it changed nothing and does not say why")
