"""Caches of attention: which states or inputs hold keys and values, how a call writes into them, and the one rewriter
of what they hold.

    %k = aten.index_copy(@key_cache_0, 2, %at, %new)        static: written in place, read whole
    %k = aten.cat([%past, %new], 2)                         concatenated: an input, longer as a result

A layout says what a cache holds in place of what is written: it encodes what goes in and decodes what comes out. The
rewriter changes states, every entry that reads or writes them, and what the entries return, together.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from laconic.ir.errors import UnsupportedError
from laconic.ir.program import Entry, Kind, Program, Role
from laconic.ir.propagate import propagate, recompute
from laconic.ir.rewrite import fake_weight, insert_call
from laconic.ir.structure import Attention, find_structure
from laconic.ir.structure.records import NearMiss
from laconic.ir.traits import argument

aten = torch.ops.aten

#: Between a cache and the attention that reads it.
_PASSED = frozenset(
    {
        *(aten.reshape.default, aten.expand.default, aten.unsqueeze.default, aten.squeeze.dim, aten.clone.default),
        *(aten.transpose.int, aten.permute.default, aten._to_copy.default, aten.repeat_interleave.self_int),
        aten.slice.Tensor,
    }
)
#: What writes into a part of its first operand.
_WRITES = frozenset({aten.index_copy.default, aten.index_put.default, aten.slice_scatter.default})
_ATTENTION = aten.scaled_dot_product_attention.default


@dataclass(frozen=True)
class CacheSite:
    """Keys and values of one attention. `kind` is static (`key` and `value` are states, written in place along `axis`)
    or concatenated (they are inputs, and longer results). `entries` are those in which it is read."""

    kind: str
    key: str
    value: str
    axis: int
    entries: tuple[str, ...]


def find_caches(program: Program) -> tuple[list[CacheSite], list[NearMiss]]:
    """The caches of a Program, in the order of its attentions, and what almost was one, with the reason."""
    found: dict[tuple[str, str, str, int], list[str]] = {}
    near: list[NearMiss] = []
    for name, structure in find_structure(program).items():
        entry = program.entries[name]
        for attention in structure.attentions:
            if not attention.cached:
                continue
            site = _site(entry, attention)
            if isinstance(site, str):
                where = str(program.site(attention.node) or "")
                near.append(NearMiss("cache", attention.node, f"in entry {name!r}, {site}", where))
            else:
                found.setdefault(site, []).append(name)
    return [CacheSite(*key, tuple(names)) for key, names in found.items()], near


def _site(entry: Entry, attention: Attention) -> tuple[str, str, str, int] | str:
    """Kind, names and axis of an attention's cache; or why it is none that is known."""
    if attention.node.target is not _ATTENTION:
        return "attention is written out, and its keys are not told apart from its scores"
    sides = []
    for value in ("key", "value"):
        side = _side(entry, argument(attention.node, value))
        if isinstance(side, str):
            return f"its {value}s {side}"
        sides.append(side)
    (kind, key, axis), (other, values, along) = sides
    if (kind, axis) != (other, along):
        return f"keys are {kind} along axis {axis}, and values {other} along axis {along}"
    return kind, key, values, axis


def _side(entry: Entry, node: fx.Node) -> tuple[str, str, int] | str:
    while node.op == "call_function" and node.target in _PASSED:
        node = node.args[0]  # type: ignore[assignment]
    if node.target in _WRITES:
        home = node.args[0]
        if not isinstance(home, fx.Node) or home.op != "placeholder" or home.meta["kind"] != Kind.STATE:
            return f"are written into %{home}, which is no state"
        axis = argument(node, "dim") if node.target is not aten.index_put.default else _indexed(node)
        return "static", str(home.meta["name"]), int(axis)
    if node.target is aten.cat.default:
        past = node.args[0][0]  # type: ignore[index]
        if not isinstance(past, fx.Node) or past.op != "placeholder" or past.meta["kind"] != Kind.INPUT:
            return f"continue %{past}, which is no input"
        if not any(v is node for o, v in zip(entry.outputs, entry.output_values, strict=True) if o.role is Role.RESULT):
            return f"continue the input {past.meta['name']!r}, and no result says how far"
        return "concatenated", str(past.meta["name"]), int(argument(node, "dim"))
    return f"come from %{node.name} ({node.target}), which neither writes into a state nor continues an input"


def _indexed(node: fx.Node) -> int:
    indices: Any = node.args[1]
    return next(k for k, index in enumerate(indices) if index is not None)


class Layout(ABC):
    """What a cache holds in place of keys or values."""

    #: The pass in whose name calls are put in.
    by: str = "caches"

    @abstractmethod
    def state(self, value: torch.Tensor) -> torch.Tensor:
        """What a state holds in place of this."""

    @abstractmethod
    def encode(self, program: Program, entry: Entry, before: fx.Node, new: fx.Node) -> fx.Node:
        """Calls in front of `before` that make of what is written what the state holds."""

    @abstractmethod
    def decode(self, program: Program, entry: Entry, before: fx.Node, held: fx.Node) -> fx.Node:
        """Calls in front of `before` that make of what the state holds what attention reads."""


@dataclass(frozen=True)
class Cast(Layout):
    """The same numbers in another floating dtype."""

    dtype: torch.dtype
    was: torch.dtype

    def state(self, value: torch.Tensor) -> torch.Tensor:
        return value.to(self.dtype)

    def encode(self, program: Program, entry: Entry, before: fx.Node, new: fx.Node) -> fx.Node:
        return self._cast(program, entry, before, new, self.dtype)

    def decode(self, program: Program, entry: Entry, before: fx.Node, held: fx.Node) -> fx.Node:
        return self._cast(program, entry, before, held, self.was)

    def _cast(self, program: Program, entry: Entry, before: fx.Node, value: fx.Node, dtype: torch.dtype) -> fx.Node:
        return insert_call(
            program, entry, before, aten._to_copy.default, (value,), by=self.by, like=before, kwargs={"dtype": dtype}
        )


def cast_caches(program: Program, dtype: torch.dtype) -> Program:
    """The Program with all its static caches in another floating dtype.

    Raises UnsupportedError if it has none that are known, with the reasons.
    """
    sites, near = find_caches(program)
    static = [site for site in sites if site.kind == "static"]
    if not static:
        raise UnsupportedError(
            "no cache was found that can be rewritten",
            why="; ".join(miss.reason for miss in near[:3]) or "no attention reads a state",
            hint="capture the model with cache=(batch, length)",
        )
    made = program
    for name in dict.fromkeys(name for site in static for name in (site.key, site.value)):
        made = relayout(made, [name], Cast(dtype, program.weights[name].value.dtype))
    return made


def relayout(program: Program, states: Iterable[str], layout: Layout) -> Program:
    """The Program with these states in another layout, in all entries at once.

    Raises UnsupportedError for a state that is used otherwise than by writes into it that are read and kept.
    """
    made = program.clone()
    for name in states:
        row = made.weights[name]
        made.weights[name] = replace(row, value=layout.state(row.value))
        for entry in made.entries.values():
            node = entry.weight_nodes().get(name)
            if node is not None:
                _in_entry(made, entry, node, layout)
    return made


def _in_entry(program: Program, entry: Entry, node: fx.Node, layout: Layout) -> None:
    users = list(node.users)
    node.meta["val"] = fake_weight(program, program.weights[node.meta["name"]])
    for user in users:
        if user.target not in _WRITES or user.args[0] is not node:
            raise UnsupportedError(
                f"the state {node.meta['name']!r} cannot be held otherwise",
                where=program.describe(user),
                why=f"%{user.name} does not write into a part of it",
            )
        schema: Any = user.target._schema
        place = next(k for k, a in enumerate(schema.arguments) if a.name in ("source", "src", "values"))
        args = list(user.args)
        args[place] = layout.encode(program, entry, user, args[place])  # type: ignore[arg-type]
        user.args = tuple(args)
        user.meta["val"] = recompute(program, user)
        readers = [reader for reader in user.users if reader.op != "output"]
        if readers:
            decoded = layout.decode(program, entry, user.next, user)
            for reader in readers:
                reader.replace_input_with(user, decoded)
            propagate(program, entry.graph, readers)  # strides may be others
