"""The few edits of which every rewrite consists. They keep names, sites, provenance and types right."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import fx

from laconic.ir.program import Alias, Entry, Kind, Program, Weight
from laconic.ir.propagate import recompute
from laconic.ir.traits import traits
from laconic.ir.types import type_of


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


def inline_literal(entry: Entry, name: str, literal: Any) -> None:
    """Let a Python number stand for the node `name` in all its users, and remove it."""
    node = find(entry, name)
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
) -> fx.Node:
    """A new call in front of `before`, with its type computed, made by pass `by` at the site of `like`."""
    with entry.graph.inserting_before(before):
        node = entry.graph.call_function(target, args)
    if "site" in like.meta:
        node.meta["site"] = like.meta["site"]
    node.meta["by"] = by
    node.meta["val"] = recompute(program, node)
    return node


def weight_node(program: Program, entry: Entry, name: str) -> fx.Node:
    """The entry's placeholder of a row of the weight table, made if it has none."""
    existing = entry.weight_nodes().get(name)
    if existing is not None:
        return existing
    weight = program.weights[name]
    first = next(iter(entry.graph.nodes))
    with entry.graph.inserting_before(first):
        node = entry.graph.create_node("placeholder", placeholder_name(name), name=placeholder_name(name))
    node.target = node.name
    node.meta.update(kind=weight.kind, name=name, val=fake_weight(program, weight))
    return node


def placeholder_name(name: str) -> str:
    """The identifier of a weight's placeholder: its name with what no identifier may hold replaced."""
    return "w_" + "".join(c if c.isalnum() and c.isascii() else "_" for c in name).lower()


def fake_weight(program: Program, weight: Weight) -> Any:
    kind = type_of(weight.value)
    return program.fake(kind)  # type: ignore[arg-type]


def add_constant(program: Program, name: str, value: Any) -> str:
    """A new row for a tensor that a pass made; returns its name, made unique."""
    unique, number = name, 1
    while unique in program.weights or unique in program.aliases:
        unique, number = f"{name}_{number}", number + 1
    program.weights[unique] = Weight(unique, value, Kind.CONSTANT, persistent=False)
    return unique


def drop_weight(program: Program, name: str, alias: Alias) -> None:
    """Remove a row that no entry uses, noting where its values went. Aliases that named it follow."""
    for entry in program.entries.values():
        node = entry.weight_nodes().get(name)
        if node is not None:
            entry.graph.erase_node(node)
    del program.weights[name]
    program.aliases[name] = alias
    for other, old in list(program.aliases.items()):
        if old.target == name:
            rows = old.rows
            if alias.rows is not None:
                start = alias.rows[0]
                rows = (start + rows[0], start + rows[1]) if rows else alias.rows
            program.aliases[other] = Alias(alias.target, rows if alias.target else None)


def dead_nodes(entry: Entry) -> list[fx.Node]:
    """The calls whose results nobody uses, users before operands; effects and random draws keep a call alive."""
    dead: set[fx.Node] = set()
    order: list[fx.Node] = []
    for node in reversed(entry.graph.nodes):
        if node.op == "call_function" and all(u in dead for u in node.users) and traits(node).pure:
            dead.add(node)
            order.append(node)
    return order
