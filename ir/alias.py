"""Which values may share storage, and which of that a caller can see.

Inside a functional graph sharing cannot be observed. It can at the boundary: whether a result is a view of an input, a
weight or another result is part of what a model means, since the caller may write into it. `boundary` is that relation;
the verifier holds every pass to it, and `Aliasing` tells a pass beforehand what it may replace.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from laconic.ir.program import Entry, Program
from laconic.ir.traits import traits
from laconic.ir.types import TensorType, same_type, type_of


def alias_operand(node: fx.Node) -> fx.Node | None:
    """The operand that `node`'s result may share storage with, if any.

    An element of a tuple shares with what the tuple's op may alias; the elements of an op with several fresh results
    are apart.
    """
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        source: Any = node.args[0]
        if not isinstance(source, fx.Node) or (position := traits(source).alias) is None:
            return None
        listed = source.args[position] if position < len(source.args) else None
        if isinstance(listed, (list, tuple)) and isinstance(node.args[1], int):  # result k is a view of element k
            element = listed[node.args[1]]
            return element if isinstance(element, fx.Node) else None
        return source
    position = traits(node).alias
    if position is None or position >= len(node.args):
        return None
    operand = node.args[position]
    if isinstance(operand, (list, tuple)) and len(operand) == 1:
        operand = operand[0]
    return operand if isinstance(operand, fx.Node) else None


def root(node: fx.Node) -> fx.Node:
    """The value whose storage `node` may live in: itself, or what it is a view of a view of. Of several calls that take
    the same element of one tuple it is the first."""
    while (operand := alias_operand(node)) is not None:
        node = operand
    source = _tuple_of(node)
    if source is None:
        return node
    return next(u for u in source.users if u.target is operator.getitem and u.args[1] == node.args[1])


def _tuple_of(node: fx.Node) -> fx.Node | None:
    """The call of which `node` takes one of several fresh results."""
    if node.op != "call_function" or node.target is not operator.getitem or alias_operand(node) is not None:
        return None
    source: Any = node.args[0]
    return source if isinstance(source, fx.Node) else None


def boundary(entry: Entry) -> frozenset[tuple[str, str]]:
    """The pairs (output, other) that may share storage, where other is a placeholder or another output."""
    seen: dict[fx.Node, list[str]] = {}
    pairs: set[tuple[str, str]] = set()
    for output, value in zip(entry.outputs, entry.output_values, strict=True):
        if not isinstance(value, fx.Node):
            continue
        source = root(value)
        if source.op == "placeholder":
            pairs.add((str(output), f"{source.meta['kind']} {source.meta['name']}"))
        for other in seen.setdefault(source, []):
            pairs.add((other, str(output)))
        seen[source].append(str(output))
    return frozenset(pairs)


def exposed(program: Program) -> set[str]:
    """Weights that some output may share storage with: callers may write into them, and may tell them apart."""
    return {
        source.meta["name"]
        for entry in program.entries.values()
        for value in entry.output_values
        if isinstance(value, fx.Node) and (source := root(value)).op == "placeholder"
    }


def _surely_shares(node: fx.Node, operand: fx.Node) -> bool:
    """Whether `node`, a view of `operand` by its op's schema, is one at every size: a reshape may be a copy."""
    if not traits(node).may_copy:
        return True
    was, now = type_of(operand.meta["val"]), type_of(node.meta["val"])
    if not isinstance(was, TensorType) or not isinstance(now, TensorType) or was.dtype != now.dtype:
        return False
    return node.target is torch.ops.aten.reshape.default and (was.contiguous or same_type(was, now))


class Aliasing:
    """What may be replaced by what without a caller seeing it; kept up to date while a plan is made."""

    def __init__(self, entry: Entry) -> None:
        self._escaping: set[fx.Node] = set()
        self._stands_for: dict[fx.Node, fx.Node] = {}
        for value in entry.output_values:
            if isinstance(value, fx.Node):
                self._escape(value)

    def now(self, node: fx.Node) -> fx.Node:
        """What stands for `node` after all replacements so far."""
        while node in self._stands_for:
            node = self._stands_for[node]
        return node

    def _escape(self, node: fx.Node) -> None:
        step: fx.Node | None = self.now(node)
        while step is not None and step not in self._escaping:
            self._escaping.add(step)
            operand = alias_operand(step) or _tuple_of(step)
            step = None if operand is None else self.now(operand)

    def _root(self, node: fx.Node, *, surely: bool) -> fx.Node:
        """The value whose storage `node` lives in, or (not `surely`) may live in, after all replacements so far."""
        node = self.now(node)
        while (operand := alias_operand(node)) is not None and not (surely and not _surely_shares(node, operand)):
            node = self.now(operand)
        return node

    def chain(self, node: fx.Node) -> list[fx.Node]:
        """`node` and the values whose storage it may live in, nearest first, after all replacements so far."""
        found = [self.now(node)]
        while (operand := alias_operand(found[-1])) is not None:
            found.append(self.now(operand))
        return found

    def escapes(self, node: fx.Node) -> bool:
        """Whether some output may share storage with `node`."""
        return node in self._escaping

    def may_replace(self, old: fx.Node, new: fx.Node) -> bool:
        """Whether `new` may stand for an equal `old`, as far as callers can see."""
        if old not in self._escaping or self._root(old, surely=True) is self._root(new, surely=True):
            return True
        source = self._root(new, surely=False)
        return source.op != "placeholder" and source not in self._escaping

    def replaced(self, old: fx.Node, new: fx.Node) -> None:
        """Note that `new` now stands for `old`."""
        self._stands_for[old] = new
        if old in self._escaping:
            self._escape(new)
