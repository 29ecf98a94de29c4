"""From a Program back to `torch.export.ExportedProgram`, without tracing anything again.

How the result is called: `ep.module()` takes every argument by keyword, under the name it has in the Program; the first
`facts["positional"]` of them (and all that stand before a `*args`) by position instead, since torch fixes one way for
each argument. Arguments that were constants at capture are left out; constants among the results are kept.

Keys of its state dict are names of rows: a tensor with several names in the model stands in it once. Weights are shared
with the Program, states are copied. The exported program has fake values and a shape environment of its own, so that
nothing torch does with it can add a guard to the Program, and it holds no example inputs.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import ExportedProgram, ModuleCallEntry, ModuleCallSignature
from torch.export.graph_signature import (
    ArgumentSpec,
    ConstantArgument,
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    SymBoolArgument,
    SymFloatArgument,
    SymIntArgument,
    TensorArgument,
)

from laconic.ir.errors import UsageError
from laconic.ir.program import Entry, Kind, Output, Program, Role, Weight
from laconic.ir.torch_private import FakeTensorMode, fake_mode, fake_tensor, new_symbol, sym_number, value_range
from laconic.ir.tree import Leaf, Tree, leaves, transform
from laconic.ir.types import NumberType, TensorType, TupleType, ValueType, type_of

#: The order in which torch wants placeholders.
_ORDER = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
_KINDS = {
    Kind.PARAMETER: InputKind.PARAMETER,
    Kind.BUFFER: InputKind.BUFFER,
    Kind.STATE: InputKind.BUFFER,
    Kind.CONSTANT: InputKind.CONSTANT_TENSOR,
}
_NUMBERS = {"int": int, "float": float, "bool": bool}


def to_exported(program: Program, entry: str = "forward", *, explicit_states: bool = False) -> ExportedProgram:
    """An entry of the program as an ExportedProgram of dialect ATEN.

    States are buffers that a call updates. With `explicit_states` they are arguments and results instead: the argument
    `state` is a dict by state name, the result is a tuple of the entry's own result and a dict of what would have been
    written, under `state.<name>.next` and `<input>.next`.

    Raises UsageError if the program has no such entry.
    """
    if entry not in program.entries:
        raise UsageError(f"the program has no entry {entry!r}", why=f"it has {', '.join(program.entries)}")
    return _Rebuild(program, program.entries[entry], explicit_states).exported()


def flat_names(program: Program, entry: str = "forward") -> tuple[list[str], list[str]]:
    """The names of all that an entry takes and returns if its states are explicit.

    The entry's inputs, then `state.<name>`; the entry's results, then `state.<name>.next` and `<input>.next`. Constants
    in the trees have no name and are left out.
    """
    found = program.entries[entry]
    inputs = [declared.name for declared in found.inputs]
    inputs += [f"state.{name}" for name, node in found.weight_nodes().items() if _is_state(program, node)]
    outputs = [output.name for output in found.outputs if output.role is Role.RESULT]
    return inputs, outputs + [_next(output) for output in found.outputs if output.role is not Role.RESULT]


def _is_state(program: Program, node: fx.Node) -> bool:
    return program.weights[node.meta["name"]].kind is Kind.STATE


def _next(output: Output) -> str:
    """The name under which a new value is returned that would have been written."""
    return f"state.{output.name}.next" if output.role is Role.UPDATE else f"{output.name}.next"


@dataclass
class _Rebuild:
    """One entry on its way into an ExportedProgram."""

    program: Program
    entry: Entry
    explicit_states: bool
    graph: fx.Graph = field(default_factory=fx.Graph)
    mode: FakeTensorMode = field(default_factory=fake_mode)
    nodes: dict[fx.Node, fx.Node] = field(default_factory=dict)
    inputs: list[InputSpec] = field(default_factory=list)
    outputs: list[OutputSpec] = field(default_factory=list)
    kept: dict[str, torch.Tensor] = field(default_factory=dict)
    constants: dict[str, Any] = field(default_factory=dict)

    def exported(self) -> ExportedProgram:
        ranges = {}
        for key, size in self.program.symbols.items():
            symbol = new_symbol(self.mode, int(key.removeprefix("s")), size.low, size.high, size.hint)
            ranges[symbol] = value_range(size.low, size.high)
        states = self._weights()
        in_spec, names = self._arguments(states)
        for node in self.entry.calls():
            self._call(node)
        out_spec = self._results()
        # Without names of nodes, as torch writes it for the root: decomposing renames weights, and torch follows none
        # of them into a result.
        call = ModuleCallSignature([], [], in_spec, out_spec, forward_arg_names=names)
        return ExportedProgram(
            root=nn.Module(),
            graph=self.graph,
            graph_signature=ExportGraphSignature(self.inputs, self.outputs),
            state_dict=self.kept,
            range_constraints=ranges,
            module_call_graph=[ModuleCallEntry("", call)],
            example_inputs=None,
            constants=self.constants,
        )

    def _placeholder(self, name: str, value: Any) -> fx.Node:
        node = self.graph.create_node("placeholder", name, name=name)
        node.target = node.name
        node.meta["val"] = value
        return node

    def _weights(self) -> list[fx.Node]:
        """Placeholders of the rows in torch's order; returns the states that become arguments, still without one."""
        explicit: list[fx.Node] = []
        rows = [(n, self.program.weights[n.meta["name"]]) for n in self.entry.weight_nodes().values()]
        for kind in _ORDER:
            for node, row in rows:
                if _KINDS[row.kind] is not kind:
                    continue
                if self.explicit_states and row.kind is Kind.STATE:
                    explicit.append(node)
                    continue
                self.nodes[node] = self._placeholder(node.name, self._fake(type_of(node.meta["val"])))
                argument = TensorArgument(name=self.nodes[node].name)
                persistent = self._store(row) if kind is not InputKind.CONSTANT_TENSOR else None
                if kind is InputKind.CONSTANT_TENSOR:
                    self.constants[row.name] = row.value
                flag = persistent if kind is InputKind.BUFFER else None
                self.inputs.append(InputSpec(kind=kind, arg=argument, target=row.name, persistent=flag))
        return explicit

    def _store(self, row: Weight) -> bool:
        """Put a parameter or buffer where torch looks for it; returns whether it belongs to the state dict."""
        if row.kind is Kind.PARAMETER:
            self.kept[row.name] = nn.Parameter(row.value, requires_grad=row.trainable)
            return True
        value = row.value.clone() if row.kind is Kind.STATE else row.value
        (self.kept if row.persistent else self.constants)[row.name] = value
        return row.persistent

    def _arguments(self, states: list[fx.Node]) -> tuple[pytree.TreeSpec, list[str]]:
        """Placeholders of the user's arguments, in the order in which their tree is flattened."""
        arguments = {
            name: tree
            for name, tree in self.entry.arguments.items()
            if any(isinstance(leaf, Leaf) for _, leaf in leaves(tree))
        }
        by_position = _positional(self.program, self.entry, arguments)
        order: list[Any] = [leaf for _, leaf in leaves(arguments)]
        given = self.entry.input_nodes()
        for leaf in order:
            if isinstance(leaf, Leaf):
                source = given[leaf.index]
                self.nodes[source] = self._placeholder(source.name, self._fake(type_of(source.meta["val"])))
                self._user_input(TensorArgument(name=self.nodes[source].name))
            else:
                node = self._placeholder("constant", leaf)
                self._user_input(ConstantArgument(name=node.name, value=leaf))
        keywords = {name: tree for name, tree in arguments.items() if name not in by_position}
        if states:
            keywords[_free("state", arguments)] = {node.meta["name"]: node for node in states}
            for node in states:
                self.nodes[node] = self._placeholder(node.name, self._fake(type_of(node.meta["val"])))
                self._user_input(TensorArgument(name=self.nodes[node].name))
        spec = pytree.tree_structure((tuple(arguments[name] for name in by_position), keywords))
        return spec, [*by_position, *keywords]

    def _user_input(self, argument: ArgumentSpec) -> None:
        self.inputs.append(InputSpec(kind=InputKind.USER_INPUT, arg=argument, target=None))

    def _call(self, node: fx.Node) -> None:
        copy = self.graph.node_copy(node, lambda n: self.nodes[n])
        copy.meta = {"val": self._fake(type_of(node.meta["val"]))}
        site = self.program.site(node)
        if site is not None and site.source:
            file, _, line = site.source.rpartition(":")
            copy.meta["stack_trace"] = f'  File "{file}", line {line}, in {site.module or "forward"}'
        self.nodes[node] = copy

    def _results(self) -> pytree.TreeSpec:
        """The output node and its specs: mutations first, then the leaves of the result tree."""
        outputs = list(zip(self.entry.outputs, self.entry.output_values, strict=True))
        results = [value for output, value in outputs if output.role is Role.RESULT]
        written = [(o, v) for o, v in outputs if o.role is not Role.RESULT]
        flat: list[Any] = []
        user_nodes = {i.name: n for i, n in zip(self.entry.inputs, self.entry.input_nodes(), strict=True)}
        if not self.explicit_states:
            for role in (Role.UPDATE, Role.INPUT_UPDATE):
                for output, value in written:
                    if output.role is not role:
                        continue
                    is_state = role is Role.UPDATE
                    kind = OutputKind.BUFFER_MUTATION if is_state else OutputKind.USER_INPUT_MUTATION
                    target = output.name if is_state else self.nodes[user_nodes[output.name]].name
                    self.outputs.append(OutputSpec(kind=kind, arg=self._argument(value), target=target))
                    flat.append(self._value(value))
        tree: Tree = transform(self.entry.results, lambda x: results[x.index] if isinstance(x, Leaf) else x)
        if self.explicit_states and written:
            tree = (tree, {_next(output): value for output, value in written})
        for _, value in leaves(tree):
            self.outputs.append(OutputSpec(kind=OutputKind.USER_OUTPUT, arg=self._argument(value), target=None))
            flat.append(self._value(value))
        self.graph.output(tuple(flat)).meta["val"] = tuple(v.meta["val"] if isinstance(v, fx.Node) else v for v in flat)
        return pytree.tree_structure(tree)

    def _value(self, value: Any) -> Any:
        return self.nodes[value] if isinstance(value, fx.Node) else value

    def _argument(self, value: Any) -> ArgumentSpec:
        """How torch's signature names an operand of the output node."""
        if not isinstance(value, fx.Node):
            return ConstantArgument(name="", value=value)
        name, kind = self.nodes[value].name, type_of(value.meta["val"])
        if isinstance(kind, NumberType):
            if kind.kind == "int":
                return SymIntArgument(name=name)
            return SymFloatArgument(name=name) if kind.kind == "float" else SymBoolArgument(name=name)
        return TensorArgument(name=name)

    def _fake(self, kind: ValueType | None) -> Any:
        """A value of this type in the fake mode of the exported program."""
        if isinstance(kind, TensorType):
            return fake_tensor(self.mode, kind.shape, kind.stride, kind.dtype, kind.device)
        if isinstance(kind, NumberType):
            return sym_number(self.mode, _NUMBERS[kind.kind], kind.value)
        if isinstance(kind, TupleType):
            return tuple(self._fake(part) for part in kind.parts)
        return None


def _positional(program: Program, entry: Entry, arguments: dict[str, Tree]) -> list[str]:
    """The arguments that a call gives by position: those recorded at capture, and all up to the last of a `*args`."""
    recorded = program.facts.get("positional", 0) if entry.name == "forward" else 0
    names = list(entry.arguments)
    variadic = [k + 1 for k, name in enumerate(names) if name.startswith("args_") and name[5:].isdigit()]
    return [name for name in names[: max([recorded, *variadic])] if name in arguments]


def _free(name: str, taken: dict[str, Any]) -> str:
    while name in taken:
        name += "_"
    return name
