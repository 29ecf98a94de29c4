"""Laconic: a compiler for neural networks that says the same with less.

Attributes are resolved on first use, so that ``import laconic`` (and the command line's ``--help``) does not import
torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from laconic.version import __version__

if TYPE_CHECKING:
    from laconic.api import Result, capture, export_onnx, export_pt2, load, optimize
    from laconic.auditing import Audit, audit
    from laconic.ir.errors import LaconicError
    from laconic.ir.program import Program

__all__ = [
    "Audit",
    "LaconicError",
    "Program",
    "Result",
    "__version__",
    "audit",
    "capture",
    "export_onnx",
    "export_pt2",
    "load",
    "optimize",
]

_HOMES = {
    "Audit": "laconic.auditing",
    "LaconicError": "laconic.ir.errors",
    "Program": "laconic.ir.program",
    "Result": "laconic.api",
    "audit": "laconic.auditing",
    "capture": "laconic.api",
    "export_onnx": "laconic.api",
    "export_pt2": "laconic.api",
    "load": "laconic.api",
    "optimize": "laconic.api",
}


def __getattr__(name: str) -> Any:
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'laconic' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)


def __dir__() -> list[str]:
    return __all__
