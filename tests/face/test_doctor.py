"""doctor says what is there, and that the two ONNX Runtime packages exclude each other."""

from __future__ import annotations

import importlib.metadata

import pytest

from laconic.doctor import examine


def parts(monkeypatch: pytest.MonkeyPatch, **installed: str) -> dict[str, dict[str, str]]:
    """What doctor finds where exactly these packages are installed (names with _ for -)."""

    def version(name: str) -> str:
        if name.replace("-", "_") in installed:
            return installed[name.replace("-", "_")]
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    return {part["name"]: part for part in examine()["parts"]}


def test_what_is_missing_is_said_with_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    found = parts(monkeypatch)
    assert found["onnxruntime"]["status"] == "missing"
    assert "laconic-compiler[cpu]" in found["onnxruntime"]["follows"]
    assert "laconic-compiler[hf]" in found["transformers"]["follows"]
    assert found["GPU"]["status"] == "missing"


def test_one_runtime_is_fine_and_two_are_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parts(monkeypatch, onnxruntime="1.31.1")["onnxruntime"]["found"] == "1.31.1 (cpu)"
    assert parts(monkeypatch, onnxruntime_gpu="1.31.1")["onnxruntime"]["found"] == "1.31.1 (gpu)"
    both = parts(monkeypatch, onnxruntime="1.31.1", onnxruntime_gpu="1.31.0")["onnxruntime"]
    assert both["status"] == "problem"
    assert "uninstall both" in both["follows"]
    assert examine()["problems"] == ["onnxruntime"]
