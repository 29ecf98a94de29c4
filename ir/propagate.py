"""Fake propagation: what every node computes, without computing it, and without adding a guard.

`propagate` recomputes the type of nodes that were added or whose operands changed, and follows a change only as far as
it reaches. `recompute` is one node of it; `computed_types` is what the verifier asks of many.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from typing import Any

import torch
from torch import fx

from laconic.ir.errors import VerificationError
from laconic.ir.program import Program
from laconic.ir.signature import Interner, layout, skeleton
from laconic.ir.torch_private import expression, quiet
from laconic.ir.types import ValueType, same_type, type_of


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


def computed_types(program: Program, nodes: Iterable[fx.Node]) -> Iterator[tuple[fx.Node, ValueType | None]]:
    """Each call with the type that it computes. Raises VerificationError like `recompute`.

    Calls that say the same of operands in which an op can see no difference are computed once: in a deep model most of
    them are. What an op can see is a value's type, offset, and conjugate, negative and gradient bits.
    """
    intern = Interner()
    seen: dict[fx.Node, Hashable] = {}
    known: dict[Hashable, ValueType | None] = {}

    def operand(node: fx.Node) -> Hashable:
        if node not in seen:
            seen[node] = intern(_visible(node.meta["val"]))
        return seen[node]

    for node in nodes:
        key = (node.target, skeleton(node.args, operand), skeleton(node.kwargs, operand))
        if key not in known:
            known[key] = type_of(recompute(program, node))
        yield node, known[key]


def _visible(value: Any) -> Hashable:
    """All that an op can read of a fake value; a tensor of which the elements are known is like no other."""
    if isinstance(value, (list, tuple)):
        return ("sequence", *map(_visible, value))
    if not isinstance(value, torch.Tensor):
        return layout(value)
    if getattr(value, "constant", None) is not None:
        return ("known elements", id(value))
    bits = (value.is_conj(), value.is_neg(), value.requires_grad)
    return (layout(value), expression(value.storage_offset()), *bits)


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
