"""Data for tests of what runs on data."""

from __future__ import annotations

import torch

from laconic.ir.data import Batch, Data


class Ragged(Data):
    """Sequences of these lengths, `rows` of them a batch, padded at the right; ids below 100, drawn by the seed."""

    def __init__(self, lengths: tuple[int, ...] = (5, 8, 3, 7), rows: int = 2, seed: int = 0) -> None:
        self.name = "ragged"
        self.digest = f"{lengths} {rows} {seed}"
        self.samples = frozenset(f"{seed}.{k}" for k in range(len(lengths)))
        generator = torch.Generator().manual_seed(seed)
        self.sequences = [torch.randint(0, 100, (n,), generator=generator) for n in lengths]
        self.rows = rows

    def __len__(self) -> int:
        return -(-len(self.sequences) // self.rows)

    def batch(self, k: int) -> Batch:
        chosen = self.sequences[k * self.rows : (k + 1) * self.rows]
        ids = torch.nn.utils.rnn.pad_sequence(chosen, batch_first=True)
        mask = torch.arange(ids.shape[1]) < torch.tensor([[len(s)] for s in chosen])
        units = tuple(str(k * self.rows + n) for n in range(len(chosen)))
        return Batch({"input_ids": ids, "attention_mask": mask.long()}, mask, units=units)
