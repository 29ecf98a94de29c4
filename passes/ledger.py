"""The ledger: what each pass did and what it cost, a row per pass, telescoping from captured to optimised.

Its JSON form is versioned; sizes are those of the program after the row's pass, errors are against the captured
program. What was not measured is null.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from laconic.ir.cost import flops_at
from laconic.ir.program import Program

SCHEMA = 1


@dataclass(frozen=True)
class Sizes:
    """A program's sizes, and how far its outputs are from the captured program's (greatest absolute difference)."""

    nodes: int
    weight_bytes: int
    flops: float | None = None
    cache_bytes_per_token: float | None = None
    max_abs: float | None = None
    kl: float | None = None
    metrics: dict[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One pass: what it was, whether it changed the program, why or why not, and the sizes after it. `skipped`: it was
    in the pipeline and was kept from running."""

    name: str
    spec: str
    contract: str
    modified: bool
    reason: str
    seconds: float
    after: Sizes
    actions: int = 0
    skipped: bool = False


@dataclass
class Ledger:
    """The whole run. `verified` says that every contract was checked and held."""

    model: str
    pipeline: str
    before: Sizes
    rows: list[Row] = field(default_factory=list)
    verified: bool = False
    checked: list[str] = field(default_factory=list)

    @property
    def after(self) -> Sizes:
        return self.rows[-1].after if self.rows else self.before

    def to_json(self) -> dict[str, Any]:
        return {
            "schema": SCHEMA,
            "model": self.model,
            "pipeline": self.pipeline,
            "before": asdict(self.before),
            "after": asdict(self.after),
            "passes": [asdict(row) for row in self.rows],
            "verified": self.verified,
            "checked": self.checked,
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Ledger:
        """Raises KeyError or TypeError for what is no ledger of this schema."""
        rows = [Row(**{**row, "after": Sizes(**row["after"])}) for row in data["passes"]]
        return cls(
            data["model"], data["pipeline"], Sizes(**data["before"]), rows, data["verified"], data.get("checked", [])
        )


def measure(program: Program, max_abs: float | None) -> Sizes:
    """A program's sizes; FLOPs are those of one call of each entry at the captured example's sizes."""
    return Sizes(program.node_count(), program.weight_bytes(), flops_at(program), max_abs=max_abs)
