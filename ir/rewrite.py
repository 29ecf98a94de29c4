"""The few edits of which every rewrite consists. They keep names, sites, provenance and types right."""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Collection, Mapping
from itertools import pairwise
from typing import Any

import sympy
import torch
from torch import fx

from laconic.ir.errors import UsageError
from laconic.ir.program import Alias, Entry, Kind, Program, Weight
from laconic.ir.propagate import recompute
from laconic.ir.torch_private import expression
from laconic.ir.traits import traits
from laconic.ir.types import Size, type_of


def find(entry: Entry, name: str) -> fx.Node:
    """The node with this name. Raises KeyError."""
    node: fx.Node
    for node in entry.graph.nodes:
        if node.name == name:
            return node
    raise KeyError(f"entry {entry.name!r} has no node %{name}")


def by_name(entry: Entry) -> dict[str, fx.Node]:
    return {node.name: node for node in entry.graph.nodes}


def substitute(entry: Entry, pairs: Mapping[str, str]) -> None:
    """Let the node named by each value stand for the one named by its key, and remove the latter.

    The replacement must stand before all users of what it replaces; chains (a by b, b by c) are followed.
    """
    nodes = by_name(entry)

    def final(name: str) -> str:
        while name in pairs:
            name = pairs[name]
        return name

    for old in pairs:
        nodes[old].replace_all_uses_with(nodes[final(old)])
    for old in reversed([name for name in nodes if name in pairs]):
        entry.graph.erase_node(nodes[old])


def hoist(entry: Entry, names: Collection[str]) -> None:
    """Move these calls up to right behind the last of their operands; all others keep their order."""
    nodes = list(entry.graph.nodes)
    first = max((k for k, node in enumerate(nodes) if node.op == "placeholder"), default=-1)
    place: dict[fx.Node, tuple[int, int]] = {}
    for k, node in enumerate(nodes):
        operands = max((place[n][0] for n in node.all_input_nodes), default=first)
        place[node] = (max(operands, first) if node.name in names else k, k)
    ordered = sorted(nodes, key=place.__getitem__)
    for before, node in pairwise(ordered):
        if node.name in names:
            before.append(node)


def inline_literal(entry: Entry, node: fx.Node, literal: Any) -> None:
    """Let a Python number stand for a node in all its users, and remove it."""
    for user in list(node.users):
        user.args = fx.node.map_arg(user.args, lambda n: literal if n is node else n)
        user.kwargs = fx.node.map_arg(user.kwargs, lambda n: literal if n is node else n)
    entry.graph.erase_node(node)


def insert_call(
    program: Program,
    entry: Entry,
    before: fx.Node,
    target: Any,
    args: tuple[Any, ...],
    *,
    by: str,
    like: fx.Node,
    kwargs: Mapping[str, Any] | None = None,
) -> fx.Node:
    """A new call in front of `before`, with its type computed, made by pass `by` at the site of `like`."""
    site = like.meta.get("site")
    stem = str(getattr(target, "__name__", "call")).partition(".")[0]
    with entry.graph.inserting_before(before):
        name = None if site is None else site_name(stem, site)
        node = entry.graph.create_node("call_function", target, args, dict(kwargs or {}), name=name)
    if site is not None:
        node.meta["site"] = site
    node.meta["by"] = by
    node.meta["val"] = recompute(program, node)
    return node


def spell_size(program: Program, entry: Entry, before: fx.Node, size: Size, *, by: str) -> Any:
    """A size as an argument for the call `before`: the number itself, or calls in front of it that compute it from axes
    of the inputs.

    Raises UsageError for a size that is no sum of products of dynamic axes.
    """
    if isinstance(size, int):
        return size
    terms = sympy.Poly(size).terms() if size.is_polynomial() else [((), sympy.nan)]
    if any(not coefficient.is_Integer for _, coefficient in terms):
        raise UsageError(f"%{before.name} needs a size that cannot be spelled", why=f"it would be {size}")
    found: Any = None
    for powers, coefficient in terms:
        parts: list[Any] = [int(coefficient)] if coefficient != 1 or not any(powers) else []
        for symbol, power in zip(sympy.Poly(size).gens, powers, strict=True):
            parts += [_axis_size(program, entry, before, symbol, by)] * power
        term = parts[-1]
        for part in reversed(parts[:-1]):
            term = insert_call(program, entry, before, operator.mul, (term, part), by=by, like=before)
        if found is not None:
            term = insert_call(program, entry, before, operator.add, (found, term), by=by, like=before)
        found = term
    return found


def _axis_size(program: Program, entry: Entry, before: fx.Node, symbol: Any, by: str) -> fx.Node:
    """A call in front of `before` that reads a dynamic size off an input."""
    for value in entry.input_nodes():
        for axis, size in enumerate(value.meta["val"].shape):
            if expression(size) == symbol:
                return insert_call(
                    program, entry, before, torch.ops.aten.sym_size.int, (value, axis), by=by, like=before
                )
    raise UsageError(f"%{before.name} needs a size that no input has", why=f"it would hold {symbol}")


def set_argument(node: fx.Node, name: str, value: Any, *, by: str) -> None:
    """Give a call another value for the argument with this schema name; `by` is the pass that did.

    Its type must not change by that. Raises KeyError if the op has no such argument.
    """
    target = node.target
    assert isinstance(target, torch._ops.OpOverload)
    declared = {a.name: (k, a) for k, a in enumerate(target._schema.arguments)}
    position, argument = declared[name]
    args, kwargs = list(node.args), dict(node.kwargs)
    kwargs.pop(name, None)
    if position < len(args):
        args[position] = value
    elif value is not argument.default_value:
        if position == len(args) and not argument.kwarg_only:
            args.append(value)
        else:
            kwargs[name] = value
    node.args, node.kwargs = tuple(args), kwargs
    node.meta["by"] = by


def weight_node(program: Program, entry: Entry, name: str, known: dict[str, fx.Node] | None = None) -> fx.Node:
    """The entry's placeholder of a row of the weight table, made if it has none.

    `known` is `entry.weight_nodes()`, kept up to date here, for who asks for many.
    """
    known = entry.weight_nodes() if known is None else known
    if name in known:
        return known[name]
    weight = program.weights[name]
    first = next(iter(entry.graph.nodes))
    with entry.graph.inserting_before(first):
        node = entry.graph.create_node("placeholder", placeholder_name(name), name=placeholder_name(name))
    node.target = node.name
    node.meta.update(kind=weight.kind, name=name, val=fake_weight(program, weight))
    known[name] = node
    return node


def site_name(stem: str, site: int) -> str:
    """The name of a node at a site: repeats of one block then have names that differ as their sites do."""
    return f"{stem.rstrip('0123456789').rstrip('_') or stem}_{site}"


def placeholder_name(name: str) -> str:
    """The identifier of a weight's placeholder: its name with what no identifier may hold replaced."""
    return "w_" + "".join(c if c.isalnum() and c.isascii() else "_" for c in name).lower()


def fake_weight(program: Program, weight: Weight) -> Any:
    kind = type_of(weight.value)
    return program.fake(kind)  # type: ignore[arg-type]


def add_constant(program: Program, name: str, value: Any, *, trainable: bool = False) -> str:
    """A new row for a tensor that a pass made; returns its name, made unique. It is `trainable` where weights became
    it, which are then never folded into others."""
    unique, number = name, 1
    while unique in program.weights or unique in program.aliases:
        unique, number = f"{name}_{number}", number + 1
    program.weights[unique] = Weight(unique, value, Kind.CONSTANT, trainable, persistent=False)
    return unique


def folded_name(row: str) -> str:
    """What a constant that a pass made of a row is called."""
    return "folded_" + row.replace(".", "_")  # no dot: a part might be a method of a module


def used_rows(program: Program) -> set[str]:
    """The rows that some call or output reads."""
    return {name for entry in program.entries.values() for name, node in entry.weight_nodes().items() if node.users}


def drop_unused(program: Program, used: Collection[str]) -> None:
    """Remove those of these rows that nothing reads any more; their names lead nowhere. States stay."""
    for row in sorted(set(used) - used_rows(program)):
        if row in program.weights and program.weights[row].kind is not Kind.STATE:
            drop_weight(program, row, Alias(None))


def drop_weight(program: Program, name: str, alias: Alias) -> None:
    """Remove a row that no entry uses, noting where its values went. Aliases that named it follow."""
    drop_weights(program, {name: alias})


def drop_weights(program: Program, gone: Mapping[str, Alias]) -> None:
    """Remove rows that no entry uses, one after another, noting where their values went. Aliases that named them
    follow; a row may go to one that is removed after it."""
    for entry in program.entries.values():
        for name, node in entry.weight_nodes().items():
            if name in gone:
                entry.graph.erase_node(node)
    of_target: dict[str | None, list[str]] = defaultdict(list)
    for name, alias in program.aliases.items():
        of_target[alias.target].append(name)
    for name, alias in gone.items():
        del program.weights[name]
        program.aliases[name] = alias
        followers = of_target.pop(name, [])
        for other in followers:
            program.aliases[other] = program.aliases[other].through(alias)
        of_target[alias.target] += [*followers, name]


def dead_nodes(entry: Entry) -> list[fx.Node]:
    """The calls whose results nobody uses, users before operands; effects and random draws keep a call alive."""
    dead: set[fx.Node] = set()
    order: list[fx.Node] = []
    for node in reversed(entry.graph.nodes):
        if node.op == "call_function" and all(u in dead for u in node.users) and traits(node).pure:
            dead.add(node)
            order.append(node)
    return order
