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
from laconic.ir.statistics.moments import HeadMoments, Moments
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
    #: Sites that something is not asked of, and why.
    unseen: list[tuple[fx.Node, str]] = field(default_factory=list)

    def statistics(self) -> Iterator[Statistic]:
        """All of them."""
        for name, part in vars(self).items():
            for _, statistic in part if name != "unseen" else ():
                yield statistic


def evidence_of(program: Program, structure: EntryStructure) -> Evidence:
    """What to ask about an entry."""
    found = Evidence()
    for run in structure.runs:
        edges = boundaries(structure, run)
        found.runs.append((run, Similarity(tuple(node.name for node in edges), _channels(edges))))
        found.tokens.extend((node, TokenLikeness(node.name)) for node in edges if node.meta["val"].ndim == 3)
    for stream in structure.streams:
        for branch in stream.branches:
            both = [branch.v, branch.add]
            found.branches.append((branch, Similarity(tuple(node.name for node in both), _channels(both))))
    for mlp in structure.mlps:
        found.hidden.append((mlp, Moments(mlp.down.x.name)))
    for moe in structure.moes:
        if (chosen := chosen_experts(moe)) is not None:
            sigmoid = moe.score == "sigmoid"
            found.experts.append((moe, Routing(moe.router.node.name, chosen.name, moe.experts, sigmoid)))
        else:
            found.unseen.append((moe.node, "experts: which are chosen is not computed as indices"))
    for attention in structure.attentions:
        for k, part in ((1, found.keys), (2, found.values)):
            if (held := _held(attention, k)) is not None:
                part.append((attention, held))
            else:
                name = "keys" if k == 1 else "values"
                found.unseen.append(
                    (attention.node, f"cache: no one op is given the {name}, and no one matrix makes them")
                )
        if (attended := _attended(attention)) is not None:
            found.attended.append((attention, attended))
        else:
            found.unseen.append((attention.node, "heads: the softmax has no axis of samples beside that of heads"))
    return found


def expert_matrices(program: Program, moe: Moe) -> list[list[torch.Tensor]]:
    """The matrices of each expert, without the router's; nothing if they cannot be told apart."""
    inside = set(moe.nodes)
    read = (n for node in moe.nodes if node is not moe.router.node for n in node.all_input_nodes if n not in inside)
    named = dict.fromkeys(name for node in read if (name := _weight(node)) in program.weights)
    values = [program.weights[name].value for name in named if name is not None]
    stacked = [value for value in values if value.ndim == 3 and len(value) == moe.experts]
    if stacked:
        return [[value[k] for value in stacked] for k in range(moe.experts)]
    flat = [value for value in values if value.ndim == 2]
    each = len(flat) // moe.experts
    found = [flat[k * each : (k + 1) * each] for k in range(moe.experts)]
    alike = {tuple(value.shape for value in matrices) for matrices in found}
    return found if each and len(flat) == each * moe.experts and len(alike) == 1 else []


def _weight(node: fx.Node) -> str | None:
    """The weight that a node is, or is a view or copy of."""
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        (node,) = node.all_input_nodes
    return node.meta.get("name") if node.op == "placeholder" else None


def _channels(nodes: list[fx.Node]) -> int:
    """The axis of channels of a stream: the second one if convolutions read it, else the last."""
    reads = (user.target for node in nodes for user in node.users)
    return 1 if nodes[0].meta["val"].ndim == 4 and any("conv" in str(target) for target in reads) else -1


def _held(attention: Attention, operand: int) -> Moments | None:
    """The keys (1) or values (2) as a cache holds them: what a fused attention is given, else what is projected, before
    norms and rotation."""
    node = attention.node
    if attention.fused and node.target is _FUSED and node.meta["val"].ndim == 4:
        given = node.args[operand]
        assert isinstance(given, fx.Node)
        return HeadMoments(given.name)
    projection = attention.k if operand == 1 else attention.v
    return None if projection is None else Moments(projection.node.name, projection.columns)


def _attended(attention: Attention) -> Attended | None:
    """How to see the rows of a softmax: as they are, or from what a fused attention reads; None where there is no
    axis of samples beside that of heads."""
    node = attention.node
    if not attention.fused:
        return Attended(weights=node.name, sink=attention.sink) if node.meta["val"].ndim == 4 else None
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
