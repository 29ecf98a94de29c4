"""Data to run a program on: batches of named inputs, which positions count, and what each sample belongs to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from laconic.ir.errors import UsageError, did_you_mean
from laconic.ir.program import Program
from laconic.ir.run import check_inputs
from laconic.ir.types import type_of


@dataclass(frozen=True)
class Batch:
    """Some samples. `inputs` by the names of the entry's inputs; `mask` (samples, positions) bool says which positions
    count, None if all do; `labels` are what a metric compares results with, where the inputs do not say it
    themselves. Intervals are drawn over units: `units` says of each sample what it belongs to (a document), or
    `label_units`, int64 as `labels`, of each label (the digit that is read)."""

    inputs: dict[str, torch.Tensor]
    mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    units: tuple[str, ...] = ()
    label_units: torch.Tensor | None = None

    @property
    def samples(self) -> int:
        return len(next(iter(self.inputs.values())))

    @property
    def tokens(self) -> int:
        return self.samples if self.mask is None else int(self.mask.sum())


class Data(ABC):
    """A set of samples in batches; any batch can be had at any time, so that processes can share them out.

    `name` is what people call it; `digest` tells it from others; `samples` are hashes of what was sampled (documents,
    images), by which two sets that overlap are found.
    """

    name: str
    digest: str
    samples: frozenset[str]
    #: What is measured on it where no metric is named.
    metrics: tuple[str, ...] = ("nats", "top1")

    @abstractmethod
    def __len__(self) -> int:
        """How many batches there are."""

    @abstractmethod
    def batch(self, k: int) -> Batch:
        """Batch k, the same every time."""

    def place(self, k: int) -> str:
        """Batch k in words."""
        return f"{self.name}, batch {k}"

    def __iter__(self) -> Iterator[Batch]:
        return (self.batch(k) for k in range(len(self)))


def flat_inputs(program: Program, batch: Batch, where: str) -> list[torch.Tensor]:
    """A batch as the entry `forward` takes it. `where` names the batch. Raises UsageError for inputs that are missing
    or of other types or sizes, and for a mask that is not of (samples, positions)."""
    entry, given = program.forward, batch.inputs
    wanted = [declared.name for declared in entry.inputs]
    for name in given:
        if name not in wanted:
            hint = did_you_mean(name, wanted)
            raise UsageError(f"there are values for {name!r}, which the model does not take", where=where, hint=hint)
    for name in wanted:
        if name not in given:
            said = f"there are no values for the input {name!r}"
            raise UsageError(said, where=where, why=f"there are some for {', '.join(given)}")
    inputs = [given[name] for name in wanted]
    try:
        check_inputs(program, entry, inputs, [type_of(node.meta["val"]) for node in entry.input_nodes()])
    except UsageError as problem:
        raise UsageError(problem.what, where=where, why=problem.why, hint=problem.hint) from problem
    if batch.mask is not None and (batch.mask.ndim != 2 or len(batch.mask) != batch.samples):
        raise UsageError(
            f"the mask must be of {batch.samples} samples and their positions, is {tuple(batch.mask.shape)}",
            where=where,
        )
    return inputs


@contextmanager
def running(where: str) -> Iterator[None]:
    """What torch refuses while a model runs on a batch, as a UsageError that names the batch: ids beyond a table."""
    try:
        yield
    except (IndexError, RuntimeError) as problem:
        why = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        hint = ""
        if isinstance(problem, IndexError):
            why = f"an id is none of the table that it is looked up in ({why})"
            hint = "the data is made for another model, or by another tokenizer"
        raise UsageError("the model does not take these values", where=where, why=why, hint=hint) from problem


def refuse_overlap(data: Data, calibration: Data) -> None:
    """Raise UsageError if samples that decisions were made on are to judge them."""
    shared = data.samples & calibration.samples
    if shared:
        raise UsageError(
            f"{data.name} overlaps the calibration set {calibration.name}",
            why=f"{len(shared)} of its {len(data.samples)} samples are in both",
            hint="evaluate on other data than decisions are made on",
        )
