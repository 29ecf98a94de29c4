"""What the analysis of axes understands of each model of the support matrix, whether it is right, and how fast it is.

    python benchmarks/axes.py benchmarks/results/axes.json [MODEL ...]

Of each model: how many calls have a rule, which share of weights has an axis that may be permuted, and trials in
float64: axes permuted must leave results as they are, axes halved must give what the model with zeros there gives. A
trial is void if the results do not move even when one weight alone is permuted, or when the zeros are put in; it says
nothing, and is counted apart. Of models with more axes than that, so many are drawn. Times are those of the graph of
ten thousand nodes: the analysis, and a shrink with the nodes that it touched, fake propagation and checks included.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "tests")]

from graph_10k import LAYERS, graph  # noqa: E402
from matrix_models import ROWS, make  # noqa: E402

from axes_oracles import Tried, try_permutations, try_shrinks  # noqa: E402
from laconic.ir.axes import analyse, free, rewrite, row_factors  # noqa: E402
from laconic.ir.axes.classes import coverage  # noqa: E402
from laconic.ir.capture import capture_module  # noqa: E402
from laconic.ir.errors import LaconicError  # noqa: E402
from laconic.ir.program import Program  # noqa: E402
from laconic.machine import machine  # noqa: E402

MOST, REPEATS = 24, 3


def model(name: str) -> dict[str, Any]:
    """A row of the matrix."""
    module, inputs, dynamic = make(name)
    program = capture_module(module, (), inputs, dynamic, check=False)
    start = time.process_time()
    axes = analyse(program)
    seconds = time.process_time() - start
    found = coverage(axes)
    _, permuted = try_permutations(program, most=MOST)
    _, halved = try_shrinks(program, most=MOST)
    return {
        "calls": found.calls,
        "known_calls": found.known,
        "misaligned_calls": found.misfits,
        "weight_axes": found.axes,
        "free_weight_axes": found.free,
        "weight_elements": found.elements,
        "elements_with_a_free_axis": found.movable,
        "seconds": round(seconds, 3),
        "permuted": told(permuted),
        "halved": told(halved),
    }


def told(tried: list[Tried]) -> dict[str, Any]:
    """Trials, those of them that say nothing, and the largest error of the others, relative to the largest result."""
    worst = max((trial.moved for trial in tried), default=0.0)
    return {"tried": len(tried), "void": sum(trial.void for trial in tried), "worst": worst}


def times() -> dict[str, Any]:
    """Processor seconds on ten thousand nodes: median and spread."""
    rows: dict[str, Any] = {}
    for kind, dynamic in (("static", False), ("dynamic", True)):
        program = graph(LAYERS, dynamic)
        axes = analyse(program)
        largest = max(f.size for f in row_factors(axes) if free(f))
        hidden = [f for f in row_factors(axes) if free(f) and f.size == largest]
        unpinned = [f for f in row_factors(axes) if not f.pins and isinstance(f.size, int)]
        requests = {"one hidden axis": hidden[:1], "all hidden axes": hidden, "all axes without a pin": unpinned}
        rows[kind] = {"nodes": program.node_count(), "analysis": timed(lambda p=program: analyse(p))}  # type: ignore[misc]
        for what, factors in requests.items():
            kept = {f: list(range(0, f.size, 2)) for f in factors}
            made = rewrite(axes, kept, by="timed")
            seconds = timed(lambda kept=kept, axes=axes: rewrite(axes, kept, by="timed"))  # type: ignore[misc]
            rows[kind][what] = {"axes": len(kept), "nodes_touched": touched(program, made), **seconds}
    return rows


def touched(before: Program, after: Program) -> int:
    """Calls that compute another type than before, or say something else."""
    pairs = zip(before.forward.calls(), after.forward.calls(), strict=True)
    return sum(str(a.args) != str(b.args) or a.meta["val"] is not b.meta["val"] for a, b in pairs)


def timed(work: Any) -> dict[str, Any]:
    found = []
    for _ in range(REPEATS):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return {"seconds": round(median(found), 2), "spread": [round(min(found), 2), round(max(found), 2)]}


def main(out: Path, names: list[str]) -> None:
    known = json.loads(out.read_text()) if out.exists() and names else {"models": {}}
    for name in names or ROWS:
        start = time.time()
        try:
            known["models"][name] = model(name)
        except LaconicError as problem:
            known["models"][name] = {"problem": str(problem).splitlines()[0]}
        print(name, known["models"][name], round(time.time() - start), "s", file=sys.stderr, flush=True)
    models = {name: known["models"][name] for name in ROWS if name in known["models"]}
    data = {"schema": 1, "machine": machine(), "most": MOST, "runs": REPEATS, "models": models}
    data["times"] = known.get("times") if names else times()
    out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
