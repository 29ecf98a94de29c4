"""Training from scratch with a quarter of the weights: share-hash against ROAST's form of it, and against plain models.

    python benchmarks/share_hash.py benchmarks/results/share_hash.json

A network of three layers reads the 8 x 8 digits that the zoo's pictures are made of; trained on the training split,
measured on the test split. Each way of sharing holds as many numbers and starts with weights of the same spread. ROAST
hashes tiles of weights to offsets on their own, and does not scale gradients; either of these is also tried alone.
`narrow` is a plain network of as many weights, `plain` one of all of them.

Five learning rates, up to where the plain model itself fails, and five seeds each, of SGD with momentum. A run diverges
when its loss is not finite, or greater at its end than that of predicting all digits alike.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from laconic.ir.files import place_file, temporary_beside
from laconic.machine import machine
from laconic.models import canvas
from laconic.passes.share_hash import share_hash
from laconic.passes.share_hash.module import scale_of, slot_scale

RATIO = 0.25
WIDTH, NARROW = 256, 113  # of as many weights as a quarter
RATES = (0.01, 0.03, 0.1, 0.2, 0.4)
SEEDS = range(5)
EPOCHS, BATCH = 30, 64
TILE = 32


def network(width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10))


class Tiled(nn.Module):
    """ROAST's weights: each tile of TILE x TILE is read at an offset of its own, with signs by element."""

    def __init__(self, weight: torch.Tensor, slots: int, draw: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape
        index = torch.empty(rows, columns, dtype=torch.long)
        for i in range(0, rows, TILE):
            for j in range(0, columns, TILE):
                high, wide = min(TILE, rows - i), min(TILE, columns - j)
                start = int(torch.randint(0, max(1, slots - high * wide), (), generator=draw))
                index[i : i + high, j : j + wide] = start + torch.arange(high * wide).reshape(high, wide)
        self.register_buffer("index", index)
        self.register_buffer("sign", torch.randint(0, 2, (rows, columns), generator=draw) * 2.0 - 1.0)
        self.scale = scale_of(weight)

    def forward(self, array: torch.Tensor) -> torch.Tensor:
        return array[self.index] * self.sign * self.scale


def tiled(model: nn.Module, seed: int, scaled: bool) -> nn.Module:
    """A model whose matrices stand in one array by ROAST's mapping; with gradients `scaled` as share-hash does."""
    draw = torch.Generator().manual_seed(seed)
    layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
    slots = int(RATIO * sum(layer.weight.numel() for layer in layers))
    array = nn.Parameter((torch.rand(slots, generator=draw) * 2 - 1) * 0.04)
    total, count = torch.zeros(slots), torch.zeros(slots)
    for layer in layers:
        part = Tiled(layer.weight, slots, draw)
        parametrize.register_parametrization(layer, "weight", part, unsafe=True)
        layer.parametrizations["weight"].original = array
        used = part.index.flatten()
        total.index_add_(0, used, torch.full(used.shape, part.scale))
        count.index_add_(0, used, torch.ones(len(used)))
    if scaled:
        by = (total.square() / count.clamp(min=1)).clamp(min=1e-12)
        array.register_hook(lambda gradient: gradient / by)
    return model


def folded(model: nn.Module, seed: int, scaled: bool) -> nn.Module:
    made = share_hash(model, RATIO, least=1, seed=seed)
    if not scaled:
        by = slot_scale(made).float()
        made.hash_shared.register_hook(lambda gradient: gradient * by)  # takes the scaling back
    return made


FORMS: dict[str, Callable[[int], nn.Module]] = {
    "plain": lambda seed: network(WIDTH),
    "narrow": lambda seed: network(NARROW),
    "share-hash": lambda seed: folded(network(WIDTH), seed, True),
    "share-hash, gradients not scaled": lambda seed: folded(network(WIDTH), seed, False),
    "ROAST": lambda seed: tiled(network(WIDTH), seed, False),
    "ROAST, gradients scaled": lambda seed: tiled(network(WIDTH), seed, True),
}


def digits() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Pixels in [0, 1], (n, 64), and labels, by split."""
    with np.load(canvas.FOLDER / "digits.npz", allow_pickle=False) as kept:
        images = torch.from_numpy(kept["images"]).float() / 16
        labels, splits = (torch.from_numpy(kept[name]).long() for name in ("labels", "splits"))
    return {kind: (images[splits == k], labels[splits == k]) for kind, k in (("train", 0), ("test", 2))}


def trained(form: str, rate: float, seed: int, data: dict[str, tuple[torch.Tensor, torch.Tensor]]) -> dict[str, Any]:
    torch.manual_seed(seed)
    model = FORMS[form](seed)
    chosen = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    x, y = data["train"]
    losses = []
    for _ in range(EPOCHS):
        order, total = torch.randperm(len(x)), 0.0
        for part in order.split(BATCH):
            chosen.zero_grad()
            loss = F.cross_entropy(model(x[part]), y[part])
            loss.backward()
            chosen.step()
            total += float(loss.detach()) * len(part)
        losses.append(total / len(x))
        if not math.isfinite(losses[-1]):
            break
    diverged = not math.isfinite(losses[-1]) or losses[-1] >= math.log(10)
    with torch.no_grad():
        right = (model(data["test"][0]).argmax(-1) == data["test"][1]).double().mean()
    return {
        "form": form,
        "rate": rate,
        "seed": seed,
        "numbers": sum(p.numel() for p in model.parameters() if p.dim() > 1 or p.numel() > WIDTH),
        "diverged": diverged,
        "loss": None if diverged else losses[-1],
        "top1": float(right),
    }


def main(path: Path) -> None:
    data = digits()
    rows = [trained(form, rate, seed, data) for form in FORMS for rate in RATES for seed in SEEDS]
    for form in FORMS:
        for rate in RATES:
            own = [row for row in rows if row["form"] == form and row["rate"] == rate]
            print(
                form,
                rate,
                sum(r["diverged"] for r in own),
                statistics.median(r["top1"] for r in own),
                own[0]["numbers"],
            )
    document = {"machine": machine(), "rows": rows}
    with temporary_beside(path) as temporary:
        temporary.write_text(json.dumps(document, indent=1) + "\n")
        place_file(temporary, path, force=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
