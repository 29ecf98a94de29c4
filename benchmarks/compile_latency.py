"""Steady latency and memory of compiled models: laconic's backend against Inductor's, in pairs.

    python benchmarks/compile_latency.py benchmarks/results/compile_latency.json [--pairs 200]

Eight architectures with random weights, and a training step of a deep Llama; each in a process of its own, in which
both are compiled and then called by turns on one thread: a ratio is of two calls of the same turn. Memory is the peak
of live bytes that torch's allocator has handed out during a call, above what lived before it; in inference on a Llama
of 6 layers at sequence 512, in training at sequence 256.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from compile_time import llama, tokens
from torch import nn

from laconic.codegen import stats
from laconic.compiling import WAYS, spawn
from laconic.latency import by_turns, ratios
from laconic.machine import machine

OURS = ("compiled", "compiled-without-passes")
TEXT = torch.randint(0, 1000, (2, 64), generator=torch.Generator().manual_seed(1))
SIZES = {"hidden_size": 256, "num_hidden_layers": 6, "num_attention_heads": 8, "intermediate_size": 704}

Case = tuple[nn.Module, dict[str, Any]]


def text(model: nn.Module, **extra: Any) -> Case:
    return model, {"input_ids": TEXT, **extra}


def image(model: nn.Module) -> Case:
    return model, {"pixel_values": torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(2))}


MODELS: dict[str, Callable[[], Case]] = {
    "BERT": lambda: text(hf.BertModel(hf.BertConfig(**SIZES, vocab_size=1000))),
    "GPT-2": lambda: text(
        hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=256, n_layer=6, n_head=8, vocab_size=1000)), use_cache=False
    ),
    "Llama": lambda: text(llama(6), use_cache=False),
    "Gemma-3": lambda: text(
        hf.Gemma3ForCausalLM(
            hf.Gemma3TextConfig(**SIZES, num_key_value_heads=4, head_dim=32, vocab_size=1000, sliding_window=32)
        ),
        use_cache=False,
    ),
    "T5": lambda: text(
        hf.T5ForConditionalGeneration(
            hf.T5Config(d_model=256, d_kv=32, d_ff=704, num_layers=6, num_heads=8, vocab_size=1000)
        ),
        decoder_input_ids=TEXT[:, :16],
        use_cache=False,
    ),
    "ViT": lambda: image(hf.ViTModel(hf.ViTConfig(**SIZES, image_size=64, patch_size=8))),
    "Qwen3-MoE": lambda: text(
        hf.Qwen3MoeForCausalLM(
            hf.Qwen3MoeConfig(
                **SIZES,
                num_key_value_heads=4,
                head_dim=32,
                vocab_size=1000,
                num_experts=8,
                num_experts_per_tok=2,
                moe_intermediate_size=128,
            )
        ),
        use_cache=False,
    ),
    "ResNet": lambda: image(
        hf.ResNetModel(hf.ResNetConfig(embedding_size=32, hidden_sizes=[64, 128, 256, 512], depths=[3, 4, 6, 3]))
    ),
}


def inference(name: str, pairs: int) -> dict[str, Any]:
    """Milliseconds of a call, and ratios to Inductor's."""
    torch.manual_seed(0)
    module, arguments = MODELS[name]()
    return timed(module.eval(), lambda model: model(**arguments), pairs)


def training(layers: int, pairs: int) -> dict[str, Any]:
    """The same of a forward with its backward."""
    ids = tokens()

    def step(model: Callable[..., Any]) -> None:
        with torch.enable_grad():
            model(input_ids=ids, use_cache=False).logits.square().mean().backward()

    return timed(llama(layers), step, pairs)


def timed(module: nn.Module, call: Callable[[Any], Any], pairs: int) -> dict[str, Any]:
    models = {way: WAYS[way](copy.deepcopy(module))[0] for way in ("inductor", *OURS)}
    with torch.no_grad():
        for model in models.values():
            call(model)
    done = stats()
    ways = {way: (lambda _, model=model: lambda: call(model)) for way, model in models.items()}
    times = by_turns(ways, list, pairs, warmup=20)
    return {
        "milliseconds": {way: round(1e3 * statistics.median(found), 3) for way, found in times.items()},
        "ratio": {way: statistics.quantiles(ratios(times, way, "inductor"), n=4) for way in OURS},
        "pieces": done["pieces"] // len(OURS),
        "steps": done["steps"] // len(OURS),
    }


def memory(way: str, mode: str) -> dict[str, Any]:
    """Peak bytes above what lived before the call."""
    grown = {"inference": 512, "training": 256}[mode]
    ids = torch.randint(0, 1000, (2, grown), generator=torch.Generator().manual_seed(1))
    model = WAYS[way](llama(6))[0]

    def call() -> None:
        with torch.set_grad_enabled(mode == "training"):
            result = model(input_ids=ids, use_cache=False).logits
            if mode == "training":
                result.square().mean().backward()

    for _ in range(2):  # the second step finds gradients to accumulate into, as the one that is measured does
        call()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    return {"peak_bytes": peak}


def run(*arguments: str) -> dict[str, Any]:
    found = spawn([sys.executable, "-W", "ignore", __file__, "--child", *arguments])
    print(*arguments, json.dumps(found), file=sys.stderr, flush=True)
    return found


def child(what: str, *arguments: str) -> None:
    torch.set_num_threads(1)
    if what == "inference":
        found = inference(arguments[0], int(arguments[1]))
    elif what == "training":
        found = training(int(arguments[0]), int(arguments[1]))
    else:
        found = memory(*arguments)
    print(json.dumps(found))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--training-layers", type=int, default=24)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    given = parser.parse_args()
    rows = {name: run("inference", name, str(given.pairs)) for name in given.models}
    mean = {
        way: round(math.exp(statistics.mean(math.log(row["ratio"][way][1]) for row in rows.values())), 4)
        for way in OURS
    }
    step = run("training", str(given.training_layers), str(given.pairs // 4))
    peaks = {
        mode: {way: run("memory", way, mode)["peak_bytes"] for way in ("inductor", *OURS)}
        for mode in ("inference", "training")
    }
    torch.set_num_threads(1)
    found = {"models": rows, "geometric_mean": mean, "training_step": step, "peak_bytes": peaks}
    given.out.write_text(
        json.dumps({"schema": 1, "machine": machine(), "pairs": given.pairs, **found}, indent=1) + "\n"
    )


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1:2] == ["--child"] else main()
