"""Named inputs: from a file of tensors, or from a function of the user's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from laconic.ir.data import Batch, Data
from laconic.ir.errors import UsageError
from laconic.ir.signature import content_key

#: Beside the inputs: which positions count, and what predictions are compared with.
MASK, LABELS = "mask", "labels"


class NamedData(Data):
    """Tensors whose first axis are the samples, `batch` of them at a time; `mask` and `labels` are not inputs.

    Raises UsageError if there are none, or if they do not all have the same number of samples.
    """

    def __init__(
        self, name: str, tensors: Mapping[str, torch.Tensor], *, inputs: Sequence[str], batch: int = 8
    ) -> None:
        self.name, self._batch = name, batch
        counts = {key: len(value) if value.ndim else 0 for key, value in tensors.items()}
        if not counts or not min(counts.values()):
            raise UsageError(f"{name} is empty", why=", ".join(f"{key}: {n} samples" for key, n in counts.items()))
        if len(set(counts.values())) > 1:
            raise UsageError(
                f"the tensors of {name} have different numbers of samples",
                why=", ".join(f"{key}: {n}" for key, n in counts.items()),
                hint="the first axis of every tensor is that of the samples",
            )
        self._count = next(iter(counts.values()))
        apart = {key for key in (MASK, LABELS) if key not in inputs}
        self._inputs = {key: value for key, value in tensors.items() if key not in apart}
        self._mask = tensors.get(MASK) if MASK in apart else None
        self._labels = tensors.get(LABELS) if LABELS in apart else None
        self.digest = _hash({"batch": torch.tensor(batch), **tensors})
        self.samples = frozenset(sample(self._inputs, k) for k in range(self._count))

    def __len__(self) -> int:
        return -(-self._count // self._batch)

    def batch(self, k: int) -> Batch:
        part = slice(k * self._batch, (k + 1) * self._batch)
        inputs = {key: value[part] for key, value in self._inputs.items()}
        mask = None if self._mask is None else self._mask[part].bool()
        if mask is None and "attention_mask" in inputs and inputs["attention_mask"].ndim == 2:
            mask = inputs["attention_mask"].bool()
        labels = None if self._labels is None else self._labels[part]
        units = tuple(str(n) for n in range(part.start, min(part.stop, self._count)))
        return Batch(inputs, mask, labels, units)


class ListedData(Data):
    """Batches that are there already, as a user's function gives them."""

    def __init__(self, name: str, batches: Sequence[Batch]) -> None:
        self.name, self._batches = name, list(batches)
        parts = ("mask", "labels", "label_units")
        said = [
            _hash(b.inputs | {f" {k}": v for k in parts if (v := getattr(b, k)) is not None}) for b in self._batches
        ]
        self.digest = hashlib.sha256(repr(said).encode()).hexdigest()
        self.samples = frozenset(sample(b.inputs, k) for b in self._batches for k in range(b.samples))

    def __len__(self) -> int:
        return len(self._batches)

    def batch(self, k: int) -> Batch:
        return self._batches[k]


def sample(inputs: Mapping[str, torch.Tensor], k: int) -> str:
    """What tells a sample from others, wherever it stands in its set."""
    return _hash({key: value[k] for key, value in inputs.items() if len(value) > k})


def _hash(tensors: Mapping[str, torch.Tensor]) -> str:
    found = hashlib.sha256()
    for key, value in sorted(tensors.items()):
        found.update(f"{key} {value.dtype} {tuple(value.shape)}".encode() + content_key(value))
    return found.hexdigest()


def read_tensors(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a .safetensors or .npz file. Raises UsageError if it is damaged; nothing is unpickled."""
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            return load_file(path)
        import numpy as np

        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(file[name]) for name in file.files}
    except Exception as problem:
        raise UsageError(f"{path} cannot be read", why=f"{type(problem).__name__}: {problem}") from problem


def listed(name: str, made: Any, inputs: Sequence[str] = ()) -> ListedData:
    """What a user's function returned: batches, or dicts of inputs with, if need be, `mask` and `labels`, unless
    `inputs` of the model are called so.

    Raises UsageError for anything else.
    """
    if not isinstance(made, Iterable) or isinstance(made, (Mapping, str)):
        raise UsageError(f"{name} returned a {type(made).__name__}", hint="return an iterable of dicts of tensors")
    apart = {key for key in (MASK, LABELS) if key not in inputs}
    batches = []
    for row in made:
        if isinstance(row, Batch):
            batches.append(row)
        elif isinstance(row, Mapping) and all(isinstance(value, torch.Tensor) for value in row.values()):
            own = {key: value for key, value in row.items() if key not in apart}
            mask = row.get(MASK) if MASK in apart else None
            if mask is None and "attention_mask" in own and own["attention_mask"].ndim == 2:
                mask = own["attention_mask"]
            labels = row.get(LABELS) if LABELS in apart else None
            batches.append(Batch(own, None if mask is None else mask.bool(), labels))
        else:
            raise UsageError(f"{name} gave a {type(row).__name__}", hint="give dicts of tensors by input name")
    return ListedData(name, batches)
