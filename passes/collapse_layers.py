"""collapse-layers: several blocks become one, which holds what they add up to; LaCo.

    rdsc       W* = W_l + sum over k of (W_(l+k) - W_l)          blocks l+1 .. l+m go, the norms of l stay
    replace    W* = W_(l+m)

From the top down, `size` blocks at a time are tried; what leaves the last block's output, on a few samples, nearer than
`threshold` to the original's by its cosine is kept, and the next try begins `interval` blocks further down. If the
blocks do not suffice at this threshold, it is lowered by a twentieth and all begins anew: the highest one at which they
do is the one that counts. (The published 0.45 is one for a given model and budget.)

Yang et al. 2024, "LaCo: Large Language Model Pruning via Layer Collapse", arXiv:2402.11187. Its published code
subtracts the layer that is being changed, by which the sum becomes the last block's weights: that is `replace`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Literal

import torch

from laconic.ir.calibration import Calibration
from laconic.ir.data import Data, flat_inputs, running
from laconic.ir.depth import Block, Depth
from laconic.ir.errors import UsageError
from laconic.ir.gated import Candidate, Gate, Gated, Instead, replaced_by
from laconic.ir.program import Program
from laconic.passes.allocate import going
from laconic.passes.base import Contract, Needs, Pass, Plan
from laconic.passes.deciding import ENTRY, is_matrix, placed, refuse_quantised
from laconic.passes.options import check_least, check_share

_SAMPLES = 5
_LOWER = 0.05


@dataclass(frozen=True)
class CollapseLayers(Pass):
    """`keep`: the share of blocks that stay. `size`: so many become one at a time; 0 for a sixth of them, two at least.
    Raises ValueError for numbers that are none."""

    keep: float = 0.75
    mode: Literal["rdsc", "replace"] = "rdsc"
    size: int = 0
    interval: int = 1
    threshold: float = 0.95

    name: ClassVar[str] = "collapse-layers"
    summary: ClassVar[str] = "let one block hold what several add up to"
    contract: ClassVar[Contract] = Contract.LOSSY
    source: ClassVar[str] = "arXiv:2402.11187"

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        if self.size < 0 or self.size == 1:
            raise ValueError(f"option 'size' is 2 or more, or 0, not {self.size}")
        check_least(1, interval=self.interval)
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"option 'threshold' is a cosine, not {self.threshold}")

    @property
    def reads_values(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return Needs.NOTHING if self.keep == 1 else Needs.ACTIVATIONS

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        if self.keep == 1:
            return Plan(self.spec, reason="all blocks are kept")
        assert calibration is not None
        depth = Depth(program)
        if not depth.blocks:
            raise UsageError("this model has no blocks that recur", hint="see `laconic audit`")
        actions, tensors = list[dict[str, Any]](), dict[str, torch.Tensor]()
        for run in dict.fromkeys(block.run for block in depth.blocks):
            blocks = [block for block in depth.blocks if block.run == run]
            budget = going(self.keep, len(blocks))
            if budget == len(blocks):
                raise UsageError(f"{budget} of {budget} blocks of run {run} cannot go", hint="keep more")
            if budget:
                _refuse_shared(program, depth, blocks)
                found = _Collapse(program, depth, blocks, calibration, self, budget).found()
                actions += found.actions
                tensors |= found.tensors
        return Plan(self.spec, tuple(actions), tensors, f"{1 - self.keep:.0%} of the blocks is less than half a block")

    def rewrite(self, program: Program, plan: Plan) -> None:
        depth = Depth(program.clone())
        blocks = {(block.run, block.number): block for block in depth.blocks}
        gone = []
        for action in plan.actions:
            if action["rule"] == "collapse into":
                for row in action["rows"]:
                    program.weights[row] = replace(program.weights[row], value=plan.tensors[row])
            elif tuple(action["place"]) in blocks:
                gone.append(blocks[tuple(action["place"])])
            else:
                raise UsageError(f"there is no {action['layer']}", why="the plan was made for another program")
        depth.skip_blocks(gone, into=program)

    def said(self, plan: Plan) -> str:
        gone = [action["layer"] for action in plan.actions if action["rule"] == "drop block"]
        return f"{', '.join(gone)} collapsed into {len(plan.actions) - len(gone)} others"


def _refuse_shared(program: Program, depth: Depth, blocks: Sequence[Block]) -> None:
    """Raise UsageError for blocks whose matrices are quantised, or not their own: what one becomes, others would."""
    for block in blocks:
        read = {row for unit in block.units for row in depth.reads(unit)}
        refuse_quantised(program, read)
        shared = sorted(row for row in read - block.rows if is_matrix(program, row))
        if shared:
            raise UsageError(
                f"block {block.number} of run {block.run} cannot be collapsed",
                why=f"it shares {shared[0]!r} with others",
                hint="drop-layers leaves blocks out",
            )


@dataclass
class _Model:
    """What a run has become: the blocks that are left, in order, what their rows hold now, and the numbers of those
    that were merged, one step behind the other."""

    left: list[Block]
    held: dict[str, torch.Tensor] = field(default_factory=dict)
    merges: tuple[tuple[int, ...], ...] = ()


@dataclass(frozen=True)
class _Found:
    actions: list[dict[str, Any]]
    tensors: dict[str, torch.Tensor]


def _some(program: Program, data: Data) -> Iterator[tuple[torch.Tensor | None, list[torch.Tensor], str]]:
    """The batches that the first few samples stand in: their masks, inputs and places."""
    count = 0
    for k in range(len(data)):
        if count < _SAMPLES:
            batch, place = data.batch(k), data.place(k)
            yield batch.mask, flat_inputs(program, batch, place), place
            count += batch.samples


class _Collapse:
    """The search in one run."""

    def __init__(
        self,
        program: Program,
        depth: Depth,
        blocks: Sequence[Block],
        calibration: Calibration,
        item: CollapseLayers,
        budget: int,
    ) -> None:
        self._program, self._depth, self._blocks, self._item, self._budget = program, depth, blocks, item, budget
        self._size = item.size or max(2, len(blocks) // 6)
        self._before = [depth.branches(b.units[0].stream, b.units[0].place)[ENTRY].v.name for b in blocks]
        outs = [depth.branches(b.units[-1].stream, b.units[-1].place)[ENTRY].out.name for b in blocks]
        nodes = program.entries[ENTRY].weight_nodes()
        self._rows = [self._matrices(block) for block in blocks]
        gates = [Gate(f"block {b.number}", out) for b, out in zip(blocks, outs, strict=True)]
        gates += [Gate(row, nodes[row].name) for rows in self._rows for row in rows]
        gates.append(Gate("end", outs[-1]))  # acts behind the last block's own
        self._seen: list[torch.Tensor] = []
        self._run = Gated(program, gates)
        self._batches = list(_some(program, calibration.data))
        self._whole = self._last({})
        self._likenesses: dict[tuple[tuple[int, ...], ...], float] = {}

    def _matrices(self, block: Block) -> list[str]:
        """The block's own rows of two axes or more."""
        return sorted(row for row in block.rows if is_matrix(self._program, row))

    def found(self) -> _Found:
        threshold = self._item.threshold
        while True:
            model = self._attempt(threshold)
            if len(self._blocks) - len(model.left) == self._budget:
                return self._plan(model)
            threshold -= _LOWER
            if threshold < -1 - _LOWER:
                raise UsageError(f"{self._budget} blocks cannot be collapsed", hint="a smaller size, or keep more")

    def _attempt(self, threshold: float) -> _Model:
        model = _Model(list(self._blocks))
        at = len(model.left) - min(self._size, len(model.left))
        while at >= 0:
            left = self._budget - (len(self._blocks) - len(model.left))
            count = min(self._size - 1, left, len(model.left) - 1 - at)
            tried = self._merged(model, at, count) if count > 0 else model
            if count > 0 and self._known(tried) > threshold:
                model = tried
                at -= self._item.interval
                if at >= len(model.left) - 1:
                    at = len(model.left) - 1 - self._size
            else:
                at -= 1
        return model

    def _merged(self, model: _Model, at: int, count: int) -> _Model:
        """The model in which block `at` of those left holds the next `count` too."""
        block, others = model.left[at], model.left[at + 1 : at + 1 + count]
        held = dict(model.held)

        def value(row: str) -> torch.Tensor:
            return model.held.get(row, self._program.weights[row].value.detach()).double()

        pairs = [self._depth.pairs(block, other) for other in others]
        for row in self._matrices(block):
            own = value(row)
            if self._item.mode == "replace":
                total = value(pairs[-1].get(row, row))
            else:
                total = own + sum(value(pair.get(row, row)) - own for pair in pairs)
            held[row] = total.to(self._program.weights[row].value.dtype)
        merges = (*model.merges, tuple(b.number for b in (block, *others)))
        return _Model(model.left[: at + 1] + model.left[at + 1 + count :], held, merges)

    def _known(self, model: _Model) -> float:
        """The likeness; each model is run once, as it is met at many thresholds."""
        if model.merges not in self._likenesses:
            self._likenesses[model.merges] = self._likeness(model)
        return self._likenesses[model.merges]

    def _likeness(self, model: _Model) -> float:
        """The cosine of what comes out of the last block, all of a sample's positions as one vector, to the original's,
        averaged over the samples."""
        pairs = zip(self._last(self._candidate(model)), self._whole, strict=True)
        each = [float(torch.nn.functional.cosine_similarity(now, whole, dim=0)) for now, whole in pairs]
        return sum(each) / len(each) if all(map(math.isfinite, each)) else -math.inf

    def _candidate(self, model: _Model) -> Candidate:
        gone = [(block, v) for block, v in zip(self._blocks, self._before, strict=True) if block not in model.left]
        found: dict[str, Any] = {f"block {block.number}": Instead(v) for block, v in gone}
        return found | {row: replaced_by(value) for row, value in model.held.items()}

    def _last(self, candidate: Candidate) -> list[torch.Tensor]:
        """What comes out of the run for each sample, (numbers,) float64, padding as zeros."""
        found: list[torch.Tensor] = []
        for mask, inputs, place in self._batches:
            self._seen.clear()
            with running(place):
                self._run({**candidate, "end": self._see}, inputs)
            value = self._seen[0].double()
            if mask is not None and value.shape[:2] == mask.shape:
                value = value.masked_fill(~mask[..., None], 0.0)
            found += list(value.flatten(1))
        return found[:_SAMPLES]

    def _see(self, value: torch.Tensor) -> torch.Tensor:
        self._seen.append(value)
        return value

    def _plan(self, model: _Model) -> _Found:
        kept = {row for block in model.left for row in block.rows}
        tensors = {row: value for row, value in model.held.items() if row in kept}
        actions = []
        for block in self._blocks:
            where = placed(self._depth, block)
            rows = sorted(block.rows.intersection(tensors))
            if block not in model.left:
                actions.append(where | {"rule": "drop block", "place": [block.run, block.number]})
            elif rows:
                actions.append(where | {"rule": "collapse into", "rows": rows})
        return _Found(actions, tensors)
