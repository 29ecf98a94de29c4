"""A graph as Dynamo hands it over, read for the repeat finder.

Modules are inlined: parameters and buffers are placeholders, a layer's weight is an input like any other. Calls are
torch functions and methods; `meta["example_value"]` is the fake value. What is on around a call, autocast or recorded
gradients, is said by nodes of their own, which enter and leave it. Here it becomes a property of each call (its
`Scope`), so that a block is the same wherever in an open scope it stands, and any stretch of calls can be taken out
and run by itself: it enters what it needs and leaves it again.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from laconic.ir.listing import Listing, Operand
from laconic.ir.signature import Interner, layout, skeleton
from laconic.ir.torch_private import LEAVING, FakeTensor, expression, storage_key
from laconic.ir.torch_traits import changes_metadata, held, touches_state


@dataclass(frozen=True)
class Refusal:
    """Why a graph is not cut, and the call it is about."""

    reason: str
    node: str = ""

    def __str__(self) -> str:
        return f"{self.reason} (%{self.node})" if self.node else self.reason


@dataclass(frozen=True)
class Scope:
    """What is on around a call: the contexts that were entered, outermost first, as (function, arguments); and whether
    gradients are recorded."""

    entered: tuple[tuple[Callable[..., Any], tuple[Any, ...]], ...]
    grad: bool


@dataclass(frozen=True)
class Reading:
    """The calls of a graph in order, the scope of each, and what the repeat finder sees of them. `base` is the scope
    that the graph is called in, `final` the one it leaves behind."""

    nodes: list[fx.Node]
    scopes: list[Scope]
    base: Scope
    final: Scope
    listing: Listing

    @property
    def recording(self) -> bool:
        """Whether gradients are recorded anywhere in the graph."""
        return any(scope.grad for scope in self.scopes)

    def operand(self, operand: Operand) -> fx.Node:
        node = self.nodes[operand] if isinstance(operand, int) else operand
        assert isinstance(node, fx.Node)
        return node


def value_of(node: fx.Node) -> Any:
    """The fake value of a node; of a constant tensor that the graph holds, the tensor."""
    return node.meta["example_value"] if "example_value" in node.meta else held(node)


def memory(node: fx.Node) -> int | None:
    """What tells the memory of a node's value from that of others; None if it has none of its own."""
    value = value_of(node)
    strided = isinstance(value, torch.Tensor) and value.layout == torch.strided
    return storage_key(value) if strided else None


def read_dynamo(graph: fx.Graph, grad: bool) -> Reading | Refusal:
    """Read a graph that is called with gradients recorded (`grad`) or not; or say why it cannot be cut."""
    refused = obstacle(graph)
    if refused is not None:
        return refused
    base = now = Scope((), grad)
    nodes: list[fx.Node] = []
    scopes: list[Scope] = []
    for node in graph.nodes:
        behind = scope_behind(node, now)
        if behind is not None:
            now = behind
        elif node.op in ("call_function", "call_method"):
            nodes.append(node)
            scopes.append(now)
    if now.entered:
        return Refusal("a scope is left open")
    return Reading(nodes, scopes, base, now, _list(graph, nodes, scopes))


def scope_behind(node: fx.Node, now: Scope) -> Scope | None:
    """The scope behind a call that enters or leaves one; None for any other node."""
    target: Any = node.target
    if node.op != "call_function":
        return None
    if target is torch._C._set_grad_enabled:
        return Scope(now.entered, bool(node.args[0]))
    if target in LEAVING:
        return Scope((*now.entered, (target, tuple(node.args))), now.grad)
    if target in LEAVING.values():
        return Scope(now.entered[:-1], now.grad)
    return None


def obstacle(graph: fx.Graph) -> Refusal | None:
    """Why no cut of a graph would be right, if there is a reason that a single node tells."""
    now = Scope((), True)
    for node in graph.nodes:
        if scope_behind(node, now) is None:
            reason = _obstacle(node)
            if reason:
                return Refusal(reason, node.name)
    return None


def _obstacle(node: fx.Node) -> str:
    if node.op == "call_module":
        return "a module is called as a whole"
    if node.op in ("call_function", "call_method"):
        if changes_metadata(node):
            return f"{getattr(node.target, '__name__', node.target)} changes a tensor's form in place"
        if touches_state(node):
            return f"{getattr(node.target, '__name__', node.target)} may change global state"
    value = node.meta.get("example_value")
    if isinstance(value, torch.Tensor):
        if type(value) is not FakeTensor and not isinstance(value, torch.nn.Parameter):
            return f"a value is a {type(value).__name__}"
        if value.layout is not torch.strided:
            return f"a value is {value.layout}"
    return ""


def _list(graph: fx.Graph, nodes: list[fx.Node], scopes: list[Scope]) -> Listing:
    position = {node: k for k, node in enumerate(nodes)}
    number = Interner()
    signatures: list[int] = []
    operands: list[tuple[Operand, ...]] = []
    kinds: dict[fx.Node, int] = {}

    def kind(node: fx.Node, grad: bool) -> int:
        if node not in kinds:
            kinds[node] = number(("value", seen(value_of(node), grad)))
        return kinds[node]

    recording = any(scope.grad for scope in scopes)
    for node, scope in zip(nodes, scopes, strict=True):
        read: list[fx.Node] = []
        signatures.append(number((call(node, read), kind(node, recording), scope)))
        operands.append(tuple(position.get(leaf, leaf) for leaf in read))
    returned: list[fx.Node] = []
    fx.node.map_arg(next(iter(reversed(graph.nodes))).args, returned.append)

    def value(operand: Operand) -> fx.Node:
        return nodes[operand] if isinstance(operand, int) else operand  # type: ignore[return-value]

    return Listing(
        signatures,
        operands,
        lambda operand: kind(value(operand), recording),
        kept=frozenset(position[node] for node in returned if node in position),
        uncut=frozenset(k for k, node in enumerate(nodes) if not _may_cross(value_of(node))),
        together=lambda slots: sharing([value_of(value(slot)) for slot in slots]),
    )


def call(node: fx.Node, read: list[fx.Node]) -> Hashable:
    """What a call says, apart from what it reads, which is added to `read` in order."""

    def leaf(operand: fx.Node) -> Hashable:
        body = held(operand)
        if isinstance(body, fx.GraphModule):
            return ("graph", content(body))
        read.append(operand)
        return "%"

    args = node.args
    if node.target is torch.ops.higher_order.invoke_subgraph:  # the name that it has for a region says nothing
        args = tuple(None if isinstance(a, str) else a for a in args)
    said = (node.op, node.target, skeleton(args, leaf), skeleton(node.kwargs, leaf))
    return (*said, _lists(node.args[1])) if node.target in _INDEXING and len(node.args) > 1 else said


#: Where a list is an index into one axis, a tuple one for each of several.
_INDEXING = {operator.getitem, operator.setitem, operator.delitem, "__getitem__", "__setitem__"}


def _lists(index: Any) -> Hashable:
    """Which sequences in an index are lists."""
    if isinstance(index, (list, tuple)):
        return (isinstance(index, list), *map(_lists, index))
    return None


def content(body: fx.GraphModule) -> Hashable:
    """All that a graph inside a higher-order op says."""
    position: dict[fx.Node, int] = {}
    said: list[Hashable] = []
    for node in body.graph.nodes:
        read: list[fx.Node] = []
        value = node.meta.get("example_value")
        what = node.op if node.op == "placeholder" else call(node, read)
        inner = held(node)
        known = content(inner) if isinstance(inner, fx.GraphModule) else None
        wiring = tuple(position[r] for r in read)
        said.append((what, known, wiring, seen(value, True), id(inner) if known is None else None))
        position[node] = len(position)
    return (*said, _function(body.meta.get("_checkpoint_context_fn")))  # what a checkpoint is told to save


def _function(told: Any) -> Hashable:
    """What tells a function from others; of a partial one, made anew for each call, what it is made of."""
    if isinstance(told, functools.partial):
        return (_function(told.func), *map(id, told.args), *((name, id(v)) for name, v in told.keywords.items()))
    return id(told)


def seen(value: Any, grad: bool) -> Hashable:
    """All of a value that compiling a block may depend on. Never guards. Without `grad` nothing is recorded anywhere,
    and whether a value requires gradients does not count."""
    if isinstance(value, torch.Tensor):
        traits = (value.layout, value.is_conj(), value.is_neg(), isinstance(value, torch.nn.Parameter))
        gradients = (value.requires_grad, value.requires_grad and value.is_leaf) if grad else ()
        return (layout(value), *traits, *gradients)
    if isinstance(value, (list, tuple)):
        return (type(value).__name__, *(seen(part, grad) for part in value))
    return layout(value)


def sharing(values: Sequence[Any]) -> Hashable:
    """Which of several values share a storage, and how far from each other they start in it."""
    groups: dict[int, list[tuple[int, Any]]] = {}
    for position, value in enumerate(values):
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            groups.setdefault(storage_key(value), []).append((position, expression(value.storage_offset())))
    shared = (group for group in groups.values() if len(group) > 1)
    return tuple(tuple((position, offset - group[0][1]) for position, offset in group) for group in shared)


def _may_cross(value: Any) -> bool:
    return isinstance(value, (torch.Tensor, torch.SymInt))


def parts_beside_their_tuple(graph: fx.Graph) -> None:
    """Move what reads an element of a tuple right behind the call that makes it: the elements can then leave a block,
    which a tuple cannot."""
    for node in list(graph.nodes):
        if node.op not in ("call_function", "call_method") or not isinstance(value_of(node), (list, tuple)):
            continue
        last = node
        for user in [u for u in node.users if u.target is operator.getitem and u.all_input_nodes == [node]]:
            last.append(user)
            last = user


def numbers_beside_their_use(graph: fx.Graph) -> None:
    """Read a Python number, which Dynamo may hand over as a tensor, anew for each call that uses it: the tensor can
    enter a block, which the number cannot."""
    for node in list(graph.nodes):
        source = node.args[0] if node.op == "call_method" and node.target == "item" else None
        if isinstance(source, fx.Node) and source.op == "placeholder" and isinstance(value_of(node), torch.SymFloat):
            for user in list(node.users):
                with graph.inserting_before(user):
                    user.replace_input_with(node, graph.node_copy(node))
            graph.erase_node(node)
