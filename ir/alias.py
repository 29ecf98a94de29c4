"""Which values may share storage, and which of that a caller can see.

Inside a functional graph sharing cannot be observed. It can at the boundary: whether a result is a view of an input, a
weight or another result is part of what a model means, since the caller may write into it. `boundary` is that relation;
the verifier holds every pass to it, and `Aliasing` tells a pass beforehand what it may replace.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from laconic.ir.program import Entry
from laconic.ir.traits import traits


def alias_operand(node: fx.Node) -> fx.Node | None:
    """The operand that `node`'s result may share storage with, if any.

    An element of a tuple shares with what the tuple's op may alias; the elements of an op with several fresh results
    are apart.
    """
    if node.op != "call_function":
        return None
    if node.target is operator.getitem:
        source: Any = node.args[0]
        return source if isinstance(source, fx.Node) and traits(source).alias is not None else None
    position = traits(node).alias
    if position is None or position >= len(node.args):
        return None
    operand = node.args[position]
    return operand if isinstance(operand, fx.Node) else None


def root(node: fx.Node) -> fx.Node:
    """The value whose storage `node` may live in: itself, or what it is a view of a view of."""
    while (operand := alias_operand(node)) is not None:
        node = operand
    return node


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


class Aliasing:
    """What may be replaced by what without a caller seeing it; kept up to date while a plan is made."""

    def __init__(self, entry: Entry) -> None:
        self._escaping: set[fx.Node] = set()
        for value in entry.output_values:
            if isinstance(value, fx.Node):
                self._escape(value)

    def _escape(self, node: fx.Node) -> None:
        step: fx.Node | None = node
        while step is not None and step not in self._escaping:
            self._escaping.add(step)
            step = alias_operand(step)

    def escapes(self, node: fx.Node) -> bool:
        """Whether some output may share storage with `node`."""
        return node in self._escaping

    def may_replace(self, old: fx.Node, new: fx.Node) -> bool:
        """Whether `new` may stand for an equal `old`, as far as callers can see."""
        if old not in self._escaping or root(old) is root(new):
            return True
        source = root(new)
        return source.op != "placeholder" and source not in self._escaping

    def replaced(self, old: fx.Node, new: fx.Node) -> None:
        """Note that `new` now stands for `old`."""
        if old in self._escaping:
            self._escape(new)
