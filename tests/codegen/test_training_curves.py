"""Losses over many steps: a small version of `benchmarks/training.py`.

Training is chaotic, so a curve is as far from eager's as rounding makes it: no further than curves of eager itself with
the last bits of its weights moved.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import training


@pytest.mark.slow
@pytest.mark.parametrize("name", training.MODELS)
def test_losses_of_sixty_steps(name: str) -> None:
    found = training.measure(training.MODELS[name], steps=60, seeds=4)
    assert found["losses"][1] < 0.97 * found["losses"][0], "something is learnt"
    assert found["largest_relative_difference"] < max(1e-4, *found["last_bits_of_weights"])
    assert found["compiled"] < 0.6 * found["nodes"]
    assert found["dropout"]["standard_errors_apart"] < 5
