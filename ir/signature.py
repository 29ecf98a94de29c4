"""The interned node signature: what a node says, apart from where it stands.

One function serves common subexpressions, structural hashes, cache keys, diffs and the repeat finder; they differ only
in what an operand counts as (`leaf`). In Python 1, 1.0 and True are equal and hash alike, so are 0.0 and -0.0:
constants therefore count by type and repr.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from laconic.ir.traits import op_name

if TYPE_CHECKING:
    from laconic.ir.program import Program

Leaf = Callable[[fx.Node], Hashable]


def skeleton(argument: Any, leaf: Leaf) -> Hashable:
    """An argument as a hashable value: containers with their shape, nodes by `leaf`, constants by type and repr."""
    if isinstance(argument, fx.Node):
        return leaf(argument)
    if isinstance(argument, (list, tuple)):
        return ("sequence", *(skeleton(a, leaf) for a in argument))
    if isinstance(argument, Mapping):
        return ("mapping", *((key, skeleton(a, leaf)) for key, a in sorted(argument.items())))
    if isinstance(argument, slice):
        return ("slice", *(skeleton(a, leaf) for a in (argument.start, argument.stop, argument.step)))
    return (type(argument).__name__, repr(argument))


def signature(node: fx.Node, leaf: Leaf) -> Hashable:
    """A call as a hashable value: op, arguments and keyword arguments."""
    return (op_name(node.target), skeleton(node.args, leaf), skeleton(node.kwargs, leaf))


class Interner:
    """Small integers for hashable values: equal values, equal integers."""

    def __init__(self) -> None:
        self._numbers: dict[Hashable, int] = {}

    def __call__(self, value: Hashable) -> int:
        return self._numbers.setdefault(value, len(self._numbers))


def fingerprint(program: Program) -> tuple[str, tuple[Hashable, ...]]:
    """What tells whether a pass changed a program: a hash of its text, and which bytes its weights are.

    Writing into a weight in place changes the tensor's version counter and so the second part.
    """
    rows = tuple(
        (name, w.value.data_ptr(), tuple(w.value.shape), tuple(w.value.stride()), _written(w.value))
        for name, w in program.weights.items()
    )
    return hashlib.sha256(str(program).encode()).hexdigest(), rows


def _written(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


def checksum(tensor: torch.Tensor) -> bytes:
    """A hash of the sums of a tensor's bytes, piece by piece: fast enough to take after every pass."""
    if tensor.device.type == "meta" or not tensor.numel():
        return b""
    flat = tensor.detach().contiguous()
    flat = flat.as_strided((flat.numel(),), (1,)).view(torch.uint8)
    whole = flat.numel() // 8192 * 8192
    words = flat[:whole].view(torch.int64) if flat.data_ptr() % 8 == 0 else flat[:whole].clone().view(torch.int64)
    sums = words.view(-1, 1024).sum(1)
    return hashlib.sha256(raw_bytes(sums)).digest() + hashlib.sha256(raw_bytes(flat[whole:])).digest()


def content_key(tensor: torch.Tensor) -> bytes:
    """A hash of a tensor's bytes in row-major order (not of its values: -0.0 and 0.0 differ, a NaN equals itself)."""
    return hashlib.sha256(raw_bytes(tensor)).digest()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order; copies only if it is not contiguous or not on the CPU."""
    flat = tensor.detach().cpu().contiguous()
    flat = flat.as_strided((flat.numel(),), (1,))  # reshape may keep an odd stride of a single element
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
