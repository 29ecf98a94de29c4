"""Random models of repeated blocks, cut and run without any compiler: the same bits, and no piece in common between a
block and one that differs from it in one place."""

from __future__ import annotations

import re
from collections import Counter

import pytest
import torch
from torch import fx

from cut_eager import EagerPieces, calls_of_steps
from laconic.codegen.backend.cut import Cut
from random_block_steps import ENDS, STEPS
from random_blocks import RandomBlocks, observed, random_blocks

#: What programs are made of, each of which must occur among a hundred.
WIRING = {"dynamic batch", "more is returned", "one module many times", "open scope", "period of two", "swapped slots"}
SCOPES = {"autocast around blocks", "no_grad around blocks", "tied weights"}
FEATURES = WIRING | SCOPES | {step.feature for step in STEPS} | {end.feature for end in ENDS}
#: What is planted, by how many among a hundred programs must have it.
KINDS = {"constant": 8, "requires_grad": 2, "stride": 2, "type": 2, "order": 2, "zero": 2, "index": 1, "dtype": 1}
RARE = {"same weight": 0.5, "shared memory": 0.5, "scope": 0.5, "grad scope": 0.5}


def block_and_line(node: fx.Node, program: RandomBlocks) -> tuple[int, int] | None:
    """The block that a call was made in, and the line of the block's source."""
    trace = node.meta.get("stack_trace") or ""
    lines = [int(n) for n in re.findall(rf'File "{re.escape(program.file)}", line (\d+)', trace)]
    return (program.lines.index(lines[0]), lines[-1]) if len(lines) > 1 and lines[0] in program.lines else None


def apart(found: Cut, program: RandomBlocks) -> int:
    """Checks that whatever holds the planted difference is a piece of its own. How many calls hold it.

    Operands in another order are other operands, and no difference, to a piece that is given them.
    """
    planted = (program.planted.block, program.planted.line)
    times = Counter(step.piece for step in found.steps)
    touched = 0
    for step, calls in zip(found.steps, calls_of_steps(found), strict=True):
        for node in calls:
            if block_and_line(node, program) != planted or node.target is torch.ops.laconic.snapshot.default:
                continue
            touched += 1
            given = program.planted.kind == "order" and not set(calls).issuperset(node.all_input_nodes)
            if not given and times[step.piece] > 1:
                raise AssertionError(f"{program.planted} shares a piece: {node}\n{program.source}")
    return touched


def cut_of(program: RandomBlocks, odd: bool) -> Cut | str | None:
    """The first cut of a model, held to eager in all that a caller sees; or why there is none. None if the model does
    not run in eager."""
    try:
        expected = observed(program, odd, lambda model: model)
    except RuntimeError:
        return None
    torch._dynamo.reset()
    backend = EagerPieces()
    found = observed(program, odd, lambda m: torch.compile(m, backend=backend, dynamic=program.dynamic or None))
    assert found == expected, f"seed {program.seed}\n{program.source}"
    return backend.cuts[0] if backend.cuts else backend.refusals[0].reason


def run_seeds(seeds: range, least: int, plain: bool) -> None:
    """At least `least` programs with a difference must have been cut; with `plain`, some are run without it too."""
    tried, refused, seen = 0, Counter[str](), Counter[str]()
    for seed in seeds:
        program = random_blocks(seed)
        found = cut_of(program, odd=True)
        if found is None:
            continue
        tried += 1
        if plain and seed % 3 == 0:
            cut_of(program, odd=False)
        if isinstance(found, str):
            refused[found] += 1
            continue
        with torch.set_grad_enabled(program.training):
            assert apart(found, program), f"seed {seed}: nothing is planted\n{program.source}"
        seen.update([*program.features, f"planted: {program.planted.kind}", "training" if program.training else "no"])
    cut = tried - sum(refused.values())
    print(f"{cut} of {tried} programs cut ({cut / tried:.0%}); refused: {dict(refused)}\n{dict(seen)}")
    assert cut >= least
    assert cut >= 0.8 * tried, f"few are cut: {refused}"
    assert len(seeds) * 0.85 <= tried, "many models do not run in eager"
    if len(seeds) >= 100:
        missing = [feature for feature in FEATURES if not seen[feature]]
        missing += [kind for kind, share in (KINDS | RARE).items() if seen[f"planted: {kind}"] < share * cut / 100]
        assert not missing, f"hardly ever: {missing}\n{seen}"


def test_random_blocks_keep_every_bit_when_cut() -> None:
    run_seeds(range(10), least=8, plain=False)


@pytest.mark.slow
@pytest.mark.parametrize("first", range(1000, 1600, 200))
def test_many_random_blocks_keep_every_bit_when_cut(first: int) -> None:
    run_seeds(range(first, first + 200), least=170, plain=True)
