"""What is installed here, and what follows from it. Looks, changes nothing."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import sys
from typing import Any

from laconic.version import __version__

_INSTALL_CPU = 'pip install "laconic-compiler[cpu]"'


def examine() -> dict[str, Any]:
    """A part per line: name, status (ok, missing, problem), what was found, what follows."""
    parts = [
        _part("python", "ok", f"{platform.python_version()} on {sys.platform}", ""),
        _part("laconic", "ok", __version__, ""),
        _package("torch", "nothing works without it", "capture, optimize, eval, export --format pt2"),
        _package("onnx", "no ONNX export", "ONNX export"),
        _onnxruntime(),
        _package("transformers", 'no Hugging Face folders: pip install "laconic-compiler[hf]"', "Hugging Face folders"),
        _package("triton", "no kernels of our own", "kernel generation"),
        _compiler(),
        _gpu(),
    ]
    return {"schema": 1, "parts": parts, "problems": [p["name"] for p in parts if p["status"] == "problem"]}


def _part(name: str, status: str, found: str, follows: str) -> dict[str, str]:
    return {"name": name, "status": status, "found": found, "follows": follows}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _package(name: str, without: str, gives: str) -> dict[str, str]:
    version = _version(name)
    return _part(name, "ok", version, gives) if version else _part(name, "missing", "", without)


def _onnxruntime() -> dict[str, str]:
    """The two packages share one import name: with both, whichever was installed last wins and the other is broken."""
    cpu, gpu = _version("onnxruntime"), _version("onnxruntime-gpu")
    if cpu and gpu:
        return _part(
            "onnxruntime",
            "problem",
            f"onnxruntime {cpu} and onnxruntime-gpu {gpu}",
            "they overwrite each other: pip uninstall both, then install one of the extras [cpu] and [gpu]",
        )
    if cpu or gpu:
        return _part("onnxruntime", "ok", f"{cpu or gpu} ({'cpu' if cpu else 'gpu'})", "ONNX export is checked by it")
    return _part("onnxruntime", "missing", "", f"no ONNX export, since it could not be checked: {_INSTALL_CPU}")


def _compiler() -> dict[str, str]:
    name = os.environ.get("CXX") or next((c for c in ("g++", "clang++", "c++") if shutil.which(c)), "")
    if name and shutil.which(name):
        return _part("C++ compiler", "ok", str(shutil.which(name)), "torch.compile on CPU")
    return _part("C++ compiler", "missing", "", "torch.compile on CPU falls back to eager")


def _gpu() -> dict[str, str]:
    if _version("torch") is None:
        return _part("GPU", "missing", "", "")
    import torch

    if not torch.cuda.is_available():
        return _part("GPU", "missing", "", "everything runs on the CPU")
    return _part("GPU", "ok", torch.cuda.get_device_name(), f"CUDA {torch.version.cuda}")
