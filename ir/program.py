"""The Program: named entries over one table of weights and states.

An entry is a functional ATen-level `torch.fx` graph. Everything is explicit: each weight, state and user input is a
placeholder whose `meta["kind"]` and `meta["name"]` say what it is; each result and each update is an operand of the
output node, described in order by `Entry.outputs`. What the graph computes at each node stands in `meta["val"]` as a
fake tensor, where it came from in `meta["site"]`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any

import sympy
import torch
from torch import fx

from laconic.ir.torch_private import FakeTensorMode, fake_mode, fake_tensor, new_symbol
from laconic.ir.tree import Tree
from laconic.ir.types import TensorType, nbytes


class Kind(StrEnum):
    """What a placeholder, or a row of the weight table, is."""

    PARAMETER = "parameter"
    BUFFER = "buffer"
    CONSTANT = "constant"
    STATE = "state"
    INPUT = "input"


class Role(StrEnum):
    """What an output is."""

    RESULT = "result"
    UPDATE = "update"
    INPUT_UPDATE = "input_update"


@dataclass(frozen=True)
class Weight:
    """A row of the weight table: a tensor under the name the model knows it by.

    `kind` is PARAMETER, BUFFER, CONSTANT (lifted from the code, or made by a pass) or STATE (updated by some entry).
    `trainable` is the parameter's `requires_grad`; of a constant, whether weights became it, so that a fine-tune may
    move it.
    """

    name: str
    value: torch.Tensor
    kind: Kind
    trainable: bool = False
    persistent: bool = True


@dataclass(frozen=True)
class Alias:
    """Where the values of a name that is no longer a row went.

    `target` is the row that holds them, None if they stand nowhere any more: nothing uses them, or a pass folded them
    into a row that it made. `rows` and `columns` are the (start, stop) along axes 0 and 1 if they are a part of that
    row; `transposed` says that they are that (matrix, or part of one) transposed.
    """

    target: str | None
    rows: tuple[int, int] | None = None
    columns: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def whole(self) -> bool:
        """Whether the values are the target's, as it is."""
        return self.rows is None and self.columns is None and not self.transposed

    def of(self, value: torch.Tensor) -> torch.Tensor:
        """The view of the target's value that this alias is."""
        if self.rows is not None:
            value = value[self.rows[0] : self.rows[1]]
        if self.columns is not None:
            value = value[:, self.columns[0] : self.columns[1]]
        return value.t() if self.transposed else value

    def through(self, moved: Alias) -> Alias:
        """This alias once its target's values went where `moved` says."""
        if moved.target is None:
            return moved
        rows, columns = (self.columns, self.rows) if moved.transposed else (self.rows, self.columns)
        return Alias(
            moved.target,
            _window(moved.rows, rows),
            _window(moved.columns, columns),
            self.transposed != moved.transposed,
        )


def _window(outer: tuple[int, int] | None, inner: tuple[int, int] | None) -> tuple[int, int] | None:
    """A part of a part."""
    if outer is None or inner is None:
        return outer or inner
    return (outer[0] + inner[0], outer[0] + inner[1])


@dataclass(frozen=True)
class Input:
    """A user input: its name and the range its values were seen in (used to draw further inputs)."""

    name: str
    low: float
    high: float


@dataclass(frozen=True)
class Output:
    """An operand of the output node: a result under its path, or the new value of a state or user input.

    `seen`, of an update, names the results that are the written tensor itself (as with `return self.buffer`), so that a
    caller sees later writes in them; any other result is a tensor of its own.
    """

    role: Role
    name: str
    seen: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.role.replace('_', ' ')} {self.name}"


@dataclass(frozen=True)
class Site:
    """Where in the user's model a node was captured: module path and source line. Ids are never renumbered."""

    module: str
    source: str

    def __str__(self) -> str:
        return f"{self.module or '<model>'} ({self.source})" if self.source else self.module or "<model>"


@dataclass(frozen=True)
class Symbol:
    """A dynamic size: the name users gave the axis, its inclusive range (`high` None: unbounded) and its example."""

    name: str
    low: int
    high: int | None
    hint: int


@dataclass
class Entry:
    """One function of the program. `arguments` maps each parameter name to a tree whose leaves index `inputs`;
    `results` is a tree whose leaves index the RESULT outputs, in order."""

    name: str
    graph: fx.Graph
    inputs: list[Input]
    outputs: list[Output]
    arguments: dict[str, Tree]
    results: Tree

    @property
    def output_node(self) -> fx.Node:
        node: fx.Node = next(iter(reversed(self.graph.nodes)))
        return node

    @property
    def output_values(self) -> tuple[Any, ...]:
        """What the outputs are: nodes or constants, in the order of `outputs`."""
        return tuple(self.output_node.args[0])  # type: ignore[arg-type]

    def placeholders(self) -> Iterator[fx.Node]:
        return (n for n in self.graph.nodes if n.op == "placeholder")

    def weight_nodes(self) -> dict[str, fx.Node]:
        """The placeholder of each weight or state that this entry names."""
        return {n.meta["name"]: n for n in self.placeholders() if n.meta["kind"] != Kind.INPUT}

    def input_nodes(self) -> list[fx.Node]:
        """The placeholders of the user inputs, in the order of `inputs`."""
        by_name = {n.meta["name"]: n for n in self.placeholders() if n.meta["kind"] == Kind.INPUT}
        return [by_name[i.name] for i in self.inputs if i.name in by_name]

    def calls(self) -> Iterator[fx.Node]:
        return (n for n in self.graph.nodes if n.op == "call_function")

    def updated(self) -> set[str]:
        """The names of the states that this entry updates."""
        return {o.name for o in self.outputs if o.role is Role.UPDATE}

    def clone(self) -> Entry:
        return replace(self, graph=copy_graph(self.graph), inputs=list(self.inputs), outputs=list(self.outputs))


@dataclass(frozen=True)
class Function:
    """A block that entries call by its name: what is said several times, said once.

    The placeholders of `graph` are its slots, in order; the output node holds a tuple of results. A call is a
    `call_module` node whose target is the function's name; each result is read from it by `operator.getitem`. Its
    `meta["labels"]` has the (name, site) of every node of the body as they are in that repeat.
    """

    name: str
    graph: fx.Graph

    def slots(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "placeholder"]

    def calls(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n.op == "call_function"]

    @property
    def results(self) -> tuple[fx.Node, ...]:
        return tuple(next(iter(reversed(self.graph.nodes))).args[0])


@dataclass
class Program:
    """Named entries over one table of weights and states.

    `examples` (flat inputs of the entry `forward`) are the user's data: kept in memory for checks, never written.
    `facts` are plain data about the captured model. `functions` are there only in an outlined program
    (`laconic.ir.outline`), which is printed, saved and compiled; passes are given it inlined.
    """

    entries: dict[str, Entry]
    weights: dict[str, Weight]
    symbols: dict[str, Symbol] = field(default_factory=dict)
    sites: dict[int, Site] = field(default_factory=dict)
    aliases: dict[str, Alias] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)
    examples: list[tuple[torch.Tensor, ...]] = field(default_factory=list)
    functions: dict[str, Function] = field(default_factory=dict)
    mode: FakeTensorMode = field(default_factory=fake_mode)

    @property
    def forward(self) -> Entry:
        return self.entries["forward"]

    def entry_of(self, node: fx.Node) -> Entry:
        """The entry whose graph a node stands in. Raises KeyError for a node of another program."""
        for entry in self.entries.values():
            if entry.graph is node.graph:
                return entry
        raise KeyError(f"%{node.name} stands in no entry")

    @property
    def names(self) -> dict[str, str]:
        """Symbol to display name."""
        return {symbol: s.name for symbol, s in self.symbols.items()}

    def add_symbol(self, name: str, low: int, high: int | None, hint: int) -> sympy.Symbol:
        """A new dynamic size under a display name."""
        symbol = new_symbol(self.mode, len(self.symbols), low, high, hint)
        self.symbols[symbol.name] = Symbol(name, low, high, hint)
        return symbol

    def fake(self, kind: TensorType) -> torch.Tensor:
        """A fake tensor of this type, in the program's own fake mode."""
        return fake_tensor(self.mode, kind.shape, kind.stride, kind.dtype, kind.device)

    def clone(self) -> Program:
        """A copy that can be rewritten: graphs and tables are copied, tensors and fake values are shared."""
        return replace(
            self,
            entries={name: entry.clone() for name, entry in self.entries.items()},
            weights=dict(self.weights),
            symbols=dict(self.symbols),
            sites=dict(self.sites),
            aliases=dict(self.aliases),
            facts=dict(self.facts),
            examples=list(self.examples),
        )

    def value_of(self, name: str) -> torch.Tensor | None:
        """The tensor that a weight's name leads to: its row, the row or part of one that its alias names, or None if
        nothing uses it any more. Raises KeyError for a name that the model never had."""
        if name in self.weights:
            return self.weights[name].value
        alias = self.aliases[name]
        if alias.target is None:
            return None
        return alias.of(self.weights[alias.target].value)

    def site(self, node: fx.Node) -> Site | None:
        return self.sites.get(node.meta.get("site", -1))

    def describe(self, node: fx.Node) -> str:
        """A node in words for an error message: its name, op and the user's source line."""
        site = self.site(node)
        what = f"%{node.name} ({node.target})" if node.op == "call_function" else f"%{node.name}"
        return f"{what} from {site}" if site else what

    def node_count(self) -> int:
        return sum(1 for entry in self.entries.values() for _ in entry.calls())

    def weight_bytes(self) -> int:
        """Bytes of all weights and states, each storage byte counted once."""
        spans: dict[int, list[tuple[int, int]]] = {}
        for w in self.weights.values():
            if w.value.numel() and w.value.device.type != "meta":
                storage = w.value.untyped_storage()
                start = int(w.value.storage_offset()) * w.value.element_size()
                last = sum((int(n) - 1) * int(s) for n, s in zip(w.value.shape, w.value.stride(), strict=True))
                stop = start + min((last + 1) * w.value.element_size(), storage.nbytes() - start)
                spans.setdefault(storage.data_ptr(), []).append((start, stop))
            else:
                spans.setdefault(id(w.value), []).append((0, nbytes(w.value)))
        return sum(_covered(intervals) for intervals in spans.values())

    def __str__(self) -> str:
        from laconic.ir.text import print_program

        return print_program(self)


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph with the same node names and meta dicts of its own; attributes are those of the same module."""
    new = fx.Graph(owning_module=graph.owning_module)
    mapped: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        mapped[node] = new.node_copy(node, lambda n: mapped[n])
    return new


def _covered(intervals: list[tuple[int, int]]) -> int:
    """The length of a union of intervals."""
    total, end = 0, -1
    for start, stop in sorted(intervals):
        total += max(0, stop - max(start, end))
        end = max(end, stop)
    return total
