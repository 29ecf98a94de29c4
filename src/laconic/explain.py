"""A saved DIR in words: what each pass did, where, and what it cost; whether it is verified and undamaged.

Reads and changes nothing, and says what is wrong with a damaged DIR as far as it can be read: the program may be gone,
recipe, ledger and plans may not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laconic.artefact import LEDGER, RECIPE, read_recipe, states
from laconic.ir.errors import LaconicError, ModelError, UsageError
from laconic.ir.files import read_text
from laconic.ir.program import Program
from laconic.ir.store import PROGRAM, read_program
from laconic.passes.base import Plan
from laconic.passes.ledger import Ledger, Row, Sizes
from laconic.passes.plans import PLANS, read_plan

log = logging.getLogger(__name__)

_INCOMPLETE = "the DIR is incomplete or damaged: write it again with `laconic optimize MODEL -o DIR`"


@dataclass(frozen=True)
class Place:
    """Where a rule fired, and how often: a module of the captured model with its source line, or a weight."""

    name: str
    source: str
    count: int


@dataclass(frozen=True)
class PassReport:
    """A pass of the ledger: its row, the sizes before it, and the places of each of its rules, most frequent first."""

    row: Row
    before: Sizes
    rules: dict[str, list[Place]]


@dataclass(frozen=True)
class Explanation:
    """What is known of a DIR. `files`: "ok", "missing" or "damaged" by name. `problem`: why its program cannot be read,
    so that places are unknown."""

    path: Path
    recipe: dict[str, Any]
    ledger: Ledger
    files: dict[str, str]
    passes: list[PassReport]
    problem: str = ""

    @property
    def damaged(self) -> list[str]:
        """The files that are missing or not those that were written."""
        return [name for name, state in self.files.items() if state != "ok"]

    def to_json(self) -> dict[str, Any]:
        known = ("format", "model", "pipeline", "seed", "calibration", "versions")
        rows = self.ledger.to_json()["passes"]
        return {
            "path": str(self.path),
            **{key: self.recipe.get(key) for key in known},
            "verified": bool(self.recipe["verified"]),
            "checked": self.ledger.checked,
            "files": self.files,
            "damaged": self.damaged,
            "problem": self.problem,
            "before": self.ledger.to_json()["before"],
            "after": self.ledger.to_json()["after"],
            "passes": [
                {**row, "rules": {rule: [vars(p) for p in places] for rule, places in report.rules.items()}}
                for row, report in zip(rows, self.passes, strict=True)
            ],
        }


def explain(path: str | Path) -> Explanation:
    """Read a DIR. Raises UsageError if it is no folder, ModelError if it is no DIR, or its recipe, ledger or plans
    cannot be read or do not fit together."""
    folder = Path(path)
    recipe, ledger = _opened(folder)
    plans = [_plan(folder, number, row) for number, row in enumerate(ledger.rows, start=1)]
    program, problem = _program(folder)
    before = [ledger.before, *(row.after for row in ledger.rows)]
    reports = [
        PassReport(row, sizes, _rules(plan, program))
        for row, sizes, plan in zip(ledger.rows, before, plans, strict=False)  # one size more than rows
    ]
    return Explanation(folder, recipe, ledger, states(folder, recipe["hashes"]), reports, problem)


def read_ledger(folder: Path) -> Ledger:
    """The ledger of a DIR. Raises ModelError if it is missing or damaged."""
    path = folder / LEDGER
    try:
        return Ledger.from_json(json.loads(read_text(path)))
    except FileNotFoundError as problem:
        raise ModelError(f"{LEDGER} is missing", where=str(folder), hint=_INCOMPLETE) from problem
    except (OSError, ValueError, RecursionError) as problem:
        raise ModelError(f"{LEDGER} cannot be read", where=str(path), why=str(problem), hint=_INCOMPLETE) from problem


def actions_of(path: str | Path, number: int) -> list[dict[str, Any]]:
    """All actions of the `number`-th pass (from 1) as its plan has them, each with its `place` in words.

    Raises UsageError for a number that no pass has, and what `explain` raises.
    """
    folder = Path(path)
    recipe, ledger = _opened(folder)
    rows = ledger.rows
    if not 1 <= number <= len(rows):
        passes = ", ".join(f"{k} {row.spec}" for k, row in enumerate(rows, start=1))
        raise UsageError(f"there is no pass {number}", hint=f"known: {passes}" if passes else "no pass ran")
    program, _ = _program(folder)
    plan = _plan(folder, number, rows[number - 1])
    for name, state in states(folder, recipe["hashes"]).items():
        if state != "ok":
            log.warning("DAMAGED: %s is %s", folder / name, state)
    return [{**action, "place": " ".join(filter(None, _place(action, program)))} for action in plan.actions]


def _opened(folder: Path) -> tuple[dict[str, Any], Ledger]:
    """Recipe and ledger of a DIR, which fit together and to the number of plans."""
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder", hint="explain takes a DIR that `laconic optimize -o DIR` wrote")
    _refuse_other(folder)
    recipe, ledger = read_recipe(folder), read_ledger(folder)
    ran = [row.spec for row in ledger.rows if not row.skipped]
    skipped = [{"pass": row.spec, "reason": row.reason} for row in ledger.rows if row.skipped]
    for key, found in (
        ("model", ledger.model),
        ("pipeline", ledger.pipeline),
        ("passes", ran),
        ("skipped", skipped),
        ("verified", ledger.verified),
    ):
        if recipe[key] != found:
            why = f"{key}: {found} against {recipe[key]}"
            raise ModelError(f"{LEDGER} does not fit {RECIPE}", where=str(folder), why=why, hint=_INCOMPLETE)
    if (specs := ",".join(row.spec for row in ledger.rows)) != ledger.pipeline:
        why = f"its passes are {specs or 'none'}, its pipeline is {ledger.pipeline}"
        raise ModelError(f"{LEDGER} does not fit itself", where=str(folder / LEDGER), why=why, hint=_INCOMPLETE)
    plans = len(list((folder / PLANS).glob("*.json")))
    if plans > len(ledger.rows):
        why = f"{PLANS} holds {plans} plans, {LEDGER} has {len(ledger.rows)} passes"
        raise ModelError(f"{LEDGER} does not fit the plans", where=str(folder), why=why, hint=_INCOMPLETE)
    return recipe, ledger


def _refuse_other(folder: Path) -> None:
    """Raise ModelError for a folder that is no DIR, with what it is and what to do with it."""
    names = {path.name for path in folder.iterdir()}
    optimize = "explain takes a DIR that `laconic optimize MODEL -o DIR` wrote"
    if RECIPE in names:
        return
    if names & {LEDGER, PLANS}:
        raise ModelError(f"{RECIPE} is missing", where=str(folder), hint=_INCOMPLETE)
    if PROGRAM in names:
        raise ModelError(
            f"{folder} is a dump, and no DIR",
            why=f"it holds a program, and no {RECIPE} or {LEDGER} that would say what was done to it",
            hint=f"`laconic diff A B` compares dumps; {optimize}",
        )
    if dumps := sorted(name for name in names if (folder / name / PROGRAM).is_file()):
        raise ModelError(
            f"{folder} is no DIR",
            why=f"it holds other folders with a program: {', '.join(dumps[:4])}{' ...' if dumps[4:] else ''}",
            hint=f"to explain one that is a DIR, name it; `laconic diff A B` compares any two; {optimize}",
        )
    why = f"it holds no {RECIPE}" if names else "it is empty"
    raise ModelError(f"{folder} is no DIR", why=why, hint=optimize)


def _plan(folder: Path, number: int, row: Row) -> Plan:
    """The plan of a pass. Raises ModelError if it is missing, damaged, or that of another."""
    path = folder / PLANS / f"{number}.json"
    if not path.exists():
        why = f"{LEDGER} has it as {row.spec}"
        raise ModelError(f"{PLANS}/{path.name} is missing", where=str(folder), why=why, hint=_INCOMPLETE)
    plan = read_plan(folder / PLANS, number)
    if plan.spec != row.spec:
        why = f"it is one of {plan.spec!r}, and {LEDGER} has {row.spec!r}"
        raise ModelError(f"{PLANS}/{path.name} is another pass's plan", where=str(path), why=why, hint=_INCOMPLETE)
    return plan


def _program(folder: Path) -> tuple[Program | None, str]:
    """The program, or in words why it cannot be read."""
    try:
        return read_program(folder), ""
    except LaconicError as problem:
        return None, problem.what


def _rules(plan: Plan, program: Program | None) -> dict[str, list[Place]]:
    counts: dict[str, dict[tuple[str, str], int]] = {}
    for action in plan.actions:
        places = counts.setdefault(str(action["rule"]), {})
        place = _place(action, program)
        places[place] = places.get(place, 0) + 1
    ranked = sorted(counts.items(), key=lambda item: -sum(item[1].values()))
    return {rule: _by_count(places) for rule, places in ranked}


def _by_count(places: Mapping[tuple[str, str], int]) -> list[Place]:
    found = [Place(name, source, count) for (name, source), count in places.items()]
    return sorted(found, key=lambda place: -place.count)


def _place(action: Mapping[str, Any], program: Program | None) -> tuple[str, str]:
    """Module and source line of an action's site; without one, the weight or node that it names."""
    number = action.get("site")
    site = program.sites.get(number) if program is not None and isinstance(number, int) else None
    if site is not None:
        return site.module or "<model>", site.source
    if "weight" in action:
        return f"@{action['weight']}", ""
    return (f"%{action['node']}" if "node" in action else "", "")
