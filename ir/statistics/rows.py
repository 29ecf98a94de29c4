"""Which rows count: padding is found by the axis that a mask is of, not by chance equality of sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from laconic.ir.data import Batch
from laconic.ir.errors import UsageError
from laconic.ir.program import Program
from laconic.ir.types import TensorType, type_of


@dataclass(frozen=True)
class Rows:
    """Which positions of some values count: `mask` (samples, positions) bool; None if all do."""

    mask: torch.Tensor | None = None

    def flat(self, value: torch.Tensor) -> torch.Tensor:
        """The rows that count, (rows, width). `value` is (samples, positions, ..., width), or flat already."""
        if self.mask is None:
            return value.reshape(-1, value.shape[-1])
        if value.ndim == 2:
            return value[self.mask.flatten()]
        return value[self.mask].reshape(-1, value.shape[-1])

    def samples(self, value: torch.Tensor) -> list[torch.Tensor]:
        """The rows of each sample, (positions, width), of a value (samples, positions, width)."""
        if self.mask is None:
            return list(value)
        return [rows[kept] for rows, kept in zip(value, self.mask, strict=True)]


class Masks:
    """The masks of a batch, each with the sizes of samples and positions as the program says them: that of the batch,
    and inputs named `...attention_mask`, as encoders and decoders have each their own."""

    def __init__(self, program: Program, batch: Batch) -> None:
        nodes = zip(program.forward.inputs, program.forward.input_nodes(), strict=True)
        shapes = {declared.name: shape_of(node.meta["val"]) for declared, node in nodes}
        self._known: list[tuple[Any, Any, torch.Tensor]] = []
        if batch.mask is not None:
            given = [name for name, value in batch.inputs.items() if value.shape[:2] == batch.mask.shape]
            given.sort(key=lambda name: name != "attention_mask")
            rows, positions = shapes[given[0]][:2] if given else batch.mask.shape
            self._known.append((rows, positions, batch.mask))
        for name, value in batch.inputs.items():
            if name.endswith("attention_mask") and value.ndim == 2:
                self._known.append((*shapes[name], value.bool()))

    def rows(self, shape: Sequence[Any], axis: int) -> Rows:
        """Which rows of a value of this shape count, its positions being along `axis`, or flat beside the samples.

        A value without the axis that a mask is of has no padding: one row a sample, or positions of another kind.
        Raises UsageError for a value whose first axis is neither that of samples nor that of samples and positions.
        """
        for rows, positions, mask in self._known:
            if len(shape) > axis + 1 and shape[0] == rows and shape[axis] == positions:
                return Rows(mask)
            if len(shape) == 2 and shape[0] == rows * positions:
                return Rows(mask)
        if all(shape[0] == rows or bool(mask.all()) for rows, _, mask in self._known):
            return Rows()
        raise UsageError(
            f"padding cannot be told from tokens in a value of {' x '.join(map(str, shape))}",
            why="; ".join(f"a mask is of {rows} x {positions}" for rows, positions, _ in self._known),
            hint="calibrate with samples of one length",
        )


def shape_of(value: Any) -> tuple[Any, ...]:
    """Sizes of a node's value as the program says them, ints or expressions; () for what is no tensor."""
    kind = type_of(value)
    return kind.shape if isinstance(kind, TensorType) else ()
