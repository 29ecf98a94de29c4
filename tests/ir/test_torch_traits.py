"""What calls in a graph of Dynamo's write into and change, against what they do to real tensors."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import fx
from torch.nn import functional as F

from laconic.ir.torch_traits import changes_metadata, inplace_position, is_inplace, touches_state, written

_aten = torch.ops.aten


def made(target: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> tuple[fx.Node, list[fx.Node]]:
    """A call whose tensor operands, in lists too, are placeholders; and these."""
    graph = fx.Graph()
    inputs: list[fx.Node] = []

    def place(value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            return type(value)(map(place, value))
        if not isinstance(value, torch.Tensor):
            return value
        inputs.append(graph.placeholder(f"x{len(inputs)}"))
        return inputs[-1]

    args = tuple(map(place, arguments))
    kwargs = {name: place(value) for name, value in named.items()}
    call = graph.call_method if isinstance(target, str) else graph.call_function
    return call(target, args, kwargs), inputs


def really_written(target: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> list[int]:
    """The tensor operands that a call changes, or whose version counter it moves."""
    tensors: list[torch.Tensor] = []

    def collect(value: Any) -> None:
        if isinstance(value, torch.Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            for part in value:
                collect(part)

    collect(arguments)
    collect(tuple(named.values()))
    before = [(tensor._version, tensor.clone()) for tensor in tensors]
    (getattr(torch.Tensor, target) if isinstance(target, str) else target)(*arguments, **named)
    after = zip(tensors, before, strict=True)
    return [k for k, (now, (version, was)) in enumerate(after) if now._version != version or not torch.equal(now, was)]


def t(*shape: int) -> torch.Tensor:
    return torch.rand(*(shape or (2, 3)))


ids = torch.tensor([0, 1])
CALLS: list[tuple[str, Any, tuple[Any, ...], dict[str, Any]]] = [
    ("method", "add", (t(), t()), {}),
    ("method in place", "add_", (t(), t()), {}),
    ("dunder", "__iadd__", (t(), t()), {}),
    ("dunder that does not write", "__add__", (t(), t()), {}),
    ("operator", operator.add, (t(), t()), {}),
    ("operator in place", operator.iadd, (t(), t()), {}),
    ("operator with a keyword's name", operator.and_, (t() > 0, t() > 1), {}),
    ("item", operator.setitem, (t(), 0, t(3)), {}),
    ("method item", "__setitem__", (t(), 0, t(3)), {}),
    ("index_copy_", "index_copy_", (t(), 0, ids, t()), {}),
    ("function in place", torch.relu_, (t(),), {}),
    ("function", torch.relu, (t(),), {}),
    ("inplace=True", F.relu, (t(),), {"inplace": True}),
    ("inplace by position", F.relu, (t(), True), {}),
    ("inplace=False", F.relu, (t(),), {"inplace": False}),
    ("dropout in place", F.dropout, (t(), 0.5, True, True), {}),
    ("out", torch.add, (t(), t()), {"out": t()}),
    ("two outs", torch.max, (t(), 0), {"out": (t(3), torch.zeros(3, dtype=torch.int64))}),
    ("foreach", torch._foreach_add_, ([t(), t()], 1.0), {}),
    ("overload", _aten.add_.Tensor, (t(), t()), {}),
    ("packet", _aten.add_, (t(), t()), {}),
    ("overload out", _aten.add.out, (t(), t()), {"out": t()}),
    ("batch norm", F.batch_norm, (t(), t(3), t(3)), {"training": True}),
    ("batch norm by name", F.batch_norm, (t(),), {"running_mean": t(3), "running_var": t(3), "training": True}),
    ("torch.batch_norm", torch.batch_norm, (t(), t(3), t(3), t(3), t(3), True, 0.1, 1e-5, False), {}),
    ("native batch norm", torch.native_batch_norm, (t(), t(3), t(3), t(3), t(3), True, 0.1, 1e-5), {}),
    ("instance norm", F.instance_norm, (t(2, 3, 4), t(3), t(3)), {"use_input_stats": True}),
    ("batch norm in eval mode", F.batch_norm, (t(), t(3), t(3), t(3), t(3), False), {}),
    ("batch norm in eval mode by name", F.batch_norm, (t(), t(3), t(3)), {"training": False}),
    ("torch.batch_norm in eval mode", torch.batch_norm, (t(), t(3), t(3), t(3), t(3), False, 0.1, 1e-5, False), {}),
    ("instance norm by statistics", F.instance_norm, (t(2, 3, 4), t(3), t(3)), {"use_input_stats": False}),
    ("embedding", F.embedding, (ids, t()), {}),
    ("embedding with max_norm", F.embedding, (ids, t() + 5), {"max_norm": 0.5}),
    ("max_norm by position", F.embedding, (ids, t() + 5, None, 0.5), {}),
    ("embedding bag with max_norm", F.embedding_bag, (ids[None], t() + 5), {"max_norm": 0.5}),
]


@pytest.mark.parametrize(("target", "arguments", "named"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_what_is_written(target: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
    node, inputs = made(target, arguments, named)
    assert sorted(map(inputs.index, written(node))) == really_written(target, arguments, named)


def _body(in_place: bool) -> fx.GraphModule:
    graph = fx.Graph()
    graph.output((graph.call_method("sin_" if in_place else "sin", (graph.placeholder("x"),)),))
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize("in_place", [False, True])
def test_a_graph_that_writes_may_write_into_all_that_it_is_given(in_place: bool) -> None:
    root = torch.nn.Module()
    root.body = _body(in_place)
    graph = fx.Graph(root)
    x = graph.placeholder("x")
    body = graph.get_attr("body")
    node = graph.call_function(torch.ops.higher_order.invoke_subgraph, (body, "name", x))
    fx.GraphModule(root, graph)
    assert (x in written(node)) is in_place


FORMS = ["t_", "squeeze_", "transpose_", "resize_", "requires_grad_", "detach_", "as_strided_", _aten.squeeze_.default]


@pytest.mark.parametrize("target", FORMS, ids=str)
def test_a_change_of_form_is_told(target: Any) -> None:
    assert changes_metadata(made(target, (t(),), {})[0])


@pytest.mark.parametrize("target", ["add_", "view", "transpose", "copy_", _aten.add_.Tensor], ids=str)
def test_other_calls_keep_the_form(target: Any) -> None:
    assert not changes_metadata(made(target, (t(),), {})[0])


def test_what_returns_nothing_and_writes_nothing_may_change_state() -> None:
    assert touches_state(made(torch._C._set_deterministic_algorithms, (True,), {})[0])
    assert not touches_state(made(operator.setitem, (t(), 0, 1.0), {})[0])
    assert not touches_state(made(torch._C._log_api_usage_once, ("",), {})[0])
    assert not touches_state(made(_aten._assert_async.default, (t(),), {})[0])
    known, _ = made(torch.sin, (t(),), {})
    known.meta["example_value"] = t()
    assert not touches_state(known)


def test_where_inplace_stands() -> None:
    assert inplace_position(F.relu) == 1
    assert inplace_position(F.dropout) == 3
    assert inplace_position(torch.add) is None
    assert inplace_position(_aten.relu.default) is None
    assert not is_inplace(made("relu", (t(),), {})[0])
