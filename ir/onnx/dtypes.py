"""ONNX element types as torch dtypes."""

from __future__ import annotations

import onnx_ir
import torch

from laconic.ir.types import DTYPE_NAMES


def dtype_of(number: int | onnx_ir.DataType) -> torch.dtype | None:
    """The torch dtype of an ONNX element type; None for strings, packed types and what a Program has no type for."""
    try:
        found = onnx_ir.tensor_adapters.to_torch_dtype(onnx_ir.DataType(number))
    except (ValueError, KeyError, TypeError):
        return None
    return found if found in DTYPE_NAMES else None
