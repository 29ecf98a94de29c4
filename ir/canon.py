"""Canonical form: one way to say what capture and decompositions say in several. Idempotent.

    view, _unsafe_view -> reshape      operands may have other strides after a rewrite; layout is not semantics
    _assert_tensor_metadata            erased: a fact about a type that a rewrite makes stale
    dropout outside training -> its operand
    keyword arguments at their default are left out

`view.dtype` is another op and stays. Types are not touched: propagate afterwards.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from laconic.ir.traits import argument, traits

aten = torch.ops.aten
_RESHAPES = (aten.view.default, aten._unsafe_view.default)


def canonicalize(graph: fx.Graph) -> None:
    """Rewrite `graph` in place into canonical form."""
    for node in list(graph.nodes):
        if node.op != "call_function":
            continue
        if node.target in _RESHAPES:
            node.target = aten.reshape.default
        elif node.target is aten._assert_tensor_metadata.default:
            graph.erase_node(node)
            continue
        elif node.target is aten.dropout.default and not traits(node).random:
            operand: Any = argument(node, "input")
            node.replace_all_uses_with(operand)
            graph.erase_node(node)
            continue
        _drop_defaults(node)


def _drop_defaults(node: fx.Node) -> None:
    """Leave out keyword arguments that say what the op's schema says anyway."""
    if not isinstance(node.target, torch._ops.OpOverload) or not node.kwargs:
        return
    defaults = {a.name: a.default_value for a in node.target._schema.arguments if a.has_default_value()}
    kept = {
        key: value
        for key, value in node.kwargs.items()
        if not (
            (key in defaults and (type(value) is type(defaults[key]) and value == defaults[key]))
            or (key == "pin_memory" and value is False)
        )
    }
    if len(kept) != len(node.kwargs):
        node.kwargs = kept
