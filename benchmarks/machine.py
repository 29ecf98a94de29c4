"""What a result file says of where it was made: versions and the processor, nothing else."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch


def machine() -> dict[str, object]:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    packages = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript")
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: importlib.metadata.version(name) for name in packages},
    }
