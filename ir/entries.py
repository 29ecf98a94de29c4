"""Several captures of one model as the entries of one Program, over one table of weights and states.

A row is one tensor, whichever entry reads it: tensors that lie in one place are one row, under the name that the first
entry knows it by. Each entry keeps its own inputs and results; dynamic axes of one name are one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import sympy
import torch
from torch import fx

from laconic.ir.errors import UsageError
from laconic.ir.metrics.differences import bit_equal
from laconic.ir.program import Entry, Kind, Program, Symbol, Weight
from laconic.ir.propagate import recompute
from laconic.ir.rewrite import placeholder_name
from laconic.ir.torch_private import free_symbols
from laconic.ir.types import Size, TensorType, type_of
from laconic.ir.verify import verify


def combine(captured: Mapping[str, Program]) -> Program:
    """One Program that has, under these names, the entry `forward` of each of these. Facts, examples and names of tied
    weights are those of the first.

    Raises UsageError if one name stands for different weights, or for axes of different ranges.
    """
    first = next(iter(captured.values()))
    made = Program({}, {}, facts=dict(first.facts), examples=list(first.examples))
    homes: dict[Any, str] = {}
    for name, program in captured.items():
        _Addition(made, name, program, homes).add()
    made.aliases = {name: alias for name, alias in first.aliases.items() if name not in made.weights}
    verify(made)
    return made


class _Addition:
    """One capture on its way into a Program."""

    def __init__(self, made: Program, name: str, program: Program, homes: dict[Any, str]) -> None:
        self.made, self.name, self.program, self.homes = made, name, program, homes
        self.rows: dict[str, str] = {}
        self.symbols: dict[str, sympy.Symbol] = {}
        self.offset = max(made.sites, default=-1) + 1

    def add(self) -> None:
        for weight in self.program.weights.values():
            self.rows[weight.name] = self._row(weight)
        for key, symbol in self.program.symbols.items():
            self.symbols[key] = self._symbol(symbol)
        self.made.sites.update({number + self.offset: site for number, site in self.program.sites.items()})
        entry = self.program.forward
        outputs = [replace(o, name=self.rows[o.name]) if o.name in self.rows else o for o in entry.outputs]
        self.made.entries[self.name] = Entry(
            self.name, self._graph(entry), list(entry.inputs), outputs, entry.arguments, entry.results
        )

    def _row(self, weight: Weight) -> str:
        """The row of the table that a weight is: one that is there, or a new one."""
        place = _place(weight.value)
        if weight.kind is not Kind.STATE and place in self.homes:
            return self.homes[place]
        known = self.made.weights.get(weight.name)
        name = weight.name
        if known is not None:
            # What one entry writes another may only read.
            alike = known.kind is weight.kind or (known.kind is Kind.STATE and weight.kind is Kind.BUFFER)
            if alike and bit_equal(known.value, weight.value):
                return name
            if weight.kind is not Kind.CONSTANT:
                raise UsageError(
                    f"the entry {self.name!r} was captured with another {weight.kind} {weight.name!r}",
                    hint="capture all entries of the same model, with the same weights",
                )
            while name in self.made.weights:
                name += "_"
        self.made.weights[name] = replace(weight, name=name)
        self.homes[place] = name
        return name

    def _symbol(self, symbol: Symbol) -> sympy.Symbol:
        for key, known in self.made.symbols.items():
            if known.name == symbol.name:
                if (known.low, known.high) != (symbol.low, symbol.high):
                    raise UsageError(
                        f"the axis {symbol.name!r} has another range in the entry {self.name!r}",
                        why=f"{known.low} to {known.high or 'any'}, and {symbol.low} to {symbol.high or 'any'}",
                        hint="give it a name of its own",
                    )
                return _sympy(key)
        return self.made.add_symbol(symbol.name, symbol.low, symbol.high, symbol.hint)

    def _graph(self, entry: Entry) -> fx.Graph:
        """The entry's graph, its types computed again among those of the Program."""
        graph, found = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in entry.graph.nodes:
            site = node.meta.get("site")
            own = node.name
            if site is not None and own.endswith(f"_{site}"):
                own = f"{own.removesuffix(str(site))}{site + self.offset}"
            if node.op == "placeholder" and node.meta["kind"] != Kind.INPUT:
                own = placeholder_name(self.rows[node.meta["name"]])
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
            target = own if node.op == "placeholder" else node.target
            new = graph.create_node(node.op, target, args, kwargs, name=own)
            new.meta = dict(node.meta)
            found[node] = new
            if site is not None:
                new.meta["site"] = site + self.offset
            if node.op == "placeholder":
                if node.meta["kind"] != Kind.INPUT:
                    new.meta["name"] = self.rows[node.meta["name"]]
                    new.meta["kind"] = self.made.weights[new.meta["name"]].kind
                new.meta["val"] = self._fake(type_of(node.meta["val"]))
            elif node.op == "call_function":
                new.meta["val"] = recompute(self.made, new)
        return graph

    def _fake(self, kind: Any) -> torch.Tensor:
        assert isinstance(kind, TensorType)
        shape, stride = (tuple(map(self._size, sizes)) for sizes in (kind.shape, kind.stride))
        return self.made.fake(replace(kind, shape=shape, stride=stride))

    def _size(self, size: Size) -> Size:
        if isinstance(size, int):
            return size
        return size.xreplace({s: self.symbols[s.name] for s in size.free_symbols})


def _place(value: torch.Tensor) -> Any:
    """Where a tensor lies; two of one place are one."""
    if value.device.type == "meta" or not value.numel():
        return id(value)
    return (value.data_ptr(), tuple(value.shape), tuple(value.stride()), value.dtype, value.device)


def _sympy(name: str) -> sympy.Symbol:
    return sympy.Symbol(name, positive=True, integer=True)


def alone(program: Program, name: str, examples: list[dict[str, torch.Tensor]]) -> Program:
    """One entry as the entry `forward` of a Program of its own, with what it reads of the table and its own axes;
    examples by name."""
    entry = program.entries[name]
    own = entry.clone()
    read = {row for row, node in entry.weight_nodes().items() if node.users or row in entry.updated()}
    for row, node in own.weight_nodes().items():
        if row not in read:
            own.graph.erase_node(node)
    used = {s.name for node in own.input_nodes() for s in free_symbols(node.meta["val"])}
    part = replace(
        program,
        entries={"forward": own},
        weights={row: weight for row, weight in program.weights.items() if row in read},
        aliases={},
        symbols={key: symbol for key, symbol in program.symbols.items() if key in used},
        examples=[tuple(example[given.name] for given in entry.inputs) for example in examples],
    )
    return combine({"forward": part})
