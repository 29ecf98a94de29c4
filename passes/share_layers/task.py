"""What is to be decided when blocks share weights: which could read each other's, and how a sharing is judged."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch

from laconic.ir.depth import Block, Depth
from laconic.ir.errors import UsageError
from laconic.ir.gated import Candidate, Gate, Instead, Setting, replaced_by
from laconic.ir.score import Scorer
from laconic.ir.types import nbytes
from laconic.passes.allocate import Class, Space, State, going
from laconic.passes.deciding import ENTRY, Task, is_matrix, refuse_quantised

#: How far away a block may look for a donor.
REACH = 4

#: For each block the one whose weights it reads: itself, or its donor.
Sharing = tuple[int, ...]


@dataclass(frozen=True)
class Peers:
    """Blocks of one run, in order, that read nothing of their own but weights and states; so many of them keep their
    weights. `protected` others like them take no part."""

    run: int
    blocks: tuple[int, ...]
    donors: int
    protected: int = 0

    @property
    def of(self) -> int:
        """How many blocks a share is one of."""
        return len(self.blocks) + self.protected


@dataclass(frozen=True)
class ShareTask(Task):
    """Blocks, and how many of which keep weights of their own. `rank`: that of the corrections that others get; a
    matrix which takes no more room than its correction would is not shared."""

    peers: tuple[Peers, ...]
    rank: int = 0

    @property
    def blocks(self) -> Sequence[Block]:
        return self.depth.blocks

    @property
    def space(self) -> Space:
        classes = tuple(Class(p.blocks, len(p.blocks) - p.donors) for p in self.peers)
        return Space(len(self.blocks), classes)

    def shared(self, block: int, donor: int) -> dict[str, str]:
        """The rows that a block gives up for another's: its matrices. Vectors stay its own."""
        pairs = self.depth.pairs(self.blocks[block], self.blocks[donor])
        own = self.blocks[block].rows
        matrices = {row: other for row, other in pairs.items() if row in own and is_matrix(self.program, row)}
        return {row: other for row, other in matrices.items() if self.corrected(row, self.rank) < self.size(row)}

    def size(self, row: str) -> int:
        """The bytes of a matrix."""
        return nbytes(self.program.weights[row].value)

    def corrected(self, row: str, rank: int) -> int:
        """The bytes of a matrix's correction."""
        value = self.program.weights[row].value
        outputs, *inputs = value.shape
        return rank * (outputs + math.prod(inputs)) * value.element_size()

    def affordable(self, keep: float, merged: bool) -> int:
        """The greatest rank at which the matrices of these blocks, corrections among them, take no more than if `keep`
        of the blocks kept theirs; donors that are `merged` are corrected too. 0 for blocks without matrices of their
        own. Raises UsageError if there is none, and for blocks that do not all hold as much."""
        spared, each, rank = 0, Counter[tuple[int, int]](), 0
        for peers in self.peers:
            first, *others = (self._held(block) for block in peers.blocks)
            if any(other != first for other in others):
                raise UsageError(
                    f"the blocks of run {peers.run} do not hold as many matrices of their own",
                    why="some share theirs already",
                    hint="rank instead of donors, or share in one step",
                )
            sharing = len(peers.blocks) - peers.donors
            spared += (sharing - going(keep, peers.of)) * sum(size * n for (size, _), n in first.items())
            for _ in range(len(peers.blocks) if merged else sharing):
                each += first
        most = max((size // one for size, one in each), default=0)
        while rank < most and sum(n * min(size, (rank + 1) * one) for (size, one), n in each.items()) <= spared:
            rank += 1
        if most and not rank:
            raise UsageError("what is spared does not pay for corrections of rank 1", hint="fewer donors, or keep more")
        return rank

    def _held(self, block: int) -> Counter[tuple[int, int]]:
        """How many matrices of its own a block holds, by their bytes and those of a correction of rank 1."""
        own = (row for row in self.blocks[block].rows if is_matrix(self.program, row))
        return Counter((self.size(row), self.corrected(row, 1)) for row in own)

    def nearest(self, state: State) -> Sharing:
        """Each block with the nearest of its peers that keeps its weights; of two the one behind."""
        found = list(range(len(state)))
        for peers in self.peers:
            donors = [k for k in peers.blocks if not state[k]]
            for k in peers.blocks:
                found[k] = min(donors, key=lambda d: (abs(d - k), -d))
        return tuple(found)

    @cached_property
    def scorer(self) -> Scorer:
        nodes = self.program.entries[ENTRY].weight_nodes()
        rows = {
            row for p in self.peers for k in p.blocks for row in self.blocks[k].rows if is_matrix(self.program, row)
        }
        return self.data.scorer(self.program, [Gate(row, nodes[row].name) for row in sorted(rows) if row in nodes])

    def candidate(self, sharing: Sharing, merged: Mapping[str, torch.Tensor] | None = None) -> Candidate:
        """What the gates do under a sharing, where donors hold what was `merged`."""
        nodes = self.program.entries[ENTRY].weight_nodes()
        found: dict[str, Setting] = {row: replaced_by(value.detach()) for row, value in (merged or {}).items()}
        for block, donor in enumerate(sharing):
            for row, other in self.shared(block, donor).items() if block != donor else ():
                if row in nodes:
                    found[row] = Instead(nodes[other].name)
        return found

    def settled(self, sharing: Sharing) -> Sharing:
        """Each block that shares, one after the other, with the donor within reach by which the model loses least."""
        found, judged = list(sharing), self.judged
        least = self.scorer(self.candidate(sharing), judged)
        for peers in self.peers:
            donors = [k for k in peers.blocks if sharing[k] == k]
            for k in (k for k in peers.blocks if sharing[k] != k):
                for donor in (d for d in donors if 0 < abs(d - k) <= REACH and d != sharing[k]):
                    tried = tuple(donor if block == k else own for block, own in enumerate(found))
                    value = self.scorer(self.candidate(tried), judged)
                    if value < least:
                        least, found = value, list(tried)
        return tuple(found)

    def fitness(self, state: State, batches: Sequence[int]) -> float:
        return self.scorer(self.candidate(self.nearest(state)), batches)


def peers_of(depth: Depth, keep: float, protect: int = 0, least: int = 0) -> tuple[Peers, ...]:
    """The blocks that may share, with how many keep their weights: `keep` of each, rounded, and so many at least. The
    first and last `protect` of a run take no part.

    Raises UsageError if there are none, or none of a run could do with another's weights, or none would stay.
    """
    if not depth.blocks:
        raise UsageError("this model has no blocks that recur", hint="see `laconic audit`")
    refuse_quantised(
        depth.program, {row for block in depth.blocks for unit in block.units for row in depth.reads(unit)}
    )
    groups: dict[int, list[list[int]]] = {}
    why = ""
    for k, block in enumerate(depth.blocks):
        known = groups.setdefault(block.run, [])
        for group in known:
            said = depth.apart(block, depth.blocks[group[0]])
            if said is None:
                group.append(k)
                break
            why = f"block {block.number} and block {depth.blocks[group[0]].number} of run {block.run}: {said}"
        else:
            known.append([k])
    found = [(run, group) for run, known in groups.items() for group in known if len(group) > 1]
    if not found:
        raise UsageError("no block could do with the weights of another one", why=why)
    peers = []
    for run, group in found:
        whole = [k for k, block in enumerate(depth.blocks) if block.run == run]
        free = set(whole[protect : len(whole) - protect])
        inner = [k for k in group if k in free]
        donors = max(len(inner) - going(keep, len(group)), min(least, len(inner)))
        if donors < 1:
            among = f"the {len(inner)} of {len(group)} blocks" if protect else f"{len(group)} blocks"
            raise UsageError(
                f"of {among} of run {run} that may share none would keep its weights",
                hint="keep more, or protect less" if protect else "keep more",
            )
        peers.append(Peers(run, tuple(inner), donors, len(group) - len(inner)))
    return tuple(peers)
