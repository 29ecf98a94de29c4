"""ONNX of four transformers of 12 layers: nodes of torch's own export and of ours, and how fast both run.

    python benchmarks/onnx_nodes.py benchmarks/results/onnx_nodes.json [--pairs 30] [--layers 12]

Torch's is `torch.onnx.export` of the module itself at opset 20, not optimised; ours the program after the preset
`exact`. Both run in ONNX Runtime with its default options on one thread, and take turns: a ratio is of two calls in
the same turn, each the best of three. The outputs are compared on what is timed.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.inliner
import onnxruntime
import torch
import transformers as hf
from torch import nn
from torch.export import Dim

import laconic
from laconic.ir.silence import torch_silenced
from laconic.machine import machine

OPSET = 20
#: Batch and, where there is one, sequence of what is timed.
SHAPES = ((1, 16), (4, 64))
CALLS, WARM = 3, 3

Case = tuple[nn.Module, dict[str, Any], dict[str, Any]]


def models(layers: int) -> dict[str, Callable[[], Case]]:
    """Width 128, 4 heads, vocabulary 1000; random weights, biases included, as after training."""
    sizes = {"hidden_size": 128, "num_hidden_layers": layers, "num_attention_heads": 4, "intermediate_size": 512}
    gpt2 = hf.GPT2Config(n_embd=128, n_layer=layers, n_head=4, vocab_size=1000, bos_token_id=0, eos_token_id=0)
    llama = hf.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=1000)
    axes = {0: Dim("batch"), 1: Dim("sequence", max=512)}

    def text(model: nn.Module, **extra: Any) -> Case:
        inputs = {"input_ids": torch.randint(0, 1000, (3, 7)), "attention_mask": torch.ones(3, 7, dtype=torch.long)}
        return model, inputs | extra, {**dict.fromkeys(inputs, axes), **dict.fromkeys(extra)}

    def image(model: nn.Module) -> Case:
        return model, {"pixel_values": torch.randn(3, 3, 64, 64)}, {"pixel_values": {0: Dim("batch")}}

    return {
        "BertModel": lambda: text(hf.BertModel(hf.BertConfig(**sizes, vocab_size=1000))),
        "GPT2LMHeadModel": lambda: text(hf.GPT2LMHeadModel(gpt2), use_cache=False),
        "LlamaForCausalLM": lambda: text(hf.LlamaForCausalLM(llama), use_cache=False),
        "ViTModel": lambda: image(hf.ViTModel(hf.ViTConfig(**sizes, image_size=64, patch_size=8))),
    }


def make(case: Callable[[], Case]) -> Case:
    torch.manual_seed(0)
    module, inputs, axes = case()
    for name, parameter in module.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.1)
    return module.eval(), inputs, axes


def measure(case: Callable[[], Case], folder: Path, pairs: int) -> dict[str, Any]:
    module, inputs, axes = make(case)
    raw = folder / "raw.onnx"
    with torch_silenced(), torch.no_grad():
        exported = torch.onnx.export(
            module, kwargs=inputs, dynamic_shapes=axes, dynamo=True, opset_version=OPSET, optimize=False, verbose=False
        )
        assert exported is not None
        exported.save(str(raw))
    program = laconic.optimize(module, "exact", inputs=inputs, dynamic_shapes=axes).program
    reports = {
        (name, functions): laconic.export_onnx(
            program, folder / f"{name}{functions}.onnx", opset=o, functions=functions
        )
        for name, o in (("ours", OPSET), ("newest", None))
        for functions in (False, True)
    }
    ours, newest = reports["ours", False], reports["newest", False]
    return {
        "raw": inlined(raw),
        "ours": {"opset": OPSET, **nodes(reports["ours", False], reports["ours", True])},
        "newest": {"opset": newest.opset, **nodes(newest, reports["newest", True])},
        "error_of_allowed": round(ours.worst, 3),
        "latency": [race(raw, ours.path, shape, pairs) for shape in SHAPES],
    }


def nodes(flat: Any, called: Any) -> dict[str, int]:
    return {"nodes": flat.nodes, "nodes_with_functions": called.stored_nodes, "calls": called.calls}


def inlined(path: Path) -> int:
    """Nodes of a model with all functions inlined, constants left out, which need not be nodes."""
    graph = onnx.inliner.inline_local_functions(onnx.load(path)).graph
    return sum(node.op_type != "Constant" for node in graph.node)


def race(raw: Path, ours: Path, shape: tuple[int, int], pairs: int) -> dict[str, Any]:
    """The time of `ours` as a ratio to that of `raw`: geometric mean and quartiles over alternating pairs."""
    sessions = [session(path) for path in (raw, ours)]
    feeds = drawn(sessions[1], shape)
    given = [{value.name: feeds[value.name] for value in one.get_inputs()} for one in sessions]
    found = [one.run(None, fed) for one, fed in zip(sessions, given, strict=True)]
    difference = max(float(np.abs(a - b).max()) for a, b in zip(*found, strict=True))
    times: list[list[float]] = [[], []]
    for turn in range(WARM + pairs):
        for k in (turn % 2, 1 - turn % 2):
            best = min(timed(lambda k=k: sessions[k].run(None, given[k])) for _ in range(CALLS))  # type: ignore[misc]
            if turn >= WARM:
                times[k].append(best)
    ratios = [b / a for a, b in zip(*times, strict=True)]
    return {
        "shape": list(next(iter(feeds.values())).shape),
        "pairs": pairs,
        "milliseconds": [round(1e3 * statistics.median(t), 3) for t in times],
        "ratio": round(math.exp(statistics.mean(map(math.log, ratios))), 3),
        "quartiles": [round(q, 3) for q in statistics.quantiles(ratios, n=4)],
        "difference": difference,
    }


def session(path: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def drawn(one: Any, shape: tuple[int, int]) -> dict[str, Any]:
    generator = np.random.default_rng(0)
    feeds: dict[str, Any] = {}
    for value in one.get_inputs():
        sizes = [n if isinstance(n, int) else shape[k] for k, n in enumerate(value.shape)]
        if value.type == "tensor(float)":
            feeds[value.name] = generator.standard_normal(sizes).astype(np.float32)
        elif value.name == "attention_mask":
            feeds[value.name] = np.ones(sizes, np.int64)
        else:
            feeds[value.name] = generator.integers(0, 1000, sizes)
    return feeds


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out", type=Path)
    parser.add_argument("--pairs", type=int, default=30)
    parser.add_argument("--layers", type=int, default=12)
    asked = parser.parse_args()
    rows = {}
    for name, case in models(asked.layers).items():
        print(name, file=sys.stderr)
        with tempfile.TemporaryDirectory() as folder:
            rows[name] = measure(case, Path(folder), asked.pairs)
    data = {"schema": 1, "machine": machine(), "layers": asked.layers, "models": rows}
    asked.out.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
