"""What generation runs: a prompt, then token by token, caches kept in between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from laconic.ir.past import DECODE, ENCODE, FEATURES, PIXELS, PREFILL, VISION, generating, refuse_without_past
from laconic.ir.program import Kind, Program, Role
from laconic.ir.run import Executable, declared_weights
from laconic.ir.types import TensorType, nbytes, type_of


class Decoder(ABC):
    """Runs `batch` sequences of at most `length` tokens, the prompt at once, then one token at a time.

    `run` is given, as int64: input_ids and position_ids (batch, tokens), attention_mask (batch, length), and
    cache_position (tokens,). Where there is a source to read, of at most `source` tokens, the first call is given the
    source's input_ids, and each its attention_mask (batch, source) and decoder_input_ids (batch, 1). Where images may
    stand for each `image_token`, the first call may be given pixel_values. It returns the logits of the last position,
    (batch, vocabulary), and keeps the caches.
    """

    def __init__(self, facts: Mapping[str, int]) -> None:
        """`facts` as `laconic.ir.past` has them."""
        self.batch, self.length = facts["batch"], facts["length"]
        self.source, self.image_token = facts.get("source"), facts.get("image_token")
        self._first = PREFILL if self.source is None else ENCODE

    def run(self, inputs: Mapping[str, torch.Tensor], *, first: bool) -> torch.Tensor:
        """The logits of the last of these tokens: of a prompt or source, if it is the `first` call, else of one."""
        if first and self.image_token is not None:
            seen = self._call(VISION, inputs)[FEATURES] if PIXELS in inputs else self.empty(PREFILL, FEATURES)
            inputs = {**inputs, FEATURES: seen}
        return self._call(self._first if first else DECODE, inputs)["logits"][:, -1]

    @abstractmethod
    def start(self) -> None:
        """Forget what was seen."""

    @abstractmethod
    def _call(self, name: str, inputs: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
        """The results of an entry, by name; caches are kept."""

    @abstractmethod
    def empty(self, name: str, given: str) -> torch.Tensor:
        """Zeros, of the shape that an entry takes an input of fixed sizes in."""

    @property
    @abstractmethod
    def vocabulary(self) -> int:
        """How many tokens there are."""

    @property
    @abstractmethod
    def cache_bytes(self) -> int:
        """The bytes of all caches."""


class ProgramDecoder(Decoder):
    """A Program's entries. Caches are this decoder's own; `weights` stand for rows of the table, its own by default.

    Raises UsageError for a Program without these entries.
    """

    def __init__(self, program: Program, weights: Mapping[str, torch.Tensor] | None = None) -> None:
        refuse_without_past(program, "it cannot generate")
        super().__init__(program.facts["cache"])
        self._entries = {name: program.entries[name] for name in generating(program)}
        self._run = {name: Executable(entry) for name, entry in self._entries.items()}
        rows = declared_weights(program) if weights is None else dict(weights)
        self._initial = {n: rows[n] for n, weight in program.weights.items() if weight.kind is Kind.STATE}
        self._rows = rows
        self.start()

    def start(self) -> None:
        self._rows |= {name: torch.zeros_like(value) for name, value in self._initial.items()}

    @torch.no_grad()
    def _call(self, name: str, inputs: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        results: dict[str, torch.Tensor] = {}
        for output, value in zip(self._entries[name].outputs, self._outputs(name, inputs), strict=True):
            if output.role is Role.UPDATE:
                self._rows[output.name] = value
            elif output.role is Role.RESULT:
                results[output.name] = value
        return results

    def _outputs(self, name: str, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """What an entry gives for these inputs and the rows as they are."""
        return self._run[name](self._rows, [inputs[given.name] for given in self._entries[name].inputs])

    def empty(self, name: str, given: str) -> torch.Tensor:
        node = next(n for n in self._entries[name].input_nodes() if n.meta["name"] == given)
        kind = type_of(node.meta["val"])
        assert isinstance(kind, TensorType)
        return torch.zeros(kind.shape, dtype=kind.dtype, device=kind.device)

    @property
    def vocabulary(self) -> int:
        entry = self._entries[DECODE]
        logits = next(v for o, v in zip(entry.outputs, entry.output_values, strict=True) if o.name == "logits")
        return int(logits.meta["val"].shape[-1])

    @property
    def cache_bytes(self) -> int:
        return sum(nbytes(value) for value in self._initial.values())
