"""Where in memory a tensor starts. Matrix kernels choose their path by it, and another path rounds differently."""

from __future__ import annotations

from collections.abc import Sequence

import torch

#: The widest vector load that kernels align to, in bytes; torch allocates on this boundary.
ALIGNMENT = 64


def misalignment(tensor: torch.Tensor) -> int:
    """How many bytes behind a 64-byte boundary a tensor starts; 0 for an empty one."""
    return int(tensor.data_ptr() % ALIGNMENT) if tensor.numel() else 0


def placed(tensor: torch.Tensor, stride: Sequence[int], start: int, device: str = "cpu") -> torch.Tensor:
    """A copy with these strides that starts `start` bytes behind a 64-byte boundary.

    `start` is rounded down to whole elements. Raises RuntimeError if the strides let elements overlap.
    """
    dense = torch.empty_strided(tensor.shape, tuple(stride), dtype=tensor.dtype, device=device)
    offset = start // tensor.element_size()
    if offset and tensor.numel():
        room = torch.empty(offset + dense.untyped_storage().nbytes() // tensor.element_size(), dtype=tensor.dtype)
        dense = room.to(device).as_strided(tensor.shape, tuple(stride), offset)
    return dense.copy_(tensor)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it starts on a boundary, else a copy that does, with the same strides if they are dense."""
    return tensor if misalignment(tensor) == 0 else tensor.clone(memory_format=torch.preserve_format)
