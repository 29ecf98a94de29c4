"""How alike the weights of isomorphic blocks are: exact numbers, from which nothing follows yet about what the blocks
compute."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch

from laconic.ir.program import Kind, Program
from laconic.ir.signature import content_key
from laconic.ir.structure.records import BlockRun

_CHUNK = 1 << 18
_CLOSE = 1e-8  # squared relative distance below which differences are summed themselves, since those of squares cancel


@dataclass(frozen=True)
class Likeness:
    """Two of several blocks, experts or matrices. With w all weights of one as a vector: `distance` is |w_a - w_b| over
    the root mean square of |w_a| and |w_b|, `cosine` that of the angle between them."""

    a: int
    b: int
    distance: float
    cosine: float


def weight_slots(program: Program, run: BlockRun) -> list[list[str]]:
    """For each slot of a run's block that is bound to a weight in every block: the names of those weights."""
    found = []
    for slot in range(len(run.repeat.slots)):
        nodes = [run.bound(slot, k) for k in range(run.count)]
        if all(n.op == "placeholder" and n.meta["kind"] in (Kind.PARAMETER, Kind.BUFFER, Kind.CONSTANT) for n in nodes):
            found.append([n.meta["name"] for n in nodes])
    return found


def equal_blocks(program: Program, run: BlockRun) -> list[tuple[int, ...]]:
    """Groups of blocks whose weights hold the same bytes, slot by slot."""
    slots = [names for names in weight_slots(program, run) if len(set(names)) > 1]
    keys = {name: content_key(program.weights[name].value) for names in slots for name in names}
    groups: dict[tuple[bytes, ...], list[int]] = {}
    for k in range(run.count):
        groups.setdefault(tuple(keys[names[k]] for names in slots), []).append(k)
    return [tuple(group) for group in groups.values() if len(group) > 1]


def likeness(program: Program, run: BlockRun) -> list[Likeness]:
    """All pairs of a run's blocks, in float64; [] if the blocks have no floating weights."""
    slots = [names for names in weight_slots(program, run) if _comparable(program, names)]
    return alike([[program.weights[names[k]].value for names in slots] for k in range(run.count)]) if slots else []


def alike(things: Sequence[Sequence[torch.Tensor]]) -> list[Likeness]:
    """All pairs of things that are each made of as many tensors of the same shapes, compared as one vector each."""
    count = len(things)
    gram = torch.zeros(count, count, dtype=torch.float64)
    for rows in _rows(things):
        gram += rows @ rows.T
    found = []
    for a, b in combinations(range(count), 2):
        mean, product = float(gram[a, a] + gram[b, b]) / 2, float(gram[a, b])
        squared = max(0.0, 2 * (mean - product))
        if squared < _CLOSE * mean:
            squared = sum(float((rows[0] - rows[1]).square().sum()) for rows in _rows([things[a], things[b]]))
        norms = math.sqrt(float(gram[a, a]) * float(gram[b, b]))
        found.append(
            Likeness(a, b, math.sqrt(squared / mean) if mean else 0.0, min(1.0, product / norms) if norms else 1.0)
        )
    return found


def _comparable(program: Program, names: list[str]) -> bool:
    values = [program.weights[name].value for name in names]
    return all(v.is_floating_point() and v.shape == values[0].shape and v.device.type != "meta" for v in values)


def _rows(things: Sequence[Sequence[torch.Tensor]]) -> Iterator[torch.Tensor]:
    """The tensors of some things side by side, a piece at a time."""
    for values in zip(*things, strict=True):
        flat = [value.detach().cpu().reshape(-1) for value in values]
        for start in range(0, flat[0].numel(), _CHUNK):
            yield torch.stack([row[start : start + _CHUNK].double() for row in flat])
