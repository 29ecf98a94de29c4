"""What generation runs: a prompt, then token by token, caches kept in between."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import torch

from laconic.ir.past import DECODE, ENCODE, PREFILL, cache_size, refuse_without_past
from laconic.ir.program import Kind, Program, Role
from laconic.ir.run import Executable, declared_weights
from laconic.ir.types import nbytes


class Decoder(ABC):
    """Runs `batch` sequences of at most `length` tokens, the prompt at once, then one token at a time.

    `run` is given, as int64: input_ids and position_ids (batch, tokens), attention_mask (batch, length), and
    cache_position (tokens,). Where there is a source to read, of at most `source` tokens, the first call is given the
    source's input_ids, and each its attention_mask (batch, source) and decoder_input_ids (batch, 1). It returns the
    logits of the last position, (batch, vocabulary), and keeps the caches.
    """

    batch: int
    length: int
    source: int | None = None

    @abstractmethod
    def start(self) -> None:
        """Forget what was seen."""

    @abstractmethod
    def run(self, inputs: Mapping[str, torch.Tensor], *, first: bool) -> torch.Tensor:
        """The logits of the last of these tokens: of a prompt or source, if it is the `first` call, else of one."""

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
        self._first = PREFILL if PREFILL in program.entries else ENCODE
        self._entries = {name: program.entries[name] for name in (self._first, DECODE)}
        self._run = {name: Executable(entry) for name, entry in self._entries.items()}
        rows = declared_weights(program) if weights is None else dict(weights)
        self._initial = {n: rows[n] for n, weight in program.weights.items() if weight.kind is Kind.STATE}
        self._rows = rows
        self.batch, self.length = cache_size(program)
        self.source = program.facts["cache"].get("source")
        self.start()

    def start(self) -> None:
        self._rows |= {name: torch.zeros_like(value) for name, value in self._initial.items()}

    @torch.no_grad()
    def run(self, inputs: Mapping[str, torch.Tensor], *, first: bool) -> torch.Tensor:
        name = self._first if first else DECODE
        logits = None
        for output, value in zip(self._entries[name].outputs, self._outputs(name, inputs), strict=True):
            if output.role is Role.UPDATE:
                self._rows[output.name] = value
            elif output.role is Role.RESULT and output.name == "logits":
                logits = value
        assert isinstance(logits, torch.Tensor)
        return logits[:, -1]

    def _outputs(self, name: str, inputs: Mapping[str, torch.Tensor]) -> tuple[Any, ...]:
        """What an entry gives for these inputs and the rows as they are."""
        return self._run[name](self._rows, [inputs[given.name] for given in self._entries[name].inputs])

    @property
    def cache_bytes(self) -> int:
        return sum(nbytes(value) for value in self._initial.values())
