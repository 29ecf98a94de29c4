"""What there is to know about a program's structure: the statistics of each run of blocks, branch and site."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import fx

from laconic.ir.program import Program
from laconic.ir.statistics.attention import Attended
from laconic.ir.statistics.base import Statistic
from laconic.ir.statistics.likeness import Similarity, TokenLikeness
from laconic.ir.statistics.moments import Moments
from laconic.ir.statistics.routing import Routing
from laconic.ir.structure.records import Attention, BlockRun, Branch, EntryStructure, Mlp, Moe
from laconic.ir.traits import argument

_TOP_K = torch.ops.aten.topk.default
_FUSED = torch.ops.aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class Evidence:
    """Which statistic says what of which part of an entry. Parts that cannot be looked at are not in it."""

    runs: list[tuple[BlockRun, Similarity]] = field(default_factory=list)
    branches: list[tuple[Branch, Similarity]] = field(default_factory=list)
    tokens: list[tuple[fx.Node, TokenLikeness]] = field(default_factory=list)
    hidden: list[tuple[Mlp, Moments]] = field(default_factory=list)
    experts: list[tuple[Moe, Routing]] = field(default_factory=list)
    keys: list[tuple[Attention, Moments]] = field(default_factory=list)
    values: list[tuple[Attention, Moments]] = field(default_factory=list)
    attended: list[tuple[Attention, Attended]] = field(default_factory=list)

    def statistics(self) -> Iterator[Statistic]:
        """All of them."""
        for part in vars(self).values():
            for _, statistic in part:
                yield statistic


def evidence_of(program: Program, structure: EntryStructure) -> Evidence:
    """What to ask about an entry."""
    found = Evidence()
    for run in structure.runs:
        edges = boundaries(structure, run)
        found.runs.append((run, Similarity(tuple(node.name for node in edges))))
        found.tokens.extend((node, TokenLikeness(node.name)) for node in edges if node.meta["val"].ndim == 3)
    for stream in structure.streams:
        found.branches.extend((branch, Similarity((branch.v.name, branch.out.name))) for branch in stream.branches)
    for mlp in structure.mlps:
        found.hidden.append((mlp, Moments(mlp.down.x.name)))
    for moe in structure.moes:
        if (chosen := chosen_experts(moe)) is not None:
            sigmoid = moe.score == "sigmoid"
            found.experts.append((moe, Routing(moe.router.node.name, chosen.name, moe.experts, sigmoid)))
    for attention in structure.attentions:
        if attention.k is not None and attention.v is not None:
            found.keys.append((attention, Moments(attention.k.node.name)))
            found.values.append((attention, Moments(attention.v.node.name)))
        if (attended := _attended(attention)) is not None:
            found.attended.append((attention, attended))
    return found


def _attended(attention: Attention) -> Attended | None:
    """How to see the rows of a softmax: as they are, or from what a fused attention reads; None where there is no
    axis of samples beside that of heads."""
    node = attention.node
    if not attention.fused:
        return Attended(weights=node.name) if node.meta["val"].ndim == 4 else None
    if node.target is not _FUSED or node.meta["val"].ndim != 4:
        return None
    q, k = node.args[:2]
    mask, scale = argument(node, "attn_mask"), argument(node, "scale")
    assert isinstance(q, fx.Node)
    assert isinstance(k, fx.Node)
    return Attended(
        q=q.name,
        k=k.name,
        mask=mask.name if isinstance(mask, fx.Node) else "",
        scale=float(scale) if isinstance(scale, (int, float)) else int(q.meta["val"].shape[-1]) ** -0.5,
        causal=bool(argument(node, "is_causal")),
    )


def boundaries(structure: EntryStructure, run: BlockRun) -> list[fx.Node]:
    """What goes into each block of a run, and what comes out of the last."""
    branches = structure.streams[run.stream].branches[run.first : run.first + run.period * run.count]
    return [*(branch.v for branch in branches[:: run.period]), branches[-1].out]


def chosen_experts(moe: Moe) -> fx.Node | None:
    """The indices of the experts that each row is sent to, (rows, k); None if they are not computed."""
    choices = [n for n in moe.nodes if n.target is _TOP_K and n.args[1] == moe.top_k]
    choices = [n for n in choices if n.all_input_nodes[0].meta["val"].shape[-1] == moe.experts]
    if not choices:
        return None
    users = choices[-1].users
    return next((u for u in users if u.target is operator.getitem and u.args[1] == 1), None)
