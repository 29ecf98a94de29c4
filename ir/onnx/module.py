"""An ONNX graph as a torch module: its nodes run one after another, each by the function that the table has for it."""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from laconic.ir.errors import LaconicError, UnsupportedError
from laconic.ir.onnx.shapes import Numbers, Value, tensor_of
from laconic.ir.onnx.table import Op, Refused

#: The attribute that holds the nodes; no weight's name may begin with it.
NODES = "nodes"
#: What torch and Python raise for operands that do not fit.
_MISFITS = (RuntimeError, TypeError, ValueError, IndexError, ArithmeticError, AssertionError, AttributeError)


class Step(nn.Module):
    """A node of the graph: its operator, and what it is called and reads."""

    def __init__(
        self, op: Op, kind: str, name: str, inputs: Sequence[str], outputs: Sequence[str], attributes: dict[str, Any]
    ) -> None:
        super().__init__()
        self.op, self.kind, self.name, self.attributes = op, kind, name, attributes
        self.inputs, self.outputs = tuple(inputs), tuple(outputs)

    @property
    def label(self) -> str:
        return f"{self.kind} {self.name!r}" if self.name else f"{self.kind} that makes {self.outputs[0]!r}"

    def forward(self, *values: Value | None) -> tuple[Any, ...]:
        """Raises UnsupportedError, naming the node, if this use is not read or the operands do not fit."""
        try:
            found = self.op(values, self.attributes, len(self.outputs))
        except LaconicError:
            raise
        except Refused as problem:
            raise UnsupportedError(
                "a node is used in a way that is not read", where=self.label, why=str(problem)
            ) from problem
        except NotImplementedError as problem:
            raise UnsupportedError(
                "torch does not compute a node", where=self.label, why=str(problem)[:300]
            ) from problem
        except _MISFITS as problem:
            said = next((line for line in str(problem).splitlines() if line.strip()), "")
            raise UnsupportedError(
                "a node does not take what it is given",
                where=self.label,
                why=f"{type(problem).__name__}: {said[:300]}\nits inputs: {', '.join(map(_described, values))}",
                hint="the model may be damaged, or its example inputs may not be such as it takes",
            ) from problem
        if len(found) < len(self.outputs):
            raise UnsupportedError(
                "a node has outputs that are not read", where=self.label, why=f"{len(found)} of {len(self.outputs)} are"
            )
        return found


def _described(value: Value | None) -> str:
    if value is None:
        return "none"
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"


class OnnxModel(nn.Module):
    """A graph with its weights. Called by keyword, under the names of its inputs; returns its outputs by name."""

    def __init__(self, steps: Iterable[Step], inputs: dict[str, str], outputs: Sequence[str]) -> None:
        """`inputs` maps each parameter's name to the graph's input."""
        super().__init__()
        self._inputs, self._outputs = dict(inputs), tuple(outputs)
        self._numbers: dict[str, Numbers] = {}  # constants; those that are weights too are read with them
        self._homes: dict[str, tuple[nn.Module, str]] = {}  # where each weight is held
        self._steps = list(steps)
        self._last_used = _last_used(self._steps, self._outputs)
        nodes = nn.Module()
        self.add_module(NODES, nodes)
        for step in self._steps:
            nodes.add_module(_free_name(nodes, step), step)

    def _run(self, given: dict[str, Tensor]) -> dict[str, Tensor]:
        values: dict[str, Value] = {self._inputs[name]: value for name, value in given.items()}
        values.update(self._numbers)
        for name, (owner, part) in self._homes.items():
            held = getattr(owner, part)
            numbers = self._numbers.get(name)
            values[name] = held if numbers is None else Numbers(numbers.values, numbers.dtype, held)
        for step, over in zip(self._steps, self._last_used, strict=True):
            found = step(*(values[name] if name else None for name in step.inputs))
            values.update((name, value) for name, value in zip(step.outputs, found, strict=False) if name)
            for name in over:
                values.pop(name, None)
        return {name: tensor_of(values[name]) for name in self._outputs}


def _last_used(steps: Sequence[Step], outputs: Sequence[str]) -> list[tuple[str, ...]]:
    """The values that no later step reads, by step."""
    seen = set(outputs)
    found = []
    for step in reversed(steps):
        named = {value for value in (*step.inputs, *step.outputs) if value}
        found.append(tuple(sorted(named - seen)))
        seen |= named
    return found[::-1]


def _free_name(nodes: nn.Module, step: Step) -> str:
    """The name of a node as a module: what a Program's sites show."""
    stem = re.sub(r"[.\s]", "_", step.name) or step.kind
    for name in (stem, *(f"{stem}_{number}" for number in range(len(nodes._modules) + 1))):
        if not hasattr(nodes, name):
            return name
    raise AssertionError(stem)


def hold_numbers(model: OnnxModel, name: str, numbers: Numbers) -> None:
    """Hold a constant whose values are known."""
    model._numbers[name] = numbers


def hold(model: OnnxModel, name: str, value: Tensor, trainable: bool) -> None:
    """Hold a weight under its ONNX name: dots are submodules. A part that no module can hold gets `_` behind it."""
    owner: nn.Module = model
    *parents, last = name.split(".")
    for part in parents:
        while not part or (owner is model and part == NODES) or (part not in owner._modules and hasattr(owner, part)):
            part += "_"
        if part not in owner._modules:
            owner.add_module(part, nn.Module())
        owner = owner.get_submodule(part)
    while not last or hasattr(owner, last):
        last += "_"
    if trainable:
        owner.register_parameter(last, nn.Parameter(value))
    else:
        owner.register_buffer(last, value)
    model._homes[name] = (owner, last)


def signed_model(steps: Iterable[Step], inputs: dict[str, str], outputs: Sequence[str]) -> OnnxModel:
    """An OnnxModel of a class of its own, whose `forward` names the inputs in its signature: torch.export reads it."""

    def forward(self: OnnxModel, /, **given: Tensor) -> dict[str, Tensor]:
        return self._run(given)

    own = inspect.Parameter("self", inspect.Parameter.POSITIONAL_ONLY)
    named = [inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY) for name in inputs]
    forward.__signature__ = inspect.Signature([own, *named])  # type: ignore[attr-defined]
    kind: type[OnnxModel] = type("OnnxModel", (OnnxModel,), {"forward": forward})
    return kind(steps, inputs, outputs)


def parameter_names(names: Sequence[str]) -> dict[str, str]:
    """A Python name for each input, in order: its own where it is one, else with `_` for what no name may hold."""
    found: dict[str, str] = {}
    for name in names:
        stem = re.sub(r"\W", "_", name, flags=re.ASCII)
        if not stem.isidentifier() or keyword.iskeyword(stem):
            stem = f"_{stem}" if not keyword.iskeyword(stem) else f"{stem}_"
        unique = stem
        while unique in found or unique == "self":
            unique += "_"
        found[unique] = name
    return found
