"""Memory: from a folder to a verified DIR, with all checks on, the model is in memory once and little else."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import memory

import laconic
from laconic.ir.hf import load_model

SMALL = {"vocab_size": 8000, "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 2}
TINY = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2}
LIMIT = 1.6
#: What a run needs apart from weights: activations, graphs, text. Less than half of the small model.
BESIDE = 32 << 20


@pytest.mark.slow
def test_a_small_model(tmp_path: Path) -> None:
    size = memory.write_llama(tmp_path / "model", SMALL)
    assert size > 60e6
    memory.write_llama(tmp_path / "tiny", TINY)
    found = memory.summary(size, memory.measure(tmp_path / "model", tmp_path / "out", tmp_path / "tiny"))
    assert found["peak_rss_above_imports"] < LIMIT * size + BESIDE, found
    assert found["peak_rss_above_imports"] > size / 2, "the weights themselves were seen"
    assert [s["stage"] for s in found["stages"]][-2:] == ["reading it back", "moving it into place"]
    weights = load_model(tmp_path / "model").state_dict()
    saved = laconic.load(tmp_path / "out").state_dict()
    assert torch.equal(saved["model.layers.1.mlp.up_proj.weight"], weights["model.layers.1.mlp.up_proj.weight"])
    assert str(tmp_path / "out") in Path("/proc/self/maps").read_text(), "a DIR's weights are mapped"


@pytest.mark.slow
def test_one_gigabyte(tmp_path: Path) -> None:
    size = memory.write_llama(tmp_path / "model", memory.LARGE)
    assert size > 1e9
    found = memory.summary(size, memory.measure(tmp_path / "model", tmp_path / "out"))
    assert found["ratio"] <= LIMIT, found
