"""An audit as one self-contained page: tables, and heat maps as drawings in the page. No script, no other file."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from laconic.ir.files import place_file, temporary_beside

_CELL = 18  # pixels
_SHOWN = 20
_STYLE = """
body { font: 14px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; color: #1b1b1b; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; }
th, td { padding: .15rem .7rem; border-bottom: 1px solid #ddd; text-align: left; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; }
p.meaning { color: #555; margin: 0; }
code { font-size: 12px; }
"""


def write_page(document: dict[str, Any], path: Path, *, force: bool = False) -> None:
    """Write the audit `document` (as `laconic audit --json` has it). Raises UsageError if the file exists and `force`
    is not given."""
    with temporary_beside(path) as temporary:
        temporary.write_text(page(document), encoding="utf-8")
        place_file(temporary, path, force)


def page(document: dict[str, Any]) -> str:
    """The page as text."""
    title = f"Audit of {document['model']}"
    sizes = ", ".join(f"{name} = {size}" for name, size in document["sizes"].items()) or "fixed sizes"
    facts = [
        ("nodes", document["nodes"]),
        ("weight bytes", document["weight_bytes"]),
        ("FLOPs", document["flops"]),
        ("nodes with repeated blocks said once", document["outlined_nodes"]),
    ]
    parts = [
        f"<h1>{escape(title)}</h1><p class='meaning'>{escape(sizes)}</p>",
        _table(["", ""], [[escape(name), f"{value:,}"] for name, value in facts]),
    ]
    if "calibration" in document:
        parts.append(f"<p>Calibrated on <code>{escape(document['calibration'])}</code>. Most redundant first.</p>")
    parts += [_redundancy(table) for table in document.get("redundancy", [])]
    return (
        f"<!doctype html><html lang='en'><head><meta charset='utf-8'><title>{escape(title)}</title>"
        f"<style>{_STYLE}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def _redundancy(table: dict[str, Any]) -> str:
    rows = [
        [
            escape(row["what"]),
            f"{row['score']:.4f}",
            f"{row['weight_bytes']:,}" if row["weight_bytes"] else "",
            f"{row['flops']:,}" if row["flops"] else "",
            f"{row['risk']:.3f}",
            f"<code>{escape(row['where'])}</code>",
        ]
        for row in table["findings"][:_SHOWN]
    ]
    more = len(table["findings"]) - _SHOWN
    return (
        f"<h2>{escape(table['name'])}</h2><p class='meaning'>{escape(table['meaning'])}</p>"
        + (heat_map(table["matrix"]) if table["matrix"] else "")
        + _table(["what", "score", "weight bytes", "FLOPs", "risk", "where"], rows, numeric=(1, 2, 3, 4))
        + (f"<p class='meaning'>and {more} more</p>" if more > 0 else "")
    )


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]], numeric: Sequence[int] = (1,)) -> str:
    def cells(kind: str, values: Sequence[str]) -> str:
        return "".join(
            f"<{kind}{' class=n' if k in numeric else ''}>{value}</{kind}>" for k, value in enumerate(values)
        )

    head = [cells("th", columns)] if any(columns) else []
    lines = [*head, *(cells("td", row) for row in rows)]
    return "<table>" + "".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def heat_map(matrix: Sequence[Sequence[float]]) -> str:
    """A matrix as coloured squares, from its smallest number (dark) to its greatest; each square tells its number."""
    values = [value for row in matrix for value in row]
    low, high = min(values), max(values)
    span = (high - low) or 1.0
    side = _CELL * len(matrix) + 24
    squares = []
    for r, row in enumerate(matrix):
        squares.append(f"<text x='0' y='{24 + r * _CELL + 13}' font-size='10'>{r}</text>")
        squares.append(f"<text x='{24 + r * _CELL + 4}' y='14' font-size='10'>{r}</text>")
        for c, value in enumerate(row):
            light = 15 + 80 * (value - low) / span
            squares.append(
                f"<rect x='{24 + c * _CELL}' y='{24 + r * _CELL}' width='{_CELL}' height='{_CELL}' "
                f"fill='hsl(215 60% {light:.0f}%)'><title>{r}, {c}: {value:.4f}</title></rect>"
            )
    return f"<svg role='img' width='{side}' height='{side}' viewBox='0 0 {side} {side}'>{''.join(squares)}</svg>"
