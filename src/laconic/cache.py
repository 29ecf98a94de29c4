"""Where what can be computed again is kept between runs."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """`LACONIC_CACHE_DIR`, else the user's cache folder. It may be removed at any time."""
    said = os.environ.get("LACONIC_CACHE_DIR", "")
    if said:
        return Path(said)
    base = os.environ.get("XDG_CACHE_HOME", "") or str(Path.home() / ".cache")
    return Path(base) / "laconic"
