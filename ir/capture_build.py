"""From an ExportedProgram to a Program: rows, symbols, inputs, calls, outputs, facts."""

from __future__ import annotations

import inspect
import logging
from dataclasses import replace
from itertools import count
from typing import Any

import sympy
import torch
import torch.utils._pytree as pytree
from torch import fx, nn
from torch.export import Dim, ExportedProgram
from torch.export.graph_signature import ConstantArgument, InputKind, OutputKind, TensorArgument

from laconic.ir.canon import canonicalize
from laconic.ir.errors import UnsupportedError
from laconic.ir.inputs import observed
from laconic.ir.program import Alias, Entry, Input, Kind, Output, Program, Role, Site, Weight
from laconic.ir.propagate import propagate
from laconic.ir.rewrite import fake_weight, placeholder_name, site_name
from laconic.ir.source import user_source
from laconic.ir.torch_private import expression, free_symbols, is_unbacked, symbol_hint
from laconic.ir.tree import Leaf, Tree, class_of, leaves, plain
from laconic.ir.types import DTYPE_NAMES, TensorType, type_of

log = logging.getLogger(__name__)

_KINDS = {
    InputKind.PARAMETER: Kind.PARAMETER,
    InputKind.BUFFER: Kind.BUFFER,
    InputKind.CONSTANT_TENSOR: Kind.CONSTANT,
}
_ROLES = {
    OutputKind.USER_OUTPUT: Role.RESULT,
    OutputKind.BUFFER_MUTATION: Role.UPDATE,
    OutputKind.USER_INPUT_MUTATION: Role.INPUT_UPDATE,
}


def build(
    module: nn.Module, exported: ExportedProgram, args: tuple[Any, ...], kwargs: dict[str, Any], dynamic: Any
) -> Program:
    """The Program that a functional ExportedProgram of `module` says, with `args` and `kwargs` as its examples.

    Raises UnsupportedError, with the user's source line, for what a Program cannot hold.
    """
    return _Builder(module, exported, args, kwargs, dynamic).program()


class _Builder:
    """From an ExportedProgram to a Program."""

    def __init__(
        self,
        module: nn.Module,
        exported: ExportedProgram,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        dynamic: Any,
    ) -> None:
        self.module, self.exported = module, exported
        self.args, self.kwargs, self.dynamic = args, kwargs, dynamic
        self.result = Program({}, {})
        self.graph = fx.Graph()
        self.nodes: dict[str, fx.Node] = {}
        self.renamed: dict[sympy.Symbol, sympy.Symbol] = {}

    def program(self) -> Program:
        self._refuse_foreign()
        names, inputs, arguments = self._arguments()
        examples = self._examples(arguments)
        self._symbols(arguments)
        self._weights()
        declared = [self._input(name, label, e) for name, label, e in zip(names, inputs, examples, strict=True)]
        self._calls()
        outputs, results = self._outputs(dict(zip(inputs, names, strict=True)))
        entry = Entry("forward", self.graph, declared, outputs, arguments, results)
        self.result.entries["forward"] = entry
        canonicalize(self.graph)
        for node in list(self.graph.nodes):
            if node.op == "placeholder" and node.meta["kind"] not in (Kind.INPUT, Kind.STATE) and not node.users:
                self.graph.erase_node(node)
        propagate(self.result, self.graph, None)
        self.result.examples = [tuple(e.detach().clone() for e in examples)]
        self._facts(arguments)
        return self.result

    def _refuse_foreign(self) -> None:
        """Higher-order ops, data-dependent sizes and script objects have no place in a Program yet."""
        for node in self.exported.graph.nodes:
            if node.op == "get_attr" or isinstance(node.target, torch._ops.HigherOrderOperator):
                what = node.target if node.op == "call_function" else "a nested graph"
                self._refuse(node, f"it uses {what}, an op that holds graphs of its own")
            if any(is_unbacked(s) for s in free_symbols(node.meta.get("val"))):
                self._refuse(node, "a size there depends on the values of tensors (as with nonzero, or .item())")
        for spec in self.exported.graph_signature.input_specs:
            if spec.kind not in (*_KINDS, InputKind.USER_INPUT):
                self._refuse(None, f"it takes a {spec.kind.name.lower()} ({spec.arg.name})")

    def _refuse(self, node: fx.Node | None, why: str) -> None:
        raise UnsupportedError(
            f"{type(self.module).__name__} cannot be captured",
            where=_node_source(node) if node else "",
            why=why,
            hint="rewrite that part of the model with tensors of sizes known from its inputs",
        )

    def _arguments(self) -> tuple[list[str], list[str], dict[str, Tree]]:
        """Input names, their placeholders' names, and each argument's tree."""
        flat: list[Any] = []
        labels: list[str] = []
        for spec in self.exported.graph_signature.input_specs:
            if spec.kind is not InputKind.USER_INPUT:
                continue
            if isinstance(spec.arg, ConstantArgument):
                flat.append(spec.arg.value)
            elif isinstance(spec.arg, TensorArgument):
                flat.append(Leaf(len(labels)))
                labels.append(spec.arg.name)
            else:
                self._refuse(None, f"its argument {spec.arg.name} is a number that varies; pass a tensor instead")
        args_spec, kwargs_spec = self.exported.call_spec.in_spec.children()
        positional = _positional_names(self.module, len(args_spec.children()))
        args = plain(args_spec, flat[: args_spec.num_leaves])
        arguments: dict[str, Tree] = dict(zip(positional, args, strict=True))
        arguments.update(plain(kwargs_spec, flat[args_spec.num_leaves :]) or {})
        names = [""] * len(labels)
        for path, leaf in leaves(arguments):
            if isinstance(leaf, Leaf):
                names[leaf.index] = path
        return names, labels, arguments

    def _examples(self, arguments: dict[str, Tree]) -> list[torch.Tensor]:
        given = pytree.tree_leaves((tuple(self.args), self.kwargs))
        specs = [s for s in self.exported.graph_signature.input_specs if s.kind is InputKind.USER_INPUT]
        ordered = [value for value, s in zip(given, specs, strict=True) if isinstance(s.arg, TensorArgument)]
        return ordered

    def _symbols(self, arguments: dict[str, Tree]) -> None:
        """Our own symbol for each of export's, under the name the user gave its axis."""
        dims = _axis_dims(self.dynamic, arguments)
        found: dict[sympy.Symbol, tuple[Any, Any]] = {}  # its environment, and the user's Dim if it is an axis itself
        position = -1
        for node, spec in zip(self.exported.graph.nodes, self.exported.graph_signature.input_specs, strict=False):
            if spec.kind is not InputKind.USER_INPUT or not isinstance(spec.arg, TensorArgument):
                continue
            position += 1
            value = node.meta["val"]
            for axis, size in enumerate(value.shape):
                expr = expression(size)
                for symbol in sorted(getattr(expr, "free_symbols", ()), key=str):
                    dim = dims.get((position, axis)) if expr == symbol else None
                    if symbol not in found or found[symbol][1] is None:
                        found[symbol] = (size.node.shape_env, dim)
        self._add_symbols(found, {name for dim in dims.values() if (name := _dim_name(dim))})

    def _add_symbols(self, found: dict[sympy.Symbol, tuple[Any, Any]], reserved: set[str]) -> None:
        taken: set[str] = set()
        for symbol, (env, dim) in found.items():
            name = _dim_name(dim)
            if not name or name in taken:
                stem = f"{name}_" if name else "s"
                name = next(n for k in count(len(taken)) if (n := f"{stem}{k}") not in reserved | taken)
            taken.add(name)
            low, high = _bounds(self.exported.range_constraints.get(symbol), dim)
            hint = symbol_hint(env, symbol)
            self.renamed[symbol] = self.result.add_symbol(name, min(low, hint), high, hint)

    def _weights(self) -> None:
        """One row a tensor: names tied to the same storage, offset, shape and strides share it."""
        signature = self.exported.graph_signature
        mutated = {s.target for s in signature.output_specs if s.kind is OutputKind.BUFFER_MUTATION}
        rows: dict[Any, str] = {}
        for spec in signature.input_specs:
            if spec.kind not in _KINDS:
                continue
            name = str(spec.target)
            tensor = self.exported.state_dict.get(name)
            if tensor is None:
                tensor = self.exported.constants[name]
            if tensor.layout is not torch.strided or tensor.dtype not in DTYPE_NAMES:
                self._refuse(None, f"it holds {name!r}, a tensor of {tensor.dtype} with the layout {tensor.layout}")
            key = (
                tensor.untyped_storage().data_ptr(),
                tensor.storage_offset(),
                tensor.shape,
                tensor.stride(),
            )
            first = rows.setdefault(key, name) if tensor.numel() else name
            if first != name:
                self.result.aliases[name] = Alias(first)
                self.nodes[spec.arg.name] = self.nodes[first]
                continue
            kind = Kind.STATE if name in mutated else _KINDS[spec.kind]
            value = tensor.detach()
            if kind is Kind.STATE:
                value = value.clone()
            self.result.weights[name] = weight = Weight(
                name,
                value,
                kind,
                bool(tensor.requires_grad),
                spec.kind is not InputKind.CONSTANT_TENSOR and bool(spec.persistent is not False),
            )
            label = placeholder_name(name)
            node = self.graph.create_node("placeholder", label, name=label)
            node.target = node.name
            node.meta.update(kind=kind, name=name, val=fake_weight(self.result, weight))
            self.nodes[spec.arg.name] = self.nodes[name] = node
        self._refuse_overlap(mutated)

    def _refuse_overlap(self, mutated: set[Any]) -> None:
        """A state that shares memory with another row would have to change it too; no functional graph says so."""
        names = {**self.exported.state_dict, **self.exported.constants}
        for state in sorted(mutated):
            for other, tensor in names.items():
                if other != state and isinstance(tensor, torch.Tensor) and tensor.numel():
                    same = tensor.untyped_storage().data_ptr() == names[state].untyped_storage().data_ptr()
                    if same and names[state].numel():
                        self._refuse(None, f"{state!r} is written in forward and shares memory with {other!r}")

    def _input(self, name: str, label: str, example: torch.Tensor) -> Input:
        source = next(n for n in self.exported.graph.nodes if n.name == label)
        kind = type_of(source.meta["val"])
        assert isinstance(kind, TensorType)
        swap = self.renamed

        def ours(size: Any) -> Any:
            return size.xreplace(swap) if isinstance(size, sympy.Expr) else size

        kind = replace(kind, shape=tuple(map(ours, kind.shape)), stride=tuple(map(ours, kind.stride)))
        node = self.graph.create_node("placeholder", label, name=label)
        node.meta.update(kind=Kind.INPUT, name=name, val=self.result.fake(kind))
        self.nodes[label] = node
        return observed(name, example)

    def _calls(self) -> None:
        lookup = {
            old: self.nodes[old.name]
            for old in self.exported.graph.nodes
            if old.op == "placeholder" and old.name in self.nodes
        }
        for old in self.exported.graph.nodes:
            if old.op != "call_function":
                continue
            site = len(self.result.sites)
            args, kwargs = fx.node.map_arg((old.args, old.kwargs), lambda n: lookup[n])
            new = self.graph.create_node("call_function", old.target, args, kwargs, name=site_name(old.name, site))
            new.meta = {"site": site}
            self.result.sites[site] = Site(_module_path(old), _node_source(old))
            lookup[old] = new
            self.nodes[old.name] = new

    def _outputs(self, input_names: dict[str, str]) -> tuple[list[Output], Tree]:
        signature = self.exported.graph_signature
        outputs: list[Output] = []
        values: list[Any] = []
        flat: list[Any] = []
        for spec in signature.output_specs:
            role = _ROLES.get(spec.kind)
            if role is None:
                self._refuse(None, f"it returns a {spec.kind.name.lower()}")
            elif isinstance(spec.arg, ConstantArgument):
                flat.append(spec.arg.value)
            elif role is Role.RESULT:
                flat.append(Leaf(sum(isinstance(f, Leaf) for f in flat)))
                values.append(self.nodes[spec.arg.name])
            else:
                name = str(spec.target)
                outputs.append(Output(role, name if role is Role.UPDATE else input_names[name]))
                values.insert(len(outputs) - 1, self.nodes[spec.arg.name])
        results = plain(self.exported.call_spec.out_spec, flat)
        outputs += [Output(Role.RESULT, path or "output") for path, leaf in leaves(results) if isinstance(leaf, Leaf)]
        self.graph.output(tuple(values))
        return outputs, results

    def _facts(self, arguments: dict[str, Tree]) -> None:
        facts = self.result.facts
        facts["model"] = type(self.module).__name__
        if self.args:
            facts["positional"] = len(self.args)
        returned = class_of(self.exported.call_spec.out_spec)
        if returned is not None and returned not in (dict, list, tuple):
            facts["returned"] = returned.__name__
        fixed = []
        for position, axis in sorted(_axis_dims(self.dynamic, arguments)):
            kind = type_of(self.result.forward.input_nodes()[position].meta["val"])
            if isinstance(kind, TensorType) and isinstance(kind.shape[axis], int):
                fixed.append(f"{self.result.forward.inputs[position].name} axis {axis} = {kind.shape[axis]}")
        if fixed:
            facts["specialized"] = fixed
            small = any(line.endswith(("= 0", "= 1")) for line in fixed)
            note = " (torch takes an example's size of 0 or 1 for a fixed one)" if small else ""
            log.warning("asked to be dynamic, but the model fixes: %s%s", "; ".join(fixed), note)


def _bounds(known: Any, dim: Any) -> tuple[int, int | None]:
    """Inclusive bounds of a size. A lower bound of 2 that the user did not ask for is an artefact of tracing, not of
    the model: 1 is tried."""
    low = int(known.lower) if known is not None else 1
    bounded = known is not None and isinstance(known.upper, sympy.Integer) and int(known.upper) < 2**62
    high = int(known.upper) if bounded else None
    asked = getattr(dim, "min", None) or 1
    return (max(1, asked) if low <= 2 else low), high


def _positional_names(module: nn.Module, count: int) -> list[str]:
    names = []
    for parameter in inspect.signature(module.forward).parameters.values():
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
            names.append(parameter.name)
    return [names[k] if k < len(names) else f"args_{k}" for k in range(count)]


def _axis_dims(dynamic: Any, arguments: dict[str, Tree]) -> dict[tuple[int, int], Any]:
    """(input, axis) to what the user asked for there, of every axis asked to be dynamic."""
    if not isinstance(dynamic, (dict, list, tuple)):
        return {}
    by_argument = dynamic if isinstance(dynamic, dict) else dict(zip(arguments, dynamic, strict=False))
    found: dict[tuple[int, int], Any] = {}

    def visit(tree: Tree, spec: Any) -> None:
        if spec is None:
            return
        if isinstance(tree, Leaf):
            for axis, dim in spec.items() if isinstance(spec, dict) else enumerate(spec):
                if dim is not None and not isinstance(dim, int) and dim is not Dim.STATIC:
                    found[(tree.index, axis)] = dim
        elif isinstance(tree, dict):
            by_key = {str(key): part for key, part in spec.items()} if isinstance(spec, dict) else {}
            for key, child in tree.items():
                visit(child, by_key.get(key))
        elif isinstance(tree, (list, tuple)):
            for child, part in zip(tree, spec, strict=False):
                visit(child, part)

    for name, tree in arguments.items():
        visit(tree, by_argument.get(name))
    return found


def _dim_name(dim: Any) -> str:
    """The name of a user's Dim; "" for AUTO, DYNAMIC and None, and for one that does not fit into the text form."""
    name = getattr(dim, "__name__", "") if not isinstance(dim, type(Dim.AUTO)) else ""
    return name if name.isidentifier() and name.isascii() else ""


def _module_path(node: fx.Node) -> str:
    stack = node.meta.get("nn_module_stack") or {}
    path = str(list(stack.values())[-1][0]) if stack else ""
    return path if not path.startswith("_empty_nn_module") else ""


def _node_source(node: fx.Node) -> str:
    """The user's line behind a node: the innermost frame of its trace that is not torch's."""
    found = ""
    for line in str(node.meta.get("stack_trace") or "").splitlines():
        parts = line.strip().split('"')
        if line.strip().startswith("File ") and len(parts) == 3 and (short := user_source(parts[1])):
            number = parts[2].split(",")[1].removeprefix(" line ").strip()
            found = f"{short}:{number}"
    return found
