"""share-layers: blocks read another block's matrices; norms, biases and caches stay their own.

    %a = linear(%x, @layers.1.up)             block 2 shares with block 1:  @layers.1.up is read twice,
    %b = linear(%y, @layers.2.up)             and @layers.2.up goes; with rank > 0 a low-rank correction is added to %b

`keep` is the share of blocks that keep their weights. `method` decides which blocks read whose:

- `search` (the default): evolution by the divergence of the model's predictions, each block reading the nearest donor,
  or one within four blocks by which less is lost;
- `fixed`: consecutive groups of one size; `crash`: clusters of alike outputs; `functional`: each replacement by itself;
- `exhaustive`, `random`: what these are measured against.

`protect` blocks at either end take no part. `donor` says what a group reads: the block that the method names (`own`),
its `first` or `middle` block's weights, or all of them `merged` by the operator `merge`. `align` puts hidden units and
heads of each block in the donor's order first. `rank` gives each block that shares what it then misses, whitened by its
inputs, as two narrow matrices; a matrix that is no larger than these stays. `donors`, less than `keep`, says how many
blocks keep their weights then: what that spares goes to corrections, of the rank that it pays for.

Fires where blocks recur and differ in weights alone. Refused: blocks with other masks, groups that do not divide.
With `keep=1` the program is returned as it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch

from laconic.ir.axes import Axes, analyse, rewrite
from laconic.ir.calibration import Calibration
from laconic.ir.depth import Depth
from laconic.ir.errors import UsageError
from laconic.ir.program import Program
from laconic.ir.rewrite import find
from laconic.passes.aligning import match
from laconic.passes.allocate import going
from laconic.passes.axes import class_action, named
from laconic.passes.base import Contract, Needs, Pass, Plan
from laconic.passes.deciding import place_of, placed
from laconic.passes.low_rank import add_correction
from laconic.passes.merging import OPERATORS
from laconic.passes.methods import load_method
from laconic.passes.options import check_least, check_share
from laconic.passes.products import products_of
from laconic.passes.share_layers.donors import Inputs, corrections, elected, merged_rows
from laconic.passes.share_layers.task import ShareTask, Sharing, peers_of

_ALIGN, _MERGE, _SHARE, _CORRECT = "align", "merge", "share", "correct"


@dataclass(frozen=True)
class ShareLayers(Pass):
    """`protect`: so many at either end of a run take no part. `donors`: 0 for as many as `keep`, else one at least.
    `generations`: of the search, 0 for k (n - k) / 1.5 where k of n blocks share. Raises ValueError for shares and
    ranks that are none, and UsageError for an unknown method or operator."""

    keep: float = 0.5
    method: str = "search"
    protect: int = 0
    donor: Literal["own", "first", "middle", "merged"] = "own"
    merge: str = "average"
    align: bool = False
    rank: int = 0
    donors: float = 0.0
    generations: int = 0

    name: ClassVar[str] = "share-layers"
    summary: ClassVar[str] = "let blocks read another block's matrices, their norms staying their own"
    contract: ClassVar[Contract] = Contract.LOSSY
    source: ClassVar[str] = "FoldGPT 2024, arXiv:2310.15477, arXiv:2410.21271"

    def __post_init__(self) -> None:
        check_share("keep", self.keep)
        check_least(0, protect=self.protect, rank=self.rank, generations=self.generations)
        if self.donors:
            check_share("donors", self.donors)
            if self.rank:
                raise ValueError("options 'rank' and 'donors' both say how much is corrected")
            if self.donors >= self.keep:
                raise ValueError(f"option 'donors' must be less than keep={self.keep:g}, is {self.donors:g}")
        load_method(self.name, self.method)
        OPERATORS.load(self.merge)
        if self.merge != "average" and self.donor != "merged":
            raise ValueError(f"option 'merge={self.merge}' says nothing without donor=merged")

    @property
    def reads_values(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        if self.keep == 1:
            return Needs.NOTHING
        merged = self.merge if self.donor == "merged" else ""
        if merged == "fisher":
            return Needs.GRADIENTS
        plain = self.method == "fixed" and merged != "regmean" and not (self.rank or self.donors)
        return Needs.NOTHING if plain else Needs.ACTIVATIONS

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        if self.keep == 1:
            return Plan(self.spec, reason="all blocks keep their weights")
        task = _task(self, program, calibration)
        if not any(going(self.keep, peers.of) for peers in task.peers):
            return Plan(self.spec, reason=f"{1 - self.keep:.0%} of the blocks is less than half a block")
        sharing: Sharing = elected(load_method(self.name, self.method)(task), self.donor)
        if not any(task.shared(k, donor) for k, donor in enumerate(sharing) if k != donor):
            return Plan(self.spec, reason=_nothing(task, sharing))
        actions, tensors = list[dict[str, Any]](), dict[str, torch.Tensor]()
        if self.align:
            actions += _alignments(task, sharing)
            task = _task(self, _aligned(program.clone(), actions), calibration)
        inputs = Inputs(task)
        if task.rank or (self.donor == "merged" and self.merge == "regmean"):
            inputs.gather(_touched(task, sharing))
        merged = merged_rows(task, sharing, self.merge, inputs) if self.donor == "merged" else {}
        actions += _shares(task, sharing, merged)
        tensors |= {f"merged.{row}": value for row, value in merged.items()}
        for row, made in corrections(task, sharing, merged, inputs).items() if task.rank else ():
            tensors |= {f"outer.{row}": made.outer, f"inner.{row}": made.inner}
            actions.append(_at(task, row) | {"rule": _CORRECT, "row": row, "left": made.left})
        return Plan(self.spec, tuple(actions), tensors)

    def rewrite(self, program: Program, plan: Plan) -> None:
        _aligned(program, plan.actions)
        before = program.clone()
        depth = Depth(before)
        blocks = {(block.run, block.number): block for block in depth.blocks}
        for action in plan.actions:
            if action["rule"] == _MERGE:
                row = action["row"]
                program.weights[row] = replace(program.weights[row], value=plan.tensors[f"merged.{row}"])
            elif action["rule"] == _SHARE:
                places = [(action["run"], action[key]) for key in ("block", "donor")]
                if any(place not in blocks for place in places):
                    raise UsageError(f"there is no {action['layer']}", why="the plan was made for another program")
                block, donor = (blocks[place] for place in places)
                keep = set(depth.pairs(block, donor)) - set(action["rows"])
                depth.repoint(block, donor, keep, into=program)
        for action in plan.actions:
            if action["rule"] == _CORRECT:
                row = action["row"]
                pair = plan.tensors[f"outer.{row}"], plan.tensors[f"inner.{row}"]
                for use in products_of(before, row)[0]:
                    entry = program.entries[use.entry.name]
                    name = row.replace(".", "_")
                    add_correction(program, entry, find(entry, use.node.name), name, pair, by=self.name)

    def said(self, plan: Plan) -> str:
        groups: dict[tuple[int, int], list[int]] = {}
        for action in plan.actions:
            if action["rule"] == _SHARE:
                groups.setdefault((action["run"], action["donor"]), []).append(action["block"])
        pairs = [f"{', '.join(map(str, blocks))} read {donor}" for (_, donor), blocks in groups.items()]
        rules = [action["rule"] for action in plan.actions]
        more = {"merged": rules.count(_MERGE), "corrected": rules.count(_CORRECT), "put in order": rules.count(_ALIGN)}
        return "; ".join([f"blocks {'; '.join(pairs)}", *(f"{n} {what}" for what, n in more.items() if n)])


def _task(item: ShareLayers, program: Program, calibration: Calibration | None) -> ShareTask:
    depth = Depth(program)
    peers = peers_of(depth, item.donors or item.keep, item.protect, least=1 if item.donors else 0)
    task = ShareTask(program, depth, calibration, item.generations, peers, item.rank)
    if item.donors and any(going(item.keep, p.of) for p in peers):
        return replace(task, rank=task.affordable(item.keep, item.donor == "merged"))
    return task


def _nothing(task: ShareTask, sharing: Sharing) -> str:
    """Why no matrix is shared."""
    plain = replace(task, rank=0)
    if any(plain.shared(k, donor) for k, donor in enumerate(sharing) if k != donor):
        return f"no matrix of these blocks is larger than its correction of rank {task.rank}"
    return "these blocks have no floating-point matrices of their own"


def _touched(task: ShareTask, sharing: Sharing) -> list[str]:
    """The rows that a sharing changes: those given up, and those that stand for them."""
    pairs = [task.shared(k, donor) for k, donor in enumerate(sharing) if k != donor]
    return list(dict.fromkeys(row for pair in pairs for both in pair.items() for row in both))


def _shares(task: ShareTask, sharing: Sharing, merged: Mapping[str, torch.Tensor]) -> Iterator[dict[str, Any]]:
    for row in merged:
        yield _at(task, row) | {"rule": _MERGE, "row": row}
    for k, donor in enumerate(sharing):
        if k != donor:
            block = task.blocks[k]
            yield placed(task.depth, block) | {
                "rule": _SHARE,
                "run": block.run,
                "block": block.number,
                "donor": task.blocks[donor].number,
                "rows": sorted(task.shared(k, donor)),
            }


def _at(task: ShareTask, row: str) -> dict[str, Any]:
    """Where a row of a block belongs."""
    return placed(task.depth, next(block for block in task.blocks if row in block.rows))


def _alignments(task: ShareTask, sharing: Sharing) -> Iterator[dict[str, Any]]:
    """The orders of units of each block that shares, nearest to the donor's."""
    axes: Axes = analyse(task.program)
    for k, donor in enumerate(sharing):
        if k != donor:
            pairs = task.depth.pairs(task.blocks[k], task.blocks[donor])
            own = {row: other for row, other in pairs.items() if row in task.blocks[k].rows and row in axes.rows}
            node = place_of(task.depth, task.blocks[k])
            for factor, order in match(axes, task.blocks[k].rows, own).orders.items():
                yield class_action(axes, factor, order, _ALIGN, node) | placed(task.depth, task.blocks[k])


def _aligned(program: Program, actions: Sequence[Mapping[str, Any]]) -> Program:
    """Put units in the order that a plan says, in the program itself."""
    orders = [action for action in actions if action["rule"] == _ALIGN]
    if orders:
        axes = analyse(program.clone())
        kept = {named(axes, action): action["positions"] for action in orders}
        rewrite(axes, kept, by=ShareLayers.name, into=program)
    return program
