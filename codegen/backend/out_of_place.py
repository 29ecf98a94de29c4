"""In-place calls on intermediates, said out of place.

    %h = linear(%x, %w)                       %h = linear(%x, %w)
    %y = add_(%x, %h)                 ->      %y = add(%x, %h)
    %z = relu(%x)                             %z = relu(%y)

A cut makes inputs of pieces out of intermediates. In training autograd refuses a write into what an earlier piece has
saved, where the whole graph would have been right; in any case a piece would have to write back what it could return.
A call is left as it is if the caller, or an older view, would see the difference; if there is no out-of-place form; if
that would give another type; or if gradients are not recorded but flow through what is written to.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from laconic.ir.dynamo import Scope, memory, scope_behind, value_of
from laconic.ir.signature import layout
from laconic.ir.torch_traits import inplace_position, is_inplace, written

_OPERATORS: dict[Any, Any] = {
    getattr(operator, f"i{name}"): getattr(operator, name)
    for name in ["add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "matmul", "lshift", "rshift"]
} | {operator.iand: operator.and_, operator.ior: operator.or_, operator.ixor: operator.xor}
#: Methods whose form without the underscore is another function.
_OTHERS = {"bernoulli_", "random_"}
#: What autocast leaves alone; the out-of-place form of anything else may compute in another type under it.
_SAME_UNDER_AUTOCAST = {"add", "sub", "mul", "div", "truediv", "relu", "dropout", "clamp", "masked_fill", "index_put"}


def out_of_place(graph: fx.Graph, grad: bool, autocast: bool) -> int:
    """Rewrite a graph that is called with gradients recorded (`grad`) or not, under autocast or not. Returns how many
    calls were rewritten."""
    position = {node: number for number, node in enumerate(graph.nodes)}
    sharing: dict[int, list[fx.Node]] = {}
    for node in graph.nodes:
        where = memory(node) if node.op != "output" else None
        if where is not None:
            sharing.setdefault(where, []).append(node)
    rewritten, now = 0, Scope((), grad)
    for node in list(graph.nodes):
        now = scope_behind(node, now) or now
        target = _target(node)
        if target is None or not _unseen(target, node, position, sharing):
            continue
        if value_of(target).requires_grad and not now.grad:
            continue  # what is written where nothing is recorded keeps the gradient of what was there before
        if not _say(node, target, autocast or bool(now.entered)):
            continue
        rewritten += 1
        for user in [u for u in target.users if position[u] > position[node]]:
            user.replace_input_with(target, node)
    return rewritten


def autocast_is_on(graph: fx.Graph) -> bool:
    """Whether autocast is on now for a device that a graph computes on."""
    values = (value_of(node) for node in graph.nodes if node.op != "output")
    kinds = {value.device.type for value in values if isinstance(value, torch.Tensor)}
    return any(torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind) for kind in kinds)


def _target(node: fx.Node) -> fx.Node | None:
    """The one intermediate that a call writes into, if there is one."""
    if node.op not in ("call_function", "call_method"):
        return None
    found = written(node)
    return found[0] if len(found) == 1 and found[0].op in ("call_function", "call_method") else None


def _unseen(target: fx.Node, node: fx.Node, position: dict[fx.Node, int], sharing: dict[int, list[fx.Node]]) -> bool:
    """Whether nobody sees the write but who reads `target`, the call's result, or what is made of these later on."""
    where = memory(target)
    if where is None:
        return False
    others = [n for n in sharing[where] if n is not target and position[n] < position[node]]
    return all(
        n.op in ("call_function", "call_method") and all(position[u] < position[node] for u in n.users) for n in others
    )


def _say(node: fx.Node, target: fx.Node, autocast: bool) -> bool:
    """Give a call its out-of-place form, if it has one of the same type."""
    found = _twin(node)
    if found is None:
        return False
    name, function, args, kwargs = found
    if autocast and name not in _SAME_UNDER_AUTOCAST:
        return False
    was = value_of(target)
    fakes, named = fx.node.map_arg((args, kwargs), value_of)
    try:
        with torch.no_grad(), was.fake_mode:
            now = function(*fakes, **named)
    except (TypeError, RuntimeError):  # the out-of-place form takes other arguments
        return False
    if not isinstance(now, torch.Tensor) or layout(now) != layout(was):
        return False
    node.target = name if node.op == "call_method" else function
    node.args, node.kwargs = args, kwargs
    return True


def _twin(node: fx.Node) -> tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any]] | None:
    """The out-of-place form of a call: its name, function and arguments."""
    target: Any = node.target
    if node.op == "call_method":
        name = target[:-1]
        known = target not in _OTHERS and hasattr(torch.Tensor, name)
        return (name, getattr(torch.Tensor, name), node.args, node.kwargs) if known else None
    if target in _OPERATORS:
        return _OPERATORS[target].__name__.strip("_"), _OPERATORS[target], node.args, node.kwargs
    if is_inplace(node):
        place, args, kwargs = inplace_position(target), list(node.args), dict(node.kwargs)
        if place is not None and place < len(args):
            args[place] = False
        else:
            kwargs["inplace"] = False
        return target.__name__, target, tuple(args), kwargs
    if isinstance(target, OpOverload):
        packet = getattr(torch.ops.aten, target._schema.name.removeprefix("aten::").rstrip("_"), None)
        overload = getattr(packet, target._overloadname, None) if target.namespace == "aten" else None
        return (str(packet), overload, node.args, node.kwargs) if overload is not None else None
    name = getattr(target, "__name__", "").removesuffix("_")
    known = name + "_" == getattr(target, "__name__", "") and getattr(torch, name + "_", None) is target
    return (name, getattr(torch, name), node.args, node.kwargs) if known and hasattr(torch, name) else None
