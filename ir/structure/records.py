"""What structure finds, as frozen records. A record names graph nodes, so it belongs to the Program it was found in."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum

from torch import fx

from laconic.ir.listing import Repeat, SlotKind


@dataclass(frozen=True)
class NearMiss:
    """What almost was a site: what it would have been, at which call, and the condition that failed. `where` is the
    user's module and source line."""

    wanted: str
    node: fx.Node
    reason: str
    where: str = ""


@dataclass(frozen=True)
class Norm:
    """A normalisation of `x` over its last axis (layer, rms), its channels (batch, group) or less.

    `weight` and `bias` are placeholders or None; `offset` is added to the weight (1.0 in Gemma). `fused`: one op says
    it. `nodes` are all its calls.
    """

    site: int
    kind: str  # layer | rms | batch | group
    x: fx.Node
    out: fx.Node
    eps: float | None
    weight: fx.Node | None
    bias: fx.Node | None
    fused: bool
    nodes: tuple[fx.Node, ...] = field(repr=False)
    offset: float = 0.0


@dataclass(frozen=True)
class Projection:
    """A product of `x` with a constant matrix that a site owns; `columns` are those of its outputs that the site reads,
    where one matrix serves several."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node | None
    bias: fx.Node | None
    inputs: int
    outputs: int
    columns: tuple[int, int] | None = None


@dataclass(frozen=True)
class Attention:
    """softmax(cap(q k^T * scale) + mask) v, fused or written out.

    q is (..., heads, queries, head_dim), k and v have `kv_heads`. `cross`: keys are not projected from what queries
    are projected from; None if that cannot be told. `window`: how many positions back a query sees. `scale` counts
    factors on the way from the projections too. `softcap` c: scores are capped as c tanh(scores / c); None if they are
    not. `sink`: a constant score beside those of the keys takes part in the softmax. `cached`: keys come from a state
    or an input too.
    """

    site: int
    node: fx.Node
    heads: int
    kv_heads: int
    head_dim: int
    value_dim: int
    scale: float
    causal: bool
    window: int | None
    masked: bool
    softcap: float | None
    sink: bool
    cross: bool | None
    fused: bool
    rotary: bool
    qk_norm: bool
    cached: bool
    q: Projection | None
    k: Projection | None
    v: Projection | None
    o: Projection | None
    mask: fx.Node | None
    nodes: tuple[fx.Node, ...] = field(repr=False)


@dataclass(frozen=True)
class Mlp:
    """down(act(gate x) * up x) or down(act(up x)). `activation` is found by its values. `packed`: gate and up are one
    matrix, gate first unless `interleaved`."""

    site: int
    node: fx.Node
    x: fx.Node
    width: int
    hidden: int
    activation: str
    gated: bool
    packed: bool
    up: Projection
    gate: Projection | None
    down: Projection
    nodes: tuple[fx.Node, ...] = field(repr=False)


@dataclass(frozen=True)
class Moe:
    """Experts of which a router chooses `top_k` for each token.

    `score` is softmax, sigmoid, or softmax after top-k. `renormalised`: the chosen weights are made to sum to one.
    `impl` is grouped (rows sorted by expert), batched (a matrix gathered for each row), dense (all experts on all
    tokens at once) or loop. `layout` says how an expert's gate and up matrices lie: concatenated, interleaved, apart,
    or none where it is not gated. `transposed`: matrices are (experts, inputs, outputs).
    """

    site: int
    node: fx.Node
    x: fx.Node
    experts: int
    top_k: int
    width: int
    hidden: int
    activation: str
    gated: bool
    score: str
    renormalised: bool
    shared: tuple[int, ...]
    impl: str
    layout: str
    transposed: bool
    router: Projection
    up: fx.Node | None
    down: fx.Node | None
    nodes: tuple[fx.Node, ...] = field(repr=False)


class BranchKind(StrEnum):
    """What a residual branch holds. MIXER: none of the sites, as state spaces and convolutions."""

    ATTENTION = "attention"
    MLP = "mlp"
    MOE = "moe"
    PARALLEL = "attention+mlp"
    MIXER = "mixer"


@dataclass(frozen=True)
class Branch:
    """One step of a residual stream: out = v + f(v, context), behind it the norm or activation of a post-norm model.

    `nodes` are f, the addition and what follows it, in an order that depends on their wiring alone. `exits` are nodes
    of f that are used elsewhere too (caches, logits of a router).
    """

    v: fx.Node
    add: fx.Node
    out: fx.Node
    nodes: tuple[fx.Node, ...] = field(repr=False)
    exits: tuple[fx.Node, ...] = ()
    kind: BranchKind = BranchKind.MIXER
    reason: str = ""


@dataclass(frozen=True)
class BlockRun:
    """`count` isomorphic blocks one behind the other, each of `period` branches, from branch `first` of a stream on.

    `nodes` are those of all blocks, block by block; `repeat` says what the slots of the block are bound to, by
    positions in `nodes` or by outer nodes.
    """

    stream: int
    first: int
    period: int
    count: int
    nodes: tuple[fx.Node, ...] = field(repr=False)
    repeat: Repeat = field(repr=False)

    def block(self, k: int) -> tuple[fx.Node, ...]:
        """The nodes of block k."""
        return self.nodes[k * self.repeat.period : (k + 1) * self.repeat.period]

    def bound(self, slot: int, k: int) -> fx.Node:
        """What a slot is bound to in block k."""
        value = self.repeat.slots[slot][k]
        node = self.nodes[value] if isinstance(value, int) else value
        assert isinstance(node, fx.Node)
        return node

    @property
    def turns(self) -> int:
        """After how many blocks what they read from outside recurs: 2 where local and global masks take turns. What
        is a block's own (weights, say) does not count; 1 if nothing takes turns."""
        for turns in range(2, self.count // 2 + 1):
            for slot in self.slots(SlotKind.PRIVATE):
                bound = [self.bound(slot, k) for k in range(self.count)]
                if len(set(bound)) == turns and all(bound[k] is bound[k % turns] for k in range(self.count)):
                    return turns
        return 1

    def slots(self, kind: SlotKind) -> list[int]:
        return [slot for slot, found in enumerate(self.repeat.kinds) if found is kind]


@dataclass(frozen=True)
class Stream:
    """A residual stream: the value it starts with, and its branches in order."""

    start: fx.Node
    branches: tuple[Branch, ...]


@dataclass(frozen=True)
class EntryStructure:
    """All that was found in one entry."""

    entry: str
    streams: tuple[Stream, ...]
    runs: tuple[BlockRun, ...]
    norms: tuple[Norm, ...]
    attentions: tuple[Attention, ...]
    mlps: tuple[Mlp, ...]
    moes: tuple[Moe, ...]
    near_misses: tuple[NearMiss, ...]

    def branch_of(self, node: fx.Node) -> Branch | None:
        """The branch that holds a node, if any."""
        return next((b for s in self.streams for b in s.branches if node in b.nodes), None)
