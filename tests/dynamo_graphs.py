"""Graphs as Dynamo hands them over, for tests of what reads them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from laconic.ir.dynamo import Reading, read_dynamo


def dynamo_graph(
    function: Callable[..., Any], *inputs: Any, grad: bool = False, dynamic: bool = False
) -> fx.GraphModule:
    """The one graph of a function."""
    found: list[fx.GraphModule] = []

    def backend(graph: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        found.append(graph)
        return graph.forward

    torch._dynamo.reset()
    with torch.set_grad_enabled(grad):
        torch.compile(function, backend=backend, fullgraph=True, dynamic=dynamic or None)(*inputs)
    (graph,) = found
    return graph


def read(function: Callable[..., Any], *inputs: Any, grad: bool = False, dynamic: bool = False) -> Reading:
    """The one graph of a function, read."""
    reading = read_dynamo(dynamo_graph(function, *inputs, grad=grad, dynamic=dynamic).graph, grad)
    assert isinstance(reading, Reading), reading
    return reading
