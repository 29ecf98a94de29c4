"""How long the exact preset takes on large graphs, each pass verified: processor seconds, linear in the nodes."""

from __future__ import annotations

import importlib.util
import time
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
import torch

from laconic.ir.errors import VerificationError
from laconic.ir.program import Alias, Program
from laconic.ir.propagate import computed_types, recompute
from laconic.ir.signature import fingerprint
from laconic.ir.torch_private import quiet
from laconic.ir.types import same_type, type_of
from laconic.ir.verify import verify
from laconic.passes.manager import PassManager, Run
from laconic.passes.pipeline import parse_pipeline

_SCRIPT = Path(__file__).parents[2] / "benchmarks" / "graph_10k.py"


@pytest.fixture(scope="module")
def deep() -> ModuleType:
    """The benchmark, whose `graph` makes a decoder of about 68 nodes a layer."""
    spec = importlib.util.spec_from_file_location("graph_10k", _SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run(program: Program) -> tuple[float, Run]:
    start = time.process_time()
    found = PassManager(parse_pipeline("exact"), verify_each=True, check_contracts=False).run(program)
    return time.process_time() - start, found


@pytest.mark.slow
@pytest.mark.usefixtures("quick_collections")
def test_2000_nodes_take_seconds_and_time_is_linear(deep: ModuleType) -> None:
    small, large = deep.graph(8, False), deep.graph(32, False)
    assert large.node_count() > 2000
    run(small)  # what is done once: imports, caches
    (few, _), (many, found) = min((run(small) for _ in range(2)), key=lambda r: r[0]), run(large)
    assert many < 2.5
    assert many < 4 * 2 * few
    assert [row.modified for row in found.ledger.rows] == [True] * 4
    assert found.ledger.after.nodes < 0.8 * large.node_count()


@pytest.mark.slow
@pytest.mark.parametrize("dynamic", [False, True])
def test_a_graph_of_10000_nodes_takes_less_than_ten_seconds(deep: ModuleType, dynamic: bool) -> None:
    program = deep.graph(deep.LAYERS, dynamic)
    assert program.node_count() > 10000
    seconds, found = run(program)
    assert seconds < 10
    assert found.ledger.after.nodes < 0.8 * program.node_count()


def test_types_computed_once_for_equal_calls_are_those_of_each_call(deep: ModuleType) -> None:
    program = deep.graph(2, True)
    found = list(computed_types(program, program.forward.calls()))
    assert [node for node, _ in found] == list(program.forward.calls())
    assert all(same_type(kind, type_of(recompute(program, node))) for node, kind in found)


def test_a_stale_type_in_the_second_of_two_equal_calls_is_seen(deep: ModuleType) -> None:
    program = deep.graph(2, False)
    second = [n for n in program.forward.calls() if n.target is torch.ops.aten.gelu.default][1]
    with quiet(program.mode):
        second.meta["val"] = torch.empty_like(second.meta["val"], dtype=torch.float64)
    with pytest.raises(VerificationError, match=rf"%{second.name} is recorded as f64"):
        verify(program)


def test_the_fingerprint_sees_what_the_text_says(deep: ModuleType) -> None:
    program = deep.graph(1, True)
    known = fingerprint(program)
    assert fingerprint(program.clone()) == known
    for change in _CHANGES:
        changed = program.clone()
        change(changed)
        assert fingerprint(changed) != known, change.__name__
        assert fingerprint(program) == known


def _literal(program: Program) -> None:
    node = next(n for n in program.forward.calls() if n.target is torch.ops.aten.div.Tensor)
    node.args = (node.args[0], 3)


def _operand(program: Program) -> None:
    node = next(n for n in program.forward.calls() if n.target is torch.ops.aten.softmax.int)
    node.args = (node.args[0].args[0], *node.args[1:])


def _keyword(program: Program) -> None:
    next(n for n in program.forward.calls() if not n.kwargs).kwargs = {"alpha": 1}


def _type(program: Program) -> None:
    node = next(n for n in program.forward.calls() if n.target is torch.ops.aten.softmax.int)
    node.meta["val"] = node.meta["val"].double()


def _site(program: Program) -> None:
    next(iter(program.forward.calls())).meta["site"] = 99


def _provenance(program: Program) -> None:
    next(iter(program.forward.calls())).meta["by"] = "someone"


def _fact(program: Program) -> None:
    program.facts["model"] = "another"


def _trained(program: Program) -> None:
    program.weights["gain"] = replace(program.weights["gain"], trainable=False)


def _alias(program: Program) -> None:
    program.aliases["old"] = Alias("gain")


def _order(program: Program) -> None:
    program.weights = dict(reversed(program.weights.items()))


_CHANGES = [_literal, _operand, _keyword, _type, _site, _provenance, _fact, _trained, _alias, _order]
