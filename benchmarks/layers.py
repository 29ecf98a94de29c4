"""What dropping and sharing layers costs: every method on reference models, on the held-out test split, with intervals.

    python benchmarks/layers.py benchmarks/results/layers.json [MODEL | SHARE | together | branches ...]

Decisions are made on the calibration split alone. Of each result: nats and divergence from the original with 95 %
intervals over documents (or digits), top-1, bytes of weights, and the seconds that deciding took. Methods at random are
drawn with five seeds. `together` is what pipelines of several passes do at half of the blocks' bytes, and corrections
for as many bytes as further blocks; `branches` tries all states of single branches. Without names all of it. A run that
is stopped goes on with the rows that are missing; what other versions or another machine wrote is measured anew.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from layer_tables import HEALED

from laconic.data.load import load_data
from laconic.ir.calibrate import digest
from laconic.ir.calibration import Calibration
from laconic.ir.data import Data
from laconic.ir.depth import Depth
from laconic.ir.errors import LaconicError
from laconic.ir.files import place_file, temporary_beside
from laconic.ir.metrics.registry import load as load_metric
from laconic.ir.program import Program
from laconic.ir.quality import Units, difference, figure, measure
from laconic.ir.types import nbytes
from laconic.machine import machine
from laconic.passes.allocate import going
from laconic.passes.pipeline import parse_pipeline, print_pipeline
from laconic.sources import opened

KEEP = (0.75, 0.67, 0.5)
SEEDS = range(5)
#: Samples a batch: what a step of training, and of a search's sieve, sees.
BATCH = {"vit": 8, "llama-gqa": 4, "llama-mha": 4}
METRICS = ("nats", "kl", "top1")


def pipelines(model: Model, keep: float) -> Iterator[tuple[str, int]]:
    """What is measured at a share of blocks, or of their weights: a pipeline and a seed. Nothing where as many blocks
    go as at another share: a quarter and a third of ten are three."""
    if any(going(keep, model.blocks) == going(more, model.blocks) for more in KEEP if more > keep):
        return
    for method in ("influence", "span", "gates", "greedy", "search"):
        yield f"drop-layers{{keep={keep},method={method}}}", 0
    yield f"drop-layers{{keep={keep},method=gates,repair=no}}", 0
    yield f"drop-layers{{keep={keep},unit=branch}}", 0
    yield f"collapse-layers{{keep={keep}}}", 0
    for mode in ("rdsc", "replace"):
        yield f"collapse-layers{{keep={keep},mode={mode},size=3}}", 0
    for method in ("fixed", "crash", "crash,protect=1", "functional", "search"):
        yield f"share-layers{{keep={keep},method={method}}}", 0
    for seed in SEEDS:
        yield f"drop-layers{{keep={keep},method=random}}", seed
        yield f"share-layers{{keep={keep},method=random}}", seed
    for name in ("drop", "share"):
        yield f"{name}-layers{{keep={keep},method=exhaustive}}", 0


def together(model: Model) -> Iterator[tuple[str, int]]:
    """What is compared at equal bytes: single passes and FoldGPT's chain, healed and not; blocks that share for fewer
    donors and corrections."""
    for share in (
        "drop-layers{keep=0.75,method=gates},share-layers{keep=0.67,method=functional}",
        "drop-layers{keep=0.75},share-layers{keep=0.67}",
        "drop-layers{keep=0.5,method=influence}",
        "drop-layers{keep=0.5}",
        "collapse-layers{keep=0.5}",
        "share-layers{keep=0.5}",
    ):
        yield share, 0
        yield share + HEALED, 0
    for keep, *fewer in ((0.75, 0.5, 0.25, 0.125), (0.5, 0.375, 0.25, 0.125)):
        yield f"share-layers{{keep={keep}}}", 0
        for donors in fewer:
            yield f"share-layers{{keep={keep},donors={donors}}}", 0


def branches(model: Model) -> Iterator[tuple[str, int]]:
    """Evolution of a space that is too large to be tried by the way, beside all of its 784 states."""
    if model.name == "zoo:vit":
        yield "drop-layers{keep=0.75,unit=branch,method=exhaustive}", 0


GROUPS: dict[str, Callable[[Model], Iterator[tuple[str, int]]]] = {"together": together, "branches": branches}


class Model:
    """A reference model with its splits, and the original's own figures."""

    def __init__(self, name: str) -> None:
        self.name = f"zoo:{name}"
        self.program, folder = opened(self.name)
        self.blocks = len(Depth(self.program).blocks)
        batch = BATCH[name]
        self.calibration = load_data(self.name, self.program, folder=folder, split="calibration", batch=batch)
        self.test: Data = load_data(self.name, self.program, folder=folder, split="test", batch=32)
        self.metrics = [load_metric(metric) for metric in METRICS]
        plain = [metric for metric in self.metrics if not metric.reference]
        (self.own,) = measure([self.program], self.test, plain)
        self._known: dict[str, dict[str, Units]] = {}
        self._steps: dict[tuple[str, int], tuple[Program, str, float]] = {}

    def row(self, pipeline: str, seed: int) -> dict[str, Any]:
        """A pipeline's result, measured."""
        program, said, seconds = self.program, list[str](), 0.0
        decided = Calibration(self.calibration, seed, original=self.program)
        passes = parse_pipeline(pipeline)
        try:
            for k, item in enumerate(passes):
                key = print_pipeline(passes[: k + 1]), seed
                if key not in self._steps:  # what several pipelines begin with is decided once
                    start = time.process_time()
                    result = item.apply(program, item.plan(program, decided))
                    self._steps[key] = result.program, result.reason, time.process_time() - start
                program, reason, took = self._steps[key]
                said, seconds = [*said, reason], seconds + took
        except LaconicError as problem:
            return {"model": self.name, "pipeline": pipeline, "seed": seed, "refused": problem.what}
        units = self._measured(program)
        figures = {metric.name: asdict(figure(metric, units[metric.name])) for metric in self.metrics}
        for metric in self.metrics:
            if metric.name in self.own:
                against = difference(metric, units[metric.name], self.own[metric.name])
                figures[f"{metric.name} more than the original's"] = asdict(against)
        return {
            "model": self.name,
            "pipeline": pipeline,
            "seed": seed,
            "did": said,
            "figures": figures,
            "weight_bytes": program.weight_bytes(),
            "cpu_seconds": round(seconds, 1),
        }

    def _measured(self, program: Program) -> dict[str, Units]:
        """What a program says on the test split; methods that decide alike are measured once."""
        key = digest(program, self.test, None)
        if key not in self._known:
            (self._known[key],) = measure([program], self.test, self.metrics, reference=self.program)
        return self._known[key]

    def original(self) -> dict[str, Any]:
        figures = {name: asdict(figure(load_metric(name), units)) for name, units in self.own.items()}
        return {
            "figures": figures,
            "weight_bytes": self.program.weight_bytes(),
            "block_bytes": block_bytes(self.program),
        }


def block_bytes(program: Program) -> int:
    """Bytes of the rows that blocks read."""
    depth = Depth(program)
    rows = {row for block in depth.blocks for unit in block.units for row in depth.reads(unit)}
    return sum(nbytes(program.weights[row].value) for row in rows)


def main(path: Path, asked: list[str]) -> None:
    document: dict[str, Any] = {"machine": machine(), "originals": {}, "rows": []}
    if path.exists():
        known = json.loads(path.read_text())
        if known["machine"] == document["machine"]:
            document = known
    models = [Model(name) for name in [name for name in asked if name in BATCH] or BATCH]
    shares = [name for name in asked if name not in BATCH] or [*map(str, KEEP), *GROUPS]
    done = {(row["model"], row["pipeline"], row["seed"]) for row in document["rows"]}
    for share, model in itertools.product(shares, models):
        document["originals"][model.name] = model.original()
        for pipeline, seed in GROUPS[share](model) if share in GROUPS else pipelines(model, float(share)):
            key = (model.name, pipeline, seed)
            if key in done:
                continue
            row = model.row(pipeline, seed)
            done.add(key)
            document["rows"].append(row)
            print(*key, row.get("refused") or row["figures"]["kl"], flush=True)
            with temporary_beside(path) as temporary:
                temporary.write_text(json.dumps(document, indent=1) + "\n")
                place_file(temporary, path, force=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
