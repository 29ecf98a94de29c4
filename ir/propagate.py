"""Fake propagation: what every node computes, without computing it, and without adding a guard.

`propagate` recomputes the type of nodes that were added or whose operands changed, and follows a change only as far as
it reaches. `recompute` is one node of it, which the verifier uses too.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import fx

from laconic.ir.errors import VerificationError
from laconic.ir.program import Program
from laconic.ir.torch_private import quiet
from laconic.ir.types import same_type, type_of


def fake_arguments(node: fx.Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The operands of a call as fake values."""
    args = fx.node.map_arg(node.args, lambda n: n.meta["val"])
    kwargs = fx.node.map_arg(node.kwargs, lambda n: n.meta["val"])
    return args, kwargs


def recompute(program: Program, node: fx.Node) -> Any:
    """What the call `node` returns for the fake values of its operands.

    Raises VerificationError, naming the node and the user's source line, if the op refuses them.
    """
    args, kwargs = fake_arguments(node)
    try:
        with quiet(program.mode):
            return node.target(*args, **kwargs)  # type: ignore[operator]
    except Exception as problem:  # an op's own check: any type
        raise VerificationError(
            f"%{node.name} cannot be computed from its operands",
            where=program.describe(node),
            why=str(problem).strip().splitlines()[0] if str(problem).strip() else type(problem).__name__,
        ) from problem


def propagate(program: Program, graph: fx.Graph, changed: Iterable[fx.Node] | None = None) -> set[fx.Node]:
    """Recompute `meta["val"]` of the `changed` calls (all, if None) and of what depends on them, until it agrees with
    what was known. Returns the nodes whose type changed."""
    dirty = None if changed is None else set(changed)
    moved: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op != "call_function":
            continue
        known = "val" in node.meta
        if known and dirty is not None and node not in dirty and moved.isdisjoint(node.all_input_nodes):
            continue
        value = recompute(program, node)
        if known and same_type(type_of(value), type_of(node.meta["val"])):
            continue
        node.meta["val"] = value
        moved.add(node)
    return moved
