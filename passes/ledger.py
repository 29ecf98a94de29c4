"""The ledger: what each pass did and what it cost, a row per pass, telescoping from captured to optimised.

Its JSON form is versioned; sizes are those of the program after the row's pass, errors are against the captured
program. What was not measured is null.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

from laconic.ir.cost import flops_at
from laconic.ir.past import cache_bytes_per_token
from laconic.ir.program import Program
from laconic.passes.base import Contract

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
    rows: list[Row] = field(default_factory=list, metadata={"json": "passes"})
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
        """Raises ValueError, which names the place, for what is no ledger of this schema."""
        if not isinstance(data, dict) or data.get("schema") != SCHEMA:
            raise ValueError(f"it is no object with schema {SCHEMA}")
        found: Ledger = _read(cls, {key: value for key, value in data.items() if key not in ("schema", "after")}, "")
        for number, row in enumerate(found.rows):
            if row.contract not in set(Contract):
                raise ValueError(f"passes[{number}].contract is {reprlib.repr(row.contract)}, which is none")
            if not row.seconds >= 0:
                raise ValueError(f"passes[{number}].seconds is {row.seconds}")
        if repr(_read(Sizes, data.get("after"), "after")) != repr(found.after):  # nan is nan there
            raise ValueError("after is not what the last pass left")
        return found


_WORDS = {str: "a text", bool: "true or false", int: "a whole number, 0 or more", float: "a number"}


def _read(kind: Any, value: Any, where: str) -> Any:
    """A value of JSON as one of this type: a dataclass (an object with exactly its fields), a list, a dict by name, or
    a plain value. Raises ValueError that names the place."""
    arguments = get_args(kind)
    if isinstance(kind, UnionType):
        return None if value is None else _read(arguments[0], value, where)
    if get_origin(kind) is list:
        return [_read(arguments[0], item, f"{where}[{k}]") for k, item in enumerate(_of(list, value, where, "a list"))]
    if get_origin(kind) is dict:
        return {k: _read(arguments[1], v, f"{where}.{k}") for k, v in _of(dict, value, where, "an object").items()}
    if is_dataclass(kind):
        _of(dict, value, where, "an object")
        make: Any = kind
        hints = get_type_hints(kind)
        names = {f.metadata.get("json", f.name): f.name for f in fields(kind)}
        for name in sorted(names.keys() - value.keys()):
            raise ValueError(f"{where or 'it'} lacks {name!r}")
        for name in sorted(value.keys() - names.keys()):
            raise ValueError(f"{where or 'it'} has {name!r}, which is not known")
        read = {name: _read(hints[names[name]], v, f"{where}.{name}".lstrip(".")) for name, v in value.items()}
        return make(**{names[name]: v for name, v in read.items()})
    accepted = (int, float) if kind is float else kind
    if not isinstance(value, accepted) or isinstance(value, bool) is not (kind is bool) or (kind is int and value < 0):
        raise ValueError(f"{where} is {reprlib.repr(value)}, not {_WORDS[kind]}")
    return value


def _of(kind: type, value: Any, where: str, words: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{where} is {reprlib.repr(value)}, not {words}")
    return value


def measure(program: Program, max_abs: float | None, metrics: Mapping[str, float]) -> Sizes:
    """A program's sizes and metrics; FLOPs are those of one call of each entry at the captured example's sizes."""
    return Sizes(
        program.node_count(),
        program.weight_bytes(),
        flops_at(program),
        cache_bytes_per_token(program),
        max_abs=max_abs,
        kl=metrics.get("kl"),
        metrics=dict(metrics),
    )
