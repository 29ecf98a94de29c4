"""Regions that a user marked to be compiled once, said where they are called.

    %r = invoke_subgraph(%body, "region", %x, %w)          %a = linear(%x, %w)
    %y = getitem(%r, 0)                             ->     %y = tanh(%a)
    %z = relu(%y)                                          %z = relu(%y)

Inductor of torch 2.13 reuses memory around such calls, and gradients come out wrong without a word
(tests/codegen/test_upstream.py). What is cut out around a region is compiled once in any case.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from laconic.ir.torch_private import invoke_subgraph


def inline_regions(graph: fx.GraphModule) -> int:
    """Put the body of each region in place of its calls, in place; inside of other bodies too. Returns how many calls
    there were. Values that nodes are marked with get lost."""
    found = 0
    for child in graph.children():
        if isinstance(child, fx.GraphModule):
            found += inline_regions(child)
    for node in graph.graph.find_nodes(op="call_function", target=invoke_subgraph):
        _inline(graph, node)
        found += 1
    if found:
        graph.graph.eliminate_dead_code(lambda node: node.op != "get_attr")  # the bodies
        graph.recompile()
    return found


def _inline(graph: fx.GraphModule, node: fx.Node) -> None:
    held, _, *operands = node.args
    assert isinstance(held, fx.Node)
    body = graph.get_submodule(str(held.target))
    assert isinstance(body, fx.GraphModule)
    inside: dict[fx.Node, Any] = dict(zip(body.graph.find_nodes(op="placeholder"), operands, strict=True))
    with graph.graph.inserting_before(node):
        for inner in body.graph.nodes:
            if inner.op == "get_attr":
                inside[inner] = graph.graph.get_attr(_moved(graph, body, str(inner.target)))
            elif inner.op not in ("placeholder", "output"):
                inside[inner] = graph.graph.node_copy(inner, inside.__getitem__)
    returned: Any = fx.node.map_arg(body.graph.output_node().args[0], inside.__getitem__)
    for user in list(node.users):
        assert user.target is operator.getitem, "a region returns a tuple"
        user.replace_all_uses_with(returned[user.args[1]])
        graph.graph.erase_node(user)
    graph.graph.erase_node(node)


def _moved(graph: fx.GraphModule, body: fx.GraphModule, target: str) -> str:
    """A name in `graph` for what a body holds by the name `target`."""
    value = operator.attrgetter(target)(body)
    number = 0
    while hasattr(graph, f"region_{number}") and getattr(graph, f"region_{number}") is not value:
        number += 1
    if not hasattr(graph, f"region_{number}"):
        setattr(graph, f"region_{number}", value)
    return f"region_{number}"
