"""In-place calls said out of place: where that is the same, and where it would not be; and reads through copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from helpers import bits
from laconic.codegen.backend.out_of_place import autocast_is_on, out_of_place
from laconic.codegen.backend.snapshots import read_through_copies
from laconic.ir.torch_traits import written

Tensor = torch.Tensor
Function = Callable[..., Any]


def given(grad: bool = False) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.rand(4, 6, generator=generator).requires_grad_(grad), torch.rand(4, 6, generator=generator)]


def outcome(run: Function, grad: bool) -> Any:
    """Results, the gradient of the first input, and both inputs afterwards."""
    inputs = given(grad)
    torch.manual_seed(3)
    with torch.set_grad_enabled(grad):
        results = run(*inputs)
    results = results if isinstance(results, (tuple, list)) else (results,)
    wanted = [r.double().square().sum() for r in results if r.requires_grad]
    if wanted:
        torch.stack(wanted).sum().backward()
    return bits(([r.detach() for r in results], [r.requires_grad for r in results], [*inputs, inputs[0].grad]))


def changed(function: Function, grad: bool, change: Callable[[fx.Graph], int]) -> tuple[int, fx.Graph]:
    """What a change of a function's graph returns, and the graph, which computes the same in any case."""
    found: list[tuple[int, fx.Graph]] = []

    def backend(graph: fx.GraphModule, examples: list[Any]) -> Function:
        found.append((change(graph.graph), graph.graph))
        graph.graph.lint()
        graph.recompile()
        return graph.forward

    torch._dynamo.reset()
    assert outcome(torch.compile(function, backend=backend, fullgraph=True), grad) == outcome(function, grad)
    (only,) = found
    return only


def rewritten(function: Function, grad: bool = True) -> tuple[int, fx.Graph]:
    return changed(function, grad, lambda graph: out_of_place(graph, grad, autocast_is_on(graph)))


def methods(x: Tensor, y: Tensor) -> Tensor:
    return x.sin().add_(y).mul_(2.0).clamp_(0.1, 1.5)


def operators(x: Tensor, y: Tensor) -> Tensor:
    x = x.sin()
    x += y
    x *= 2
    x -= 0.5
    return x


def functions(x: Tensor, y: Tensor) -> Tensor:
    return torch.relu_(F.dropout(F.relu(x - y, inplace=True) + 1, 0.5, True, True) + 1)


def overloads(x: Tensor, y: Tensor) -> Tensor:
    return torch.ops.aten.add_.Tensor(x.sin(), y, alpha=2)


def statement(x: Tensor, y: Tensor) -> Tensor:
    h = x.sin()
    h.add_(y)
    return h * h


def read_before(x: Tensor, y: Tensor) -> Any:
    h = x * 2
    early = h + y
    h.add_(1)
    return early, h


def view_used_up(x: Tensor, y: Tensor) -> Tensor:
    h = x * 2
    early = h.view(-1) * 3
    h.add_(1)
    return early.sum() + h


def written_twice_and_viewed(x: Tensor, y: Tensor) -> Tensor:
    h = x * 2
    h.add_(1)
    late = h.view(-1)
    return late * 2 + h.view(-1)


FIRES = [
    (methods, 3),
    (operators, 3),
    (functions, 3),
    (overloads, 1),
    (statement, 1),
    (read_before, 1),
    (view_used_up, 1),
    (written_twice_and_viewed, 1),
]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize(("function", "count"), FIRES, ids=[f.__name__ for f, _ in FIRES])
def test_fires(function: Function, count: int, grad: bool) -> None:
    found, graph = rewritten(function, grad)
    assert found == count
    assert not any(written(node) for node in graph.nodes if node.op.startswith("call_"))


def of_the_caller(x: Tensor, y: Tensor) -> Tensor:
    y.add_(1)
    return x * y


def view_of_the_caller(x: Tensor, y: Tensor) -> Tensor:
    y[0].add_(1)
    return x * y


def seen_through_a_view(x: Tensor, y: Tensor) -> Any:
    h = x * 2
    view = h[0]
    h.add_(1)
    return h, view * 3


def written_through_a_view(x: Tensor, y: Tensor) -> Tensor:
    h = x * 2
    h.view(-1).add_(1)
    return h * 3


def seen_through_two(x: Tensor, y: Tensor) -> Tensor:
    h = x * 2
    g = h.mul_(1.5)
    g.view(-1).add_(0.5)
    return g * 3


def returned_before(x: Tensor, y: Tensor) -> Any:
    h = x * 2
    view = h.t()
    h.add_(1)
    return view, h


def part_of_a_split(x: Tensor, y: Tensor) -> Tensor:
    h = y * 2
    h.split(2)[0].add_(1)
    return h * x


def other_type(x: Tensor, y: Tensor) -> Tensor:
    return x.half().add_(y)


def other_strides(x: Tensor, y: Tensor) -> Tensor:
    return (x * 2)[:, ::2].add_(y[:, :3])


def no_such_form(x: Tensor, y: Tensor) -> Tensor:
    return (x * 2).copy_(y)


def drawn(x: Tensor, y: Tensor) -> Tensor:
    return (y * 2).bernoulli_(0.5) * x


def an_item(x: Tensor, y: Tensor) -> Tensor:
    h = x * 2
    h[0] = 1.0
    return h


def into_out(x: Tensor, y: Tensor) -> Tensor:
    h = y * 2
    torch.add(y, 1, out=h)
    return h * x


STAYS = [
    of_the_caller,
    view_of_the_caller,
    seen_through_a_view,
    written_through_a_view,
    returned_before,
    part_of_a_split,
    other_type,
    other_strides,
    no_such_form,
    drawn,
    an_item,
    into_out,
]


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("function", STAYS, ids=lambda f: f.__name__)
def test_stays(function: Function, grad: bool) -> None:
    assert rewritten(function, grad)[0] == 0


def test_a_rewritten_call_is_still_what_later_views_share() -> None:
    """The first write is one that nobody else sees; the second is seen through the view's base."""
    count, graph = rewritten(seen_through_two)
    assert count == 1
    assert [node.target for node in graph.nodes if written(node)] == ["add_"]


def test_what_gradients_flow_through_stays_where_none_are_recorded() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        h = x * 2
        with torch.no_grad():
            h.mul_(0.5)
        return h * y

    assert rewritten(function, grad=True)[0] == 0
    assert rewritten(function, grad=False)[0] == 1


def test_under_autocast_only_what_keeps_its_type() -> None:
    def outside(x: Tensor, y: Tensor) -> Tensor:
        return (x * 2).add_(y).addmm_(y, y.t()[:, :1].expand(6, 6))

    def inside(x: Tensor, y: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return outside(x, y)

    assert rewritten(outside)[0] == 2
    assert rewritten(inside)[0] == 1
    with torch.autocast("cpu", torch.bfloat16):
        assert rewritten(outside)[0] == 1


# Reads through copies


def copied(function: Function) -> tuple[int, list[str]]:
    """How many copies are made, and the calls of the graph."""
    count, graph = changed(function, True, read_through_copies)
    return count, [getattr(n.target, "__name__", str(n.target)) for n in graph.nodes if n.op.startswith("call_")]


def test_what_is_written_is_read_through_a_copy() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        result = x * y.sin() + y.cos()
        y.add_(1)
        return result * y

    count, calls = copied(function)
    assert count == 2
    assert calls == ["snapshot.default", "sin", "mul", "cos", "add", "add_", "snapshot.default", "mul"]


def test_a_write_through_a_view_is_seen_and_kept() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        first, *_ = y.unbind(0)
        result = x * y.sin()
        first.add_(1)
        return result * first

    count, calls = copied(function)
    assert count == 2
    assert calls[:2] == ["snapshot.default", "unbind"]
    assert calls[-3:] == ["add_", "snapshot.default", "mul"]


def test_what_nobody_writes_is_read_as_it_is() -> None:
    assert copied(lambda x, y: x * y.sin())[0] == 0
    assert copied(methods)[0] == 0, "what gradients flow through is none of it"


def test_running_statistics_are_no_reads() -> None:
    def function(x: Tensor, y: Tensor) -> Tensor:
        return F.batch_norm(x, y[0], y[1], training=True)

    assert copied(function)[0] == 0
