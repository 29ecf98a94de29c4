"""The cut run without any compiler: a Dynamo backend that calls the pieces as they are, through the driver."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from laconic.codegen.backend.backend import plan_cut
from laconic.codegen.backend.cut import Cut, Piece
from laconic.codegen.backend.driver import Boxed, drive
from laconic.codegen.backend.layouts import hand_over_channels_last
from laconic.codegen.backend.stats import GraphRecord
from laconic.ir.dynamo import Reading, Refusal, read_dynamo


class EagerPieces:
    """`torch.compile(model, backend=EagerPieces())`: each graph is cut and its pieces run eagerly. `found` has a cut,
    or why there is none, for each graph; `records` the records that planning filled."""

    def __init__(self) -> None:
        self.found: list[Cut | Refusal] = []
        self.records: list[GraphRecord] = []

    def __call__(self, graph: fx.GraphModule, examples: Sequence[Any]) -> Callable[..., Any]:
        self.records.append(GraphRecord())
        found = plan_cut(graph, self.records[-1])
        self.found.append(found)
        if isinstance(found, Refusal):
            return graph.forward
        self.records[-1].channels_last = hand_over_channels_last(found)
        return drive(found, [emptying(piece) for piece in found.pieces])

    @property
    def cuts(self) -> list[Cut]:
        return [found for found in self.found if isinstance(found, Cut)]

    @property
    def refusals(self) -> list[Refusal]:
        return [found for found in self.found if isinstance(found, Refusal)]


def emptying(piece: Piece) -> Boxed:
    """A piece as a compiled one is called: it takes its operands as a list and empties it. Checks that it is given what
    it would have been compiled for."""
    expected = described(piece.examples)

    def call(operands: list[Any]) -> Sequence[Any]:
        values = tuple(operands)
        operands.clear()
        assert described(values, like=piece.examples) == expected, f"a piece is called with something else:\n{piece}"
        results: Sequence[Any] = piece.graph(*values)
        return results

    return call


def described(values: Sequence[Any], like: Sequence[Any] | None = None) -> list[Any]:
    """What compiling a piece depends on in its operands: their types, and which of them share memory. Numbers that are
    symbolic in `like` are left out."""
    said: list[Any] = []
    examples = like or values
    storages = [v.untyped_storage()._cdata if isinstance(v, torch.Tensor) else None for v in values]
    for value, storage, example in zip(values, storages, examples, strict=True):
        if not isinstance(value, torch.Tensor):
            said.append("number")
            continue
        first = storages.index(storage)
        numbers = [
            (*tensor.shape, *tensor.stride(), tensor.storage_offset() - start.storage_offset())
            for tensor, start in ((value, values[first]), (example, examples[first]))
        ]
        fixed = tuple(number if type(shown) is int else "?" for number, shown in zip(*numbers, strict=True))
        said.append((value.dtype, fixed, torch.is_grad_enabled() and value.requires_grad, first))
    return said


def calls_of_steps(found: Cut) -> list[list[fx.Node]]:
    """The calls of each step, in order."""
    reading = read_dynamo(found.graph, torch.is_grad_enabled())
    assert isinstance(reading, Reading)
    calls = iter(reading.nodes)
    steps = [[next(calls) for _ in range(found.pieces[step.piece].nodes)] for step in found.steps]
    assert next(calls, None) is None
    return steps
