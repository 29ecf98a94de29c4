"""Which values of an entry are constants, and what they are.

A value is constant if its call is pure and leaves no memory unset, and all its operands are constants: literals, rows
of the weight table that are no state, or other constants. A call that reads only the type of an operand (`new_ones`)
does not need that operand to be constant. With `parameters`, those count too, and a value must be made of rows and
literals alone.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from laconic.ir.alias import Aliasing, exposed, root
from laconic.ir.program import Entry, Kind, Program
from laconic.ir.torch_private import storage_key
from laconic.ir.traits import traits
from laconic.ir.types import TensorType, is_dense, nbytes, type_of


class Constants:
    """The constants of one entry; values are computed when first asked for, and kept."""

    def __init__(self, program: Program, entry: Entry, *, read_weights: bool, parameters: bool = False) -> None:
        self._program, self._entry = program, entry
        self._of_types = not parameters
        self._kinds = (Kind.BUFFER, Kind.CONSTANT, *([Kind.PARAMETER] if parameters else []))
        self._values: dict[fx.Node, Any] = {}
        self._known: set[fx.Node] = set()
        self._written = exposed(program)  # a caller who receives a row may write into it between calls
        for node in entry.graph.nodes:
            if self._is_constant(node, read_weights):
                self._known.add(node)

    def _is_constant(self, node: fx.Node, read_weights: bool) -> bool:
        if node.op == "placeholder":
            row = self._program.weights[node.meta["name"]] if node.meta["kind"] in self._kinds else None
            learnt = row is not None and row.kind is Kind.CONSTANT and row.trainable
            fixed = row is not None and not learnt and row.name not in self._written
            return read_weights and fixed
        if node.op != "call_function":
            return False
        facts = traits(node)
        if not facts.pure or facts.unset or not _fixed(node.meta["val"]):
            return False
        operands = node.all_input_nodes
        if facts.type_only and operands and self._of_types:
            tensor, *rest = operands
            return tensor is node.args[0] and all(n in self._known for n in rest) and _fixed_enough(node, tensor)
        return all(n in self._known for n in operands)

    def known(self, node: fx.Node) -> bool:
        return node in self._known

    def value(self, node: fx.Node) -> Any:
        """The value of a known constant, computed by its own op on the device it has."""
        waiting = [node]
        while waiting:  # no recursion: a chain of constants may be longer than Python's stack
            wanted = waiting[-1]
            missing = [] if wanted.op == "placeholder" or traits(wanted).type_only else wanted.all_input_nodes
            missing = [n for n in missing if n not in self._values]
            waiting += missing
            if not missing:
                waiting.pop()
                if wanted not in self._values:
                    self._values[wanted] = self._compute(wanted)
        return self._values[node]

    def _compute(self, node: fx.Node) -> Any:
        """The value of a constant whose operands are computed."""
        if node.op == "placeholder":
            return self._program.weights[node.meta["name"]].value
        substitute = _typed_stand_in if traits(node).type_only else self._values.__getitem__
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), substitute)
        with torch.no_grad():
            return node.target(*args, **kwargs)  # type: ignore[operator]

    def frontier(self, max_bytes: int, aliasing: Aliasing) -> dict[fx.Node, torch.Tensor]:
        """The last constant calls before what is not constant, with values to keep in their place.

        A value must be dense, of at most `max_bytes`, and not one that a caller receives (who might write into it).
        Where a call does not qualify its operands may.
        """
        found: dict[fx.Node, torch.Tensor] = {}
        wanted = {
            node
            for node in self._entry.calls()
            if node in self._known and any(user not in self._known for user in node.users)
        }
        for node in reversed(list(self._entry.calls())):
            if node not in wanted:
                continue
            kept = self._keepable(node, max_bytes, aliasing)
            if kept is not None:
                found[node] = kept
            else:
                wanted.update(n for n in node.all_input_nodes if n in self._known and n.op == "call_function")
        return found

    def _keepable(self, node: fx.Node, max_bytes: int, aliasing: Aliasing) -> torch.Tensor | None:
        kind = type_of(node.meta["val"])
        if not isinstance(kind, TensorType) or aliasing.escapes(node):
            return None
        size = kind.dtype.itemsize
        for n in kind.shape:
            size *= int(n)
        if size > max_bytes:
            return None
        value = self.value(node)
        if not isinstance(value, torch.Tensor) or not is_dense(value) or nbytes(value) > max_bytes:
            return None
        if value.is_conj() or value.is_neg() or self._views_a_row(node, value):
            return None
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(value)

    def _views_a_row(self, node: fx.Node, value: torch.Tensor) -> bool:
        """Whether a value is a view of a row of the weight table: free to compute, and its bytes are there already."""
        source = root(node)
        return source.op == "placeholder" and storage_key(self.value(source)) == storage_key(value)


def _fixed(value: Any) -> bool:
    """Whether a (possibly nested) fake value has no symbolic size."""
    if isinstance(value, (list, tuple)):
        return all(_fixed(v) for v in value)
    if isinstance(value, torch.Tensor):
        kind = type_of(value)
        return isinstance(kind, TensorType) and all(isinstance(s, int) for s in kind.shape + kind.stride)
    return isinstance(value, (bool, int, float))


def _fixed_enough(node: fx.Node, operand: fx.Node) -> bool:
    """`new_*` reads dtype and device of its operand alone; `*_like` its sizes too."""
    likes = (torch.ops.aten.ones_like.default, torch.ops.aten.zeros_like.default, torch.ops.aten.full_like.default)
    return node.target not in likes or _fixed(operand.meta["val"])


def _typed_stand_in(node: fx.Node) -> Any:
    """A real tensor of an operand's type, for an op that reads nothing else."""
    kind = type_of(node.meta["val"])
    assert isinstance(kind, TensorType)
    if not _fixed(node.meta["val"]):
        return torch.empty(0, dtype=kind.dtype, device=kind.device)
    shape, stride = [int(n) for n in kind.shape], [int(n) for n in kind.stride]
    return torch.empty_strided(shape, stride, dtype=kind.dtype, device=kind.device)
