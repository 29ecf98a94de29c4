"""Latency of models of which blocks were dropped: compiled, and in ONNX Runtime.

    python benchmarks/depth_latency.py benchmarks/results/depth_latency.json [--turns 60]

Two reference models with all blocks, three quarters, half, a quarter and none of them left, called by turns on one
thread. The trunk is what a call takes with all blocks over what it takes with none; told is by what share of the trunk
dropping k of n makes a call shorter, turn by turn, and that over k / n.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

import laconic
from laconic.bench import input_at, onnx_way
from laconic.ir.depth import Depth
from laconic.ir.files import place_file, temporary_beside
from laconic.ir.program import Program
from laconic.ir.tree import fill
from laconic.latency import Interval, Way, by_turns
from laconic.machine import machine
from laconic.sources import program_of

MODELS = {"zoo:llama-mha": {"batch": 1, "sequence": 256}, "zoo:vit": {"batch": 4}}
LEFT = (1, 0.75, 0.5, 0.25, 0)


def shortened(program: Program, left: int) -> Program:
    """The program with its first blocks alone."""
    depth = Depth(program)
    gone = depth.blocks[left:]
    return depth.skip_blocks(gone) if gone else program


def compiled_way(program: Program, folder: Path) -> Way:
    laconic.optimize(program, "exact").save(folder)
    model = laconic.load(folder, compile=True, options={"strict": True})

    def prepare(inputs: list[torch.Tensor]) -> Any:
        arguments = {name: fill(tree, inputs) for name, tree in program.forward.arguments.items()}
        return lambda: model(**arguments)

    return prepare


def rows(name: str, turns: int, folder: Path) -> list[dict[str, Any]]:
    program = program_of(name)
    count = len(Depth(program).blocks)
    case = input_at(program, MODELS[name], 0)
    found = []
    for kind in ("compiled", "onnxruntime"):
        ways: dict[str, Way] = {}
        for left in [round(count * share) for share in LEFT]:
            short, place = shortened(program, left), folder / f"{name[4:]}-{kind}-{left}"
            ways[str(left)] = (
                compiled_way(short, place) if kind == "compiled" else onnx_way(short, place, lambda stage: None)
            )
        times = by_turns(ways, case.clone, turns, warmup=10)
        whole, none = times[str(count)], times["0"]
        for left, own in times.items():
            row: dict[str, Any] = {"model": name, "kind": kind, "input": str(case), "blocks": count, "left": int(left)}
            row["milliseconds"] = asdict(Interval.of([1000 * seconds for seconds in own]))
            if 0 < int(left) < count:
                saved = [(a - b) / (a - c) for a, b, c in zip(whole, own, none, strict=True)]
                row["share_of_trunk"] = asdict(Interval.of(saved))
                row["over_k_of_n"] = asdict(Interval.of([share / (1 - int(left) / count) for share in saved]))
            found.append(row)
            print(name, kind, left, row["milliseconds"]["median"], row.get("over_k_of_n"), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("path", type=Path)
    parser.add_argument("--turns", type=int, default=60)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        measured = [row for name in MODELS for row in rows(name, asked.turns, Path(folder))]
    document = {"machine": machine(), "turns": asked.turns, "rows": measured}
    with temporary_beside(asked.path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        place_file(temporary, asked.path, force=True)


if __name__ == "__main__":
    main()
