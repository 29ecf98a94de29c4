"""Where something was measured: versions and the processor, nothing else."""

from __future__ import annotations

import importlib.metadata
import platform
from pathlib import Path

import torch

_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime", "onnxscript")


def machine() -> dict[str, object]:
    """The processor's model, the threads that torch uses, and versions; null for a package that is not installed."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.exists() else []
    cpu = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    return {
        "cpu": cpu,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        **{name: _version(name) for name in _PACKAGES},
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
