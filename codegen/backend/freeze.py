"""`options={"freeze": True}`: weights are taken not to change any more, so that passes may look at their values.

    Dynamo graph -> a module that holds its weights -> Program -> the pipeline, as offline -> compiled without Dynamo

A weight is what Dynamo takes from a module and the graph does not write into; what is written into stays an argument.
Before every call each weight is held to what it was: the same tensor, in the same memory, of the same version. What
autograd does not see, writes through `.data` or numpy, is not seen here either; `{"freeze": "checked"}` compares
contents before every call and finds it. For inference only: no gradients are recorded.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import sympy
import torch
from torch import fx
from torch.export import Dim

from laconic.codegen.backend.backend import guarded
from laconic.codegen.backend.inductor import (
    hold_to_modules,
    hold_to_numbers,
    is_wrapped_number,
    module_source,
    no_context,
    source_name,
)
from laconic.codegen.backend.options import Options
from laconic.codegen.backend.programs import CompiledModel
from laconic.codegen.backend.stats import GraphRecord
from laconic.ir.capture import capture_module
from laconic.ir.dynamo import Refusal
from laconic.ir.errors import UsageError, VerificationError
from laconic.ir.program import Kind, Program, Role
from laconic.ir.signature import content_key
from laconic.ir.torch_private import expression, size_range, storage_key
from laconic.ir.torch_traits import held, written
from laconic.passes.base import Contract
from laconic.passes.manager import PassManager

log = logging.getLogger(__name__)

_PARTS = re.compile(r"\['([^']*)'\]|\.(\w+)|\[(\d+)\]")
_ARGUMENT = re.compile(r"L(?:\['kwargs'\])?\['([a-zA-Z]\w*)'\]")
_TABLES = {"_modules", "_parameters", "_buffers"}


@dataclass(frozen=True)
class Held:
    """A weight as it was when the graph was compiled: the argument at `position`."""

    position: int
    name: str
    tensor: torch.Tensor
    pointer: int
    version: int
    content: bytes | None

    @classmethod
    def of(cls, position: int, name: str, tensor: torch.Tensor, checked: bool) -> Held:
        content = content_key(tensor) if checked else None
        return cls(position, name, tensor, tensor.data_ptr(), _version(tensor), content)

    def check(self, now: torch.Tensor) -> None:
        """Raise UsageError if the weight is not what it was."""
        if now is not self.tensor:
            self._refuse("was replaced by another tensor")
        if now.data_ptr() != self.pointer:
            self._refuse("was moved to other memory")
        if _version(now) != self.version:
            self._refuse("was written into")
        if self.content is not None and content_key(now) != self.content:
            self._refuse("holds other values")

    def _refuse(self, what: str) -> NoReturn:
        raise UsageError(
            f"the weight {self.name!r} {what} since the model was compiled",
            why="it was compiled with the option 'freeze', which forbids that",
            hint="torch._dynamo.reset(), and the next call compiles it anew; or compile without 'freeze'",
        )


def _version(tensor: torch.Tensor) -> int:
    return 0 if tensor.is_inference() else tensor._version


@dataclass(frozen=True)
class Whole:
    """A Dynamo graph as a module that holds its weights. `given` are the positions of the arguments that it is called
    with, `weights` the names of those that it holds, by position; `axes` as torch.export wants them. Python numbers
    among the arguments are written out."""

    module: fx.GraphModule
    given: tuple[int, ...]
    weights: dict[int, str]
    axes: dict[str, dict[int, Any] | None]


def compile_frozen(
    graph: fx.GraphModule, example_inputs: Sequence[Any], options: Options, record: GraphRecord
) -> Callable[..., Any] | None:
    """A function of the graph's inputs with its weights as they are now; None if a step of laconic failed, where that
    may be. Raises UsageError if gradients are recorded."""
    if torch.is_grad_enabled() and any(isinstance(v, torch.Tensor) and v.requires_grad for v in example_inputs):
        raise UsageError(
            "the option 'freeze' is for inference, and gradients are recorded",
            hint="call the model under torch.no_grad(), or compile without 'freeze'",
        )
    exact = all(item.contract is Contract.EXACT for item in options.passes())
    chosen = options if exact else replace(options, strict=True)
    found = guarded(lambda: _compile(graph, example_inputs, chosen, record), chosen, record)
    if isinstance(found, Refusal):
        record.fallback = f"not frozen: {found.reason}"
        log.warning("not frozen, the graph is compiled as it is: %s", found)
        if chosen.strict:
            raise VerificationError("the graph was not frozen", why=str(found), hint="options={'strict': False}")
        return None
    return found  # type: ignore[no-any-return]


def _compile(
    graph: fx.GraphModule, example_inputs: Sequence[Any], options: Options, record: GraphRecord
) -> Callable[..., Any] | Refusal | None:
    whole = hold_weights(graph, example_inputs)
    if isinstance(whole, Refusal):
        return whole
    examples = tuple(example_inputs[k].detach().clone() for k in whole.given)
    with no_context(), torch.no_grad():
        with record.timed("capture"):
            program = capture_module(whole.module, examples, {}, whole.axes)
        with record.timed("passes"):
            run = PassManager(options.passes(), plans=options.decided()).run(program)
    for row in run.ledger.rows:
        record.rewritten[row.name] = record.rewritten.get(row.name, 0) + row.actions
    log.info("frozen: %s", ", ".join(f"{row.spec}: {row.reason}" for row in run.ledger.rows))
    refused = _cannot_run(run.program, [example_inputs[k] for k in whole.given])
    if refused is not None:
        return refused
    run.program.examples.clear()
    model = CompiledModel(run.program, lambda: run.program, options, record)
    if not model.compiled:
        return None
    weights = [Held.of(k, name, example_inputs[k], options.checked) for k, name in whole.weights.items()]
    placeholders = graph.graph.find_nodes(op="placeholder")
    hold_to_modules(placeholders[k] for k in whole.weights)
    hold_to_numbers(filter(is_wrapped_number, placeholders))

    def call(*args: Any) -> Any:
        for weight in weights:
            weight.check(args[weight.position])
        return model(*(args[k] for k in whole.given))

    return call


def _cannot_run(program: Program, given: list[torch.Tensor]) -> Refusal | None:
    """Why the program would not do what the graph does."""
    if any(weight.kind is Kind.STATE for weight in program.weights.values()):
        return Refusal("a weight is written into")
    outputs = program.forward.outputs
    homes = [storage_key(value) for value in given if value.numel()]
    if any(output.role is Role.INPUT_UPDATE for output in outputs) and len(set(homes)) < len(homes):
        return Refusal("an input is written into that shares memory with another")
    return None


# The graph with its weights


def hold_weights(module: fx.GraphModule, example_inputs: Sequence[Any]) -> Whole | Refusal:
    """The graph as a module that holds its weights; or why there is none."""
    placeholders = module.graph.find_nodes(op="placeholder")
    changed = {operand for node in module.graph.nodes if node.op.startswith("call") for operand in written(node)}
    names = _names([n if _is_weight(n) and n not in changed else None for n in placeholders])
    numbers = {n: example_inputs[k].item() for k, n in enumerate(placeholders) if is_wrapped_number(n)}
    graph = fx.Graph()
    mapped: dict[fx.Node, Any] = {}
    given: list[int] = []
    axes: dict[str, dict[int, Any] | None] = {}
    known = _Sizes({}, {})
    for k, node in enumerate(placeholders):
        if k not in names and node not in numbers and not isinstance(node.meta["example_value"], torch.SymInt):
            name = _argument_name(node) or f"input_{k}"
            mapped[node] = graph.placeholder(name)
            given.append(k)
            free = known.axes(node.meta["example_value"], mapped[node])
            if free is None:
                return Refusal("an input is no tensor, or one whose sizes follow from others", node.name)
            axes[name] = free or None
    attributes = {str(n.target): held(n) for n in module.graph.nodes if n.op == "get_attr"}
    for k, node in enumerate(placeholders):
        if k in names:
            if example_inputs[k].is_inference():
                return Refusal("a weight was made under torch.inference_mode", names[k])
            attributes[names[k]] = example_inputs[k]
            mapped[node] = graph.get_attr(names[k])
        elif node not in mapped and node not in numbers:
            place = known.places.get(expression(node.meta["example_value"]))
            if place is None:
                return Refusal("an input is a whole number, or has a stride, that varies and no size tells", node.name)
            mapped[node] = graph.call_method("size", place)
    for node in module.graph.nodes:
        if node.op == "call_method" and node.target == "item" and node.args[0] in numbers:
            mapped[node] = numbers[node.args[0]]
        elif node.op != "placeholder":
            args, kwargs = fx.node.map_arg((node.args, node.kwargs), mapped.__getitem__)
            mapped[node] = graph.create_node(node.op, node.target, args, kwargs)
    return Whole(fx.GraphModule(attributes, graph, "Whole"), tuple(given), names, axes)


@dataclass(frozen=True)
class _Sizes:
    """Where the inputs' symbolic sizes can be read, and torch.export's names for them."""

    places: dict[Any, tuple[fx.Node, int]]
    dims: dict[Any, Any]

    def axes(self, value: Any, node: fx.Node) -> dict[int, Any] | None:
        """The dynamic axes of an input; None if it is no tensor, or one of them has no symbol of its own."""
        found: dict[int, Any] = {}
        if not isinstance(value, torch.Tensor):
            return None
        for axis, size in enumerate(value.shape):
            told = expression(size)
            if isinstance(told, sympy.Symbol):
                if told not in self.dims:
                    low, high = size_range(size)
                    self.dims[told] = Dim(str(told), min=low, max=high)
                found[axis] = self.dims[told]
                self.places.setdefault(told, (node, axis))
            elif not isinstance(told, int):
                return None
        return found


def _is_weight(node: fx.Node) -> bool:
    """Whether Dynamo took a tensor from a module, and not from an argument or a global."""
    kept = (node.meta.get("tensor_dict") or {}).get("_dynamo_static_input_type") == "unguarded"
    return kept and module_source(node) is not None


def _argument_name(node: fx.Node) -> str | None:
    """What a model calls an argument: `x` for L['x'] or L['kwargs']['x']."""
    found = _ARGUMENT.fullmatch(source_name(node))
    return found[1] if found else None


def _names(nodes: Sequence[fx.Node | None]) -> dict[int, str]:
    """What a model calls its weights, by position: `layers.0.weight` for
    L['self']._modules['layers']._modules['0']._parameters['weight']; with the root where there are several."""
    paths = {k: _path(node) for k, node in enumerate(nodes) if node is not None}
    roots = {path[0] for path in paths.values()}
    return {k: ".".join(path if len(roots) > 1 else path[1:]) for k, path in paths.items()}


def _path(node: fx.Node) -> list[str]:
    """The root of a source and the names that lead from it to a weight."""
    parts = [next(filter(None, found), "") for found in _PARTS.findall(source_name(node))]
    return [part for part in parts if part not in _TABLES]
