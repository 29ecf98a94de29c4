"""The one rewriter along axes: leave positions out, move them, or repeat them, everywhere at once.

A request names, for each factor, the old positions that it holds afterwards: an ordered subset shrinks, a permutation
permutes, repetitions remap. Weights, states and constants are indexed, numbers that spell sizes are respelled, and
types are computed again from what changed on.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from laconic.ir.axes.dims import SOFT, Factor, Why, factors, size_of
from laconic.ir.axes.labels import Axes, Label, Literal, flat
from laconic.ir.axes.positions import Kept, new_size, old_positions, row_moves, touches
from laconic.ir.errors import UsageError, VerificationError
from laconic.ir.moves import RowMoves, moved, moved_alias
from laconic.ir.program import Program
from laconic.ir.propagate import propagate
from laconic.ir.rewrite import add_constant, fake_weight, insert_call, set_argument, spell_size, weight_node
from laconic.ir.types import Size, TensorType, TupleType, same_size, type_of

aten = torch.ops.aten


def refusals(factor: Factor, positions: Sequence[int], *, soft: bool = False) -> list[tuple[str, Why]]:
    """Why a factor may not hold these positions afterwards; empty if it may. A factor of which a size enters values may
    be permuted; with `soft` the caller answers for its shrinking too."""
    size = factor.size
    if factor.link is not None:
        return [("joined", Why("it was found to be another axis, or several, which are to be named instead"))]
    if not isinstance(size, int):
        return [("dynamic", Why("its size is not known beforehand"))]
    if not positions or any(type(k) is not int or not 0 <= k < size for k in positions):
        return [("range", Why(f"positions are 0 to {size - 1}, and one must stay"))]
    permutes = sorted(positions) == list(range(size))
    return [(kind, why) for kind, why in factor.pins.items() if not (kind in SOFT and (permutes or soft))]


def rewrite(axes: Axes, kept: Kept, *, by: str, soft: bool = False, into: Program | None = None) -> Program:
    """A program in which each of these factors holds these old positions, in this order; by pass `by`. It is a copy of
    the axes' own, or `into`, which is one already.

    Raises UsageError with every reason if a factor may not; VerificationError if the result is not as the labels say.
    """
    known = {f for label in (*axes.rows.values(), *_labels(axes)) for dim in label for f in factors(dim)}
    if any(factor.link is None and factor not in known for factor in kept):
        raise UsageError("an axis is none of this program's", hint="name those of the same analysis")
    reasons = [
        f"an axis of {factor.size}: {kind}, {why.reason}{_at(axes.program, why)}"
        for factor, positions in kept.items()
        for kind, why in refusals(factor, positions, soft=soft)
    ]
    if reasons:
        raise UsageError("these axes may not be rewritten so", why="\n".join(reasons))
    return _Rewrite(axes, kept, by, into or axes.program.clone()).program()


def _labels(axes: Axes) -> Iterator[Label]:
    return (label for found in axes.labels.values() for label in flat(found))


def _at(program: Program, why: Why) -> str:
    return f" at {program.describe(why.node)}" if why.node is not None else ""


class _Rewrite:
    """A request on its way through a program. What is changed is a copy; labels are those of the original."""

    def __init__(self, axes: Axes, kept: Kept, by: str, result: Program) -> None:
        self.axes, self.kept, self.by, self.result = axes, kept, by, result
        self.rows = {name: entry.weight_nodes() for name, entry in self.result.entries.items()}
        #: The aranges whose values are used as numbers, of an axis that changes.
        self.origins = {n for n in axes.counted if any(touches(d, kept) for d in flat(axes.labels[n])[0])}
        entries = self.result.entries.items()
        self.nodes = {(name, node.name): node for name, entry in entries for node in entry.graph.nodes}
        self.entry_of = {n: name for name, entry in axes.program.entries.items() for n in entry.graph.nodes}
        self.changed: dict[str, set[fx.Node]] = {name: set() for name in self.result.entries}

    def program(self) -> Program:
        self._rows()
        for literal in self.axes.literals:
            self._literal(literal)
        self._resplits()
        self._counted()
        self._scales()
        self._squeezes()
        for name, entry in self.result.entries.items():
            propagate(self.result, entry.graph, self.changed[name])
        self._as_labelled()
        return self.result

    def _new(self, node: fx.Node) -> fx.Node:
        """The node of the new program, which will be computed again."""
        name = self.entry_of[node]
        found: fx.Node = self.nodes[name, node.name]
        self.changed[name].add(found)
        return found

    def _rows(self) -> None:
        """Weights, states and constants hold the positions that stay."""
        for name, moves in row_moves(self.axes, self.kept).items():
            row = self.result.weights[name]
            value = moved(row.value.detach(), moves)
            if isinstance(row.value, torch.nn.Parameter):
                value = torch.nn.Parameter(value, row.value.requires_grad)
            self.result.weights[name] = replace(row, value=value)
            self._follow(name, moves)
            for entry_name, nodes in self.rows.items():
                node = nodes.get(name)
                if node is not None:
                    node.meta["val"] = fake_weight(self.result, self.result.weights[name])
                    self.changed[entry_name].update(n for n in node.users if n.op == "call_function")

    def _follow(self, target: str, moves: RowMoves) -> None:
        """Names whose values are a part of a row that changed."""
        for name, alias in self.result.aliases.items():
            if alias.target == target:
                self.result.aliases[name] = moved_alias(alias, moves)

    def _literal(self, literal: Literal) -> None:
        """Spell a size again, if it changed."""
        if not touches(literal.dim, self.kept) or literal.node in self.origins:
            return
        old, new = size_of(literal.dim), new_size(literal.dim, self.kept)
        if same_size(old, new):
            return
        node = self._new(literal.node)
        _put(node, literal.place, self._number(node, literal.times * new + literal.plus))
        node.meta["by"] = self.by

    def _number(self, node: fx.Node, size: Size) -> Any:
        return spell_size(self.result, self.result.entry_of(node), node, size, by=self.by)

    def _resplits(self) -> None:
        for found in self.axes.resplits:
            if not any(touches(part, self.kept) for part in found.parts):
                continue
            if all(new_size(part, self.kept) == size_of(part) for part in found.parts):
                continue  # put in another order alone
            node = self._new(found.node)
            sizes = [self._number(node, new_size(part, self.kept)) for part in found.parts]
            node.target = aten.split_with_sizes.default
            node.args, node.kwargs = (node.args[0], sizes, found.axis), {}
            node.meta["by"] = self.by

    def _counted(self) -> None:
        """Positions that are used as numbers stay those that they were: chosen from all of the old ones."""
        for origin in self.origins:
            (dim,) = flat(self.axes.labels[origin])[0]
            name = self.entry_of[origin]
            entry, node = self.result.entries[name], self.nodes[name, origin.name]
            row = add_constant(self.result, "kept", old_positions(dim, self.kept))
            chosen = weight_node(self.result, entry, row)
            users = list(node.users)
            call = insert_call(
                self.result, entry, node.next, aten.index_select.default, (node, 0, chosen), by=self.by, like=node
            )
            for user in users:
                user.replace_input_with(node, call)
            self.changed[name].update(n for n in users if n.op == "call_function")

    def _scales(self) -> None:
        """Attention whose scale comes from the width of its heads keeps the old one."""
        for node, dim in self.axes.scales:
            if not same_size(size_of(dim), new_size(dim, self.kept)):
                set_argument(self._new(node), "scale", 1 / math.sqrt(size_of(dim)), by=self.by)

    def _squeezes(self) -> None:
        """Axes that were larger than one stay where one position is left of them."""
        for node, gone in self.axes.squeezes:
            if any(
                touches(dim, self.kept) and new_size(dim, self.kept) == 1 for dim in flat(self.axes.labels[node])[0]
            ):
                call = self._new(node)
                call.target, call.args = aten.squeeze.dims, (call.args[0], gone)
                call.meta["by"] = self.by

    def _as_labelled(self) -> None:
        """Every value has the dtype that it had, and the sizes that its labels say: that is what makes the analysis and
        the rewriter check each other."""
        for old, label in self.axes.labels.items():
            if old.op != "call_function" or old in self.origins:
                continue
            if not any(touches(dim, self.kept) for dims in flat(label) for dim in dims):
                continue
            new = self.nodes[self.entry_of[old], old.name]
            for found, before, dims in zip(_tensors(new), _tensors(old), flat(label), strict=True):
                wanted = tuple(new_size(dim, self.kept) for dim in dims)
                if found.dtype != before.dtype or not all(map(same_size, found.shape, wanted)):
                    raise VerificationError(
                        f"%{new.name} is {found.dtype} {found.shape} after the rewrite; {before.dtype} {wanted} is due",
                        where=self.result.describe(new),
                    )


def _tensors(node: fx.Node) -> list[TensorType]:
    kind = type_of(node.meta["val"])
    return [part for part in (kind.parts if isinstance(kind, TupleType) else (kind,)) if isinstance(part, TensorType)]


def _put(node: fx.Node, place: tuple[Any, ...], value: Any) -> None:
    """Write a number at a place of a node's arguments."""
    where, first, *rest = place
    args, kwargs = list(node.args), dict(node.kwargs)
    holder: Any = args if where == "args" else kwargs
    if rest:
        sizes = list(holder[first])
        sizes[rest[0]] = value
        holder[first] = sizes
    else:
        exact = isinstance(holder[first], float) and isinstance(value, int)
        holder[first] = float(value) if exact else value
    node.args, node.kwargs = tuple(args), kwargs


def row_factors(axes: Axes) -> Iterator[Factor]:
    """The factors that stand in some row of the weight table, each once, in the order of the table."""
    seen: set[Factor] = set()
    for label in axes.rows.values():
        for dim in label:
            for factor in factors(dim):
                if factor not in seen:
                    seen.add(factor)
                    yield factor


def free(factor: Factor) -> bool:
    """Whether its positions may be put in another order."""
    return not any(kind not in SOFT for kind in factor.pins)
