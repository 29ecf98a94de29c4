"""Caches of attention: which states or inputs hold keys and values, how a call writes into them, and the one rewriter
of what they hold.

    %k = aten.index_copy(@key_cache_0, 2, %at, %new)        static: written in place, read whole
    %k = aten.cat([%past, %new], 2)                         concatenated: an input, longer as a result

A layout says what a cache holds in place of what is written: it encodes what goes in and decodes what comes out. The
rewriter changes states, every entry that reads or writes them, and what callers give and get, together.
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
from laconic.ir.rewrite import insert_call
from laconic.ir.structure import Attention, find_structure
from laconic.ir.structure.records import NearMiss
from laconic.ir.traits import argument
from laconic.ir.types import TensorType, type_of

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
        """What a cache holds in place of this; a fake tensor says of which type."""

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
    """The Program with all its caches in another floating dtype: states, or what callers give and get.

    Raises UnsupportedError if it has none that are known, with the reasons.
    """
    sites, near = find_caches(program)
    if not sites:
        raise UnsupportedError(
            "no cache was found that can be rewritten",
            why="; ".join(miss.reason for miss in near[:3]) or "no attention reads a state",
            hint="capture the model with cache=(batch, length)",
        )
    held = {node.meta["name"]: type_of(node.meta["val"]) for e in program.entries.values() for node in e.placeholders()}
    made = program
    for name in dict.fromkeys(name for site in sites for name in (site.key, site.value)):
        kind = held[name]
        assert isinstance(kind, TensorType)
        made = relayout(made, [name], Cast(dtype, kind.dtype))
    return made


def relayout(program: Program, names: Iterable[str], layout: Layout) -> Program:
    """The Program with these caches in another layout, in all entries at once: states, or inputs whose continuation is
    a result, both of which callers then have in that layout.

    Raises UnsupportedError for a state or input that is used otherwise than by calls that write into it or continue it,
    and are read and kept.
    """
    made = program.clone()
    for name in names:
        row = made.weights.get(name)
        if row is not None:
            made.weights[name] = replace(row, value=layout.state(row.value))
        for entry in made.entries.values():
            node = next((n for n in entry.placeholders() if n.meta["name"] == name), None)
            if node is not None:
                _in_entry(made, entry, node, layout)
        place = next((k for k, given in enumerate(made.forward.inputs) if given.name == name), None)
        if row is None and place is not None:
            made.examples = [(*e[:place], layout.state(e[place]), *e[place + 1 :]) for e in made.examples]
    return made


def _in_entry(program: Program, entry: Entry, node: fx.Node, layout: Layout) -> None:
    """Encode what goes into a cache, and decode it for who reads it; what is kept or returned stays encoded."""
    users = list(node.users)
    node.meta["val"] = layout.state(node.meta["val"])
    for user in users:
        args: list[Any] = list(user.args)
        if user.target in _WRITES and args[0] is node:
            schema: Any = user.target._schema
            place = next(k for k, a in enumerate(schema.arguments) if a.name in ("source", "src", "values"))
            args[place] = layout.encode(program, entry, user, args[place])
        elif user.target is aten.cat.default and args[0][0] is node:
            args[0] = [node, *(layout.encode(program, entry, user, new) for new in args[0][1:])]
        else:
            raise UnsupportedError(
                f"the {'state' if node.meta['kind'] != Kind.INPUT else 'input'} {node.meta['name']!r} cannot be held "
                "otherwise",
                where=program.describe(user),
                why=f"%{user.name} does not write into a part of it, nor continue it",
            )
        user.args = tuple(args)
        user.meta["val"] = recompute(program, user)
        readers = [reader for reader in user.users if reader.op != "output"]
        if readers:
            decoded = layout.decode(program, entry, user.next, user)
            for reader in readers:
                reader.replace_input_with(user, decoded)
            propagate(program, entry.graph, readers)  # strides may be others
