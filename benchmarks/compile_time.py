"""Seconds to the first result of a deep model: laconic's backend, Inductor, and other ways to compile layers once.

    python benchmarks/compile_time.py benchmarks/results/compile_time.json [--layers 2 24 48 80] [--training 24]

A Llama-shaped model (width 256, 8 heads, 4 KV heads, MLP 704, vocabulary 1000), batch 2, sequence 64, one thread. Each
figure is from a process of its own with an empty cache folder and Inductor's caches off: CPU seconds, children
included, from torch.compile to the first result (in training to the end of the backward), after one eager step and
after a trivial function was compiled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
import transformers as hf

from laconic.compiling import WAYS, cost, spawn
from laconic.machine import machine

BATCH, SEQUENCE, VOCABULARY = 2, 64, 1000


def llama(layers: int) -> hf.LlamaForCausalLM:
    config = hf.LlamaConfig(
        hidden_size=256,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        intermediate_size=704,
        vocab_size=VOCABULARY,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(config).eval()


def tokens() -> torch.Tensor:
    torch.manual_seed(1)
    return torch.randint(0, VOCABULARY, (BATCH, SEQUENCE))


def child(layers: int, way: str, training: bool) -> None:
    torch.set_num_threads(1)
    ids = tokens()
    print(json.dumps(cost(llama(layers), lambda m: m(input_ids=ids, use_cache=False).logits, way, training)))


def measure(layers: int, way: str, training: bool) -> dict[str, Any]:
    mode = "training" if training else "inference"
    found = spawn([sys.executable, "-W", "ignore", __file__, "--child", str(layers), way, mode])
    print(f"{mode} {layers} layers {way}: {found['cpu_seconds']:.1f} s", file=sys.stderr, flush=True)
    return found


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the repeats, and their ratio to Inductor's."""
    seconds = statistics.median(row["cpu_seconds"] for row in rows)
    found: dict[str, Any] = {
        "cpu_seconds": round(seconds, 2),
        "each": [round(row["cpu_seconds"], 2) for row in rows],
        "backend_cpu_seconds": round(statistics.median(row["backend_cpu_seconds"] for row in rows), 2),
        "output_error": max(row["output_error"] for row in rows),
    }
    for name in ("gradient_error", "gradients_right", "gradient_error_at", "stats"):
        if name in rows[0]:
            found[name] = rows[0][name]
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--layers", type=int, nargs="+", default=[2, 24, 48, 80])
    parser.add_argument("--training", type=int, nargs="*", default=[24])
    parser.add_argument("--ways", nargs="+", default=list(WAYS))
    parser.add_argument("--repeats", type=int, default=3)
    given = parser.parse_args()
    results: dict[str, Any] = {}
    for mode, depths in (("inference", given.layers), ("training", given.training)):
        for layers in depths:
            rows: dict[str, list[dict[str, Any]]] = {way: [] for way in given.ways}
            for _ in range(given.repeats):
                for way in given.ways:
                    rows[way].append(measure(layers, way, mode == "training"))
            table = {way: summary(found) for way, found in rows.items()}
            for way, row in table.items():
                pairs = zip(rows[way], rows["inductor"], strict=True)
                row["ratio"] = round(statistics.median(a["cpu_seconds"] / b["cpu_seconds"] for a, b in pairs), 3)
            results.setdefault(mode, {})[str(layers)] = table
    torch.set_num_threads(1)
    model = {"batch": BATCH, "sequence": SEQUENCE, "vocabulary": VOCABULARY, "shape": "Llama, width 256"}
    given.out.write_text(json.dumps({"schema": 1, "machine": machine(), "model": model, **results}, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(int(sys.argv[2]), sys.argv[3], sys.argv[4] == "training")
    else:
        main()
