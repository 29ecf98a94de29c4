"""The configuration of a model of transformers, as plain data that stays with the Program."""

from __future__ import annotations

import json
from typing import Any

from torch import nn

#: The fact under which it stands.
FACT = "transformers"


def noted(module: nn.Module) -> dict[str, Any] | None:
    """What `config.json` of this module says, its own class under `architectures`; None for what transformers has not
    made, or could not make again from a configuration."""
    config: Any = getattr(module, "config", None)
    if not type(module).__module__.startswith("transformers.") or not hasattr(config, "to_json_string"):
        return None
    data: dict[str, Any] = json.loads(config.to_json_string())
    return data | {"architectures": [type(module).__name__]}
