"""Where in memory a tensor starts, and how bytes of a file come there. Matrix kernels choose their path by the start of
their operands, and another path rounds differently.
"""

from __future__ import annotations

import math
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import torch

#: The widest vector load that kernels align to, in bytes; torch allocates on this boundary.
ALIGNMENT = 64

#: A tensor of fewer bytes is read and not mapped: each mapping costs at least a page and one of the 65,530 that Linux
#: gives a process.
_WORTH_MAPPING = 1 << 20

#: What is read, written or compared at a time.
PIECE = 1 << 22


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


def row_major(value: torch.Tensor) -> torch.Tensor:
    """A copy in memory of its own, with the strides that a tensor of its shape is made with."""
    return value.detach().clone(memory_format=torch.contiguous_format)


def aligned(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself if it starts on a boundary, else a copy that does, with the same strides if they are dense."""
    return tensor if misalignment(tensor) == 0 else tensor.clone(memory_format=torch.preserve_format)


def from_file(file: BinaryIO, offset: int, shape: Sequence[int], dtype: torch.dtype, *, start: int = 0) -> torch.Tensor:
    """The row-major tensor that a file holds from `offset` on, `start` bytes behind a 64-byte boundary in memory.

    A large tensor that lies so in the file is mapped: its pages are read when they are used, and writing to it changes
    memory alone. Any other is read into memory of its own. Either way it has a storage of its own, which outlives the
    file object. Raises EOFError if the file is shorter, OSError if it cannot be read.
    """
    size = math.prod(shape) * dtype.itemsize
    if offset < 0 or offset + size > os.fstat(file.fileno()).st_size:
        raise EOFError(f"expected {size} bytes at {offset}")
    if size >= _WORTH_MAPPING and offset % ALIGNMENT == start:
        ahead = offset % mmap.ALLOCATIONGRANULARITY
        pages = mmap.mmap(file.fileno(), ahead + size, access=mmap.ACCESS_COPY, offset=offset - ahead)
        return torch.frombuffer(pages, dtype=torch.uint8, count=size, offset=ahead).view(dtype).view(tuple(shape))
    whole = torch.empty(start // dtype.itemsize + math.prod(shape), dtype=dtype)
    tensor = whole[start // dtype.itemsize :]
    if size:
        _fill(file, offset, as_bytes(tensor))
    return tensor.view(tuple(shape))


def _fill(file: BinaryIO, offset: int, into: memoryview) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(file.fileno(), [into[done : done + PIECE]], offset + done)
        if not count:
            raise EOFError(f"the file ends at {offset + done}")
        done += count


def pieces(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """A tensor's values in row-major order as flat contiguous tensors of about `PIECE` bytes, views where they can be.
    What is done to each needs little memory, however large the tensor and whatever its strides."""
    tensor = tensor.detach()
    size = tensor.numel() * tensor.element_size()
    if tensor.is_contiguous():
        flat = tensor.as_strided((tensor.numel(),), (1,))  # reshape may keep an odd stride of a single element
        step = PIECE // tensor.element_size()
        yield from (flat[k : k + step] for k in range(0, len(flat), step))
    elif size <= PIECE:
        yield tensor.contiguous().view(-1)
    else:
        step = max(1, PIECE * len(tensor) // size)
        for k in range(0, len(tensor), step):
            yield from pieces(tensor[k] if step == 1 else tensor[k : k + step].contiguous())


def as_bytes(flat: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, in place."""
    return memoryview(flat.view(torch.uint8).numpy().data)
