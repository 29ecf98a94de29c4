"""dead-units: what is planted goes, and nothing else; results stay what they were."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from axes_oracles import captured, distance, results
from helpers import apart, bits, optimize, sampled
from laconic.ir.program import Program
from laconic.ir.rewrite import find
from laconic.passes.base import Plan
from laconic.passes.dead_units import DeadUnits
from laconic.passes.plans import read_plan, write_plan

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
Edit = tuple[str, int, int | tuple[int, ...], float]


def edited(program: Program, *edits: Edit) -> Program:
    """The program with a number written at some positions of axes of weights."""
    made = apart(program)
    for name, axis, positions, number in edits:
        made.weights[name].value.detach().index_fill_(axis, torch.tensor(positions).reshape(-1), number)
    return made


def gone(plan: Plan) -> dict[tuple[str, int, int], list[int]]:
    """By the first member of each class: the positions that a plan leaves out."""
    return {
        (a["weight"], a["axis"], a["factor"]): sorted(set(range(a["size"])) - set(a["positions"])) for a in plan.actions
    }


def leaves_out(program: Program, *edits: Edit) -> dict[tuple[str, int, int], list[int]]:
    """Run the pass, every check on; what it left out. Results are the same in float64, a second run finds nothing, and
    the plan, written and read, does the same again."""
    before = edited(program, *edits)
    run = optimize(before, "dead-units")
    row, plan, after = run.ledger.rows[-1], run.plans[-1], run.program
    found = gone(plan)
    assert row.modified == bool(found), row.reason
    if found:
        assert distance(results(after), results(before)) < 1e-6
        assert after.weight_bytes() < before.weight_bytes()
        assert not optimize(after, "dead-units").ledger.rows[-1].modified
    else:
        assert {name: w.value.shape for name, w in after.weights.items()} == {
            name: w.value.shape for name, w in before.weights.items()
        }
    return found


MLP = {"a": (12, 8), "b": (12,), "c": (4, 12), "d": (4,)}


def mlp(act: Callable[..., Any]) -> Program:
    return captured(MLP, lambda w, x: F.linear(act(F.linear(x, w.a, w.b)), w.c, w.d), [X])


HIDDEN = ("a", 0, 0)
ACTIVATIONS = [F.relu, F.gelu, F.silu, torch.sigmoid, torch.tanh, torch.exp, F.softplus]


@pytest.mark.parametrize("act", sampled(ACTIVATIONS, 3))
def test_a_unit_that_nothing_uses(act: Callable[..., Any]) -> None:
    assert leaves_out(mlp(act), ("c", 1, (5, 7), 0.0)) == {HIDDEN: [5, 7]}


@pytest.mark.parametrize("act", sampled(ACTIVATIONS, 3))
@pytest.mark.parametrize("bias", [0.0, 0.7, -0.3])
def test_a_unit_that_is_constant(act: Callable[..., Any], bias: float) -> None:
    assert leaves_out(mlp(act), ("a", 0, (0, 3), 0.0), ("b", 0, (0, 3), bias)) == {HIDDEN: [0, 3]}


def test_constants_are_left_alone_where_that_is_said() -> None:
    program = edited(mlp(torch.sigmoid), ("a", 0, (0, 3), 0.0), ("c", 1, (5,), 0.0))
    assert gone(DeadUnits(constants=False).plan(program)) == {HIDDEN: [5]}


def test_a_constant_goes_into_a_bias_that_was_not_there() -> None:
    program = captured({"a": (12, 8), "c": (4, 12)}, lambda w, x: F.linear(torch.cos(F.linear(x, w.a)), w.c), [X])
    before = edited(program, ("a", 0, 3, 0.0))
    run = optimize(before, "dead-units")
    assert gone(run.plans[-1]) == {HIDDEN: [3]}
    torch.testing.assert_close(run.program.weights["folded_c_bias"].value, before.weights["c"].value[:, 3])
    assert run.ledger.rows[-1].reason == "1 dead units of 1 axes, their constants in 1 bias"


def test_nothing_else_goes() -> None:
    """All but one number of what a unit reads and of what reads it is zero: it stays."""
    program = edited(mlp(F.relu), ("a", 0, 3, 0.0), ("b", 0, 3, 0.0), ("c", 1, 3, 0.0))
    for name, place in (("a", (3, 2)), ("b", (3,))):
        almost = apart(program)
        with torch.no_grad():
            almost.weights[name].value[place] = 1e-30
            almost.weights["c"].value[0, 3] = 1e-30
        found = leaves_out(almost)
        assert found == ({} if name == "a" else {HIDDEN: [3]})


def test_a_program_without_dead_units_stays_as_it_is() -> None:
    program = mlp(F.gelu)
    result = DeadUnits().apply(program, DeadUnits().plan(program))
    assert result.program is program
    assert not result.modified
    assert "provably" in result.reason


def test_a_constant_without_a_bias_to_go_to_stays() -> None:
    """A sum of activations has no bias; one of zeros needs none."""
    shapes = {"a": (12, 8), "b": (12,)}
    program = captured(shapes, lambda w, x: torch.sigmoid(F.linear(x, w.a, w.b)).sum(-1), [X])
    assert leaves_out(program, ("a", 0, 3, 0.0)) == {}
    program = captured(shapes, lambda w, x: F.relu(F.linear(x, w.a, w.b)).sum(-1), [X])
    assert leaves_out(program, ("a", 0, (3, 4), 0.0), ("b", 0, 3, 0.0), ("b", 0, 4, -1.0)) == {HIDDEN: [3, 4]}


def test_a_mean_counts_zeros_and_a_norm_too() -> None:
    shapes = {"a": (12, 8), "g": (12,), "c": (4, 12)}
    mean = captured(shapes, lambda w, x: F.relu(F.linear(x, w.a)).mean(-1), [X])
    assert leaves_out(mean, ("a", 0, 3, 0.0)) == {}
    norm = captured(shapes, lambda w, x: F.linear(F.rms_norm(F.linear(x, w.a), (12,), w.g), w.c), [X])
    assert leaves_out(norm, ("a", 0, 3, 0.0), ("c", 1, 3, 0.0)) == {}


def test_a_zero_is_not_always_the_least() -> None:
    """Under a softmax it has its share, and where others may be zero too it may be the one that is chosen."""
    shapes = {"a": (12, 8), "c": (4, 12), "t": (12, 4)}
    silent: tuple[Edit, ...] = (("a", 0, 3, 0.0), ("c", 1, 3, 0.0))
    for end in (
        lambda w, h: F.linear(h.relu().softmax(-1), w.c),
        lambda w, h: F.linear(h.relu().log_softmax(-1).exp(), w.c),
        lambda w, h: h.relu().logsumexp(-1),
        lambda w, h: F.embedding(h.relu().argmax(-1), w.t),
        lambda w, h: h.relu().topk(3).values.softmax(-1),
        lambda w, h: h.relu().max(-1).indices.float(),
    ):
        program = captured(shapes, lambda w, x, end=end: end(w, F.linear(x, w.a)), [X])
        assert leaves_out(program, *silent) == {}
    greatest = captured(shapes, lambda w, x: F.linear(x, w.a).relu().amax(-1), [X])
    assert leaves_out(greatest, *silent) == {HIDDEN: [3]}


@pytest.mark.parametrize(
    "into",
    [
        lambda i, v: torch.zeros(3).scatter_add(0, i, v),
        lambda i, v: torch.zeros(3).index_add(0, i, v),
        lambda i, v: torch.zeros(3).index_put((i,), v, accumulate=True),
        lambda i, v: torch.zeros(3).scatter_reduce(0, i, v, "sum"),
    ],
)
def test_what_is_added_up_at_places_is_read(into: Callable[..., Any]) -> None:
    """Positions of `v` are added up at places that a table chooses; its other use is zero."""
    program = captured(
        {"v": (6,), "l": (6, 8), "r": (3, 8)},
        lambda w, x: x @ (w.v @ w.l)[:, None] + into(F.linear(w.l, w.r).argmax(-1), w.v.cos()).sum(),
        [X],
    )
    assert leaves_out(program, ("v", 0, 1, 0.0)) == {}


def test_an_axis_of_which_one_is_left_is_not_squeezed_away() -> None:
    program = captured({"a": (2, 8), "d": (8, 2)}, lambda w, x: F.linear(x, w.a)[:, None].squeeze() @ w.d.t(), [X])
    assert leaves_out(program, ("a", 0, 1, 0.0)) == {("a", 0, 0): [1]}


def test_an_axis_that_is_dead_keeps_one_position() -> None:
    assert leaves_out(mlp(F.relu), ("c", 1, tuple(range(12)), 0.0)) == {HIDDEN: list(range(1, 12))}


def test_what_feeds_only_dead_units_is_dead() -> None:
    program = captured(
        {"a": (12, 8), "c": (10, 12), "d": (4, 10)},
        lambda w, x: F.linear(F.relu(F.linear(F.relu(F.linear(x, w.a)), w.c)), w.d),
        [X],
    )
    with torch.no_grad():
        program.weights["c"].value[[0, 3, 4, 5, 6, 7, 8, 9], 7] = 0.0
    assert leaves_out(program, ("d", 1, (1, 2), 0.0)) == {("a", 0, 0): [7], ("c", 0, 0): [1, 2]}
    assert leaves_out(program, ("d", 1, 1, 0.0)) == {("c", 0, 0): [1]}


def test_what_reads_only_constants_is_constant() -> None:
    """Rows 0 and 1 are constant; row 2 of the next matrix reads only them."""
    program = captured(
        {"a": (12, 8), "c": (10, 12), "d": (4, 10)},
        lambda w, x: F.linear(torch.cos(F.linear(torch.cos(F.linear(x, w.a)), w.c)), w.d),
        [X],
    )
    with torch.no_grad():
        program.weights["c"].value[2, 2:] = 0.0
    assert leaves_out(program, ("a", 0, (0, 1), 0.0)) == {("a", 0, 0): [0, 1], ("c", 0, 0): [2]}


def attention(shapes: dict[str, tuple[int, ...]], heads: int, groups: int, fused: bool = False) -> Program:
    width = 4

    def run(w: Any, x: torch.Tensor) -> torch.Tensor:
        sizes = [heads * width, groups * width, groups * width]
        q, k, v = F.linear(x, w.qkv).split(sizes, -1) if fused else (F.linear(x, m) for m in (w.q, w.k, w.v))
        q, k, v = (y.reshape(1, 5, -1, width).transpose(1, 2) for y in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != groups)
        return F.linear(y.transpose(1, 2).reshape(5, -1), w.o)

    return captured(shapes, run, [X])


@pytest.mark.parametrize("weight", ["v", "o"])
def test_a_head_whose_values_are_zero_or_unused(weight: str) -> None:
    program = attention({**dict.fromkeys("qkv", (12, 8)), "o": (8, 12)}, 3, 3)
    found = leaves_out(program, (weight, 0 if weight == "v" else 1, tuple(range(4, 8)), 0.0))
    assert found == {("q", 0, 0): [1]}


def test_a_head_whose_keys_are_zero_stays() -> None:
    """It takes the mean of its values."""
    program = attention({**dict.fromkeys("qkv", (12, 8)), "o": (8, 12)}, 3, 3)
    assert leaves_out(program, ("k", 0, tuple(range(4, 8)), 0.0)) == {}


def test_a_width_of_keys_or_of_values_that_is_zero_in_every_head() -> None:
    program = attention({**dict.fromkeys("qkv", (12, 8)), "o": (8, 12)}, 3, 3)
    assert leaves_out(program, ("k", 0, (1, 5, 9), 0.0)) == {("q", 0, 1): [1]}
    assert leaves_out(program, ("v", 0, (1, 5, 9), 0.0)) == {("v", 0, 1): [1]}
    assert leaves_out(program, ("k", 0, (1, 5), 0.0)) == {}


def test_heads_in_a_fused_matrix() -> None:
    program = attention({"qkv": (36, 8), "o": (8, 12)}, 3, 3, fused=True)
    assert leaves_out(program, ("qkv", 0, tuple(range(28, 32)), 0.0)) == {("qkv", 0, 0): [1]}
    assert leaves_out(program, ("qkv", 0, tuple(range(16, 20)), 0.0)) == {}


def test_groups_of_heads_that_share_keys() -> None:
    program = attention({"q": (24, 8), "k": (12, 8), "v": (12, 8), "o": (8, 24)}, 6, 3)
    assert leaves_out(program, ("v", 0, tuple(range(4, 8)), 0.0)) == {("q", 0, 0): [1]}
    assert leaves_out(program, ("o", 1, tuple(range(8, 16)), 0.0)) == {("q", 0, 0): [1]}
    assert leaves_out(program, ("o", 1, tuple(range(8, 12)), 0.0)) == {}  # one of a group's two heads


def test_gates() -> None:
    program = captured(
        {"gu": (24, 8), "c": (4, 12)},
        lambda w, x: F.linear(F.silu((y := F.linear(x, w.gu)).chunk(2, -1)[0]) * y.chunk(2, -1)[1], w.c),
        [X],
    )
    assert leaves_out(program, ("gu", 0, (2, 12 + 5), 0.0)) == {("gu", 0, 0): [2, 5]}


def convolutions(padding: int) -> Program:
    def run(w: Any, x: torch.Tensor) -> torch.Tensor:
        y = F.conv2d(x, w.a)
        y = F.batch_norm(y, w.m, w.v.abs() + 1, w.g, w.b).relu()
        y = F.conv2d(y, w.k, padding=padding, groups=6)
        return F.conv2d(y.relu(), w.c, w.d)

    shapes = {"a": (6, 3, 1, 1), "k": (6, 1, 3, 3), "c": (4, 6, 1, 1), "d": (4,)}
    return captured({**shapes, **dict.fromkeys("mvgb", (6,))}, run, [torch.randn(1, 3, 7, 7)])


def test_channels_through_batch_norm_and_depthwise_convolution() -> None:
    dead = ("g", 0, 2, 0.0), ("b", 0, 2, -0.5)  # relu takes the shift away
    assert leaves_out(convolutions(1), *dead) == {("a", 0, 0): [2]}
    assert leaves_out(convolutions(1), ("c", 1, 4, 0.0)) == {("a", 0, 0): [4]}


def test_a_constant_channel_stays_where_it_meets_padding() -> None:
    """At the border it meets zeros, so that what it adds is no constant."""
    program = captured(
        {"a": (6, 3, 1, 1), "b": (6,), "c": (4, 6, 3, 3)},
        lambda w, x: F.conv2d(F.conv2d(x, w.a, w.b), w.c, padding=1),
        [torch.randn(1, 3, 7, 7)],
    )
    assert leaves_out(program, ("a", 0, 2, 0.0)) == {}
    assert leaves_out(program, ("a", 0, 2, 0.0), ("b", 0, 2, 0.0)) == {("a", 0, 0): [2]}
    program = captured(
        {"a": (6, 3, 1, 1), "b": (6,), "c": (4, 6, 3, 3)},
        lambda w, x: F.conv2d(F.conv2d(x, w.a, w.b), w.c),
        [torch.randn(1, 3, 7, 7)],
    )
    assert leaves_out(program, ("a", 0, 2, 0.0)) == {("a", 0, 0): [2]}


def routed(k: int = 2) -> Program:
    """Six experts, of which the router chooses k."""

    def run(w: Any, x: torch.Tensor) -> torch.Tensor:
        shares, chosen = (F.linear(x, w.r) + w.s).softmax(-1).topk(k)
        hidden = torch.einsum("td,tkhd->tkh", x, w.u[chosen]).relu()
        return torch.einsum("tkh,tkdh,tk->td", hidden, w.d[chosen], shares)

    return captured({"r": (6, 8), "s": (6,), "u": (6, 10, 8), "d": (6, 8, 10)}, run, [X])


def test_an_expert_that_is_never_chosen() -> None:
    assert leaves_out(routed(), ("s", 0, (1, 4), -torch.inf)) == {("r", 0, 0): [1, 4]}


def test_an_expert_that_gives_zero_stays() -> None:
    """It takes its share from the others."""
    assert leaves_out(routed(), ("d", 0, 1, 0.0)) == {}


def test_as_many_experts_stay_as_are_chosen() -> None:
    found = leaves_out(routed(k=4), ("s", 0, (0, 1, 4), -torch.inf))
    assert len(found[("r", 0, 0)]) == 2


def test_a_tied_weight_is_told_once() -> None:
    """The matrix of the second layer is that of the first turned round: a unit is dead in both or in none."""
    program = captured({"a": (12, 8)}, lambda w, x: F.linear(F.relu(F.linear(x, w.a)), w.a.t()), [X])
    assert leaves_out(program, ("a", 0, 3, 0.0)) == {HIDDEN: [3]}


def test_plans_are_plain_data(tmp_path: Path) -> None:
    program = edited(mlp(torch.cos), ("a", 0, (0, 3), 0.0), ("c", 1, 7, 0.0))
    plan = DeadUnits().plan(program)
    write_plan(plan, tmp_path, 1)
    once, again = (DeadUnits().apply(program, p).program for p in (plan, read_plan(tmp_path, 1)))
    assert str(once) == str(again)
    assert {n: bits(w.value) for n, w in once.weights.items()} == {n: bits(w.value) for n, w in again.weights.items()}


def test_the_bias_is_a_constant_of_its_own() -> None:
    """The old one leads nowhere; what is left of the others keeps its name, kind and whether it is trained."""
    before = edited(mlp(torch.cos), ("a", 0, 3, 0.0))
    after = optimize(before, "dead-units").program
    assert set(after.weights) == {"a", "b", "c", "folded_d"}
    assert after.aliases["d"].target is None
    kept = [k for k in range(12) if k != 3]
    assert torch.equal(after.weights["a"].value, before.weights["a"].value[kept])
    assert after.weights["a"].trainable
    assert find(after.forward, "linear_2" if "linear_2" in str(after) else "linear_1") is not None
