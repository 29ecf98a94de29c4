"""Cutting: what becomes a piece, what a piece holds, why there is none, and the text of the driver."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import laconic.codegen.backend.cut as cutting
from cut_eager import EagerPieces, emptying
from dynamo_graphs import dynamo_graph
from helpers import bits
from laconic.codegen.backend.backend import plan_cut
from laconic.codegen.backend.cut import Cut
from laconic.codegen.backend.driver import drive, write_driver
from laconic.codegen.backend.stats import GraphRecord
from laconic.ir.dynamo import Refusal

Tensor = torch.Tensor


def weights(count: int = 4, grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(4, 4, generator=generator) - 0.5).requires_grad_(grad) for _ in range(count + 1)]


def planned(function: Callable[..., Any], *inputs: Any, grad: bool = False, dynamic: bool = False) -> Cut | Refusal:
    graph = dynamo_graph(function, *inputs, grad=grad, dynamic=dynamic)
    with torch.set_grad_enabled(grad):
        return plan_cut(graph, GraphRecord())


def cut_of(function: Callable[..., Any], *inputs: Any, grad: bool = False, dynamic: bool = False) -> Cut:
    found = planned(function, *inputs, grad=grad, dynamic=dynamic)
    assert isinstance(found, Cut), found
    return found


def calls(piece: cutting.Piece) -> list[str]:
    nodes = [n for n in piece.graph.graph.nodes if n.op in ("call_function", "call_method")]
    return [getattr(n.target, "__name__", str(n.target)) for n in nodes]


def blocks(x: Tensor, *ws: Tensor) -> Tensor:
    x = F.linear(x, ws[-1])
    for w in ws[:-1]:
        h = F.linear(x, w).sin()
        x = x + h * 2
    return x.neg()


# Pieces


def test_pieces_steps_and_their_bindings() -> None:
    found = cut_of(blocks, *weights(4), torch.rand(4, 4))
    assert [calls(piece) for piece in found.pieces] == [["linear"], ["linear", "sin", "mul", "add"], ["neg"]]
    assert [step.piece for step in found.steps] == [0, 1, 1, 1, 1, 2]
    assert (found.nodes, found.compiled) == (18, 6)
    carried = [step.operands[0] for step in found.steps[1:]]
    assert carried == [step.results[0] for step in found.steps[:-1]]
    assert len({step.operands[1] for step in found.steps[1:5]}) == 4


def test_a_piece_has_a_placeholder_for_each_slot_and_a_tuple_of_outputs() -> None:
    piece = cut_of(blocks, *weights(4), torch.rand(4, 4)).pieces[1]
    names = [node.name for node in piece.graph.graph.nodes if node.op == "placeholder"]
    assert names == ["a0", "a1"]
    assert [tuple(value.shape) for value in piece.examples] == [(4, 4), (4, 4)]
    x, w = torch.rand(4, 4), torch.rand(4, 4)
    (result,) = piece.graph(x, w)
    assert torch.equal(result, x + F.linear(x, w).sin() * 2)


def test_outputs_are_the_union_over_repeats() -> None:
    def function(x: Tensor, *ws: Tensor) -> Any:
        middle = []
        for w in ws:
            h = F.linear(x, w).sin()
            x = (x + h * 2).cos()
            middle.append(h)
        return x, middle[1]

    found = cut_of(function, torch.rand(4, 4), *weights(5))
    steps = [step for step in found.steps if len(step.results) == 2]
    assert len(steps) >= 5
    used = [[result is not None for result in step.results] for step in steps]
    assert used[1] == [True, True]
    assert all(row == [False, True] for k, row in enumerate(used) if k != 1)


def test_scopes_are_entered_inside_pieces() -> None:
    def function(x: Tensor, *ws: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            for w in ws:
                x = F.linear(x, w).float().sin()
                x = x * 2
        return x

    found = cut_of(function, torch.rand(4, 4), *weights(4))
    for piece in found.pieces:
        said = calls(piece)
        assert (said[0], said[-1]) == ("_enter_autocast", "_exit_autocast")
        assert said.count("_enter_autocast") == said.count("_exit_autocast") == 1


def test_a_scope_in_the_middle_of_a_block_stays_there() -> None:
    def function(x: Tensor, *ws: Tensor) -> Tensor:
        for w in ws:
            h = F.linear(x, w)
            with torch.no_grad():
                s = h.abs().amax()
            x = x + h / s
        return x

    found = cut_of(function, torch.rand(4, 4), *weights(5, grad=True), grad=True)
    block = next(calls(p) for p in found.pieces if [s.piece for s in found.steps].count(found.pieces.index(p)) > 2)
    assert block.count("_set_grad_enabled") == 2
    assert abs(block.index("abs") - block.index("amax")) == 1


def test_graphs_inside_ops_are_copied() -> None:
    def function(x: Tensor, *ws: Tensor) -> Tensor:
        for w in ws:
            x = checkpoint(lambda t, w=w: F.linear(t, w).sin(), x.exp(), use_reentrant=False)
        return x

    graph = dynamo_graph(function, torch.rand(4, 4), *weights(5, grad=True), grad=True)
    with torch.enable_grad():
        found = plan_cut(graph, GraphRecord())
    assert isinstance(found, Cut)
    assert len(found.pieces) < len(found.steps)
    theirs = {id(module) for module in graph.modules()}
    for piece in found.pieces:
        for name, body in piece.graph.named_children():
            assert id(body) not in theirs, name


def test_sizes_made_of_symbols_come_with_the_symbols() -> None:
    def function(x: Tensor, *ws: Tensor) -> Tensor:
        x = x.reshape(-1, 4)
        for w in ws:
            x = x + F.linear(x, w).sin()
        return x

    found = cut_of(function, torch.rand(6, 3, 4), *weights(4), dynamic=True)
    repeated = found.pieces[[s.piece for s in found.steps][-1]]
    numbers = [value for value in repeated.examples if isinstance(value, torch.SymInt)]
    tensor = repeated.examples[0]
    symbols = {str(s) for s in tensor.shape[0].node.expr.free_symbols}
    assert len(symbols) == 2
    assert {str(number) for number in numbers} == symbols


def test_text_in_a_higher_order_op_tells_blocks_apart() -> None:
    def function(x: Tensor, *ws: Tensor) -> Tensor:
        for k, w in enumerate(ws):
            x = F.linear(x, w).sin() + x
            torch.ops.higher_order.print(f"block {k // 3}: {{}}", x.mean())
        return x

    found = cut_of(function, torch.rand(6, 4), *weights(6))
    assert [(repeat.period, repeat.count) for repeat in found.repeats] == [(5, 3), (5, 3)]


# Refusals


def _nothing(x: Tensor, *ws: Tensor) -> Tensor:
    return x.sin().cos().exp()


def _little(x: Tensor, *ws: Tensor) -> Tensor:
    x = x.sin().cos().exp().tan().neg().abs().sqrt().log().relu().tanh().floor().ceil().round().sign().erf()
    for w in ws[:2]:
        x = F.linear(x, w)
    return x.cosh().sinh().erf().exp().abs().tan().relu().sin().neg().log().sqrt().cos().floor().sigmoid().sign()


def _number(x: Tensor, *ws: Tensor) -> Tensor:
    scale = x.sum().item()
    for w in ws:
        x = F.linear(x, w).sin() * 2
    return x + scale


def _carried_in_place(x: Tensor, *ws: Tensor) -> Tensor:
    y = x * 2
    views = []
    for w in ws:
        y.add_(F.linear(x + 1, w).sin())
        views.append(y[0])
    return y + sum(views)


def _two_views(x: Tensor, *ws: Tensor) -> Tensor:
    y = x * 2
    view = y.view(-1)
    for w in ws:
        y[0] = F.linear(x, w).sin()[0]
        x = x + view.sum() * 2
    return x + y


REFUSED: list[tuple[Callable[..., Any], bool, str]] = [
    (_nothing, False, "no repeated run"),
    (_little, False, "too little is repeated"),
    (_number, False, "a value that is no tensor crosses a cut"),
    (_carried_in_place, True, "a value that requires gradients is written in place"),
    (_two_views, False, "a value that is written in place leaves its piece in two views"),
]


@pytest.mark.parametrize(("function", "grad", "reason"), REFUSED, ids=[f.__name__[1:] for f, _, _ in REFUSED])
def test_refusals(function: Callable[..., Any], grad: bool, reason: str) -> None:
    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        found = planned(function, torch.rand(4, 4), *weights(5, grad=grad), grad=grad)
    assert isinstance(found, Refusal)
    assert found.reason == reason


def test_a_size_that_no_input_says_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def function(x: Tensor, *ws: Tensor) -> Tensor:
        x = x.reshape(-1, 4)
        for w in ws:
            x = x + F.linear(x, w).sin()
        return x

    monkeypatch.setattr(cutting, "_sizes", lambda graph: {})
    found = planned(function, torch.rand(6, 3, 4), *weights(4), dynamic=True)
    assert isinstance(found, Refusal)
    assert found.reason.startswith("no input says how large s")


# The driver

GOLDEN = """\
def drive(args):
    (v0, v1, v2, v3, v4, v5, ) = args
    args.clear()
    a = [v0, v1]
    del v0, v1
    (v6, ) = f0(a)
    a = [v6, v2]
    del v6, v2
    (v7, ) = f1(a)
    a = [v7, v3]
    del v7, v3
    (v8, ) = f1(a)
    a = [v8, v4]
    del v8, v4
    (v9, ) = f1(a)
    a = [v9, v5]
    del v9, v5
    (v10, ) = f1(a)
    a = [v10]
    del v10
    (v11, ) = f2(a)
    return (v11,)
"""


def test_the_text_of_a_driver() -> None:
    source, constants = write_driver(cut_of(lambda x, *ws: blocks(x, *ws[1:], ws[0]), torch.rand(4, 4), *weights(4)))
    assert source == GOLDEN
    assert not constants


def test_a_driver_returns_what_the_graph_does() -> None:
    """Inputs, the same value twice, constants, values that only the middle makes; unused inputs are let go at once."""

    def function(x: Tensor, *ws: Tensor) -> Any:
        first = x
        kept = []
        for w in ws:
            x = x + F.linear(x, w).sin() * torch.tensor([1.0, 2.0, 3.0, 4.0])
            kept.append(x)
        return [first, x, {"a": x, "b": (kept[1], 3, None)}]

    pieces = EagerPieces()
    inputs = [torch.rand(4, 4), *weights(5)]
    torch._dynamo.reset()
    found = torch.compile(function, backend=pieces)(*inputs)
    assert pieces.cuts
    assert bits(found) == bits(function(*inputs))
    assert found[1] is found[2]["a"]


def test_a_driver_holds_constants_that_the_graph_names() -> None:
    table = torch.rand(4)
    graph = dynamo_graph(blocks, torch.rand(4, 4), *weights(4))
    graph.register_buffer("table", table)
    last = next(node for node in graph.graph.nodes if node.target == "neg")
    with graph.graph.inserting_before(last):
        constant = graph.graph.get_attr("table")
        added = graph.graph.call_function(torch.add, (*last.args, constant))
    added.meta["example_value"] = last.args[0].meta["example_value"]
    last.args = (added,)
    graph.recompile()
    found = plan_cut(graph, GraphRecord())
    assert isinstance(found, Cut)
    source, constants = write_driver(found)
    assert list(constants) == ["c0"]
    assert constants["c0"] is graph.table
    assert "del c0" not in source
    inputs = [torch.rand(4, 4) for node in graph.graph.nodes if node.op == "placeholder"]
    driven = drive(found, [emptying(piece) for piece in found.pieces])
    with torch.no_grad():
        assert bits(driven(*inputs)) == bits(graph(*inputs))


def test_a_driver_leaves_the_recording_of_gradients_as_the_graph_does() -> None:
    def function(x: Tensor, *ws: Tensor) -> Tensor:
        for w in ws:
            x = x + F.linear(x, w).sin()
        torch.set_grad_enabled(False)
        return x * 2

    found = cut_of(function, torch.rand(4, 4), *weights(5, grad=True), grad=True)
    source, _ = write_driver(found)
    assert "set_grad_enabled(False)" in source
    places = [node.meta["example_value"] for node in found.graph.nodes if node.op == "placeholder"]
    driven = drive(found, [emptying(piece) for piece in found.pieces])
    with torch.enable_grad():
        (result,) = driven(*(torch.rand(4, 4, requires_grad=place.requires_grad) for place in places))
        assert not torch.is_grad_enabled()
        assert not result.requires_grad


def test_inputs_are_let_go_after_their_last_use() -> None:
    found = cut_of(blocks, torch.rand(4, 4), *weights(4))
    places = [node for node in found.graph.nodes if node.op == "placeholder"]
    given = [torch.rand(4, 4) for _ in places]
    watched = {node: weakref.ref(value) for node, value in zip(places, given, strict=True)}
    alive: list[int] = []

    def watching(piece: cutting.Piece) -> Callable[[list[Any]], Any]:
        inner = emptying(piece)

        def call(operands: list[Any]) -> Any:
            result = inner(operands)
            alive.append(sum(reference() is not None for reference in watched.values()))
            return result

        return call

    source, constants = write_driver(found)
    scope: dict[str, Any] = {f"f{k}": watching(piece) for k, piece in enumerate(found.pieces)} | constants
    exec(source, scope)
    with torch.no_grad():
        scope["drive"](given)
    assert given == []
    assert alive == [4, 3, 2, 1, 0, 0]


def test_a_graph_of_its_own_is_planned() -> None:
    """What is planned is a copy: the graph is compiled whole if the cut turns out not to work."""
    graph = dynamo_graph(blocks, torch.rand(4, 4), *weights(4))
    before = [node.format_node() for node in graph.graph.nodes]
    assert isinstance(plan_cut(graph, GraphRecord()), Cut)
    assert [node.format_node() for node in graph.graph.nodes] == before
    assert isinstance(graph, fx.GraphModule)
