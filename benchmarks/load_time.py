"""Seconds to the first result with everything compiled before: a saved DIR, and torch.compile with either backend.

    python benchmarks/load_time.py benchmarks/results/load_time.json [--layers 24] [--repeats 7]

Each figure is of a process of its own, with a cache folder that a process before it has filled, one thread. Timed is
what stands between the imports (for torch.compile: and the model in memory, called once in eager) and the first result:
CPU seconds of the process and its children. What a process does once, whatever it compiles (hashing torch's and
Triton's sources, trying out the compiler), is in it under "after imports", and not under "after a trivial function",
which is compiled before. `backend` are CPU seconds inside the backend. The ways take turns, ratios are of runs in the
same turn, and spreads are quartiles.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import laconic
from laconic.machine import machine

WAYS = ("load", "inductor", "laconic")
STARTS = ("after imports", "after a trivial function")
SHAPE = {"width": 256, "heads": 8, "kv_heads": 4, "mlp": 704, "vocabulary": 1000, "batch": 2, "sequence": 64}


def main(out: Path, layers: int, repeats: int) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        child("save", "", folder, layers)
        cold = {way: child(way, STARTS[0], folder, layers) for way in WAYS}
        turns: dict[str, list[dict[str, Any]]] = {start: [] for start in STARTS}
        for turn in range(repeats):
            for start in STARTS:
                order = WAYS[turn % len(WAYS) :] + WAYS[: turn % len(WAYS)]
                turns[start].append({way: child(way, start, folder, layers) for way in order})
                print(start, {way: round(turns[start][-1][way]["cpu"], 2) for way in WAYS}, file=sys.stderr)
    data = {
        "schema": 1,
        "machine": machine() | {"threads": 1},
        "model": {"layers": layers, **SHAPE},
        "repeats": repeats,
        "cold": cold,
        "warm": {start: summary(found) for start, found in turns.items()},
    }
    out.write_text(json.dumps(data, indent=1) + "\n")


def summary(turns: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and quartiles of each way, and of its CPU seconds over Inductor's in the same turn."""

    def spread(values: list[float]) -> list[float]:
        return [round(q, 3) for q in statistics.quantiles(values, n=4)]

    found: dict[str, Any] = {}
    for way in WAYS:
        measured = [what for what in ("cpu", "wall", "backend") if what in turns[0][way]]
        found[way] = {what: spread([t[way][what] for t in turns]) for what in measured}
        found[way]["ratio"] = spread([t[way]["cpu"] / t["inductor"]["cpu"] for t in turns])
        found[way]["stats"] = turns[-1][way]["stats"]
        found[way]["max_abs"] = max(t[way]["max_abs"] for t in turns)
    backend = [t["laconic"]["backend"] / t["inductor"]["backend"] for t in turns]
    found["laconic"]["backend_ratio"] = spread(backend)
    return found


def child(way: str, start: str, folder: Path, layers: int) -> Any:
    command = [
        sys.executable,
        __file__,
        "--child",
        way,
        "--start",
        start,
        "--folder",
        str(folder),
        "--layers",
        str(layers),
    ]
    environment = {"TORCHINDUCTOR_CACHE_DIR": str(folder / f"cache-{way}"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=os.environ | environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


# In a process of its own


def cpu_seconds() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(u.ru_utime + u.ru_stime for u in used)


def run_child(way: str, start: str, folder: Path, layers: int) -> Any:
    import torch._inductor.compile_fx

    import laconic.codegen.backend.programs

    torch.set_num_threads(1)
    inside = [0.0]
    prepare: dict[str, Callable[[], Callable[[torch.Tensor], Any]]] = {
        "load": lambda: loaded(folder),
        "inductor": lambda: compiled(layers, laconic.codegen.backend.inductor.inductor, inside),
        "laconic": lambda: compiled(layers, laconic.codegen.backend.backend.laconic, inside),
    }
    if way == "save":
        return saved(folder, layers)
    given = torch.load(folder / "given.pt", weights_only=True)
    with torch.no_grad():
        first = prepare[way]()
        if start == STARTS[1]:
            torch.compile(lambda a: (a * 2).relu().sum(-1))(torch.ones(3, 4))
        began, wall, inside[0] = cpu_seconds(), time.perf_counter(), 0.0
        result = first(given["ids"])
        spent, wall = cpu_seconds() - began, time.perf_counter() - wall
    done = laconic.codegen.stats()
    return {
        "cpu": spent,
        "wall": wall,
        **({} if way == "load" else {"backend": inside[0]}),
        "max_abs": (result - given["logits"]).abs().max().item(),
        "stats": {what: done[what] for what in ("graphs", "pieces", "steps", "nodes", "compiled", "seconds")}
        | {"cache_hits": done["each"][-1]["cache_hits"] if done["each"] else {}},
    }


def model(layers: int) -> Any:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=SHAPE["width"],
        num_hidden_layers=layers,
        num_attention_heads=SHAPE["heads"],
        num_key_value_heads=SHAPE["kv_heads"],
        intermediate_size=SHAPE["mlp"],
        vocab_size=SHAPE["vocabulary"],
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    made: Any = transformers.LlamaForCausalLM(config)
    return made.eval()


def saved(folder: Path, layers: int) -> dict[str, Any]:
    made = model(layers)
    ids = torch.randint(0, SHAPE["vocabulary"], (SHAPE["batch"], SHAPE["sequence"]))
    with torch.no_grad():
        logits = made(input_ids=ids, use_cache=False).logits
    torch.save({"ids": ids, "logits": logits}, folder / "given.pt")
    laconic.optimize(made, inputs={"input_ids": ids, "use_cache": False}).save(folder / "DIR")
    return {}


def loaded(folder: Path) -> Callable[[torch.Tensor], Any]:
    def first(ids: torch.Tensor) -> Any:
        return laconic.load(folder / "DIR", compile=True, options={"strict": True})(input_ids=ids)["logits"]

    return first


def compiled(layers: int, backend: Callable[..., Any], inside: list[float]) -> Callable[[torch.Tensor], Any]:
    made = model(layers)
    made(input_ids=torch.zeros(SHAPE["batch"], SHAPE["sequence"], dtype=torch.long), use_cache=False)

    def timed(graph: Any, examples: Any) -> Any:
        began = cpu_seconds()
        try:
            return backend(graph, examples)
        finally:
            inside[0] += cpu_seconds() - began

    found: Any = torch.compile(made, backend=timed)
    return lambda ids: found(input_ids=ids, use_cache=False).logits


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path, nargs="?")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--child", default="")
    parser.add_argument("--start", default="")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    if asked.child:
        print(json.dumps(run_child(asked.child, asked.start, asked.folder, asked.layers)))
    else:
        main(asked.out, asked.layers, asked.repeats)
