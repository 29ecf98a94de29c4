"""Gates: what is skipped or known is not computed, and not a bit of the rest differs."""

from __future__ import annotations

import itertools
import random
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from architectures import captured, wide
from helpers import bits
from laconic.ir.capture import capture_module
from laconic.ir.data import flat_inputs
from laconic.ir.depth import Depth
from laconic.ir.errors import UsageError
from laconic.ir.gated import Candidate, Gate, Gated, Instead, Memo, replaced_by, scaled_by
from laconic.ir.metrics.quality import Divergence
from laconic.ir.program import Program
from laconic.ir.run import evaluate
from laconic.ir.score import Scorer
from sequences import Ragged

LAYERS = 5
DATA = Ragged((9, 14, 6, 11, 12, 7), rows=3)


@pytest.fixture(scope="module")
def program() -> Program:
    return captured(wide(LAYERS))


@pytest.fixture(scope="module")
def ends(program: Program) -> list[tuple[str, str]]:
    """What goes into each block, and what comes out."""
    depth = Depth(program)
    first = [depth.branches(block.units[0].stream, block.units[0].place)["forward"] for block in depth.blocks]
    last = [depth.branches(block.units[-1].stream, block.units[-1].place)["forward"] for block in depth.blocks]
    return [(a.v.name, b.out.name) for a, b in zip(first, last, strict=True)]


@pytest.fixture(scope="module")
def gated(program: Program, ends: list[tuple[str, str]]) -> Gated:
    return Gated(program, gates(program, ends))


def gates(program: Program, ends: list[tuple[str, str]]) -> list[Gate]:
    """A gate on each block, and on each block's down projection."""
    nodes = program.forward.weight_nodes()
    blocks = [Gate(f"block {k}", out, beside=v) for k, (v, out) in enumerate(ends)]
    return blocks + [Gate(f"down {k}", nodes[down(k)].name) for k in range(LAYERS)]


def down(k: int) -> str:
    return f"model.layers.{k}.mlp.down_proj.weight"


def inputs(program: Program, k: int = 0) -> list[torch.Tensor]:
    return flat_inputs(program, DATA.batch(k), "")


class Counted(TorchDispatchMode):
    """How many products are computed."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.products += function.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.linear)
        return function(*args, **(kwargs or {}))


def test_open_gates_change_no_bit(program: Program, gated: Gated) -> None:
    wanted = evaluate(program, program.forward, inputs(program))
    assert bits(gated({}, inputs(program)).results) == bits(wanted.results)


def test_skipped_blocks_are_those_of_the_rewritten_program(
    program: Program, gated: Gated, ends: list[tuple[str, str]]
) -> None:
    after = program.clone()
    depth = Depth(program.clone())
    depth.skip_blocks([depth.blocks[1], depth.blocks[2]], into=after)
    found = gated({f"block {k}": Instead(ends[k][0]) for k in (1, 2)}, inputs(program))
    assert bits(found.results) == bits(evaluate(after, after.forward, inputs(program)).results)


def test_weights_read_instead_are_those_of_the_rewritten_program(program: Program, gated: Gated) -> None:
    after = program.clone()
    depth = Depth(program.clone())
    pairs = depth.pairs(depth.blocks[3], depth.blocks[0])
    depth.repoint(depth.blocks[3], depth.blocks[0], set(pairs) - {down(3)}, into=after)
    node = program.forward.weight_nodes()[down(0)].name
    found = gated({"down 3": Instead(node)}, inputs(program))
    assert bits(found.results) == bits(evaluate(after, after.forward, inputs(program)).results)
    other = torch.zeros_like(program.weights[down(0)].value)
    both = gated({"down 3": Instead(node), "down 0": replaced_by(other)}, inputs(program))
    each = gated({"down 3": replaced_by(other), "down 0": replaced_by(other)}, inputs(program))
    assert bits(both.results) == bits(each.results) != bits(found.results)


def drawn(draw: random.Random, program: Program, ends: list[tuple[str, str]]) -> Candidate:
    """Some of the gates do something."""
    found: dict[str, Any] = {}
    nodes = program.forward.weight_nodes()
    for k in draw.sample(range(LAYERS), draw.randint(0, 3)):
        settings = (Instead(ends[k][0]), 0.5, torch.tensor(0.25), scaled_by(0.75))
        found[f"block {k}"] = draw.choice(settings[: 1 + draw.randint(0, 3)])
    if draw.random() < 0.5:
        k, other = draw.sample(range(LAYERS), 2)
        found[f"down {k}"] = draw.choice((Instead(nodes[down(other)].name), 0.5))
    return found


@pytest.mark.parametrize("room", [0, 100_000, 1 << 30])
def test_what_is_remembered_changes_no_bit(
    room: int, program: Program, gated: Gated, ends: list[tuple[str, str]]
) -> None:
    draw, memo = random.Random(0), Memo(room)
    for _ in range(60):
        candidate, k = drawn(draw, program, ends), draw.randrange(len(DATA))
        told, given = gated.told(candidate), inputs(program, k)
        assert bits(gated.run(told, given, memo, k).results) == bits(gated(candidate, given).results)


def test_what_nobody_reads_or_is_known_is_not_computed(
    program: Program, gated: Gated, ends: list[tuple[str, str]]
) -> None:
    def products(candidate: Candidate, memo: Memo | None = None) -> int:
        with Counted() as counted:
            gated.run(gated.told(candidate), inputs(program), memo)
        return counted.products

    whole, block = products({}), 7
    assert whole == LAYERS * block + 1
    skipped = {f"block {k}": Instead(ends[k][0]) for k in (1, 3)}
    assert products(skipped) == whole - 2 * block
    memo = Memo(1 << 30)
    assert products({}, memo) == whole
    assert products({}, memo) == 1, "all but the head is known"
    assert products(skipped, memo) == 2 * block + 1, "blocks 2 and 4 read something else than before"
    assert products({"block 3": Instead(ends[3][0])}, memo) == block + 1
    down_2 = {"down 2": Instead(program.forward.weight_nodes()[down(0)].name)}
    assert products(down_2, memo) == 1 + 2 * block + 3, "the attention before it is known"
    assert products({"block 0": 0.5}, memo) == products({"block 0": 0.25}, memo) == 4 * block + 1
    assert products({"block 0": 0.5}, memo) == 1
    assert products({"block 0": torch.tensor(0.5)}, memo) == 4 * block + 1, "who knows what a tensor is later on"


def test_what_was_judged_is_not_run_again(program: Program, ends: list[tuple[str, str]]) -> None:
    score = Scorer(program, gates(program, ends), DATA, Divergence())
    value = score({"block 1": Instead(ends[1][0])})
    with Counted() as counted:
        assert score({"block 1": Instead(ends[1][0])}) == value
        assert counted.products == 0
        assert score({"block 1": scaled_by(0.0)}) == pytest.approx(value, rel=1e-5)
        assert counted.products


def test_gates_that_lead_nowhere(program: Program, gated: Gated, ends: list[tuple[str, str]]) -> None:
    nodes = program.forward.weight_nodes()
    with pytest.raises(UsageError, match="no node 'nowhere' for the gate 'block 1' to lead to"):
        gated({"block 1": Instead("nowhere")}, inputs(program))
    for node in (ends[1][1], ends[2][1]):
        with pytest.raises(UsageError, match=f"'block 1' leads to '{node}', which stands behind it"):
            gated({"block 1": Instead(node)}, inputs(program))
    circle = {"down 0": Instead(nodes[down(1)].name), "down 1": Instead(nodes[down(0)].name)}
    with pytest.raises(UsageError, match="in a circle"):
        gated(circle, inputs(program))
    rows = sorted((nodes[down(k)].name for k in (0, 1)), key=[n.name for n in program.forward.graph.nodes].index)
    twisted = Gated(program, [Gate("a", rows[0]), Gate("b", rows[1], beside=rows[0])])
    with pytest.raises(UsageError, match="in a circle"):
        twisted({"a": Instead(rows[1]), "b": lambda value, other: other}, inputs(program))
    for beside in (ends[1][0], ends[0][0]):
        with pytest.raises(UsageError, match="does not stand before"):
            Gated(program, [Gate("a", ends[0][0], beside=beside)])


def test_gates_on_weights_may_read_each_other_in_any_order(program: Program) -> None:
    rows = [program.forward.weight_nodes()[down(k)].name for k in range(2)]
    places = [Gate("a", rows[0]), Gate("b", rows[1]), Gate("c", rows[1])]
    candidate: Candidate = {"a": 0.5, "b": Instead(rows[0]), "c": 0.25}
    wanted = bits(Gated(program, places)(candidate, inputs(program)).results)
    for order in itertools.permutations(range(3)):
        if order.index(1) < order.index(2):
            made = Gated(program, [places[k] for k in order])
            assert bits(made(candidate, inputs(program)).results) == wanted
    beside = [Gate("a", rows[0]), Gate("b", rows[1], beside=rows[0])]
    found = Gated(program, beside)({"a": 0.5, "b": lambda value, other: other * 0.25}, inputs(program))
    assert bits(found.results) == wanted


class Noisy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + torch.tanh(layer(x)) * torch.rand_like(x)
        return x


def test_chance_is_not_remembered() -> None:
    made = Gated(capture_module(Noisy().eval(), (torch.randn(2, 8),), {}, None), [])
    told, memo = made.told({}), Memo(1 << 30)
    assert told.key is None
    first, second = (bits(made.run(told, [torch.ones(2, 8)], memo).results) for _ in range(2))
    assert first != second


def test_a_number_is_known_with_its_kind(gated: Gated) -> None:
    keys = {gated.told({"block 1": factor}).key for factor in (1, 1.0, True, -0.0, 0.0, 10**400)}
    assert len(keys) == 6


def test_the_oldest_goes_first() -> None:
    memo, value = Memo(3 * 400), torch.zeros(100)
    for key in "abc":
        memo.put(key, value.clone())
    memo.get("a")
    memo.put("d", value.clone())
    assert [key in memo for key in "abcd"] == [True, False, True, True]
    memo.put("e", torch.zeros(1000))
    assert [key in memo for key in "ae"] == [True, False]
