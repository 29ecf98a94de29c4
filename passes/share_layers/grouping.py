"""Methods that say which blocks read whose weights."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

import torch

from laconic.ir.data import flat_inputs, running
from laconic.ir.errors import UsageError
from laconic.ir.interpret import Interpreter, Tap
from laconic.ir.statistics.rows import Masks, shape_of
from laconic.passes.deciding import ENTRY
from laconic.passes.share_layers.task import REACH, Peers, ShareTask, Sharing

#: Samples that hidden states are compared on, and tokens that single replacements are judged on.
_SAMPLES, _TOKENS = 512, 8192
#: Sets of donors beyond which they are not all tried.
_MOST = 20_000


def fixed(task: ShareTask) -> Sharing:
    """Consecutive groups of one size, each reading its first block's weights (FoldGPT). Raises UsageError for groups
    that do not divide."""
    found = list(range(len(task.blocks)))
    for peers in task.peers:
        size, rest = divmod(len(peers.blocks), peers.donors)
        if rest:
            raise UsageError(
                f"{len(peers.blocks)} blocks of run {peers.run} cannot be cut into {peers.donors} groups of one size",
                hint=f"{_near(peers)}, or method=search",
            )
        for k, block in enumerate(peers.blocks):
            found[block] = peers.blocks[k - k % size]
    return tuple(found)


def _near(peers: Peers) -> str:
    """The number of groups nearest to what was asked for into which the blocks can be cut, and what share that is."""
    count = len(peers.blocks)
    counts = [n for n in range(1, count + 1) if count % n == 0]
    donors = min(counts, key=lambda n: abs(n - peers.donors))
    return f"{donors} groups would do, a share of {(peers.protected + donors) / peers.of:.4g}"


def search(task: ShareTask) -> Sharing:
    """The blocks that keep their weights by evolution, each other one reading the nearest's; then each the one's by
    which the model loses least."""
    even = [0] * len(task.blocks)
    for peers in task.peers:
        places = {math.floor((k + 0.5) * len(peers.blocks) / peers.donors) for k in range(peers.donors)}
        for k, block in enumerate(peers.blocks):
            even[block] = int(k not in places)
    return task.settled(task.nearest(task.searched("searching for blocks that may share", [tuple(even)])))


def exhaust(task: ShareTask) -> Sharing:
    """The best blocks to keep their weights, each other one reading the nearest's; then as `search`."""
    return task.settled(task.nearest(task.best("trying what may be shared")))


def draw(task: ShareTask) -> Sharing:
    """Blocks at random keep their weights: what other methods are measured against."""
    return task.nearest(task.drawn())


def functional(task: ShareTask) -> Sharing:
    """Each block with the donor whose weights it misses its own least with: every single replacement within four blocks
    is judged by itself, and the donors chosen by which the sum is least."""
    batches = range(task.batches(_TOKENS))
    found = list(range(len(task.blocks)))
    pairs = [(i, j) for p in task.peers for i in p.blocks for j in p.blocks if 0 < abs(i - j) <= REACH]
    told = task.progress("judging replacements")
    loss: dict[tuple[int, int], float] = {}
    for k, (i, j) in enumerate(pairs):
        sharing = tuple(j if block == i else block for block in range(len(found)))
        loss[i, j] = task.scorer(task.candidate(sharing), batches)
        told(k + 1, len(pairs))
    for peers in task.peers:
        for block, donor in zip(peers.blocks, _assigned(peers, loss), strict=True):
            found[block] = donor
    return tuple(found)


def _assigned(peers: Peers, loss: dict[tuple[int, int], float]) -> list[int]:
    """The donor of each block, so that the losses sum up to the least."""

    def cost(block: int, donor: int) -> float:
        return 0.0 if block == donor else loss.get((block, donor), math.inf)

    def total(donors: Sequence[int]) -> float:
        return sum(min(cost(block, donor) for donor in donors) for block in peers.blocks)

    if math.comb(len(peers.blocks), peers.donors) <= _MOST:
        chosen = min(itertools.combinations(peers.blocks, peers.donors), key=total)
    else:  # leave out, one by one, the donor that is missed least
        chosen = peers.blocks
        while len(chosen) > peers.donors:
            chosen = min((tuple(d for d in chosen if d != gone) for gone in chosen), key=total)
    if math.isinf(total(chosen)):
        raise UsageError(
            f"{peers.donors} of {len(peers.blocks)} blocks do not reach all others within {REACH}", hint="keep more"
        )
    return [min(chosen, key=lambda donor: (cost(block, donor), donor)) for block in peers.blocks]


def crash(task: ShareTask) -> Sharing:
    """Neighbours whose outputs are alike form clusters (linear CKA of pooled hidden states); the middle one of each
    keeps its weights, and the others read the nearest's.

    Zhang et al. 2023, "CRaSh: Clustering, Removing, and Sharing Enhance Fine-tuning without Full Large Language Model",
    arXiv:2310.15477.
    """
    pooled = _pooled(task)
    state = [0] * len(task.blocks)
    for peers in task.peers:
        clusters = [[block] for block in peers.blocks]
        while len(clusters) > peers.donors:
            likeness = [_cka(pooled[a[-1]], pooled[b[0]]) for a, b in itertools.pairwise(clusters)]
            k = max(range(len(likeness)), key=likeness.__getitem__)
            clusters[k : k + 2] = [clusters[k] + clusters[k + 1]]
        for cluster in clusters:
            for block in cluster:
                state[block] = int(block != cluster[len(cluster) // 2])
    return task.nearest(tuple(state))


def _pooled(task: ShareTask) -> dict[int, torch.Tensor]:
    """What comes out of each block, averaged over the positions of each sample that count: (samples, channels)."""
    places = {}
    for peers in task.peers:
        for k in peers.blocks:
            unit = task.blocks[k].units[-1]
            places[k] = task.depth.branches(unit.stream, unit.place)[ENTRY].out
    found: dict[int, list[torch.Tensor]] = {k: [] for k in places}
    shapes = {k: shape_of(node.meta["val"]) for k, node in places.items()}
    data, program = task.data.data, task.program
    masks: list[Masks] = []

    def see(k: int, value: torch.Tensor) -> None:
        rows = masks[-1].rows(shapes[k], 1)
        samples = rows.samples(value)
        found[k].extend(_over_positions(sample.double()) for sample in samples)

    def tap(k: int) -> Tap:
        return Tap((places[k].name,), lambda value: see(k, value))

    run = Interpreter(program, [tap(k) for k in places], results=False)
    for n in range(len(data)):
        batch = data.batch(n)
        masks.append(Masks(program, batch))
        with running(data.place(n)):
            run(flat_inputs(program, batch, data.place(n)))
        if min(map(len, found.values())) >= _SAMPLES:
            break
    return {k: torch.stack(rows[:_SAMPLES]) for k, rows in found.items()}


def _over_positions(sample: torch.Tensor) -> torch.Tensor:
    """The mean of (positions, channels), or of (channels, height, width); (channels,) are their own."""
    if sample.dim() < 3:
        return sample.reshape(-1, sample.shape[-1]).mean(0)
    return sample.flatten(1).mean(1)


def _cka(a: torch.Tensor, b: torch.Tensor) -> float:
    """Linear centred kernel alignment of two sets of rows: 1 for what differs by a rotation and a scale."""
    a, b = a - a.mean(0), b - b.mean(0)
    own = (a.T @ a).norm() * (b.T @ b).norm()
    return float((a.T @ b).square().sum() / own) if float(own) else 1.0
