"""The table of operators: an ONNX op by name and opset, to a Python function of its inputs and attributes.

    @op("Flatten")
    def flatten(x: Tensor, *, axis: int = 1) -> Tensor: ...

The signature says the rest. Positional parameters are inputs (a default of None: may be left out), keyword-only ones
are attributes with ONNX's defaults; `Literal[...]` lists the values that are read, others are refused before anything
runs. An input of type `Tensor` comes as a tensor, `Numbers` must be known without running the model, `Value` comes as
it is (a weight as a tensor, so that nothing is computed of its values here). A parameter called `outputs` gets how many
outputs the node has.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from types import UnionType
from typing import Any, Literal, TypeVar

from torch import Tensor

from laconic.ir.onnx.shapes import Numbers, Value, tensor_of

Function = TypeVar("Function", bound=Callable[..., Any])


class Refused(Exception):
    """This use of an operator is not read; the message says why. The node is named by whoever catches it."""


class Taken(Enum):
    """How an input comes."""

    TENSOR = "tensor"
    NUMBERS = "numbers"
    VALUE = "value"


@dataclass(frozen=True, slots=True)
class Op:
    """A function for an operator from opset `since` on. `attributes` maps each name that is read to its allowed values,
    None for any; `rest` is how inputs beyond `inputs` come, None if there are none."""

    since: int
    function: Callable[..., Any]
    inputs: tuple[Taken, ...]
    rest: Taken | None
    attributes: dict[str, tuple[Any, ...] | None]
    counts_outputs: bool

    def __call__(self, inputs: Sequence[Value | None], attributes: dict[str, Any], outputs: int) -> tuple[Any, ...]:
        """The outputs. Raises Refused, and what torch raises."""
        kinds = (*self.inputs, *[self.rest] * (len(inputs) - len(self.inputs)))
        given = [_taken(value, kind, k) for k, (value, kind) in enumerate(zip(inputs, kinds, strict=False))]
        if len(given) < len(inputs):
            raise Refused(f"it has {len(inputs)} inputs, and {len(given)} are read")
        counted = {"outputs": outputs} if self.counts_outputs else {}
        found = self.function(*given, **attributes, **counted)
        return found if isinstance(found, tuple) else (found,)


_TABLE: dict[str, list[Op]] = {}


def op(*names: str, since: int = 1) -> Callable[[Function], Function]:
    """Register a function for these operators of the standard domain, from opset `since` until the next one."""

    def register(function: Function) -> Function:
        for name in names:
            add(name, function, since)
        return function

    return register


def add(name: str, function: Callable[..., Any], since: int = 1) -> None:
    """Register one function. Raises ValueError for a second one at the same opset."""
    rows = _TABLE.setdefault(name, [])
    if any(row.since == since for row in rows):
        raise ValueError(f"{name} has two functions at opset {since}")
    rows.append(_described(function, since))
    rows.sort(key=lambda row: row.since)


def find(name: str, opset: int) -> Op | None:
    """The function for an operator of the standard domain at this opset; None if there is none."""
    return next((row for row in reversed(_TABLE.get(name, ())) if row.since <= opset), None)


def operators() -> dict[str, list[Op]]:
    """All that is read, by name."""
    return dict(_TABLE)


def _described(function: Callable[..., Any], since: int) -> Op:
    hints = typing.get_type_hints(function)
    inputs: list[Taken] = []
    rest: Taken | None = None
    attributes: dict[str, tuple[Any, ...] | None] = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if parameter.kind is parameter.KEYWORD_ONLY:
            literal = typing.get_origin(hints[name]) is Literal
            attributes[name] = typing.get_args(hints[name]) if literal else None
        elif parameter.kind is parameter.VAR_POSITIONAL:
            rest = _kind(hints[name])
        else:
            inputs.append(_kind(hints[name]))
    counted = "outputs" in attributes
    attributes.pop("outputs", None)
    return Op(since, function, tuple(inputs), rest, attributes, counted)


def _kind(hint: Any) -> Taken:
    parts = set(typing.get_args(hint)) if isinstance(hint, UnionType) or typing.get_origin(hint) else {hint}
    parts.discard(type(None))
    if parts == {Tensor}:
        return Taken.TENSOR
    return Taken.NUMBERS if parts == {Numbers} else Taken.VALUE


def _taken(value: Value | None, kind: Taken | None, position: int) -> Value | None:
    if value is None:
        return None
    if kind is Taken.TENSOR:
        return tensor_of(value)
    if isinstance(value, Numbers):
        return value if value.home is None or kind is Taken.NUMBERS else value.home
    if kind is Taken.NUMBERS:
        raise Refused(f"its input {position} depends on the values of tensors, and what it says must be known before")
    return value
