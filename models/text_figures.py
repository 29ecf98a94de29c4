"""How well a decoder predicts held-out text, and how evenly it uses its experts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F

_BATCH = 8


def windows(ids: torch.Tensor, window: int) -> Iterator[torch.Tensor]:
    """Batches (n, up to window + 1) of a stream (length,): each token but the first is predicted in just one."""
    starts = range(0, len(ids) - 1, window)
    whole = [ids[s : s + window + 1] for s in starts if s + window < len(ids)]
    for k in range(0, len(whole), _BATCH):
        yield torch.stack(whole[k : k + _BATCH])
    if len(whole) < len(starts):
        yield ids[None, starts[-1] :]


@torch.no_grad()
def token_nats(model: Any, ids: torch.Tensor, window: int) -> torch.Tensor:
    """-log p of each token but the first, (length - 1,) float64, with what stands before it in its window as context.

    `ids` (length,) int64; `window` in tokens.
    """
    found = []
    for batch in windows(ids, window):
        logits = model(input_ids=batch[:, :-1], use_cache=False).logits
        nats = F.cross_entropy(logits.flatten(0, 1).double(), batch[:, 1:].flatten(), reduction="none")
        found.append(nats)
    return torch.cat(found)


def novel(ids: Sequence[int], following: Sequence[int]) -> list[bool]:
    """Of the tokens of one window and those that follow them: which follow their predecessor for the first time. What
    no copying from the context can tell."""
    seen: set[tuple[int, int]] = set()
    found = []
    for bigram in zip(ids, following, strict=True):
        found.append(bigram not in seen)
        seen.add(bigram)
    return found


@torch.no_grad()
def expert_load(model: Any, ids: torch.Tensor, window: int) -> torch.Tensor:
    """How many tokens each expert was chosen for, (layers, experts) int64."""
    gates = [layer.mlp.gate for layer in model.model.layers]
    counts = [torch.zeros(gate.num_experts, dtype=torch.int64) for gate in gates]

    def count(k: int, chosen: torch.Tensor) -> None:
        counts[k] += torch.bincount(chosen.flatten(), minlength=len(counts[k]))

    hooks = [
        gate.register_forward_hook(lambda _, inputs, found, k=k: count(k, found[2])) for k, gate in enumerate(gates)
    ]
    try:
        for batch in windows(ids, window):
            model(input_ids=batch[:, :-1], use_cache=False)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(counts)
