"""The support matrix: thirty architectures and the reference models, and for each what holds of capture, compiling,
passes and exports.

    python benchmarks/support_matrix.py [--only NAME ...] [--jobs N] [--again] [--doc]

Writes `benchmarks/results/support_matrix.json` and, from it, `docs/support-matrix.md` (alone with `--doc`). Each row is
measured in a process of its own; one that crashes or takes too long is a row with that reason. What was measured of the
same sources stands in `build/support_matrix` and is not measured again, unless asked to.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULT, DOC = ROOT / "benchmarks/results/support_matrix.json", ROOT / "docs/support-matrix.md"
#: Seconds after which a row is given up.
LIMIT = 1800

Row = dict[str, Any]


def measure(name: str) -> Row:
    """One row, in this process."""
    import torch
    from matrix_checks import CHECKS, Subject

    torch.set_num_threads(1)
    subject = Subject(name)
    row: Row = {"model": type(subject.module).__name__, "seconds": {}}
    for check, run in CHECKS.items():
        print(f"{name}: {check}", file=sys.stderr, flush=True)
        start = time.perf_counter()
        try:
            row[check] = run(subject)
        except Exception as problem:  # noqa: BLE001  whatever it is, it is why the row is not full
            row[check] = {"hole": textwrap.shorten(f"{type(problem).__name__}: {problem}", 400)}
        row["seconds"][check] = round(time.perf_counter() - start, 1)
    return row


def measure_apart(name: str, folder: Path) -> Row:
    """One row, in a process of its own with caches of its own."""
    kept = folder / f"{name}.json"
    with tempfile.TemporaryDirectory() as caches:
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": caches, "TORCHINDUCTOR_COMPILE_THREADS": "1"}
        command = [sys.executable, __file__, "--row", name, str(kept)]
        try:
            done = subprocess.run(command, env=environment, timeout=LIMIT, check=False)
            problem = f"the process ended with {done.returncode}" if done.returncode else ""
        except subprocess.TimeoutExpired:
            problem = f"not done in {LIMIT} s"
    if problem:
        kept.unlink(missing_ok=True)
        return {"model": "", "seconds": {}, "row": {"hole": problem}}
    row: Row = json.loads(kept.read_text())
    return row


def holes(found: Any, place: str = "") -> Iterator[tuple[str, str]]:
    """What does not hold in a row, by its place, and why."""
    for key, value in found.items() if isinstance(found, dict) else ():
        if key == "hole":
            yield place, value
        yield from holes(value, f"{place} {key}".strip())


def full(row: Row) -> bool:
    return not any(True for _ in holes(row))


def git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout


def sources() -> tuple[str, str]:
    """The commit, and what tells changes to it apart: empty if there are none."""
    changed = git("diff", "HEAD", "--", "*.py")
    return git("rev-parse", "HEAD").strip(), hashlib.sha256(changed.encode()).hexdigest()[:8] if changed else ""


def run(names: list[str], jobs: int, again: bool) -> None:
    from matrix_models import ROWS

    from laconic.machine import machine

    commit, changed = sources()
    folder = ROOT / "build/support_matrix" / "-".join(filter(None, (commit[:12], changed)))
    folder.mkdir(parents=True, exist_ok=True)
    stamp = {"commit": commit, "dirty": bool(changed)}
    rows: dict[str, Row] = json.loads(RESULT.read_text())["models"] if RESULT.exists() else {}

    def one(name: str) -> tuple[str, Row]:
        kept = folder / f"{name}.json"
        row = json.loads(kept.read_text()) if kept.exists() and not again else measure_apart(name, folder)
        return name, row | stamp

    with ThreadPoolExecutor(jobs) as pool:
        for name, row in pool.map(one, names):
            rows[name] = row
            reasons = "; ".join(f"{place}: {why}" for place, why in holes(row))
            print(f"{name}: {reasons or 'full'}", file=sys.stderr, flush=True)
            data = {"schema": 1, **stamp, "machine": machine() | {"threads": 1}, "models": _ordered(rows, list(ROWS))}
            RESULT.write_text(json.dumps(data, indent=1) + "\n")


def _ordered(rows: dict[str, Row], names: list[str]) -> dict[str, Row]:
    return {name: rows[name] for name in names if name in rows}


# The page

HEAD = """# Support matrix

Written by `benchmarks/support_matrix.py` (`make matrix`) from [its result](../benchmarks/results/support_matrix.json).
Small random configurations of `transformers` classes, six or more layers each, dropout off, numbers as after training;
and the [reference models](../models/README.md), as they were trained.

{summary}

| model | captured | repeats | pieces | not compiled | error | gradients | cut alone | exact preset | ONNX |
|---|---|---|---|---|---|---|---|---|---|
"""
FOOT = """
- *captured*: one graph by `torch.compile(backend="laconic", fullgraph=True, options={"strict": True})`, with gradients
  and without; a step that falls back is an error.
- *repeats*: layers that are found to say the same as others, of those that the configuration promises.
- *pieces*: what is compiled, in inference and in training; fewer than there are repeats. *Not compiled*: the share of
  the graph's calls that is never compiled, 60 % or more.
- *error*, *gradients*: the greatest error against the same model in float64, eager, as a share of what the contract
  `tolerance` allows, which is twice eager's own, or four eps of the greatest value; gradients of each parameter by
  itself. Three draws are judged; eager's own error is told by 16 more, and by 240 if it does not hold with these.
- *cut alone*: the pieces, run without any compiler, return the bits of the graph that is not cut, gradients included.
- *exact preset*: `laconic.optimize(model)` returns the module's bits at two sizes; nodes before and after.
- *ONNX*: the same in ONNX Runtime at two sizes, the error as a share of what is allowed.
"""


def page(data: dict[str, Any]) -> str:
    rows, machine = data["models"], data["machine"]
    commits = list(dict.fromkeys(row["commit"][:12] for row in rows.values()))
    changed = " and changes to it" if any(row["dirty"] for row in rows.values()) else ""
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "transformers", "onnxruntime", "python"))
    summary = (
        f"**{sum(map(full, rows.values()))} of {len(rows)} rows are full.** Commit {' and '.join(commits)}{changed}; "
        f"{versions}; {machine['cpu']}, one thread."
    )
    lines, reasons = [], []
    for name, row in rows.items():
        lines.append(f"| {name} | {' | '.join(cells(row))} |")
        reasons += [f"- **{name}**, {place}: {why}" for place, why in holes(row)]
        if row.get("training", {}).get("mode") == "evaluation":
            reasons.append(f"- {name}: gradients are those of evaluation mode, since training draws random numbers.")
    notes = "\n".join(["", "## Holes and remarks", "", *reasons, ""]) if reasons else ""
    return HEAD.format(summary=summary) + "\n".join(lines) + "\n" + FOOT + notes


def cells(row: Row) -> list[str]:
    """A row's cells: a number where something was measured, a cross where it does not hold."""

    def found(path: str, show: Any) -> str:
        value: Any = row
        for key in path.split("/"):
            if not isinstance(value, dict) or "hole" in value or key not in value:
                return "✗"
            value = value[key]
        return "✗" if isinstance(value, dict) and "hole" in value else str(show(value))

    captured = found("inference/error", lambda _: "yes") if "error" in row.get("inference", {}) else "✗"
    pieces = [found(f"{mode}/counts", lambda c: f"{c['pieces']}") for mode in ("inference", "training")]
    never = [found(f"{mode}/counts", lambda c: f"{c['never']:.0%}") for mode in ("inference", "training")]
    return [
        captured,
        found("cut/repeats", lambda r: f"{r['found']} / {r['expected']}"),
        ", ".join(dict.fromkeys(pieces)),
        ", ".join(dict.fromkeys(never)),
        found("inference/error/worst", lambda w: f"{w:.2f}"),
        found("training/error/worst", lambda w: f"{w:.2f}"),
        found("cut/pieces", lambda _: "same bits"),
        found("exact/nodes", lambda n: f"same bits, {n[0]} → {n[1]}"),
        found("onnx/error/worst", lambda w: f"{w:.2f}"),
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--only", nargs="+", metavar="NAME")
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--again", action="store_true", help="measure what was measured of the same sources")
    parser.add_argument("--doc", action="store_true", help="write the page from the result, measure nothing")
    parser.add_argument("--row", nargs=2, metavar=("NAME", "FILE"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.row:
        Path(asked.row[1]).write_text(json.dumps(measure(asked.row[0]), indent=1) + "\n")
        return 0
    if not asked.doc:
        from matrix_models import ROWS

        unknown = set(asked.only or ()) - set(ROWS)
        if unknown:
            parser.error(f"no such row: {', '.join(sorted(unknown))}")
        run(asked.only or list(ROWS), asked.jobs, asked.again)
    DOC.write_text(page(json.loads(RESULT.read_text())))
    return 0


if __name__ == "__main__":
    sys.exit(main())
