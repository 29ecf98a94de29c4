"""What a mask lets a query see, read off how it is computed: comparisons of two position axes, triangles, constants.

key <= query          causal                      key > query - w          only the last w positions
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from laconic.ir.program import Kind
from laconic.ir.structure.reading import Reading, shape_of
from laconic.ir.types import TensorType, type_of

aten = torch.ops.aten

_BELOW = {aten.le.Tensor: 0, aten.lt.Tensor: 1}  # a <= b, a < b
_ABOVE = {aten.ge.Tensor: 0, aten.gt.Tensor: 1}
_LIMIT = 256


@dataclass(frozen=True)
class MaskFacts:
    """`causal`: no position sees later ones. `window`: how many positions, its own included, it sees at most."""

    causal: bool = False
    window: int | None = None


def read_mask(reading: Reading, mask: fx.Node) -> MaskFacts:
    """What can be told of a mask from the calls that make it."""
    causal, window = False, None
    waiting, seen = [mask], {mask}
    for node in waiting:
        found = _read(reading, node)
        causal |= found.causal
        window = found.window if window is None else window
        for operand in reading.reads(node):
            if operand not in seen and len(seen) < _LIMIT:
                seen.add(operand)
                waiting.append(operand)
    return MaskFacts(causal, window)


def _read(reading: Reading, node: fx.Node) -> MaskFacts:
    if node.target in (aten.tril.default, aten.triu.default):
        shape = shape_of(node)
        return MaskFacts(causal=len(shape) >= 2)
    if node.op == "placeholder" and node.meta["kind"] in (Kind.BUFFER, Kind.CONSTANT):
        return MaskFacts(causal=_is_triangle(reading.program.weights[node.meta["name"]].value))
    if node.target in (*_BELOW, *_ABOVE):
        return _comparison(node)
    return MaskFacts()


def _comparison(node: fx.Node) -> MaskFacts:
    left, right = node.args[:2]
    assert isinstance(left, fx.Node)
    if not isinstance(right, fx.Node):
        return MaskFacts()
    (a, low), (b, high) = _offset(left), _offset(right)
    if not (_whole(a) and _whole(b)):
        return MaskFacts()
    strict = {**_BELOW, **_ABOVE}[node.target]  # type: ignore[index]
    if node.target in _ABOVE:
        a, b, low, high = b, a, high, low
    # now: a + low <= b + high, or < if strict
    limit = high - low - strict
    if _is_keys(a) and _is_queries(b):  # key <= query + limit
        return MaskFacts(causal=limit <= 0)
    if _is_queries(a) and _is_keys(b):  # query - limit <= key: what is seen, or, of later keys alone, what is not
        return MaskFacts(window=limit + 1) if limit >= 0 else MaskFacts(causal=limit == -1)
    return MaskFacts()


def _offset(node: fx.Node) -> tuple[fx.Node, int]:
    """A value as another plus a whole number."""
    total = 0
    while node.target in (aten.add.Tensor, aten.sub.Tensor) and isinstance(node.args[1], int):
        total += node.args[1] if node.target is aten.add.Tensor else -node.args[1]
        node = node.args[0]  # type: ignore[assignment]
    return node, total


def _whole(node: fx.Node) -> bool:
    kind = type_of(node.meta["val"])
    return isinstance(kind, TensorType) and not kind.dtype.is_floating_point and kind.dtype is not torch.bool


def _is_keys(node: fx.Node) -> bool:
    shape = shape_of(node)
    return bool(shape) and shape[-1] != 1 and (len(shape) < 2 or shape[-2] == 1)


def _is_queries(node: fx.Node) -> bool:
    shape = shape_of(node)
    return len(shape) >= 2 and shape[-1] == 1 and shape[-2] != 1


def _is_triangle(value: torch.Tensor) -> bool:
    """Whether a constant mask allows what lies on and below the diagonal, and no more."""
    if value.dim() < 2 or value.shape[-1] != value.shape[-2] or value.shape[-1] < 2 or value.device.type == "meta":
        return False
    if value.dtype is not torch.bool and not value.is_floating_point():
        return False
    plane: Any = value.reshape(-1, *value.shape[-2:])[0]
    allowed = plane if value.dtype is torch.bool else (plane == 0) if bool((plane <= 0).all()) else plane != 0
    return bool(torch.equal(allowed, torch.ones_like(allowed, dtype=torch.bool).tril()))
