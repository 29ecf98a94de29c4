"""What `layers.py` measured, as tables: each method at each share, and pipelines at equal bytes."""

from __future__ import annotations

import re
from statistics import median
from typing import Any

HEALED = ",heal{steps=200}"

Rows = list[dict[str, Any]]

_SINGLE = re.compile(r"(drop|share|collapse)-layers\{keep=([\d.]+)(?:,([^{}]*))?\}")


def single(pipeline: str) -> tuple[str, str, str] | None:
    """The pass, its share and its other options where a pipeline is one that only asks for a share of blocks; without
    a method its `search`."""
    found = _SINGLE.fullmatch(pipeline)
    if found is None or "donors=" in pipeline or "rank=" in pipeline:
        return None
    options = found[3] or ("" if found[1] == "collapse" else "method=search")
    return f"{found[1]}-layers", found[2], options


def kept(data: dict[str, Any], row: dict[str, Any]) -> float:
    """The share of the blocks' bytes that a result keeps."""
    whole = data["originals"][row["model"]]
    return float(1 - (whole["weight_bytes"] - row["weight_bytes"]) / whole["block_bytes"])


def methods(data: dict[str, Any]) -> str:
    """A row for each method, a column for each model and share; the divergence, and what deciding took at the first."""
    cells: dict[str, dict[tuple[str, str], Rows]] = {}
    columns: dict[tuple[str, str], str] = {}
    for row in data["rows"]:
        read = single(row["pipeline"])
        if read is None:
            continue
        column = row["model"], read[1]
        seen = cells.setdefault(f"{read[0]}{{{read[2]}}}" if read[2] else read[0], {}).setdefault(column, [])
        if row["seed"] not in [other["seed"] for other in seen]:
            seen.append(row)
        if "refused" not in row:
            columns.setdefault(column, f"{row['model']}, {kept(data, row):.1%}".replace(".0%", "%"))
    order = sorted(columns, key=lambda column: (list(data["originals"]).index(column[0]), -float(column[1])))
    lines = [
        f"| | {' | '.join(columns[column] for column in order)} | CPU s |",
        "|---|" + "---|" * (len(order) + 1),
    ]
    for label in sorted(cells, key=_place):
        found = cells[label]
        first = next((rows[0] for column in order if (rows := found.get(column)) and "refused" not in rows[0]), None)
        seconds = f"{first['cpu_seconds']:.0f}" if first else ""
        lines.append(f"| `{label}` | {' | '.join(_cell(found.get(c, [])) for c in order)} | {seconds} |")
    return "\n".join([*lines, "", NOTE + " CPU s: what deciding took at the first share, all threads together."])


def together(data: dict[str, Any]) -> str:
    """A row for each pipeline, two columns for each model: as it is, and healed."""
    found: dict[str, dict[tuple[str, bool], dict[str, Any]]] = {}
    for row in data["rows"]:
        base = row["pipeline"].removesuffix(HEALED)
        if "refused" not in row:  # what is searched for has two names
            found.setdefault(base.replace(",method=search", ""), {})[row["model"], base != row["pipeline"]] = row
    told = {model for base, cells in found.items() for model, healed in cells if healed or "donors=" in base}
    models = [model for model in data["originals"] if model in told]
    heads = [f"{model} | healed" for model in models]
    lines = [f"| | bytes of blocks | {' | '.join(heads)} |", "|---|---|" + "---|" * (2 * len(models))]
    for base, cells in sorted(found.items(), key=lambda item: not _healed(item[1])):
        if _healed(cells) or "donors=" in base or _compared(base, found):
            each = [_cell([cells[key]] if (key := (m, h)) in cells else []) for m in models for h in (False, True)]
            shares = dict.fromkeys(f"{kept(data, row):.0%}" for row in cells.values())
            lines.append(f"| `{base}` | {' / '.join(shares)} | {' | '.join(each)} |")
    return "\n".join([*lines, "", NOTE])


def _healed(cells: dict[tuple[str, bool], dict[str, Any]]) -> bool:
    return any(healed for _, healed in cells)


def _compared(base: str, found: dict[str, Any]) -> bool:
    """Whether there are pipelines of as many bytes with corrections."""
    return any("donors=" in other and other.startswith(base[:-1] + ",") for other in found)


def _place(label: str) -> tuple[int, bool]:
    """Where a method stands among others: passes together, and last what methods are measured against."""
    passes = ("drop", "collapse", "share")
    return passes.index(label.split("-")[0]), label.endswith(("random}", "exhaustive}"))


def _cell(rows: Rows) -> str:
    if not rows:
        return ""
    if "refused" in rows[0]:
        return "refused"
    figures = [row["figures"]["kl"] for row in rows]
    values = [figure["value"] for figure in figures]
    if len(rows) > 1:
        return f"{_said(median(values))} ({_said(min(values))} to {_said(max(values))})"
    return f"{_said(values[0])} [{_said(figures[0]['low'])}, {_said(figures[0]['high'])}]"


def _said(value: float) -> str:
    return f"{value:.2f}" if value >= 0.1 else f"{value:.2g}"


NOTE = (
    "Divergence from the original in nats on the test split, with 95 % intervals over documents or digits; of draws at "
    "random (five seeds) the median, least and greatest. Decided on the calibration split. Other figures (nats, top-1, "
    "seconds) are in `benchmarks/results/layers.json`."
)
