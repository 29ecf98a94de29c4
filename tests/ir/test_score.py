"""Candidates judged through gates: what a rewritten program would give, at the price of a run."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch

from architectures import llama
from laconic.ir.capture import capture_module
from laconic.ir.data import Data
from laconic.ir.errors import UsageError
from laconic.ir.evidence import boundaries
from laconic.ir.gated import Gate
from laconic.ir.interpret import Interpreter
from laconic.ir.metrics.costs import Latency
from laconic.ir.metrics.quality import Divergence, Nats
from laconic.ir.program import Program
from laconic.ir.quality import named_results
from laconic.ir.score import Scorer
from laconic.ir.structure import entry_structure
from sequences import Ragged


def captured(layers: int) -> tuple[Any, Program]:
    torch.manual_seed(0)
    model, inputs, axes = llama(layers)
    return model.eval(), capture_module(model, (), inputs, axes)


@pytest.fixture(scope="module")
def subject() -> tuple[Any, Program]:
    return captured(4)


def gates(program: Program) -> list[Gate]:
    """One for what each residual branch adds."""
    structure = entry_structure(program, program.forward)
    found = []
    for k, branch in enumerate(structure.streams[0].branches):
        (added,) = [n for n in branch.add.all_input_nodes if n is not branch.v]
        found.append(Gate(f"branch {k}", added.name))
    return found


def nats(model: Any, data: Data) -> float:
    total = count = 0.0
    with torch.no_grad():
        for batch in data:
            part = Nats().parts({"logits": model(**batch.inputs, use_cache=False).logits}, batch, None)
            total, count = total + float(part.sums.sum()), count + float(part.weights.sum())
    return total / count


def test_a_closed_gate_is_a_zero_branch(subject: tuple[Any, Program]) -> None:
    model, program = subject
    data = Ragged()
    score = Scorer(program, gates(program), data, Nats())
    assert score({}) == pytest.approx(nats(model, data), rel=1e-6)
    found = score({"branch 2": 0.0, "branch 5": 0.5})
    branches = [model.model.layers[1].self_attn.o_proj.weight, model.model.layers[2].mlp.down_proj.weight]
    kept = [w.detach().clone() for w in branches]
    with torch.no_grad():
        branches[0].zero_()
        branches[1].mul_(0.5)
        wanted = nats(model, data)
        for weight, value in zip(branches, kept, strict=True):
            weight.copy_(value)
    assert found == pytest.approx(wanted, rel=1e-6)
    assert score({}) == pytest.approx(nats(model, data), rel=1e-6)


def test_a_gate_may_be_any_function(subject: tuple[Any, Program]) -> None:
    _, program = subject
    score = Scorer(program, gates(program), Ragged(), Nats())
    mask = torch.ones(32)
    mask[::2] = 0
    assert score({"branch 0": mask}) == score({"branch 0": lambda value: value * mask})
    assert score({"branch 0": mask}) != score({})


def test_divergence_is_from_the_open_model(subject: tuple[Any, Program]) -> None:
    _, program = subject
    score = Scorer(program, gates(program), Ragged(), Divergence())
    assert score({}) == 0.0
    assert score({"branch 3": 0.0}) > 1e-6


def test_an_unknown_gate_is_told(subject: tuple[Any, Program]) -> None:
    _, program = subject
    with pytest.raises(UsageError, match=r"no gate 'branch 99'"):
        Scorer(program, gates(program), Ragged(), Nats())({"branch 99": 0.0})


def test_gates_at_one_place_act_together(subject: tuple[Any, Program]) -> None:
    _, program = subject
    node = gates(program)[3].node
    score = Scorer(program, [Gate("a", node), Gate("b", node), *gates(program)[:1]], Ragged(), Nats())
    assert score({"a": 0.0}) == score({"b": 0.0}) != score({})
    assert score({"a": 0.5, "b": 0.5}) == score({"a": 0.25})


def test_gates_that_are_none(subject: tuple[Any, Program]) -> None:
    _, program = subject
    node = gates(program)[0].node
    with pytest.raises(UsageError, match="two gates are named 'a'"):
        Scorer(program, [Gate("a", node), Gate("a", node)], Ragged(), Nats())
    with pytest.raises(UsageError, match="no node 'nowhere' for the gate 'a'"):
        Scorer(program, [Gate("a", "nowhere")], Ragged(), Nats())
    with pytest.raises(UsageError, match="latency runs the model itself"):
        Scorer(program, [Gate("a", node)], Ragged(), Latency())


@pytest.mark.slow
def test_a_hundred_candidates_cost_a_hundred_runs() -> None:
    _, program = captured(12)
    data = Ragged(lengths=(48,) * 16, rows=16)
    structure = entry_structure(program, program.forward)
    assert len(boundaries(structure, structure.runs[0])) == 13
    places = gates(program)
    score = Scorer(program, places, data, Nats())
    plain = Interpreter(program, [])
    batch = data.batch(0)
    inputs = [batch.inputs["input_ids"], batch.inputs["attention_mask"]]

    def run() -> None:
        Nats().parts(named_results(program.forward, plain(inputs).results), batch, None)

    ratios = []
    for _ in range(3):
        for warm in (run, lambda: score({})):
            warm()
        start = time.perf_counter()
        for _ in range(100):
            run()
        middle = time.perf_counter()
        for k in range(100):
            score({places[k % len(places)].name: 0.0})
        ratios.append((time.perf_counter() - middle) / (middle - start))
    assert sorted(ratios)[1] < 1.2
