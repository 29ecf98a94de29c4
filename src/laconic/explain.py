"""A saved DIR in words: what each pass did, where, and what it cost; whether it is verified and undamaged.

Reads and changes nothing, and says what is wrong with a damaged DIR as far as it can be read.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from laconic.artefact import LEDGER, read_recipe
from laconic.ir.errors import LaconicError, ModelError, UsageError
from laconic.ir.program import Program
from laconic.ir.store import read_program
from laconic.passes.base import Plan
from laconic.passes.ledger import Ledger, Row, Sizes
from laconic.passes.plans import read_plan


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

    def to_json(self) -> dict[str, Any]:
        known = ("format", "model", "pipeline", "seed", "calibration", "versions")
        rows = self.ledger.to_json()["passes"]
        return {
            "path": str(self.path),
            **{key: self.recipe.get(key) for key in known},
            "verified": bool(self.recipe["verified"]),
            "checked": self.ledger.checked,
            "files": self.files,
            "problem": self.problem,
            "before": self.ledger.to_json()["before"],
            "after": self.ledger.to_json()["after"],
            "passes": [
                {**row, "rules": {rule: [vars(p) for p in places] for rule, places in report.rules.items()}}
                for row, report in zip(rows, self.passes, strict=True)
            ],
        }


def explain(path: str | Path) -> Explanation:
    """Read a DIR. Raises ModelError if it has no recipe, ledger or plans that can be read, UsageError if it is none."""
    folder = Path(path)
    if not folder.is_dir():
        raise UsageError(f"{folder} is no folder", hint="explain takes a DIR that `laconic optimize -o DIR` wrote")
    recipe = read_recipe(folder)
    ledger = read_ledger(folder)
    plans = [read_plan(folder / "plans", number) for number in range(1, len(ledger.rows) + 1)]
    program, problem = _program(folder)
    before = [ledger.before, *(row.after for row in ledger.rows)]
    reports = [
        PassReport(row, sizes, _rules(plan, program))
        for row, sizes, plan in zip(ledger.rows, before, plans, strict=False)
    ]
    return Explanation(folder, recipe, ledger, _files(folder, recipe["hashes"]), reports, problem)


def read_ledger(folder: Path) -> Ledger:
    """The ledger of a DIR. Raises ModelError if it is missing or damaged."""
    path = folder / LEDGER
    try:
        return Ledger.from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as problem:
        raise ModelError(f"{LEDGER} cannot be read", where=str(path), why=str(problem)) from problem


def actions_of(path: str | Path, number: int) -> list[dict[str, Any]]:
    """All actions of the `number`-th pass (from 1) as its plan has them, each with its `place` in words.

    Raises UsageError for a number that no pass has, and what `explain` raises.
    """
    folder = Path(path)
    rows = read_ledger(folder).rows
    if not 1 <= number <= len(rows):
        passes = ", ".join(f"{k} {row.spec}" for k, row in enumerate(rows, start=1))
        raise UsageError(f"there is no pass {number}", hint=f"known: {passes}" if passes else "no pass ran")
    program, _ = _program(folder)
    plan = read_plan(folder / "plans", number)
    return [{**action, "place": " ".join(filter(None, _place(action, program)))} for action in plan.actions]


def _files(folder: Path, hashes: Mapping[str, str]) -> dict[str, str]:
    found = {}
    for name, expected in hashes.items():
        found[name] = "missing"
        if (folder / name).is_file():
            with (folder / name).open("rb") as file:
                found[name] = "ok" if hashlib.file_digest(file, "sha256").hexdigest() == expected else "damaged"
    return found


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
