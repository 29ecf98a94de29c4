"""How much memory the exact preset needs beyond the model, from a folder of sharded safetensors to a verified DIR.

    python benchmarks/memory.py benchmarks/results/memory.json

`laconic optimize FOLDER -o DIR` runs in a process of its own, with all checks on: capture, passes, saving and reading
back. Memory is the kernel's peak of resident pages (VmHWM) since the process had imported what it needs, mapped pages
of files included; the peak is reset whenever a stage begins, so that each has its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

#: A Llama with 1.0 GB of float32 weights.
LARGE = {"vocab_size": 32000, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 11}
HEADS = {"num_attention_heads": 16, "num_key_value_heads": 16}


def main(out: Path) -> None:
    from laconic.machine import machine

    with tempfile.TemporaryDirectory(dir=out.parent) as folder:
        size = write_llama(Path(folder) / "model", LARGE)
        found = measure(Path(folder) / "model", Path(folder) / "out")
    out.write_text(json.dumps({"schema": 1, "machine": machine(), **summary(size, found)}, indent=1) + "\n")


def summary(size: int, found: dict[str, Any]) -> dict[str, Any]:
    """The figures of one run on a model of `size` bytes; memory in bytes above what was resident after imports."""
    stages = found["stages"]
    above = max(stage["peak"] for stage in stages) - found["after_imports"]
    return {
        "model_bytes": size,
        "rss_after_imports": found["after_imports"],
        "peak_rss_above_imports": above,
        "ratio": round(above / size, 3),
        "seconds": round(sum(stage["seconds"] for stage in stages), 1),
        "stages": [
            {
                "stage": stage["name"],
                "seconds": round(stage["seconds"], 2),
                "ratio": round((stage["peak"] - found["after_imports"]) / size, 3),
            }
            for stage in stages
        ],
    }


def measure(folder: Path, out: Path, *warm: Path) -> dict[str, Any]:
    """Run `laconic optimize` on a folder in a process of its own, which has run it on the folders `warm` before it
    starts to count: then what is imported on the way counts as an import. Raises CalledProcessError if it fails."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore", __file__, "--child", str(folder), str(out), *map(str, warm)],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def write_llama(folder: Path, sizes: dict[str, int], shards: int = 4) -> int:
    """Write a Llama with random weights, a tensor at a time, as transformers would save it; returns its bytes."""
    import torch
    import transformers

    from laconic.ir.tensor_file import write_tensors

    folder.mkdir(parents=True)
    config = transformers.LlamaConfig(**sizes, **HEADS, architectures=["LlamaForCausalLM"], tie_word_embeddings=False)
    config.save_pretrained(folder)
    with torch.device("meta"):
        shapes = {k: v.shape for k, v in transformers.LlamaForCausalLM(config).state_dict().items()}
    homes: dict[str, str] = {}
    names = list(shapes)
    torch.manual_seed(0)
    for number in range(shards):
        part = names[number::shards]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        write_tensors(folder / file, {n: torch.randn(shapes[n]) * 0.02 for n in part}, {"format": "pt"})
        homes.update(dict.fromkeys(part, file))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    return sum(4 * shape.numel() for shape in shapes.values())


class Meter:
    """The peak of each stage, by resetting the kernel's mark when the next one begins."""

    def __init__(self) -> None:
        self.stages: list[dict[str, Any]] = []
        self.begin("start")

    def begin(self, name: str) -> None:
        self.end()
        Path("/proc/self/clear_refs").write_text("5")
        self.stages.append({"name": name, "began": time.perf_counter()})

    def end(self) -> None:
        if self.stages:
            self.stages[-1] |= {"peak": status("VmHWM"), "seconds": time.perf_counter() - self.stages[-1].pop("began")}


def status(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def child(folder: str, out: str, *warm: str) -> None:
    import transformers.models.llama.modeling_llama  # noqa: F401

    import laconic.sources  # noqa: F401
    from laconic.cli.main import run
    from laconic.cli.progress import Display

    stdout = os.dup(1)
    os.dup2(2, 1)
    for number, other in enumerate(warm):
        run(["optimize", other, "-o", f"{out}.warm{number}"])
    after_imports = status("VmRSS")
    meter = Meter()
    shown = Display.stage

    def stage(display: Display, text: str) -> None:
        meter.begin(text)
        shown(display, text)

    Display.stage = stage  # type: ignore[method-assign]
    code = run(["optimize", folder, "-o", out])
    meter.end()
    os.dup2(stdout, 1)
    print(json.dumps({"after_imports": after_imports, "stages": meter.stages}), flush=True)
    os._exit(code)


if __name__ == "__main__":
    child(*sys.argv[2:]) if sys.argv[1] == "--child" else main(Path(sys.argv[1]))
