"""What a model is made of, from ops and shapes alone: residual streams, branches, blocks that recur, and sites
(attention, MLP, MoE, norm). Names of classes, modules and parameters are never read."""

from __future__ import annotations

from dataclasses import replace

from laconic.ir.program import Entry, Program
from laconic.ir.structure.attention import find_attentions
from laconic.ir.structure.blocks import find_runs, make_branches
from laconic.ir.structure.mlp import find_mlps
from laconic.ir.structure.moe import find_moes
from laconic.ir.structure.norms import find_norms
from laconic.ir.structure.reading import Reading
from laconic.ir.structure.records import (
    Attention,
    BlockRun,
    Branch,
    BranchKind,
    EntryStructure,
    Mlp,
    Moe,
    NearMiss,
    Norm,
    Projection,
    Stream,
)
from laconic.ir.structure.streams import find_streams

__all__ = [
    "Attention",
    "BlockRun",
    "Branch",
    "BranchKind",
    "EntryStructure",
    "Mlp",
    "Moe",
    "NearMiss",
    "Norm",
    "Projection",
    "Stream",
    "entry_structure",
    "find_structure",
]


def find_structure(program: Program) -> dict[str, EntryStructure]:
    """The structure of each entry. Its records name the program's nodes and hold until the program is changed."""
    return {name: entry_structure(program, entry) for name, entry in program.entries.items()}


def entry_structure(program: Program, entry: Entry) -> EntryStructure:
    """The structure of one entry."""
    reading, near = Reading(program, entry), list[NearMiss]()
    steps = find_streams(reading, near)
    branches = make_branches(reading, steps)
    carried = frozenset(v for chain in branches for b in chain for v in (b.v, b.add, b.out))
    norms = find_norms(reading, near)
    attentions = find_attentions(reading, norms, carried, near)
    mlps = find_mlps(reading, carried | {norm.out for norm in norms}, near)
    moes = find_moes(reading, mlps, near)
    experts = {node for moe in moes for node in moe.nodes}
    alone = [mlp for mlp in mlps if mlp.node not in experts]
    kinds = _Kinds(attentions, alone, moes)
    named = [[kinds.name(reading, branch) for branch in chain] for chain in branches]
    return EntryStructure(
        entry=entry.name,
        streams=tuple(Stream(chain[0].v, tuple(chain)) for chain in named),
        runs=tuple(find_runs(reading, named)),
        norms=tuple(norms),
        attentions=tuple(attentions),
        mlps=tuple(alone),
        moes=tuple(moes),
        near_misses=tuple(near),
    )


class _Kinds:
    """What branches hold, by the calls at which sites are anchored."""

    def __init__(self, attentions: list[Attention], mlps: list[Mlp], moes: list[Moe]) -> None:
        self.attention = {site.node for site in attentions}
        self.mlp = {site.node for site in mlps}
        self.moe = {site.node for site in moes}

    def name(self, reading: Reading, branch: Branch) -> Branch:
        """The branch with its kind; of a mixer, with the reason why it is no other."""
        nodes = set(branch.nodes)
        attends = not self.attention.isdisjoint(nodes)
        moe, mlp = not self.moe.isdisjoint(nodes), not self.mlp.isdisjoint(nodes)
        if attends:
            return replace(branch, kind=BranchKind.PARALLEL if moe or mlp else BranchKind.ATTENTION)
        if moe or mlp:
            return replace(branch, kind=BranchKind.MOE if moe else BranchKind.MLP)
        products = sum(reading.multiplies_constant(n) for n in nodes)
        linears = sum(n in reading.linears for n in nodes)
        reason = "no attention, MLP or MoE among its "
        reason += f"{linears} products with constant matrices and {products - linears} convolutions"
        return replace(branch, kind=BranchKind.MIXER, reason=reason)
