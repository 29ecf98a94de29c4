"""Norm sites: normalisations that one op says, and those that are written out.

    rms      x * rsqrt(mean(x^2) + eps) [* weight]
    layer    (x - mean(x)) / sqrt(var(x) + eps) [* weight + bias]

The anchor of a written-out norm is the reciprocal root; from there the matcher walks back to the mean of squares and
forward to the products with x, the weight, and the sum with the bias.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from laconic.ir.structure.reading import Reading, arranged, rearranges
from laconic.ir.structure.records import NearMiss, Norm
from laconic.ir.traits import argument, op_name

aten = torch.ops.aten

#: op -> (kind, names of x, weight, bias and eps in its schema)
_FUSED: dict[str, tuple[str, str, str, str, str]] = {
    "aten.layer_norm": ("layer", "input", "weight", "bias", "eps"),
    "aten.native_layer_norm": ("layer", "input", "weight", "bias", "eps"),
    "aten.rms_norm": ("rms", "input", "weight", "", "eps"),
    "aten._fused_rms_norm": ("rms", "input", "weight", "", "eps"),
    "aten.group_norm": ("group", "input", "weight", "bias", "eps"),
    "aten.native_group_norm": ("group", "input", "weight", "bias", "eps"),
    "aten.batch_norm": ("batch", "input", "weight", "bias", "eps"),
    "aten._native_batch_norm_legit_no_training": ("batch", "input", "weight", "bias", "eps"),
    "aten.instance_norm": ("group", "input", "weight", "bias", "eps"),
}
_ROOTS = (aten.rsqrt.default, aten.sqrt.default, aten.pow.Tensor_Scalar)
_PRODUCTS = (aten.mul.Tensor,)


def find_norms(reading: Reading, near: list[NearMiss]) -> list[Norm]:
    """The norms of an entry, in order."""
    found = []
    for node in reading.entry.calls():
        norm = _fused(reading, node) or _written(reading, node, near)
        if norm is not None:
            found.append(norm)
    return found


def _fused(reading: Reading, node: fx.Node) -> Norm | None:
    names = _FUSED.get(op_name(node.target))
    if names is None:
        return None
    kind, x, weight, bias, eps = names
    out = node
    for user in node.users:
        if user.target is operator.getitem and user.args[1] == 0:
            out = user
    return Norm(
        site=node.meta.get("site", -1),
        kind=kind,
        x=argument(node, x),
        out=out,
        eps=argument(node, eps),
        weight=reading.weight(argument(node, weight)),
        bias=reading.weight(argument(node, bias)) if bias else None,
        fused=True,
        nodes=(node,) if out is node else (node, out),
    )


def _written(reading: Reading, node: fx.Node, near: list[NearMiss]) -> Norm | None:
    """The norm whose root is `node`: rsqrt(v), sqrt(v) or v ** -0.5 of v = mean of squares + eps."""
    if node.target not in _ROOTS or (node.target is _ROOTS[2] and node.args[1] not in (-0.5, 0.5)):
        return None
    inside: list[fx.Node] = [node]
    mean, eps = _without_eps(_back(node.args[0], inside), inside)
    squared = _mean_of(mean, inside)
    if squared is None:
        return None

    def miss(reason: str) -> None:
        near.append(NearMiss("norm", node, reason, str(reading.program.site(node) or "")))

    x, kind = _squared(squared, mean, inside)
    if x is None:
        miss("the root is of a mean, but not of the mean of squares")
        return None
    scaled = _scaled(node, x, inside)
    if scaled is None:
        miss("the root of the mean of squares does not divide what was squared")
        return None
    out, weight, bias, offset = _affine(reading, scaled, inside)
    x = arranged(x) if kind == "rms" else _centred(x)
    nodes = tuple(sorted({*inside}, key=reading.position.__getitem__))
    return Norm(node.meta.get("site", -1), kind, x, out, eps, weight, bias, False, nodes, offset)


def _back(node: Any, inside: list[fx.Node]) -> fx.Node:
    """What a value is a copy or cast of; what is passed is inside."""
    while isinstance(node, fx.Node) and rearranges(node):
        inside.append(node)
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node


def _without_eps(node: fx.Node, inside: list[fx.Node]) -> tuple[fx.Node, float | None]:
    if node.target in (aten.add.Tensor, aten.add.Scalar) and isinstance(node.args[1], (int, float)):
        inside.append(node)
        return _back(node.args[0], inside), float(node.args[1])
    if node.target in (aten.clamp.default, aten.clamp_min.default) and isinstance(node.args[1], (int, float)):
        inside.append(node)
        return _back(node.args[0], inside), float(node.args[1])
    return node, None


def _mean_of(node: fx.Node, inside: list[fx.Node]) -> fx.Node | None:
    """The operand of a mean over the last axis, or a variance itself."""
    if node.target is aten.mean.dim and _last_axis(node.args[1]):
        inside.append(node)
        return _back(node.args[0], inside)
    if node.target in (aten.var.correction, aten.var.dim):
        inside.append(node)
        return node
    return None


def _last_axis(dims: Any) -> bool:
    return isinstance(dims, (list, tuple)) and len(dims) == 1 and isinstance(dims[0], int)


def _squared(node: fx.Node, mean: fx.Node, inside: list[fx.Node]) -> tuple[fx.Node | None, str]:
    """What is squared under the mean, and the kind of norm that this makes."""
    if node is mean:  # a variance
        return (operand, "layer") if isinstance(operand := node.args[0], fx.Node) else (None, "")
    x = node.args[0] if node.args else None
    squares = (
        node.target is aten.square.default
        or (node.target is aten.pow.Tensor_Scalar and node.args[1] == 2)
        or (node.target is aten.mul.Tensor and node.args[1] is x)
    )
    if not squares or not isinstance(x, fx.Node):
        return None, ""
    inside.append(node)
    return x, "layer" if _centre(x) is not None else "rms"


def _centre(node: fx.Node) -> fx.Node | None:
    """x, of x - mean(x)."""
    if node.target is not aten.sub.Tensor or not isinstance(node.args[0], fx.Node):
        return None
    x, mean = node.args[:2]
    if isinstance(mean, fx.Node) and mean.target is aten.mean.dim and mean.args[0] is x and isinstance(x, fx.Node):
        return x
    return None


def _centred(x: fx.Node) -> fx.Node:
    centre = _centre(x)
    return arranged(centre if centre is not None else x)


def _scaled(root: fx.Node, x: fx.Node, inside: list[fx.Node]) -> fx.Node | None:
    """The product of x with the reciprocal root."""
    sources = {arranged(x), x}
    centre = _centre(x)
    if centre is None:  # a variance divides x - mean(x)
        sources |= {u for u in arranged(x).users if _centre(u) is not None}
    for user in _users(root, inside):
        operands = user.all_input_nodes
        if user.target not in (aten.mul.Tensor, aten.div.Tensor) or len(operands) != 2:
            continue
        if any(n in sources or arranged(n) in sources for n in operands):
            inside.append(user)
            inside += [n for n in operands if _centre(n) is not None]
            return user
    return None


def _users(node: fx.Node, inside: list[fx.Node]) -> Iterator[fx.Node]:
    """The users of a value, through copies and casts."""
    for user in node.users:
        if rearranges(user):
            inside.append(user)
            yield from _users(user, inside)
        else:
            yield user


def _affine(
    reading: Reading, node: fx.Node, inside: list[fx.Node]
) -> tuple[fx.Node, fx.Node | None, fx.Node | None, float]:
    """The end of the norm, its weight and bias, and what is added to the weight."""
    weight, bias, offset = None, None, 0.0
    while True:
        step = _only_user(node)
        if step is None:
            return node, weight, bias, offset
        if rearranges(step) and weight is None and _leads_to_weight(reading, step):
            inside.append(step)
            node = step
            continue
        other = next((n for n in step.all_input_nodes if n is not node), None)
        if other is None or not reading.constant(other):
            return node, weight, bias, offset
        if step.target is aten.mul.Tensor and weight is None:
            plain, offset = _offset(other)
            weight = reading.weight(plain)
        elif step.target is aten.add.Tensor and bias is None and reading.weight(other) is not None:
            bias = reading.weight(other)
        else:
            return node, weight, bias, offset
        inside.append(step)
        node = step


def _leads_to_weight(reading: Reading, node: fx.Node) -> bool:
    step = _only_user(node)
    if step is None or step.target is not aten.mul.Tensor:
        return False
    return any(reading.constant(n) for n in step.all_input_nodes if n is not node)


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _offset(node: fx.Node) -> tuple[fx.Node, float]:
    """w and 1.0, of a weight w + 1.0 as Gemma has it."""
    node = arranged(node)
    if node.target in (aten.add.Tensor, aten.add.Scalar) and isinstance(node.args[1], (int, float)):
        return node.args[0], float(node.args[1])  # type: ignore[return-value]
    return node, 0.0
