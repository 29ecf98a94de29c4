"""Results as tables on stdout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from laconic.passes.base import Pass
from laconic.passes.ledger import Ledger, Sizes


def console() -> Console:
    """Stdout; as wide as the terminal, else wide enough for a ledger."""
    found = Console(highlight=False)
    return found if found.is_terminal or "COLUMNS" in os.environ else Console(highlight=False, width=120)


def print_table(table: Table) -> None:
    console().print(table)


def _table(title: str, columns: Sequence[str], numeric: Sequence[str] = ()) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for name in columns:
        table.add_column(name, justify="right" if name in numeric else "left")
    return table


def passes_table(kinds: Sequence[type[Pass]]) -> Table:
    from laconic.passes.pipeline import options_of

    table = _table("", ["pass", "contract", "needs", "reads values", "what it does", "options"])
    for kind in kinds:
        options = ", ".join(f"{k}={_yes(d)}" for k, (_, d) in options_of(kind).items())
        table.add_row(kind.name, kind.contract, kind.needs, _yes(kind().reads_values), kind.summary, options)
    return table


def _yes(value: Any) -> str:
    return {True: "yes", False: "no"}.get(value, str(value)) if isinstance(value, bool) else str(value)


def ledger_table(ledger: Ledger) -> Table:
    """A row per pass: what it did and the sizes after it."""
    numeric = ["nodes", "weight bytes", "max-abs", "seconds"]
    table = _table(f"{ledger.model}: {ledger.pipeline or '(no pass)'}", ["pass", "contract", "did", *numeric], numeric)
    table.add_row("captured", "", "", *_sizes(ledger.before), "")
    for row in ledger.rows:
        did = row.reason if row.modified else f"nothing: {row.reason}"
        table.add_row(row.spec, row.contract, did, *_sizes(row.after), f"{row.seconds:.3f}")
    return table


def _sizes(sizes: Sizes) -> tuple[str, str, str]:
    gap = "" if sizes.max_abs is None else f"{sizes.max_abs:.3g}"
    return f"{sizes.nodes:,}", f"{sizes.weight_bytes:,}", gap


def ledger_report(ledger: Ledger) -> None:
    print_table(ledger_table(ledger))
    cases = f"checked on {len(ledger.checked)} inputs" if ledger.checked else "contracts not checked"
    console().print(f"{'verified' if ledger.verified else 'UNVERIFIED'}; {cases}")


def evaluation_report(data: dict[str, Any]) -> None:
    title = data["model"] + (f" against {data['against']}" if data["against"] else "")
    columns = ["input", *data["columns"]]
    table = _table(title, columns, columns[1:])
    for row in data["rows"]:
        table.add_row(row["input"], *("" if row[c] is None else f"{row[c]:.4g}" for c in data["columns"]))
    print_table(table)


def export_report(data: dict[str, Any]) -> None:
    console().print(f"{data['path']} is written and checked")
    shown = {k: v for k, v in data.items() if k in ("opset", "ir_version", "nodes", "bytes", "checks")}
    for key, value in shown.items():
        console().print(f"  {key}: {value}", soft_wrap=True)


def doctor_report(found: dict[str, Any]) -> None:
    table = _table("", ["part", "found", "what follows"])
    for part in found["parts"]:
        mark = {"ok": "", "missing": "not found", "problem": "PROBLEM: "}[part["status"]]
        table.add_row(part["name"], f"{mark}{part['found']}", part["follows"])
    print_table(table)
