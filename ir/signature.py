"""The interned node signature: what a node says, apart from where it stands.

One function serves common subexpressions, structural hashes, cache keys, diffs and the repeat finder; they differ only
in what an operand counts as (`leaf`). In Python 1, 1.0 and True are equal and hash alike, so are 0.0 and -0.0:
constants therefore count by type and repr.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable
from typing import TYPE_CHECKING, Any

import sympy
import torch
from torch import fx

from laconic.ir.memory import pieces
from laconic.ir.torch_private import expression
from laconic.ir.traits import op_name

if TYPE_CHECKING:
    from laconic.ir.program import Entry, Program, Weight

Leaf = Callable[[fx.Node], Hashable]
Fingerprint = tuple[Hashable, ...]


def skeleton(argument: Any, leaf: Leaf) -> Hashable:
    """An argument as a hashable value: containers with their shape, nodes by `leaf`, constants by type and repr."""
    if isinstance(argument, fx.Node):
        return leaf(argument)
    if isinstance(argument, (list, tuple)):
        return ("sequence", *[skeleton(a, leaf) for a in argument])
    if isinstance(argument, dict):
        return ("mapping", *[(key, skeleton(a, leaf)) for key, a in sorted(argument.items())])
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


def fingerprint(program: Program) -> Fingerprint:
    """What tells whether a pass changed a program: all that its text says, and which bytes its weights are.

    Writing into a weight in place changes the tensor's version counter and so the last part.
    """
    rows = tuple((*_row(w), w.value.data_ptr(), _written(w.value)) for w in program.weights.values())
    facts = tuple((name, repr(value)) for name, value in program.facts.items())
    tables = (program.symbols, program.sites, program.aliases)
    functions = tuple((name, *map(_node, f.graph.nodes)) for name, f in program.functions.items())
    entries = tuple(_entry(entry) for entry in program.entries.values())
    return (facts, *(tuple(table.items()) for table in tables), functions, entries, rows)


def _row(weight: Weight) -> tuple[Hashable, ...]:
    return (weight.name, weight.kind, weight.trainable, weight.persistent, layout(weight.value))


def _entry(entry: Entry) -> Hashable:
    trees = (repr(entry.arguments), repr(entry.results))  # the order of keys counts
    weights = set(entry.weight_nodes().values())  # in whatever order: the text does not tell it
    others = (node for node in entry.graph.nodes if node not in weights)
    named = frozenset(map(_node, weights))
    return (entry.name, tuple(entry.inputs), tuple(entry.outputs), trees, named, *map(_node, others))


def _node(node: fx.Node) -> Hashable:
    """A node down to its name; meta values that do not stand in the text are left out."""
    say, marks = skeleton(node.args, _name), node.meta
    call = (say, skeleton(node.kwargs, _name)) if node.kwargs else say
    places = (marks.get("kind"), marks.get("name"), marks.get("site"), marks.get("by"))
    return (node.name, node.op, node.target, call, *places, layout(marks.get("val")))


def _name(node: fx.Node) -> Hashable:
    return ("node", node.name)


def layout(value: Any) -> Hashable:
    """The type of a value as a hashable key: what `laconic.ir.types.type_of` says, and only more."""
    if isinstance(value, torch.Tensor):
        sizes = (*value.shape, *value.stride())
        return (value.dtype, value.device, *(s if type(s) is int else expression(s) for s in sizes))
    if isinstance(value, (list, tuple)):
        return ("sequence", *map(layout, value))
    found = expression(value)
    return (type(value).__name__, found if isinstance(found, sympy.Basic) else repr(found))


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
    found = hashlib.sha256()
    for piece in pieces(tensor):
        found.update(raw_bytes(piece))
    return found.digest()


def raw_bytes(tensor: torch.Tensor) -> memoryview:
    """A tensor's bytes in row-major order; copies only if it is not contiguous or not on the CPU."""
    flat = tensor.detach().cpu().contiguous()
    flat = flat.as_strided((flat.numel(),), (1,))  # reshape may keep an odd stride of a single element
    return memoryview(flat.view(torch.uint8).numpy().data) if flat.numel() else memoryview(b"")
