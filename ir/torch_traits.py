"""What is known of a call in a graph that Dynamo hands over: what it writes, and what it changes beside values.

Such graphs hold torch functions, methods and higher-order ops beside ATen ops, and in-place calls among them. Where a
schema tells the truth it is read; elsewhere torch's own conventions are: a trailing underscore, `out=`, `inplace=`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.nn import functional

#: Methods and functions that change what a tensor is rather than what it holds.
_METADATA = {
    *("t_", "squeeze_", "unsqueeze_", "transpose_", "swapaxes_", "swapdims_", "as_strided_", "rename_"),
    *("resize_", "resize_as_", "set_", "requires_grad_", "retain_grad", "register_hook", "detach_", "share_memory_"),
    *("apply_", "map_", "map2_"),
}
_IN_PLACE = {
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul", "iand", "ior", "ixor"),
    *("ilshift", "irshift", "setitem", "delitem"),
}
_KEYWORDS = {operator.and_, operator.or_, operator.not_, operator.is_}  # an underscore for Python's sake
_HARMLESS = {"_log_api_usage_once"}  # return nothing and do nothing
#: Functions that write statistics, in training: into which operands, by position and name.
_STATISTICS: dict[Any, tuple[tuple[int, str], ...]] = {
    **dict.fromkeys((functional.batch_norm, functional.instance_norm), ((1, "running_mean"), (2, "running_var"))),
    **dict.fromkeys(
        (torch.batch_norm, torch.instance_norm, torch.native_batch_norm), ((3, "running_mean"), (4, "running_var"))
    ),
}
#: The argument of all of these that says whether they do.
_TRAINING = (5, ("training", "use_input_stats"))
#: Functions that scale rows of their operand "weight" down if they have this argument.
_RENORMING = {functional.embedding: 3, functional.embedding_bag: 3}


def changes_metadata(node: fx.Node) -> bool:
    """Whether a call changes sizes, strides, storage or gradients of a tensor in place: the value that was recorded
    for its operand is then already the changed one."""
    if isinstance(node.target, OpOverload):
        return torch.Tag.inplace_view in node.target.tags
    return _name(node) in _METADATA


def written(node: fx.Node) -> list[fx.Node]:
    """The operands that a call may write into."""
    if isinstance(node.target, HigherOrderOperator):
        writes = node.target.__name__.endswith("_mutation") or any(map(_writes_inside, _bodies(node)))
        return list(node.all_input_nodes) if writes else []
    if isinstance(node.target, (OpOverload, OpOverloadPacket)):
        return list(dict.fromkeys(operand for operand in _by_schema(node) if isinstance(operand, fx.Node)))
    name, found = _name(node), [node.kwargs.get("out")]
    in_place = name.endswith("_") and not name.endswith("__") and node.target not in _KEYWORDS
    if in_place or name.strip("_") in _IN_PLACE or is_inplace(node):
        found.append(node.args[0] if node.args else node.kwargs.get("input"))
    if node.target in _STATISTICS and not _normalises_by_statistics(node):
        found += [argument(node, position, name) for position, name in _STATISTICS[node.target]]
    if node.target in _RENORMING and argument(node, _RENORMING[node.target], "max_norm") is not None:
        found.append(argument(node, 1, "weight"))
    operands: list[fx.Node] = []
    fx.node.map_arg(found, operands.append)
    return operands


def touches_state(node: fx.Node) -> bool:
    """Whether a call may change something that is neither a tensor nor a scope: what returns nothing, and is no op."""
    if node.op != "call_function" or isinstance(node.target, (OpOverload, OpOverloadPacket, HigherOrderOperator)):
        return False
    return node.meta.get("example_value") is None and not written(node) and _name(node) not in _HARMLESS


def argument(node: fx.Node, position: int, name: str) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name)


def is_inplace(node: fx.Node) -> bool:
    """Whether a function is called with `inplace=True`, by name or by position."""
    position = inplace_position(node.target) if callable(node.target) else None
    return position is not None and argument(node, position, "inplace") is True


@cache
def inplace_position(function: Callable[..., Any]) -> int | None:
    if isinstance(function, (OpOverload, OpOverloadPacket, HigherOrderOperator)):
        return None
    try:
        return list(inspect.signature(function).parameters).index("inplace")
    except (ValueError, TypeError):  # a builtin tells no signature
        return None


def _normalises_by_statistics(node: fx.Node) -> bool:
    """Whether a normalisation surely reads the statistics that it is given, and leaves them alone."""
    position, names = _TRAINING
    return any(argument(node, position, name) is False for name in names)


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else str(getattr(node.target, "__name__", ""))


def _by_schema(node: fx.Node) -> Iterator[Any]:
    target: Any = node.target
    overloads = [target] if isinstance(target, OpOverload) else [getattr(target, o) for o in target.overloads()]
    for overload in overloads:
        for position, declared in enumerate(overload._schema.arguments):
            if declared.alias_info is not None and declared.alias_info.is_write:
                given = argument(node, position, declared.name)
                yield from given if isinstance(given, (list, tuple)) else [given]


def _bodies(node: fx.Node) -> Iterator[fx.GraphModule]:
    """The graphs that a higher-order op is given."""
    for operand in node.all_input_nodes:
        body = held(operand)
        if isinstance(body, fx.GraphModule):
            yield body


def _writes_inside(body: fx.GraphModule) -> bool:
    return any(written(node) for node in body.graph.nodes if node.op in ("call_function", "call_method"))


def held(node: fx.Node) -> Any:
    """What a `get_attr` node names, None for any other node."""
    if node.op != "get_attr":
        return None
    return operator.attrgetter(str(node.target))(node.graph.owning_module)
