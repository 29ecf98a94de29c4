"""Residual streams, branches and blocks of small models of every style, and what must not be taken for one."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.export import Dim

from helpers import parse
from laconic.ir.capture import capture_module
from laconic.ir.listing import SlotKind
from laconic.ir.program import Program
from laconic.ir.structure import BranchKind, EntryStructure, find_structure
from laconic.ir.structure.likeness import equal_blocks, likeness

ATTENTION, MLP, PARALLEL, MIXER = BranchKind.ATTENTION, BranchKind.MLP, BranchKind.PARALLEL, BranchKind.MIXER
WIDTH, HEADS = 16, 2


def captured(module: nn.Module, *args: torch.Tensor, dynamic: bool = False) -> Program:
    torch.manual_seed(0)
    batch = Dim("batch")
    shapes = tuple({0: batch} for _ in args) if dynamic else None
    return capture_module(module.eval(), args, {}, shapes, check=False)


def structure(module: nn.Module, *args: torch.Tensor, dynamic: bool = False) -> EntryStructure:
    return find_structure(captured(module, *args, dynamic=dynamic))["forward"]


def tokens(width: int = WIDTH, length: int = 5) -> torch.Tensor:
    return torch.randn(3, length, width)


class Attend(nn.Module):
    """Attention of x to `context` (itself, if there is none)."""

    def __init__(self, factor: float = 1.0) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.factor = factor

    def forward(
        self, x: torch.Tensor, context: torch.Tensor | None = None, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        context = x if context is None else context
        q, k, v = (
            f(y).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for f, y in ((self.q, x), (self.k, context), (self.v, context))
        )
        found = F.scaled_dot_product_attention(q * self.factor, k, v, mask)
        return self.o(found.transpose(1, 2).flatten(2))


class Feed(nn.Module):
    def __init__(self, inner: int = 32) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, inner), nn.Linear(inner, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(F.gelu(self.up(x)))


class Rms(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(WIDTH) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6))


class Layer(nn.Module):
    """One layer of each style of residual."""

    def __init__(self, style: str, inner: int = 32, factor: float = 1.0) -> None:
        super().__init__()
        self.style = style
        self.one, self.two = (Rms(), Rms()) if "rms" in style else (nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH))
        self.attend, self.feed = Attend(factor), Feed(inner)
        self.gamma = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
        if self.style in ("pre", "pre rms"):
            x = x + self.attend(self.one(x), mask=mask)
            return self.feed(self.two(x)) + x
        if self.style in ("post", "post rms"):
            x = self.one(x + self.attend(x))
            return self.two(self.feed(x) + x)
        if self.style == "scaled branch":
            x = x + self.gamma * self.attend(self.one(x))
            return x + 0.5 * self.feed(self.two(x))
        if self.style == "scaled stream":
            x = self.one(1.5 * x + self.attend(x))
            return self.two(x * 1.5 + self.feed(x))
        if self.style == "flat":
            x = x + self.attend(self.one(x))
            rows = x.reshape(-1, WIDTH)
            return (rows + self.feed(self.two(rows))).view(x.shape)
        if self.style == "parallel":
            y = self.one(x)
            return x + self.attend(y) + self.feed(y)
        if self.style == "branches first":
            return self.attend(self.one(x)) + self.feed(self.two(x)) + x
        raise AssertionError(self.style)


class Thin(nn.Module):
    """A layer of one branch."""

    def __init__(self, inner: int = 32, factor: float = 1.0) -> None:
        super().__init__()
        self.norm, self.feed, self.factor = nn.LayerNorm(WIDTH), Feed(inner), factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.feed(self.norm(x) * self.factor)


class Stack(nn.Module):
    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


def periods(found: EntryStructure) -> list[tuple[int, int, int, int]]:
    return [(run.stream, run.first, run.period, run.count) for run in found.runs]


def kinds(found: EntryStructure) -> list[list[BranchKind]]:
    return [[branch.kind for branch in stream.branches] for stream in found.streams]


@pytest.mark.parametrize("style", ["pre", "pre rms", "post", "post rms", "scaled branch", "scaled stream", "flat"])
def test_layers_of_two_branches_are_one_run_the_last_included(style: str) -> None:
    found = structure(Stack(Layer(style), Layer(style)), tokens(), dynamic=style == "pre")
    assert kinds(found) == [[ATTENTION, MLP] * 2]
    assert periods(found) == [(0, 0, 2, 2)]
    (run,) = found.runs
    assert [str(n.target) for n in run.block(1)] == [str(n.target) for n in run.block(0)]
    assert run.slots(SlotKind.CARRIED) != []
    for branch, after in pairwise(found.streams[0].branches):
        assert after.v in (branch.add, branch.out, *branch.out.users)  # scaled: the product is carried


@pytest.mark.parametrize("style", ["parallel", "branches first"])
def test_parallel_branches_are_one(style: str) -> None:
    found = structure(Stack(*(Layer(style) for _ in range(2))), tokens())
    assert kinds(found) == [[PARALLEL] * 2]
    assert periods(found) == [(0, 0, 1, 2)]


def test_a_norm_behind_the_last_sum_belongs_to_it_in_post_norm_models_alone() -> None:
    pre, post = structure(Stack(Thin(), Thin()), tokens()), structure(Stack(Layer("post"), Layer("post")), tokens())
    assert pre.streams[0].branches[-1].out is pre.streams[0].branches[-1].add
    last = post.streams[0].branches[-1]
    assert str(last.out.target) == "aten.layer_norm.default"
    assert last.out.args[0] is last.add


def test_layers_that_differ_in_width_end_the_run() -> None:
    found = structure(Stack(Thin(48), *(Thin() for _ in range(3))), tokens())
    assert kinds(found) == [[MLP] * 4]
    assert periods(found) == [(0, 1, 1, 3)]


@pytest.mark.parametrize("by_turns", [{"factor": (2.0, 3.0)}, {"inner": (32, 48)}], ids=["literals", "widths"])
def test_what_takes_turns_inside_makes_blocks_of_two_layers(by_turns: dict[str, tuple[Any, Any]]) -> None:
    ((name, values),) = by_turns.items()
    found = structure(Stack(*(Thin(**{name: values[k % 2]}) for k in range(6))), tokens())
    assert periods(found) == [(0, 0, 2, 3)]
    assert found.runs[0].turns == 1  # within the block, not from outside


class MaskedByTurns(nn.Module):
    """Two masks, given to the layers by turns."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer("pre") for _ in range(count))

    def forward(self, x: torch.Tensor, near: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
        for k, layer in enumerate(self.layers):
            x = layer(x, (near, far)[k % 2][:, None])
        return x


def test_masks_that_take_turns_do_not_part_the_run() -> None:
    mask = torch.ones(3, 5, 5, dtype=torch.bool)
    found = structure(MaskedByTurns(4), tokens(), mask, mask.clone())
    assert periods(found) == [(0, 0, 2, 4)]
    assert found.runs[0].turns == 2


class Decoder(nn.Module):
    """Encoder and decoder of different depth; a position bias is computed in each stack's first layer."""

    def __init__(self, encoders: int = 2, decoders: int = 2) -> None:
        super().__init__()
        self.encoders = nn.ModuleList(Layer("pre") for _ in range(encoders))
        self.selves = nn.ModuleList(Attend() for _ in range(decoders))
        self.crosses = nn.ModuleList(Attend() for _ in range(decoders))
        self.feeds = nn.ModuleList(Feed() for _ in range(decoders))
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(3 * decoders))
        self.bias = nn.Embedding(9, HEADS)
        self.last = nn.LayerNorm(WIDTH)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        for layer in self.encoders:
            x = layer(x)
        x, bias = self.last(x), None
        for k, (own, cross, feed) in enumerate(zip(self.selves, self.crosses, self.feeds, strict=True)):
            if bias is None:
                places = torch.arange(y.shape[1])
                bias = self.bias(places[None] - places[:, None] + 4).permute(2, 0, 1)[None]
            y = y + own(self.norms[3 * k](y), mask=bias)
            y = y + cross(self.norms[3 * k + 1](y), x)
            y = y + feed(self.norms[3 * k + 2](y))
        return y


def test_decoder_layers_hold_their_own_keys_of_the_encoder_but_not_the_shared_bias() -> None:
    found = structure(Decoder(), tokens(length=4), tokens())
    assert kinds(found) == [[ATTENTION, MLP] * 2, [ATTENTION, ATTENTION, MLP] * 2]
    assert periods(found) == [(0, 0, 2, 2), (1, 0, 3, 2)]
    run = found.runs[1]
    inside = {node for k in range(2) for node in run.block(k)}
    for site in found.attentions:
        if site.cross:
            assert site.k is not None
            assert site.v is not None
            assert {site.k.node, site.v.node} <= inside
    assert [site.cross for site in found.attentions] == [False] * 2 + [False, True] * 2
    targets = {str(n.target) for n in inside}
    assert "aten.embedding.default" not in targets
    assert "aten.permute.default" not in targets


def test_one_decoder_layer_does_not_swallow_the_encoder() -> None:
    found = structure(Decoder(1, 1), tokens(length=4), tokens())
    assert kinds(found) == [[ATTENTION, MLP], [ATTENTION, ATTENTION, MLP]]
    branches = [b for s in found.streams for b in s.branches]
    nodes = [n for b in branches for n in b.nodes]
    assert len(nodes) == len(set(nodes))


class Scan(nn.Module):
    """A recurrence unrolled over positions, which repeats far more often than the layers do."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.into, self.out = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.decay = nn.Parameter(torch.rand(WIDTH))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.into(self.norm(x))
        state, states = torch.zeros_like(y[:, 0]), []
        for k in range(y.shape[1]):
            state = torch.sigmoid(self.decay) * state + torch.tanh(y[:, k])
            states.append(state)
        return x + self.out(torch.stack(states, 1))


def test_a_scan_inside_is_a_mixer_and_does_not_hide_the_layers() -> None:
    found = structure(Stack(Scan(), Scan()), tokens(length=9))
    assert kinds(found) == [[MIXER] * 2]
    assert periods(found) == [(0, 0, 1, 2)]
    assert all("no attention, MLP or MoE among its 2 products" in b.reason for b in found.streams[0].branches)


class Residual(nn.Module):
    """A convolutional block; with `stride` its skip is a convolution too."""

    def __init__(self, wide: int, out: int, stride: int = 1) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(wide, out, 3, stride, 1), nn.Conv2d(out, out, 3, 1, 1)
        self.skip = nn.Conv2d(wide, out, 1, stride) if stride > 1 else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.two(torch.relu(self.one(x))) + self.skip(x))


def test_a_convolution_on_the_skip_starts_a_new_stream_and_says_so() -> None:
    net = nn.Sequential(Residual(4, 4), Residual(4, 4), Residual(4, 8, 2), Residual(8, 8), Residual(8, 8))
    found = structure(net, torch.randn(3, 4, 8, 8))
    assert kinds(found) == [[MIXER] * 2, [MIXER] * 2]
    assert periods(found) == [(0, 0, 1, 2), (1, 0, 1, 2)]
    assert ["no value is carried unchanged" in miss.reason for miss in found.near_misses] == [True]
    assert found.near_misses[0].where.startswith("2 ")


class LongSkip(nn.Module):
    """The input is added again behind all layers."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Thin() for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x
        for layer in self.layers:
            y = layer(y)
        return torch.tanh(y) + x


def test_a_skip_over_all_layers_leaves_their_run_alone() -> None:
    found = structure(LongSkip(), tokens())
    assert [MLP] * 2 in kinds(found)
    assert [run[2:] for run in periods(found)] == [(1, 2)]
    nodes = [n for s in found.streams for b in s.branches for n in b.nodes]
    assert len(nodes) == len(set(nodes))


class Fork(nn.Module):
    """Two heads go on from one trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.ModuleList(Thin() for _ in range(1))
        self.long = nn.ModuleList(Thin() for _ in range(2))
        self.short = Thin()

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        for layer in self.trunk:
            x = layer(x)
        y = x
        for layer in self.long:
            y = layer(y)
        return y, self.short(x)


def test_a_fork_goes_on_where_most_branches_follow() -> None:
    found = structure(Fork(), tokens())
    assert sorted(map(len, kinds(found))) == [1, 3]
    assert [run[2:] for run in periods(found)] == [(1, 3)]


NOT_A_STREAM = {
    "a polynomial": "%p = aten.pow.Tensor_Scalar(%x, 3)\n%y = aten.add.Tensor(%x, %p)",
    "a value that does not come from x": "%p = aten.linear(%z, @w)\n%y = aten.add.Tensor(%x, %p)",
    "two branches without an identity": (
        "%p = aten.linear(%x, @w)\n%q = aten.linear(%x, @v)\n%y = aten.add.Tensor(%p, %q)"
    ),
    "another type": "%p = aten.linear(%x, @w)\n%m = aten.mean.dim(%p, [1], True)\n%y = aten.add.Tensor(%x, %m)",
    "the same value twice": "%p = aten.linear(%x, @w)\n%y = aten.add.Tensor(%p, %p)",
}


@pytest.mark.parametrize("body", NOT_A_STREAM.values(), ids=NOT_A_STREAM)
def test_what_is_no_residual(body: str) -> None:
    assert find_structure(parse(_program(body)))["forward"].streams == ()


def test_the_least_residual() -> None:
    found = find_structure(parse(_program("%p = aten.linear(%x, @w)\n%y = aten.add.Tensor(%p, %x)")))["forward"]
    assert kinds(found) == [[MIXER]]
    assert found.runs == ()


def _program(body: str) -> str:
    """An entry on x, z: f32[4, 8] and w, v: f32[8, 8], with the types left out of `body`."""
    typed = []
    for line in body.splitlines():
        name, _, call = line.partition(" = ")
        typed.append(f"{name}: f32[{'4, 1' if name == '%m' else '4, 8'}] = {call}")
    lines = "\n".join(typed)
    return f"""
        parameter @w: f32[8, 8] trainable
        parameter @v: f32[8, 8] trainable

        entry forward {{
          input %x: f32[4, 8] in [-1, 1]
          input %z: f32[4, 8] in [-1, 1]
          argument x = %x
          argument z = %z
          {lines}
          return %y
        }}
    """


def test_names_mean_nothing() -> None:
    """The same model under other names of modules, and so of weights, has the same structure."""

    class Misnamed(nn.Module):
        def __init__(self, layer: nn.Module) -> None:
            super().__init__()
            self.mlp_experts_router = layer

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.mlp_experts_router(x)

    plain, misnamed = Stack(Layer("pre")), Stack(Misnamed(Layer("pre")))
    shown = [_shape(structure(m, tokens())) for m in (plain, misnamed)]
    assert shown[0] == shown[1]


def _shape(found: EntryStructure) -> Any:
    sites = [(s.site, s.heads, s.cross) for s in found.attentions], [(m.site, m.width) for m in found.mlps]
    return kinds(found), periods(found), sites, [(n.site, n.kind) for n in found.norms]


def _copied(module: Stack, edit: Callable[[nn.Module], None]) -> Program:
    """The last two of three layers hold the same weights; `edit` changes the very last one."""
    module.layers[2].load_state_dict(module.layers[1].state_dict())
    with torch.no_grad():
        edit(module.layers[2])
    return captured(module, tokens())


def test_blocks_with_equal_weights_are_told_and_distances_are_exact() -> None:
    torch.manual_seed(1)
    stack = Stack(*(Thin() for _ in range(3)))
    program = _copied(stack, lambda layer: None)
    (run,) = find_structure(program)["forward"].runs
    assert equal_blocks(program, run) == [(1, 2)]
    found = {(pair.a, pair.b): pair for pair in likeness(program, run)}
    assert (found[1, 2].distance, found[1, 2].cosine) == (0.0, pytest.approx(1.0))
    flat = [torch.cat([p.detach().double().flatten() for p in layer.parameters()]) for layer in stack.layers]
    mean = ((flat[0].norm() ** 2 + flat[1].norm() ** 2) / 2).sqrt()
    assert found[0, 1].distance == pytest.approx(float((flat[0] - flat[1]).norm() / mean), rel=1e-12)
    assert found[0, 1].cosine == pytest.approx(float(F.cosine_similarity(flat[0], flat[1], 0)), rel=1e-12)


def test_a_difference_in_one_bit_is_a_difference() -> None:
    torch.manual_seed(1)
    stack = Stack(*(Thin() for _ in range(3)))

    def nudge(layer: nn.Module) -> None:
        layer.feed.up.bias[3] = torch.nextafter(layer.feed.up.bias[3], torch.tensor(9.0))  # type: ignore[union-attr, index]

    program = _copied(stack, nudge)
    (run,) = find_structure(program)["forward"].runs
    assert equal_blocks(program, run) == []
    nearest = min(likeness(program, run), key=lambda pair: pair.distance)
    assert (nearest.a, nearest.b) == (1, 2)
    assert 0 < nearest.distance < 1e-8
