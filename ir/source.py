"""Source lines as the user knows them: short paths, and none of torch's own frames."""

from __future__ import annotations

import os
import sys
from functools import cache
from pathlib import Path

import torch

_TORCH = str(Path(torch.__file__).parent) + os.sep


@cache
def user_source(path: str) -> str:
    """A file's path from the folder it is imported from; "" for torch's own files and for no file at all."""
    if path.startswith(("<", "torch/")) or path.startswith(_TORCH):
        return ""
    if not os.path.isabs(path):
        return path
    roots = sorted((p for p in (*sys.path, os.getcwd()) if p), key=len, reverse=True)
    for root in roots:
        prefix = os.path.join(root, "")
        if path.startswith(prefix):
            return path[len(prefix) :]
    return os.path.basename(path)
