"""Branches and blocks: what adds nothing is skipped and changes no bit, what is said twice is said once."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

import laconic
from architectures import bert, gpt2, llama, t5, vit
from helpers import apart, bits
from laconic.ir.capture import capture_module
from laconic.ir.depth import Block, Depth
from laconic.ir.errors import UsageError
from laconic.ir.inputs import cases, cases_beside
from laconic.ir.outcomes import Outcomes
from laconic.ir.program import Kind, Program
from laconic.ir.structure import BranchKind
from laconic.ir.types import nbytes
from laconic.ir.verify import verify, verify_rewrite
from laconic.model import Model
from laconic.sources import program_of

PROMPTS = [[5, 6, 7], [9, 8, 7, 6, 5], [4]]
RANDOM: dict[str, Callable[..., Any]] = {"llama": llama, "gpt2": gpt2, "vit": vit, "bert": bert}
ZOO = ("zoo:llama-mha", "zoo:llama-gqa", "zoo:moe", "zoo:moe-sigmoid", "zoo:vit", "zoo:vlm")


@pytest.fixture(
    scope="module",
    params=[*(n if n == "vit" else pytest.param(n, marks=pytest.mark.slow) for n in (*RANDOM, *ZOO))],
)
def program(request: pytest.FixtureRequest) -> Program:
    name: str = request.param
    if name.startswith("zoo:"):
        return program_of(name)
    torch.manual_seed(0)
    module, inputs, axes = RANDOM[name](3)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return capture_module(module.eval(), (), inputs, axes)


@pytest.fixture(scope="module", params=["llama", "t5", *(n for n in ZOO if n != "zoo:vit")])
def cached(request: pytest.FixtureRequest) -> Program:
    """What generates: decoders of the zoo, one with images, and random ones of three layers."""
    name: str = request.param
    if name.startswith("zoo:"):
        return program_of(name, cache=(2, 240) if name == "zoo:vlm" else (3, 16))
    torch.manual_seed(0)
    module, inputs, axes = {"llama": llama, "t5": t5}[name](3)
    for weight in module.parameters():
        torch.nn.init.normal_(weight, std=0.2)
    return laconic.capture(module.eval(), **inputs, dynamic_shapes=axes, cache=(3, 16))


def silent(program: Program, rows: Iterable[str]) -> Program:
    """The program with zeros in these rows."""
    made = apart(program)
    for row in rows:
        made.weights[row].value.detach().zero_()
    return made


def twin(program: Program, pairs: dict[str, str]) -> Program:
    """The program with copies of some rows in others."""
    made = apart(program)
    for row, other in pairs.items():
        made.weights[row].value.detach().copy_(made.weights[other].value.detach())
    return made


def outcomes(program: Program) -> list[dict[str, Any]]:
    """All results of all entries, to the bit; without states."""
    found = Outcomes.of(program, [*cases(program, program.forward), *cases_beside(program)])
    return [{"results": bits(outcome.results)} for outcome in found.outcomes]


def size_of(program: Program, rows: Any) -> int:
    return sum(nbytes(program.weights[row].value) for row in rows)


def changed(before: Program, after: Program) -> None:
    verify(after)
    verify_rewrite(before, after)
    assert outcomes(after) == outcomes(before)


@pytest.mark.parametrize("kind", ["attention", "mlp or moe"])
def test_a_branch_that_adds_nothing_is_skipped(program: Program, kind: str) -> None:
    units = [u for u in Depth(program).units if (u.kind is BranchKind.ATTENTION) == (kind == "attention")]
    behind = set(Depth(program).skip([units[1]]).weights)  # the norm behind an addition stays
    gone = [row for row in units[1].rows if row not in behind]
    planted = silent(program, gone)
    unit = Depth(planted).units[Depth(program).units.index(units[1])]
    after = Depth(planted).skip([unit])
    changed(planted, after)
    assert after.node_count() < planted.node_count()
    assert planted.weight_bytes() - after.weight_bytes() == size_of(planted, gone)
    assert gone
    assert all(after.aliases[row].target is None for row in gone)
    assert len(Depth(after).units) == len(Depth(planted).units) - 1


def test_a_block_that_adds_nothing_is_skipped(program: Program) -> None:
    blocks = [b for b in Depth(program).blocks if b.run == 0]
    planted = silent(program, blocks[1].rows)
    after = Depth(planted).skip_blocks([Depth(planted).blocks[Depth(program).blocks.index(blocks[1])]])
    if _post_norm(program):
        assert len(Depth(after).units) == len(Depth(program).units) - len(blocks[1].units)
        return  # its norms go too: another function
    changed(planted, after)
    assert planted.weight_bytes() - after.weight_bytes() == size_of(planted, blocks[1].rows)


def _post_norm(program: Program) -> bool:
    found = next(iter(Depth(program).structures.values()))
    return any(b.add is not b.out for stream in found.streams for b in stream.branches)


def test_all_but_one_block_may_go(program: Program) -> None:
    depth = Depth(program)
    blocks = [b for b in depth.blocks if b.run == 0]
    after = depth.skip_blocks(blocks[1:])
    verify(after)
    assert len(Depth(after).units) == len(depth.units) - sum(len(b.units) for b in blocks[1:])
    assert outcomes(after) != outcomes(program)


def test_a_block_like_another_reads_its_weights(program: Program) -> None:
    depth = Depth(program)
    donor, block = (b for b in depth.blocks if b.run == 0 and b.number in (0, 1))
    pairs = depth.pairs(block, donor)
    planted = twin(program, pairs)
    again = Depth(planted)
    after = again.repoint(again.blocks[depth.blocks.index(block)], again.blocks[depth.blocks.index(donor)])
    changed(planted, after)
    gone = [row for row in pairs if row not in after.weights]
    assert gone
    assert planted.weight_bytes() - after.weight_bytes() == size_of(planted, gone)
    assert all(after.aliases[row].target == pairs[row] for row in gone)
    assert after.node_count() == planted.node_count()


def test_rows_may_be_kept(program: Program) -> None:
    depth = Depth(program)
    donor, block = (b for b in depth.blocks if b.run == 0 and b.number in (0, 1))
    vectors = [row for row in block.rows if program.weights[row].value.dim() < 2]
    after = depth.repoint(block, donor, keep=vectors)
    verify(after)
    assert all(row in after.weights for row in vectors)
    assert any(row not in after.weights for row in block.rows)


# With caches


def blocks_with_caches(program: Program) -> list[Block]:
    return [b for b in Depth(program).blocks if any(program.weights[row].kind is Kind.STATE for row in b.rows)]


@pytest.mark.slow
def test_caches_go_with_their_block(cached: Program) -> None:
    """In all entries that have it; what is left of the memory is as computed."""
    block = blocks_with_caches(cached)[1]
    states = {row for row in block.rows if cached.weights[row].kind is Kind.STATE}
    planted = silent(cached, block.rows)
    after = Depth(planted).skip_blocks([blocks_with_caches(planted)[1]])
    changed(planted, after)
    assert {row for row in planted.weights if row not in after.weights} == block.rows
    assert planted.weight_bytes() - after.weight_bytes() == size_of(planted, block.rows)
    before, now = Model(planted), Model(after)
    assert before.decoding().cache_bytes - now.decoding().cache_bytes == size_of(planted, states)
    count = sum(weight.kind is Kind.STATE for weight in planted.weights.values())
    assert len(states) * len(blocks_with_caches(planted)) == count
    assert torch.equal(*(m.generate(PROMPTS[:2], max_new_tokens=8) for m in (before, now)))


@pytest.mark.slow
def test_a_shared_block_keeps_a_cache_of_its_own(cached: Program) -> None:
    pairs = Depth(cached).pairs(*blocks_with_caches(cached)[1::-1])
    planted = twin(cached, pairs)
    first, second = blocks_with_caches(planted)[:2]
    after = Depth(planted).repoint(second, first)
    changed(planted, after)
    before, now = Model(planted), Model(after)
    assert now.decoding().cache_bytes == before.decoding().cache_bytes
    assert torch.equal(*(m.generate(PROMPTS[:2], max_new_tokens=8) for m in (before, now)))
    gone = {row for row in second.rows if planted.weights[row].kind is not Kind.STATE}
    assert {row for row in planted.weights if row not in after.weights} == gone
    assert planted.weight_bytes() - after.weight_bytes() == size_of(planted, gone)


@pytest.mark.slow
def test_a_tower_loses_a_block_in_all_entries_that_have_it(cached: Program) -> None:
    """What reads no cache: a tower, or an encoder; the decoders' other entries stay as they were."""
    own = [b for b in Depth(cached).blocks if b not in blocks_with_caches(cached)]
    if not own:
        return
    planted = silent(cached, own[1].rows)
    depth = Depth(planted)
    block = next(b for b in depth.blocks if b.rows == own[1].rows)
    homes = depth.branches(block.units[0].stream, 0)
    assert set(homes) < set(planted.entries)
    after = depth.skip_blocks([block])
    changed(planted, after)
    for name, entry in planted.entries.items():
        assert (len(after.entries[name].graph.nodes) < len(entry.graph.nodes)) == (name in homes)


def test_what_is_used_elsewhere_cannot_be_skipped() -> None:
    class Leaking(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: torch.Tensor) -> Any:
            seen = []
            for layer in self.layers:
                inner = layer(torch.relu(x))
                seen.append(inner)
                x = x + inner
            return x, seen[1] * 2

    depth = Depth(capture_module(Leaking(), (torch.randn(2, 8),), {}))
    with pytest.raises(UsageError, match="cannot be skipped") as caught:
        depth.skip([depth.units[1]])
    assert "is used by %mul" in str(caught.value)
    verify(depth.skip([depth.units[0]]))


def test_blocks_of_other_runs_are_not_alike(program: Program) -> None:
    depth = Depth(program)
    other = Block(7, 0, depth.blocks[0].units)
    with pytest.raises(UsageError, match="are not alike"):
        depth.repoint(depth.blocks[1], other)
