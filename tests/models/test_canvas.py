"""Canvases: a function of their seed, of the digits of one split, with what the labels say on them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from laconic.models.canvas import EMPTY, FOLDER, GRID, QUADRANTS, SIZE, Layout, draw
from laconic.models.corpus import Split


@pytest.mark.parametrize("layout", [QUADRANTS, GRID])
def test_shapes_and_labels(layout: Layout) -> None:
    drawn = draw(Split.TEST, layout, 12, seed=3)
    assert drawn.pixels.shape == (12, 3, SIZE, SIZE)
    assert drawn.pixels.dtype == torch.float32
    assert float(drawn.pixels.abs().max()) < 3
    filled = (drawn.labels != EMPTY).sum(1)
    assert layout.filled[0] <= int(filled.min()) <= int(filled.max()) <= layout.filled[1]
    assert torch.equal(drawn.labels == EMPTY, drawn.digits == -1)


def test_a_function_of_the_seed() -> None:
    one, again, other = (draw(Split.TRAIN, GRID, 4, seed) for seed in (5, 5, 6))
    assert torch.equal(one.pixels, again.pixels)
    assert not torch.equal(one.labels, other.labels)


def test_splits_share_no_digit() -> None:
    digits = {
        kind: set(draw(kind, GRID, 400, 0).digits.flatten().tolist()) - {-1} for kind in (Split.SELECTION, Split.TEST)
    }
    train = set(draw(Split.CALIBRATION, GRID, 400, 0).digits.flatten().tolist()) - {-1}
    assert not digits[Split.SELECTION] & digits[Split.TEST]
    assert not train & (digits[Split.SELECTION] | digits[Split.TEST])
    assert len(digits[Split.TEST]) > 300


def test_the_digits_are_those_of_scikit_learn() -> None:
    datasets = pytest.importorskip("sklearn.datasets")
    found = datasets.load_digits()
    with np.load(FOLDER / "digits.npz") as kept:
        np.testing.assert_array_equal(kept["images"], found.images.reshape(-1, 64))
        np.testing.assert_array_equal(kept["labels"], found.target)


def test_an_empty_cell_has_no_ink() -> None:
    drawn = draw(Split.TEST, GRID, 60, seed=1, texture=0.0)
    cells = drawn.pixels.unfold(2, 28, 28).unfold(3, 28, 28).flatten(2, 3)
    spread = cells.std((3, 4)).mean(1)
    assert float(spread[drawn.labels == EMPTY].max()) < 0.01
    assert float(spread[drawn.labels != EMPTY].min()) > 0.05
