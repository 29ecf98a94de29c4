"""Reading a graph of Dynamo's: scopes, what a call says, which values share memory, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dynamo_graphs import dynamo_graph, read
from laconic.ir.dynamo import Reading, Refusal, memory, obstacle, parts_beside_their_tuple, read_dynamo
from laconic.ir.torch_private import FakeTensorMode, shape_env

Tensor = torch.Tensor


def square(seed: int = 0) -> Tensor:
    return torch.rand(4, 4, generator=torch.Generator().manual_seed(seed))


def says(reading: Reading) -> list[str]:
    return [getattr(node.target, "__name__", str(node.target)) for node in reading.nodes]


def alike(reading: Reading, period: int) -> bool:
    """Whether the first `period` calls of a graph say what the next ones do."""
    return reading.listing.block(0, period)[0] == reading.listing.block(period, period)[0]


# Scopes


def test_a_scope_is_a_property_of_calls() -> None:
    def function(x: Tensor) -> Tensor:
        x = x.sin()
        with torch.autocast("cpu", torch.bfloat16):
            x = x @ x
            with torch.autocast("cpu", enabled=False):
                x = x.float().cos()
        return x.neg()

    reading = read(function, square())
    assert says(reading) == ["sin", "matmul", "float", "cos", "neg"]
    assert [len(scope.entered) for scope in reading.scopes] == [0, 1, 2, 2, 0]
    assert reading.scopes[1].entered == reading.scopes[2].entered[:1]
    assert reading.base == reading.final == reading.scopes[0]


def test_recording_of_gradients_is_part_of_the_scope() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.no_grad():
            x = x.sin()
        return x.cos()

    reading = read(function, square().requires_grad_(), grad=True)
    assert [scope.grad for scope in reading.scopes] == [False, True]
    assert reading.recording
    assert not read(function, square()).recording


def test_what_a_graph_leaves_behind() -> None:
    def function(x: Tensor) -> Tensor:
        x = x.sin()
        torch.set_grad_enabled(False)
        return x.cos()

    reading = read(function, square().requires_grad_(), grad=True)
    assert (reading.base.grad, reading.final.grad) == (True, False)


def test_calls_in_another_scope_say_something_else() -> None:
    def function(x: Tensor, late: bool) -> Tensor:
        for k in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=k == late):
                x = x.sin().cos()
        return x

    assert not alike(read(function, square(), 1), 2)
    assert alike(read(function, square(), 2), 2)


# What a call says

CONSTANTS: list[tuple[Any, Any]] = [
    (lambda x: x + 1, lambda x: x + 1.0),
    (lambda x: x * 0.0, lambda x: x * -0.0),
    (lambda x: x + 1, lambda x: x + True),
    (lambda x: x.sum(0, True), lambda x: x.sum(0, keepdim=True)),
    (lambda x: x.transpose(0, 1), lambda x: x.transpose(1, 0)),
    (lambda x: F.dropout(x, 0.5), lambda x: F.dropout(x, 0.25)),
]


@pytest.mark.parametrize("number", range(len(CONSTANTS)))
def test_constants_count_by_type_and_text(number: int) -> None:
    first, second = CONSTANTS[number]
    assert alike(read(lambda x, y: (first(x), first(y)), square(), square()), 1)
    assert not alike(read(lambda x, y: (first(x), second(y)), square(), square()), 1)


def test_a_list_as_an_index_is_no_tuple() -> None:
    def function(x: Tensor, y: Tensor, index: Any, other: Any) -> None:
        x[index] = 0.5
        y[other] = 0.5

    inputs = square(), square()
    assert not alike(read(function, *inputs, [0, 1], (0, 1)), 1)
    assert alike(read(function, *inputs, [0, 1], [0, 1]), 1)


def test_strides_types_and_gradients_of_operands_count() -> None:
    def function(x: Tensor, y: Tensor) -> Any:
        return x.sin().cos(), y.sin().cos()

    assert alike(read(function, square(), square()), 2)
    assert not alike(read(function, square(), square().t()), 2)
    assert not alike(read(function, square(), square().double()), 2)
    assert not alike(read(function, square(), square().requires_grad_(), grad=True), 2)
    assert alike(read(function, square(), square().requires_grad_()), 2), "nothing is recorded"


def test_which_operands_share_memory_counts() -> None:
    def function(a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Any:
        return torch.add(a, b), torch.add(c, d)

    def rows(values: Tensor) -> list[Tensor]:
        return [values[0], values[1]]

    apart = [torch.rand(4) for _ in range(2)]
    assert alike(read(function, *rows(square()), *rows(square())), 1)
    assert not alike(read(function, *rows(square()), *apart), 1)
    assert not alike(read(function, *rows(square()), *rows(square())[::-1]), 1)
    assert alike(read(function, *rows(square()[2:]), *rows(square()[1:])), 1), "how far apart, not where"


@pytest.mark.parametrize(("factor", "same"), [(2.0, True), (3.0, False)])
def test_graphs_inside_ops_count_by_what_they_say(factor: float, same: bool) -> None:
    def function(x: Tensor) -> Tensor:
        x = checkpoint(lambda t: t.sin() * 2.0, x.exp(), use_reentrant=False)
        return checkpoint(lambda t: t.sin() * factor, x, use_reentrant=False)

    graph = dynamo_graph(function, square().requires_grad_(), grad=True)
    parts_beside_their_tuple(graph.graph)
    reading = read_dynamo(graph.graph, True)
    assert isinstance(reading, Reading)
    bodies = [str(node.args[0]) for node in reading.nodes if "checkpoint" in str(node.target)]
    assert len(set(bodies)) == 2
    (first, second) = [k for k, node in enumerate(reading.nodes) if "checkpoint" in str(node.target)]
    assert (reading.listing.signatures[first] == reading.listing.signatures[second]) is same


def test_sizes_are_read_without_guards() -> None:
    def function(x: Tensor) -> Tensor:
        for _ in range(3):
            x = x.view(x.shape[0] // 2, -1).reshape(x.shape[0], 4) + x.shape[0]
        return x

    graph = dynamo_graph(function, torch.rand(6, 4), dynamic=True)
    tensor = next(n.meta["example_value"] for n in graph.graph.nodes if isinstance(n.meta.get("example_value"), Tensor))
    before = len(shape_env(tensor.fake_mode).guards)
    reading = read_dynamo(graph.graph, False)
    assert isinstance(reading, Reading)
    assert len(shape_env(tensor.fake_mode).guards) == before
    assert len(reading.listing.signatures) == len(reading.nodes)


# Tuples and what is returned


def test_elements_are_moved_beside_their_tuple() -> None:
    def function(x: Tensor) -> Tensor:
        parts = x.split(2)
        y = x.sin()
        return parts[0] + y[:2] + parts[1]

    graph = dynamo_graph(function, square())
    nodes = {node.name: node for node in graph.graph.nodes}
    late = next(n for n in nodes.values() if n.target == "sin")
    element = next(n for n in nodes.values() if n.op == "call_function" and n.args[1:] == (1,))
    late.append(element)  # as where a tuple is taken apart late
    parts_beside_their_tuple(graph.graph)
    graph.graph.lint()
    reading = read_dynamo(graph.graph, False)
    assert isinstance(reading, Reading)
    assert says(reading)[:3] == ["split", "getitem", "getitem"]
    assert reading.listing.uncut == {0}


def test_what_is_returned_leaves_its_block() -> None:
    reading = read(lambda x: (x.sin(), x.cos().neg()), square())
    assert says(reading) == ["sin", "cos", "neg"]
    assert reading.listing.kept == {0, 2}


def test_constant_tensors_are_operands() -> None:
    table = square()

    def function(x: Tensor) -> Tensor:
        return x + torch.tensor([1.0, 2.0, 3.0, 4.0]) + table

    reading = read(function, square())
    for operands in reading.listing.operands:
        for operand in operands:
            assert isinstance(operand, (int, fx.Node))


def test_memory_tells_views_from_copies() -> None:
    reading = read(lambda x: (x.view(-1), x.t(), x.clone(), x.split(2)), square())
    x = reading.nodes[0].all_input_nodes[0]
    assert [memory(node) == memory(x) for node in reading.nodes[:3]] == [True, True, False]
    assert memory(next(node for node in reading.nodes if node.target == "split")) is None


# Refusals


def _hooked(x: Tensor) -> Tensor:
    with torch.autograd.graph.disable_saved_tensors_hooks("no"):
        return x.sin()


def _transposed(x: Tensor) -> Tensor:
    y = x + 1
    y.t_()
    return y


REFUSED: list[tuple[str, Callable[[Tensor], Any], str, str]] = [
    ("a form that changes", _transposed, "t_ changes a tensor's form in place", "t_"),
    ("state", _hooked, "_saved_tensors_hooks_disable may change global state", "_saved_tensors_hooks_disable"),
    ("vmap", lambda x: torch.func.vmap(lambda row: row.sin())(x), "lazy_load_decompositions may change", "lazy"),
]


@pytest.mark.parametrize(("function", "reason", "node"), [r[1:] for r in REFUSED], ids=[r[0] for r in REFUSED])
def test_refusals_name_the_call(function: Callable[[Tensor], Any], reason: str, node: str) -> None:
    graph = dynamo_graph(function, square()).graph
    refused = read_dynamo(graph, False)
    assert isinstance(refused, Refusal)
    assert refused.reason.startswith(reason)
    assert refused.node.startswith(node)
    assert str(refused) == f"{refused.reason} (%{refused.node})"
    assert obstacle(graph) == refused


class Named(Tensor):
    """A subclass that does nothing."""

    __torch_function__ = torch._C._disabled_torch_function_impl


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (square().as_subclass(Named), "a value is a Named"),
        (FakeTensorMode().from_tensor(square().to_sparse()), "a value is torch.sparse_coo"),
    ],
)
def test_values_of_other_kinds_are_refused_though_only_an_input_is_one(value: Tensor, reason: str) -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    x.meta["example_value"] = value
    graph.output((graph.call_method("sin", (x,)),))
    assert obstacle(graph) == Refusal(reason, "x")


def test_modules_called_as_a_whole_are_refused() -> None:
    root = nn.Module()
    root.inner = nn.Linear(2, 2)
    graph = fx.Graph(root)
    graph.output((graph.call_module("inner", (graph.placeholder("x"),)),))
    assert obstacle(graph) == Refusal("a module is called as a whole", "inner")


def test_a_scope_that_is_not_left_is_refused() -> None:
    def function(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return x @ x

    graph = dynamo_graph(function, square()).graph
    leaving = next(node for node in graph.nodes if "exit_autocast" in str(node.target))
    graph.erase_node(leaving)
    assert read_dynamo(graph, False) == Refusal("a scope is left open")
