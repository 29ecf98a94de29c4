"""One walk over each entry, in order; the weights' own values are read when a rule asks for them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping

import torch
from torch import fx

from laconic.ir.axes.dims import Factor
from laconic.ir.axes.held.table import Asked, Held, agreeing, rule
from laconic.ir.axes.labels import Axes
from laconic.ir.axes.positions import old_positions, touches
from laconic.ir.program import Kind, Role
from laconic.ir.types import TensorType, TupleType, type_of

#: (value, result of several, axis or None for the value as a whole)
_Key = tuple[fx.Node, int, int | None]


class Holding:
    """What is held by the values of a program. Positions of axes that `gone` names, by the ones that stay, are left out
    of account in weights.

    A state holds what it begins with as long as every entry that updates it agrees.
    """

    def __init__(self, axes: Axes, gone: Mapping[Factor, list[int]] | None = None) -> None:
        self._axes, self._gone = axes, gone or {}
        self._rows: dict[tuple[str, int | None], Held | None] = {}
        self._found: dict[_Key, Held] = {}
        self._some: set[fx.Node] = set()
        while self._walk():
            self._found.clear()
            self._some.clear()

    # What rules ask

    def of(self, value: fx.Node, axis: int | None) -> Held | None:
        """What a value holds along an axis, or as a whole; None if nothing is known."""
        if value.target is operator.getitem:
            source, output = value.args
            return self._of(source, int(output), axis)  # type: ignore[arg-type]
        return self._of(value, 0, axis)

    def _of(self, value: fx.Node, output: int, axis: int | None) -> Held | None:
        if value.op == "placeholder":
            return None if value.meta["kind"] == Kind.INPUT else self._row(value.meta["name"], axis)
        return self._found.get((value, output, axis))

    def weight(self, value: fx.Node) -> torch.Tensor | None:
        """The tensor of a row of the weight table that no entry updates."""
        if value.op != "placeholder" or value.meta["kind"] in (Kind.INPUT, Kind.STATE):
            return None
        return self._axes.program.weights[value.meta["name"]].value.detach()

    # The walk

    def _walk(self) -> bool:
        """Ask every call; whether a state was updated with something else than it was taken to hold."""
        for entry in self._axes.program.entries.values():
            for node in entry.graph.nodes:
                if node.op == "placeholder" and node.meta["kind"] != Kind.INPUT:
                    self._some.add(node)
                elif node.op == "call_function":
                    self._call(node)
        return self._states_moved()

    def _call(self, node: fx.Node) -> None:
        operands = node.all_input_nodes
        if node.target is operator.getitem:
            if operands[0] in self._some:
                self._some.add(node)
            return
        if not isinstance(node.target, torch._ops.OpOverload) or (operands and self._some.isdisjoint(operands)):
            return
        found = rule.of(node.target)
        if found is None:
            return
        for output, kind in _results(node):
            for axis in _axes(kind):
                held = found(Asked(self, node, kind, axis, output))
                if held:
                    size = 1 if axis is None else int(kind.shape[axis])
                    self._found[node, output, axis] = held.spread(size) if len(held.known) == 1 else held
                    self._some.add(node)

    def _row(self, name: str, axis: int | None) -> Held | None:
        if (name, axis) not in self._rows:
            self._rows[name, axis] = self._read(name, axis)
        return self._rows[name, axis]

    def _read(self, name: str, axis: int | None) -> Held | None:
        """Where all elements of a row of the table are one number, at the positions that stay."""
        value = self._axes.program.weights[name].value.detach()
        if value.device.type == "meta" or not value.numel() or value.is_complex():
            return None
        for k, dim in enumerate(self._axes.rows[name]):
            if k != axis and touches(dim, self._gone):
                value = value.index_select(k, old_positions(dim, self._gone))
        rows = value.reshape(1, -1) if axis is None else value.movedim(axis, 0).reshape(value.shape[axis], -1)
        return Held((rows == rows[:, :1]).all(1), rows[:, 0])

    def _states_moved(self) -> bool:
        moved = False
        for entry in self._axes.program.entries.values():
            for output, value in zip(entry.outputs, entry.output_values, strict=True):
                if output.role is not Role.UPDATE or not isinstance(value, fx.Node):
                    continue
                for name, axis in [key for key in self._rows if key[0] == output.name]:
                    was = self._rows[name, axis]
                    now = agreeing([was, self.of(value, axis)])
                    if was and (now is None or not torch.equal(now.known, was.known)):
                        self._rows[name, axis] = now
                        moved = True
        return moved


def _results(node: fx.Node) -> Iterator[tuple[int, TensorType]]:
    kind = type_of(node.meta["val"])
    parts = kind.parts if isinstance(kind, TupleType) else (kind,)
    return ((k, part) for k, part in enumerate(parts) if isinstance(part, TensorType))


def _axes(kind: TensorType) -> Iterator[int | None]:
    """The axes to ask for: none of those whose sizes are dynamic."""
    yield None
    yield from (k for k, size in enumerate(kind.shape) if isinstance(size, int) and size > 1)
