"""The JSON Schema of all that laconic writes as JSON: each command's `--json`, and ledger.json.

`schema.json` stands beside this file, a definition for each command under the command's name. A field may be added in
one version; what a field means, or that it is there, changes with the version, which every document carries. A number
that is not finite is null.
"""

from __future__ import annotations

import json
import math
from importlib.resources import files
from typing import Any

from laconic.ir.errors import UsageError, did_you_mean

VERSION = 1


def schema() -> dict[str, Any]:
    """The whole schema (JSON Schema draft 2020-12)."""
    text = (files("laconic") / "schema.json").read_text(encoding="utf-8")
    loaded: dict[str, Any] = json.loads(text)
    return loaded


def schema_of(command: str) -> dict[str, Any]:
    """The schema of one command's documents, e.g. `optimize`. Raises UsageError for a name that has none."""
    whole = schema()
    if command not in whole["$defs"]:
        raise UsageError(f"there is no schema {command!r}", hint=did_you_mean(command, whole["$defs"]))
    return {**whole, "$ref": f"#/$defs/{command}"}


def finite(data: Any) -> Any:
    """A document with null for each number that JSON has no word for: NaN and the infinities."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, (list, tuple)):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
