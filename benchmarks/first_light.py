"""The exact preset on a trained sentence encoder and on six small architectures: what it saves, and that it is exact.

    python benchmarks/first_light.py benchmarks/results/first_light.json

Latency is of the sentence encoder, batch 8 of real sentences: the ways take turns in an order that rotates, and ratios
are of calls in the same turn.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import onnxruntime
import torch

import laconic
from laconic.ir.metrics.differences import bit_equal
from laconic.ir.run import Runnable
from laconic.latency import Way, by_turns, ratios
from laconic.machine import machine
from laconic.models import minilm
from laconic.sources import capture_source

sys.path[:0] = [str(Path(__file__).parents[1] / "tests")]

from architectures import ARCHITECTURES, make  # noqa: E402

TURNS, WARM = 40, 4

Batch = dict[str, torch.Tensor]
Encode = Callable[[Batch], torch.Tensor]


def main(out: Path) -> None:
    source = minilm.source()
    captured = capture_source(source)
    result = laconic.optimize(captured)
    with tempfile.TemporaryDirectory() as folder:
        report = laconic.export_onnx(result.program, Path(folder) / "model.onnx")
        ways = encoder_ways(source.module, captured, result, Path(folder) / "model.onnx")
        batch = minilm.tokenize(minilm.sentences()[:8])
        expected = ways["module"](batch)
        exact = {name: bit_equal(expected, encode(batch)) for name, encode in ways.items()}
        latency = compared(ways, batch)
    rows = {"all-MiniLM-L6-v2": row(result.report, report)}
    for name in ARCHITECTURES:
        print(name, file=sys.stderr)
        module, inputs, axes = make(name)
        small = laconic.optimize(module, inputs=inputs, dynamic_shapes=axes)
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = row(small.report, laconic.export_onnx(small.program, Path(folder) / "model.onnx"))
    data = {
        "schema": 1,
        "machine": machine(),
        "models": rows,
        "latency": {"model": "all-MiniLM-L6-v2", "shape": list(batch["input_ids"].shape), "turns": TURNS, **latency},
        "bits_of_the_module": exact,
    }
    out.write_text(json.dumps(data, indent=1) + "\n")


def encoder_ways(
    module: torch.nn.Module, captured: laconic.Program, result: laconic.Result, path: Path
) -> dict[str, Encode]:
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it takes time from the next way
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    before = Runnable(captured)

    def in_torch(model: Any) -> Encode:
        def encode(batch: Batch) -> torch.Tensor:
            with torch.no_grad():
                found: torch.Tensor = model(**batch)["sentence_embedding"]
            return found

        return encode

    def in_onnx(batch: Batch) -> torch.Tensor:
        return torch.from_numpy(session.run(None, {k: v.numpy() for k, v in batch.items()})[0])

    return {
        "module": in_torch(module),
        "captured": in_torch(before),
        "optimised": in_torch(result.model),
        "ONNX Runtime": in_onnx,
    }


def row(report: Any, onnx: Any) -> dict[str, Any]:
    return {
        "nodes": [report.before.nodes, report.after.nodes],
        "weight_bytes": [report.before.weight_bytes, report.after.weight_bytes],
        "max_abs": report.after.max_abs,
        "cases": len(report.checked),
        "passes": {r.spec: r.reason for r in report.rows},
        "onnx": {"opset": onnx.opset, "nodes": onnx.nodes, "error_of_allowed": round(onnx.worst, 3)},
    }


def compared(ways: dict[str, Encode], batch: Batch) -> dict[str, Any]:
    """Median milliseconds of each way, and its ratio to the first: median and quartiles over turns."""
    times = by_turns({name: on(batch, encode) for name, encode in ways.items()}, list, TURNS, WARM)
    first = next(iter(times))
    return {
        "milliseconds": {n: round(1e3 * statistics.median(t), 2) for n, t in times.items()},
        "ratio": {n: [round(q, 3) for q in statistics.quantiles(ratios(times, n, first), n=4)] for n in times},
    }


def on(batch: Batch, encode: Encode) -> Way:
    """A way that encodes this batch, whatever its inputs."""
    return lambda inputs: partial(encode, batch)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
