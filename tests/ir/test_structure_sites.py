"""Sites in every form they are written in, and near misses with their reasons."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from laconic.ir.capture import capture_module
from laconic.ir.structure import EntryStructure, find_structure

WIDTH, HEADS, SIZE = 16, 4, 4


class Beside(nn.Module):
    """Modules beside each other, each on an input of its own: one capture for many."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__()
        self.each = nn.ModuleList(modules)

    def forward(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(module(x) for module, x in zip(self.each, inputs, strict=True))


def structure(*modules: nn.Module) -> EntryStructure:
    torch.manual_seed(0)
    inputs = tuple(tokens() for _ in modules)
    return find_structure(capture_module(Beside(*modules).eval(), inputs, {}, check=False))["forward"]


def tokens(length: int = 6) -> torch.Tensor:
    return torch.randn(2, length, WIDTH)


def reasons(found: EntryStructure, wanted: str) -> list[str]:
    return [miss.reason for miss in found.near_misses if miss.wanted == wanted]


# Attention


class Written(nn.Module):
    """Attention without the fused op. `core(q, k, v)` takes and gives (batch, heads, positions, size)."""

    def __init__(self, core: Callable[..., torch.Tensor], kv_heads: int = HEADS, joint: bool = False) -> None:
        super().__init__()
        self.core, self.kv_heads, self.joint = core, kv_heads, joint
        self.q = nn.Linear(WIDTH, 3 * WIDTH if joint else WIDTH)
        self.k, self.v = (nn.Linear(WIDTH, kv_heads * SIZE) for _ in range(2))
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.joint:
            q, k, v = self.q(x).unflatten(-1, (3, HEADS, SIZE)).permute(2, 0, 3, 1, 4).unbind(0)
        else:
            q, k, v = (f(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for f in (self.q, self.k, self.v))
        return self.o(self.core(q, k, v).transpose(1, 2).flatten(2))


def plain(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (q @ k.mT / math.sqrt(SIZE)).softmax(-1) @ v


def causal_fill(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.ones(q.shape[-2], q.shape[-2], dtype=torch.bool).triu(1)
    return (q @ k.mT * 0.5).masked_fill(hidden, -math.inf).softmax(-1) @ v


def causal_add(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    place = torch.arange(q.shape[-2])
    bias = torch.where(place[None, :] <= place[:, None], 0.0, -1e9)
    return ((q * 0.25) @ k.mT + bias).softmax(-1) @ v


def joined_batch(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (y.flatten(0, 1) for y in (q, k, v))
    return torch.bmm(torch.bmm(q, k.mT).softmax(-1), v).unflatten(0, (-1, HEADS))


def repeated(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (y.repeat_interleave(HEADS // y.shape[1], 1) for y in (k, v))
    return plain(q, k, v)


def expanded(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    k, v = (y[:, :, None].expand(-1, -1, HEADS // y.shape[1], -1, -1).flatten(1, 2) for y in (k, v))
    return F.scaled_dot_product_attention(q, k, v)


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def capped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return (torch.tanh(q @ k.mT / 50) * 50).softmax(-1) @ v


def with_sink(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    scores = torch.cat([q @ k.mT * 0.5, torch.ones(1, 1, 1, 1).expand(*q.shape[:3], 1)], -1)
    return (scores - scores.max(-1, keepdim=True).values).softmax(-1)[..., :-1] @ v


def capped_only(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    return torch.tanh(q @ k.mT / 2).softmax(-1) @ v


def capped_as_gemma(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    hidden = torch.full((q.shape[-2], q.shape[-2]), -1e9).triu(1)
    return (torch.tanh(q @ k.mT / 2 / 5) * 5 + hidden).softmax(-1) @ v


def by_einsum(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    q, k, v = (y.transpose(1, 2) for y in (q, k, v))
    weights = (torch.einsum("bqhd,bkhd->bhqk", q, k) * 0.5).softmax(-1)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def by_einsum_with_dots(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    weights = (torch.einsum("...jd,...id->...ij", k, q) * 0.5).softmax(-1)  # keys first
    return torch.einsum("...ij,...jd->...id", weights, v)


def with_alibi(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """As BLOOM: the bias is added by the product."""
    q, k, v = (y.flatten(0, 1) for y in (q, k, v))
    alibi = torch.arange(k.shape[1], dtype=torch.float32).expand(q.shape[0], 1, -1)
    scores = alibi.baddbmm(q, k.mT, beta=1.0, alpha=0.5).unflatten(0, (-1, HEADS))
    hidden = torch.ones(q.shape[1], q.shape[1], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(hidden, -1e9).softmax(-1).flatten(0, 1)
    return torch.bmm(weights, v).unflatten(0, (-1, HEADS))


WRITTEN: list[tuple[Callable[..., torch.Tensor], int, dict[str, Any]]] = [
    (plain, 4, {"scale": 0.5, "causal": False, "masked": False, "fused": False, "softcap": None, "sink": False}),
    (causal_fill, 4, {"scale": 0.5, "causal": True, "masked": True}),
    (causal_add, 4, {"scale": 0.25, "causal": True, "masked": True}),
    (joined_batch, 4, {"scale": 1.0, "causal": False}),
    (capped, 4, {"scale": 1.0, "fused": False, "softcap": 50.0, "sink": False}),
    (capped_only, 4, {"scale": 0.5, "softcap": 1.0}),
    (capped_as_gemma, 4, {"scale": 0.5, "softcap": 5.0, "causal": True}),
    (with_sink, 4, {"scale": 0.5, "fused": False, "sink": True}),
    (by_einsum, 4, {"scale": 0.5, "kv_heads": 4, "value_dim": SIZE, "fused": False, "masked": False}),
    (by_einsum_with_dots, 4, {"scale": 0.5, "kv_heads": 4, "value_dim": SIZE}),
    (with_alibi, 4, {"scale": 0.5, "kv_heads": 4, "masked": True, "causal": True}),
    (repeated, 2, {"scale": 0.5, "kv_heads": 2}),
    (expanded, 2, {"scale": 0.5, "kv_heads": 2, "fused": True}),
    (grouped, 1, {"scale": 0.5, "kv_heads": 1, "fused": True, "causal": True, "masked": False}),
]


@pytest.fixture(scope="module")
def written() -> EntryStructure:
    return structure(*(Written(core, kv_heads) for core, kv_heads, _ in WRITTEN))


@pytest.mark.parametrize("k", range(len(WRITTEN)), ids=[core.__name__ for core, *_ in WRITTEN])
def test_attention_however_it_is_written(written: EntryStructure, k: int) -> None:
    assert len(written.attentions) == len(WRITTEN)
    assert written.near_misses == ()
    site, (_, _, expected) = written.attentions[k], WRITTEN[k]
    assert (site.heads, site.head_dim, site.cross, site.rotary, site.window) == (HEADS, SIZE, False, False, None)
    assert {name: getattr(site, name) for name in expected} == pytest.approx(expected)
    named = [part.weight.meta["name"] if part and part.weight else None for part in (site.q, site.k, site.v, site.o)]
    assert named == [f"each.{k}.{part}.weight" for part in "qkvo"]


def test_joint_projections_are_seen_as_one() -> None:
    (site,) = structure(Written(plain, joint=True)).attentions
    assert site.q is not None
    assert site.k is not None
    assert site.q.node is site.k.node
    assert (site.heads, site.kv_heads, site.q.outputs) == (HEADS, HEADS, 3 * WIDTH)


def test_a_rotary_embedding_and_norms_of_queries_and_keys_are_seen() -> None:
    class Rotated(Written):
        def __init__(self) -> None:
            super().__init__(self.rotate)
            self.norm = nn.LayerNorm(SIZE)

        def rotate(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
            angle = torch.arange(q.shape[-2])[:, None] * torch.tensor([1.0, 0.1, 1.0, 0.1])
            cos, sin = angle.cos(), angle.sin()

            def turn(x: torch.Tensor) -> torch.Tensor:
                a, b = x.chunk(2, -1)
                return x * cos + torch.cat([-b, a], -1) * sin

            return plain(turn(self.norm(q)), turn(self.norm(k)), v)

    (site,) = structure(Rotated()).attentions
    assert (site.rotary, site.qk_norm) == (True, True)


def sliding(place: torch.Tensor) -> torch.Tensor:
    return (place[None, :] <= place[:, None]) & (place[None, :] > place[:, None] - 3)


def causal_flipped(place: torch.Tensor) -> torch.Tensor:
    return place[:, None] >= place[None, :]


def strictly_before(place: torch.Tensor) -> torch.Tensor:
    return place[None, :] < place[:, None] + 1


def both_ways(place: torch.Tensor) -> torch.Tensor:
    return (place[None, :] - place[:, None]).abs() < 3


def ahead(place: torch.Tensor) -> torch.Tensor:
    return place[None, :] <= place[:, None] + 2


def masked(mask: Callable[[torch.Tensor], torch.Tensor]) -> nn.Module:
    def core(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, mask(torch.arange(q.shape[-2])))

    return Written(core)


class Stored(Written):
    """A mask in a buffer."""

    seen: torch.Tensor

    def __init__(self, diagonal: int) -> None:
        super().__init__(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, self.seen))
        self.register_buffer("seen", torch.ones(6, 6, dtype=torch.bool).tril(diagonal))


def test_what_a_mask_lets_see() -> None:
    masks = (sliding, causal_flipped, strictly_before, both_ways, ahead)
    found = structure(*map(masked, masks), Stored(0), Stored(1)).attentions
    assert all(site.masked for site in found)
    assert [site.causal for site in found] == [True, True, True, False, False, True, False]
    assert [site.window for site in found] == [3, *[None] * 6]


def test_a_cache_is_seen() -> None:
    class Cached(Written):
        def __init__(self) -> None:
            super().__init__(plain)

        def forward(self, x: torch.Tensor, past: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            q, k, v = (f(x).unflatten(-1, (-1, SIZE)).transpose(1, 2) for f in (self.q, self.k, self.v))
            return self.o(plain(q, torch.cat([past, k], 2), torch.cat([past, v], 2)).transpose(1, 2).flatten(2))

    inputs = tokens(1), torch.randn(2, HEADS, 5, SIZE)
    (site,) = find_structure(capture_module(Cached().eval(), inputs, {}, check=False))["forward"].attentions
    assert (site.cached, site.cross) == (True, False)


class Unprojected(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])


class Classify(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x).softmax(-1) @ torch.ones(5, 2)


def test_near_misses_of_attention_name_what_failed_and_a_classifier_is_none() -> None:
    gated = Written(lambda q, k, v: (q @ k.mT).softmax(-1)[..., :SIZE] + v)
    found = structure(gated, Unprojected(), Classify())
    assert [(site.q, site.heads) for site in found.attentions] == [(None, 1)]
    assert reasons(found, "attention") == [
        "the softmax of a product is not multiplied with values, but read by aten.slice.Tensor",
        *(
            f"{name} are computed from 0 products with constants where one was looked for"
            for name in ("queries", "keys", "values")
        ),
        "the result is not read by one product with a constant",
    ]
    assert found.near_misses[0].where.startswith("each.0 (")


NO_ATTENTION: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "wrong axis": (
        lambda q, k, v: (q @ k.mT).softmax(-2) @ v,
        "the softmax is over axis -2 where the last one, that of the keys, was expected",
    ),
    "turned before": (
        lambda q, k, v: (k @ q.mT).mT.softmax(-1) @ v,
        "aten.transpose.int rearranges the axis of the keys before the softmax",
    ),
    "turned behind": (
        lambda q, k, v: (q @ k.mT).softmax(-1).mT @ v,
        "the softmax of a product is not multiplied with values, but read by aten.transpose.int",
    ),
    "masked behind": (
        lambda q, k, v: ((q @ k.mT).softmax(-1) * torch.ones(6, 6).tril()) @ v,
        "the softmax of a product is not multiplied with values, but read by aten.mul.Tensor",
    ),
    "relu": (lambda q, k, v: (q @ k.mT).relu() @ v, "the scores go through aten.relu where a softmax was expected"),
    "relu then softmax": (
        lambda q, k, v: (q @ k.mT).relu().softmax(-1) @ v,
        "the scores go through aten.relu before the softmax",
    ),
    "masked before the cap": (
        lambda q, k, v: torch.tanh(q @ k.mT + torch.ones(6, 6).tril()).softmax(-1) @ v,
        "a mask is added to the scores before they are capped",
    ),
    "two products": (
        lambda q, k, v: (q @ k.mT + k @ q.mT).softmax(-1) @ v,
        "aten.add.Tensor reads the scores otherwise than once, beside a mask",
    ),
    "further keys": (
        lambda q, k, v: torch.cat([q @ k.mT, q @ q.mT], -1).softmax(-1) @ torch.cat([v, v], -2),
        "aten.cat joins the scores with others than constant ones of further keys",
    ),
    "einsum over queries": (
        lambda q, k, v: torch.einsum("bhqk,bhqd->bhkd", (q @ k.mT).softmax(-1), v),
        "the product with values is aten.einsum 'bhqk,bhqd->bhkd' where a sum over the last axis of the weights, that "
        "of the keys, was expected",
    ),
    "einsum of three": (
        lambda q, k, v: torch.einsum("bhqd,bhkd,d->bhqk", q, k, torch.ones(SIZE)).softmax(-1) @ v,
        "the product of queries and keys is aten.einsum 'bhqd,bhkd,d->bhqk' of 3 operands where two were expected",
    ),
}


@pytest.fixture(scope="module")
def no_attention() -> EntryStructure:
    return structure(*(Written(core) for core, _ in NO_ATTENTION.values()))


@pytest.mark.parametrize("k", range(len(NO_ATTENTION)), ids=list(NO_ATTENTION))
def test_what_is_no_attention_says_why(no_attention: EntryStructure, k: int) -> None:
    assert no_attention.attentions == ()
    said = [miss for miss in no_attention.near_misses if miss.wanted == "attention"]
    assert len(said) == len(NO_ATTENTION)
    (miss,) = [miss for miss in said if miss.where.startswith(f"each.{k} (")]
    assert miss.reason == list(NO_ATTENTION.values())[k][1]


# MLPs


class Gated(nn.Module):
    def __init__(self, act: Callable[[torch.Tensor], torch.Tensor], form: str) -> None:
        super().__init__()
        self.act, self.form = act, form
        self.gate, self.up, self.down = nn.Linear(WIDTH, 24), nn.Linear(WIDTH, 24), nn.Linear(24, WIDTH)
        self.both = nn.Linear(WIDTH, 48)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.form == "plain":
            return self.down(self.act(self.up(x)))
        if self.form == "packed":
            gate, up = self.both(x).chunk(2, -1)
        elif self.form == "packed, up first":
            up, gate = self.both(x).chunk(2, -1)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(up * self.act(gate))


def gelu_new(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def gelu_erf(x: torch.Tensor) -> torch.Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def swish(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(x)


def quick_gelu(x: torch.Tensor) -> torch.Tensor:
    return x * torch.sigmoid(1.702 * x)


def nearly_gelu(x: torch.Tensor) -> torch.Tensor:
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.05 * x**3)))


ACTIVATIONS: dict[str, tuple[Callable[[torch.Tensor], torch.Tensor], str]] = {
    "gelu_new": (gelu_new, "gelu_tanh"),
    "gelu_erf": (gelu_erf, "gelu"),
    "swish": (swish, "silu"),
    "quick_gelu": (quick_gelu, "quick_gelu"),
    "relu2": (lambda x: torch.relu(x).square(), "relu2"),
    "leaky_relu": (F.leaky_relu, "leaky_relu"),
    "nearly_gelu": (nearly_gelu, "unknown"),
}
GATES = [
    (act, name, form)
    for act, name in ((F.silu, "silu"), (gelu_new, "gelu_tanh"))
    for form in ("apart", "packed", "packed, up first")
]


@pytest.fixture(scope="module")
def mlps() -> EntryStructure:
    plain = (Gated(act, "plain") for act, _ in ACTIVATIONS.values())
    return structure(*plain, *(Gated(act, form) for act, _, form in GATES))


@pytest.mark.parametrize("k", range(len(ACTIVATIONS)), ids=list(ACTIVATIONS))
def test_an_activation_is_known_by_its_values(mlps: EntryStructure, k: int) -> None:
    assert len(mlps.mlps) == len(ACTIVATIONS) + len(GATES)
    assert mlps.near_misses == ()
    site, name = mlps.mlps[k], list(ACTIVATIONS.values())[k][1]
    assert (site.activation, site.gated, site.hidden, site.width) == (name, False, WIDTH, 24)


@pytest.mark.parametrize("k", range(len(GATES)), ids=[f"{name} {form}" for _, name, form in GATES])
def test_a_gate_is_told_from_what_it_gates(mlps: EntryStructure, k: int) -> None:
    site, (_, name, form) = mlps.mlps[len(ACTIVATIONS) + k], GATES[k]
    assert (site.activation, site.gated, site.packed) == (name, True, form != "apart")
    assert site.gate is not None
    if form == "apart":
        assert site.gate.weight is not None
        assert site.gate.weight.meta["name"].endswith("gate.weight")
    else:
        columns = [(0, 24), (24, 48)] if form == "packed" else [(24, 48), (0, 24)]
        assert [site.gate.columns, site.up.columns] == columns


class Normed(Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.layer_norm(F.gelu(self.up(x)), (24,)))


class Crossed(Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x.flip(-1)))


class Three(Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x) * self.both(x)[..., :24])


class Summed(Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x).cumsum(1)))


class Straight(Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(3 * self.up(x))


def test_near_misses_of_mlps() -> None:
    """Behind a norm (as every next layer begins), and without an activation, nothing was near."""
    found = structure(*(kind(F.gelu, "") for kind in (Normed, Crossed, Three, Summed, Straight)))
    assert found.mlps == ()
    assert reasons(found, "mlp")[:2] == [
        "gate and up read different values",
        "3 products are read where an MLP has one or two",
    ]
    assert "aten.cumsum" in reasons(found, "mlp")[2]
    assert len(found.near_misses) == 3


# Experts


class Experts(nn.Module):
    """Four experts, two chosen, in the forms in which MoE layers are written."""

    def __init__(self, form: str, score: str = "softmax", count: int = 4) -> None:
        super().__init__()
        self.form, self.score = form, score
        self.router = nn.Linear(WIDTH, count)
        self.up, self.down = nn.Parameter(torch.randn(4, 24, WIDTH)), nn.Parameter(torch.randn(4, WIDTH, 24))
        self.both, self.bias = nn.Parameter(torch.randn(4, WIDTH, 48)), nn.Parameter(torch.randn(4, 1, 48))
        self.into = nn.Parameter(torch.randn(4, 24, WIDTH))
        self.each = nn.ModuleList(Gated(F.silu, "plain") for _ in range(4))
        self.shared = Gated(F.silu, "plain")

    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = self.router(x)
        if self.score == "after":
            values, chosen = logits.topk(2)
            return values.softmax(-1), chosen
        scores = logits.sigmoid() if self.score == "sigmoid" else logits.softmax(-1)
        values, chosen = scores.topk(2)
        return (values if self.score == "plain" else values / values.sum(-1, keepdim=True)), chosen

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x.flatten(0, 1)
        weights, chosen = self.route(x)
        if self.form == "batched":
            rows, ids = x.repeat_interleave(2, 0), chosen.flatten()
            inner = F.silu(torch.bmm(self.up[ids], rows[..., None])[..., 0])
            outs = torch.bmm(self.down[ids], inner[..., None])[..., 0] * weights.flatten()[:, None]
            return outs.unflatten(0, (-1, 2)).sum(1)
        if self.form == "dense interleaved":
            both = torch.bmm(x.expand(4, -1, -1), self.both) + self.bias
            outs = torch.bmm(F.silu(both[..., ::2]) * both[..., 1::2], self.into)
            return (outs * weights.new_zeros(x.shape[0], 4).scatter(1, chosen, weights).T[..., None]).sum(0)
        scattered = torch.zeros(x.shape[0], self.router.out_features).scatter(1, chosen, weights)
        if self.form == "dense":
            outs = torch.bmm(F.silu(torch.bmm(x.expand(4, -1, -1), self.up.mT)), self.down.mT)
            return (outs * scattered.T[..., None]).sum(0)
        out = self.shared(x)
        for k, expert in enumerate(self.each):
            out = out + expert(x) * scattered[:, k : k + 1]
        return out


FORMS = ("batched", "dense", "loop")
SCORES = {"sigmoid": ("sigmoid", True), "plain": ("softmax", False), "after": ("softmax after top-k", True)}


@pytest.fixture(scope="module")
def experts() -> EntryStructure:
    scored = (Experts("batched", score) for score in SCORES)
    return structure(*map(Experts, FORMS), *scored, Experts("dense interleaved", "after"))


def test_experts_in_every_form(experts: EntryStructure) -> None:
    assert len(experts.moes) == len(FORMS) + len(SCORES) + 1
    assert len(experts.mlps) == 1  # the shared expert of the loop
    assert experts.near_misses == ()
    by_impl = {site.impl: site for site in experts.moes if site.score == "softmax" and site.renormalised}
    assert sorted(by_impl) == sorted(FORMS)
    for form, site in by_impl.items():
        assert (site.experts, site.top_k, site.activation, site.gated) == (4, 2, "silu", False)
        assert (site.hidden, site.width, site.layout, site.transposed) == (WIDTH, 24, "none", False)
        assert site.router.weight is not None
        assert site.router.weight.meta["name"] == f"each.{FORMS.index(form)}.router.weight"
        assert site.shared == (tuple(mlp.site for mlp in experts.mlps) if form == "loop" else ())


def test_gates_that_lie_between_their_factors_are_seen(experts: EntryStructure) -> None:
    (site,) = [site for site in experts.moes if site.gated]
    assert (site.impl, site.layout, site.transposed, site.activation) == ("dense", "interleaved", True, "silu")
    assert (site.hidden, site.width, site.score) == (WIDTH, 24, "softmax after top-k")


def test_how_experts_are_scored(experts: EntryStructure) -> None:
    found = {
        site.router.weight.meta["name"]: (site.score, site.renormalised)
        for site in experts.moes
        if site.router.weight is not None
    }
    expected = {f"each.{k}.router.weight": said for k, said in enumerate(SCORES.values(), len(FORMS))}
    assert expected.items() <= found.items()


class Elsewhere(Experts):
    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return super().route(x.sin())


class First(Experts):
    def route(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scores = self.router(x).softmax(-1)
        return scores[:, :2], scores.argsort(-1)[:, :2]


def test_near_misses_of_experts() -> None:
    found = structure(Experts("batched", count=5), Elsewhere("batched"), First("batched"))
    assert found.moes == ()
    assert reasons(found, "moe") == [
        "no product with 4 outputs scores the experts",
        "the router and the experts read different values",
        "rows are not routed by a top-k",
    ]


# Norms


def rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-5) * w


def rms_float(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x.double()
    return w * (y * (y.pow(2).mean(-1, keepdim=True) + 1e-5) ** -0.5).to(x.dtype)


def rms_offset(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * (1.0 + w)


def layer(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    y = x - x.mean(-1, keepdim=True)
    return y / torch.sqrt(y.pow(2).mean(-1, keepdim=True) + 1e-5) * w + w


def layer_var(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    variance = x.var(-1, keepdim=True, unbiased=False)
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-5) * w + w


def fused_rms(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, (WIDTH,), w, 1e-5)


class Apply(nn.Module):
    def __init__(self, function: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x, self.weight)


NORMS: dict[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], tuple[str, float]] = {
    rms: ("rms", 0.0),
    rms_float: ("rms", 0.0),
    rms_offset: ("rms", 1.0),
    fused_rms: ("rms", 0.0),
    layer: ("layer", 0.0),
    layer_var: ("layer", 0.0),
}


def test_norms_however_they_are_written() -> None:
    found = structure(*map(Apply, NORMS))
    assert found.near_misses == ()
    by_weight = {norm.weight.meta["name"]: norm for norm in found.norms if norm.weight is not None}
    assert len(by_weight) == len(found.norms) == len(NORMS)
    for k, (kind, offset) in enumerate(NORMS.values()):
        norm = by_weight[f"each.{k}.weight"]
        assert (norm.kind, norm.eps, norm.offset) == (kind, 1e-5, offset)
        assert (norm.bias is not None) is (kind == "layer")
        assert norm.x.op == "placeholder"
        assert next(iter(norm.out.users)).op == "output"


def test_near_misses_of_norms() -> None:
    of_mean = Apply(lambda x, w: x * torch.rsqrt(x.mean(-1, keepdim=True) + 1e-5) * w)
    of_other = Apply(lambda x, w: w * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5))
    found = structure(of_mean, of_other, Apply(lambda x, w: torch.sqrt(x.abs()) * w))
    assert found.norms == ()
    assert reasons(found, "norm") == [
        "the root is of a mean, but not of the mean of squares",
        "the root of the mean of squares does not divide what was squared",
    ]
