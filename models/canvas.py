"""The pictures the vision models are trained on: handwritten digits on textured canvases, drawn from a seed.

The digits are the 1,797 of 8 x 8 pixels that scikit-learn ships (Alpaydin and Kaynak 1998, "Optical Recognition of
Handwritten Digits", UCI Machine Learning Repository, CC BY 4.0), kept in `data/digits.npz` with the split each is of.
A canvas is 112 x 112 pixels and three colours: a grid of cells, a digit in each or in some, turned, sheared, stretched
and moved; ink darker or lighter than the background; behind it noise at several scales and two gratings.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from laconic.ir.errors import ModelError
from laconic.models.corpus import Split

FOLDER = Path(__file__).parent / "data"

SIZE = 112  # pixels
EMPTY = 10  # the label of a cell without a digit
_FINE = 32  # pixels of a digit before it is placed
_DIGITS = "ad36755d027a8da89f62020820bbb615943f96f0da940bf08f10b33b970e0950"  # sha256 of digits.npz
_SCALES = (4, 14, 28, 56)  # cells of the background's noise along a side


@dataclass(frozen=True)
class Layout:
    """A grid of `side` x `side` cells; the digits' side in pixels, least and greatest; how many cells hold one."""

    side: int
    digit: tuple[float, float]
    filled: tuple[int, int]

    @property
    def cells(self) -> int:
        return self.side * self.side


#: One digit in each quadrant: what the vit reads.
QUADRANTS = Layout(side=2, digit=(25.0, 35.0), filled=(4, 4))
#: Sixteen cells, about half of them empty: what the vlm reads, row by row.
GRID = Layout(side=4, digit=(19.0, 24.0), filled=(6, 10))


@dataclass(frozen=True)
class Canvases:
    """`pixels` (n, 3, 112, 112) float32, about [-1, 1]; `labels` (n, cells) int64, row by row, `EMPTY` for none;
    `digits` (n, cells) the numbers of the digits among the 1,797, -1 for none."""

    pixels: torch.Tensor
    labels: torch.Tensor
    digits: torch.Tensor


def recorded() -> dict[str, Any]:
    """What canvases are made of: how many digits each split has, and the hash of all."""
    _, _, splits = _digits()
    return {"digits": {str(kind): len(own) for kind, own in splits.items()}, "sha256": _DIGITS}


@cache
def _digits() -> tuple[torch.Tensor, torch.Tensor, dict[Split, torch.Tensor]]:
    """Digits (n, 1, 32, 32) in [0, 1], their labels (n,), and which are of which split."""
    path = FOLDER / "digits.npz"
    if hashlib.sha256(path.read_bytes()).hexdigest() != _DIGITS:
        raise ModelError(f"{path} is not the file that was committed", hint="get it again from the repository")
    with np.load(path, allow_pickle=False) as data:
        images = torch.from_numpy(data["images"]).float().reshape(-1, 1, 8, 8) / 16.0
        labels = torch.from_numpy(data["labels"]).long()
        splits = torch.from_numpy(data["splits"]).long()
    fine = F.interpolate(images, size=(_FINE, _FINE), mode="bicubic", align_corners=False).clamp(0.0, 1.0)
    return fine, labels, {kind: torch.nonzero(splits == k).flatten() for k, kind in enumerate(_STORED)}


_STORED = (Split.TRAIN, Split.SELECTION, Split.TEST)


def draw(kind: Split, layout: Layout, count: int, seed: int, *, texture: float = 1.0) -> Canvases:
    """`count` canvases with digits of one split, a function of the seed; `texture` scales what lies behind the ink.

    Calibration canvases are drawn with digits of the training split.
    """
    generator = torch.Generator().manual_seed(seed)
    fine, labels, splits = _digits()
    own = splits[Split.TRAIN if kind is Split.CALIBRATION else kind]
    chosen = own[torch.randint(len(own), (count, layout.cells), generator=generator)]
    least, most = layout.filled
    filled = torch.randint(least, most + 1, (count, 1), generator=generator)
    rank = torch.rand((count, layout.cells), generator=generator).argsort(1).argsort(1)
    present = rank < filled
    ink = _placed(fine[chosen.flatten()], layout, generator) * present.flatten()[:, None, None, None]
    cell = SIZE // layout.side
    ink = ink.reshape(count, layout.side, layout.side, cell, cell).permute(0, 1, 3, 2, 4).reshape(count, 1, SIZE, SIZE)
    return Canvases(
        pixels=_inked(ink, _background(count, texture, generator), generator),
        labels=torch.where(present, labels[chosen], EMPTY),
        digits=torch.where(present, chosen, -1),
    )


def _uniform(shape: tuple[int, ...], low: float, high: float, generator: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=generator) * (high - low) + low


def _placed(digits: torch.Tensor, layout: Layout, generator: torch.Generator) -> torch.Tensor:
    """Each digit (n, 1, 32, 32) somewhere in its cell, (n, 1, cell, cell)."""
    n, cell = len(digits), SIZE // layout.side
    side = _uniform((n,), *layout.digit, generator)
    aspect = torch.exp(_uniform((n,), -0.15, 0.15, generator))
    angle = _uniform((n,), -0.26, 0.26, generator)  # radians
    shear = _uniform((n,), -0.2, 0.2, generator)
    room = (cell - side) / cell  # how far the centre may move, in halves of the cell
    shift = _uniform((n, 2), -1.0, 1.0, generator) * room[:, None]
    # From a place in the cell to one in the digit: undo the shift, the size, the turn and the shear.
    cos, sin, scale = torch.cos(angle), torch.sin(angle), cell / side
    turn = torch.stack([torch.stack([cos, sin], 1), torch.stack([-sin, cos], 1)], 1)
    skew = torch.stack(
        [torch.stack([scale * aspect, shear * scale], 1), torch.stack([torch.zeros(n), scale / aspect], 1)], 1
    )
    matrix = skew @ turn
    offset = -(matrix @ shift[:, :, None])
    grid = F.affine_grid(torch.cat([matrix, offset], 2), [n, 1, cell, cell], align_corners=False)
    return F.grid_sample(digits, grid, mode="bilinear", padding_mode="zeros", align_corners=False)


def _background(count: int, texture: float, generator: torch.Generator) -> torch.Tensor:
    base = _uniform((count, 3, 1, 1), -0.4, 0.4, generator)
    noise = torch.zeros((count, 3, SIZE, SIZE))
    for cells in _SCALES:
        coarse = torch.randn((count, 3, cells, cells), generator=generator)
        strength = _uniform((count, 1, 1, 1), 0.02, 0.12, generator)
        noise += strength * F.interpolate(coarse, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    axis = torch.linspace(-1.0, 1.0, SIZE)
    for _ in range(2):
        angle = _uniform((count, 1, 1), 0.0, math.pi, generator)
        frequency = _uniform((count, 1, 1), 4.0, 30.0, generator)
        phase = _uniform((count, 1, 1), 0.0, 2 * math.pi, generator)
        along = torch.cos(angle) * axis[None, None, :] + torch.sin(angle) * axis[None, :, None]
        wave = torch.sin(frequency * along + phase)[:, None]
        noise += _uniform((count, 3, 1, 1), -0.1, 0.1, generator) * wave
    noise += 0.04 * torch.randn((count, 3, SIZE, SIZE), generator=generator)
    return base + texture * noise


def _inked(ink: torch.Tensor, background: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    count = len(ink)
    sign = torch.where(torch.rand((count, 1, 1, 1), generator=generator) < 0.5, -1.0, 1.0)
    contrast = 2 * _uniform((count, 1, 1, 1), 0.38, 0.63, generator)
    cast = _uniform((count, 3, 1, 1), -0.15, 0.15, generator)
    return background + ink * (sign * contrast + cast)


def write_digits() -> None:
    """Take the digits from scikit-learn and split them by sample. Done once: the split is final."""
    from sklearn.datasets import load_digits

    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    splits = np.zeros(len(order), dtype=np.uint8)
    splits[order[1250:1450]] = _STORED.index(Split.SELECTION)
    splits[order[1450:]] = _STORED.index(Split.TEST)
    np.savez_compressed(
        FOLDER / "digits.npz",
        images=found.images.astype(np.uint8).reshape(-1, 64),
        labels=found.target.astype(np.uint8),
        splits=splits,
    )
