"""The methods there are, by the pass that takes them: `drop-layers.search` is the method `search` of `drop-layers`.

A method is a function of one argument, what its pass says is to be decided, and returns the decision. Third parties add
methods by the entry point group `laconic.methods` (name = "module:function").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from laconic.ir.errors import UsageError, did_you_mean
from laconic.ir.registry import Registry

METHODS = Registry(
    "method",
    "laconic.methods",
    {
        "drop-layers.exhaustive": "laconic.passes.drop_layers.search:exhaust",
        "drop-layers.gates": "laconic.passes.drop_layers.gates:train_gates",
        "drop-layers.greedy": "laconic.passes.drop_layers.search:descend",
        "drop-layers.influence": "laconic.passes.drop_layers.influence:least_influence",
        "drop-layers.random": "laconic.passes.drop_layers.search:draw",
        "drop-layers.search": "laconic.passes.drop_layers.search:search",
        "drop-layers.span": "laconic.passes.drop_layers.influence:best_span",
        "share-layers.crash": "laconic.passes.share_layers.grouping:crash",
        "share-layers.exhaustive": "laconic.passes.share_layers.grouping:exhaust",
        "share-layers.fixed": "laconic.passes.share_layers.grouping:fixed",
        "share-layers.functional": "laconic.passes.share_layers.grouping:functional",
        "share-layers.random": "laconic.passes.share_layers.grouping:draw",
        "share-layers.search": "laconic.passes.share_layers.grouping:search",
    },
)


def methods_of(name: str) -> list[str]:
    """The methods of a pass, sorted."""
    return [found.removeprefix(f"{name}.") for found in METHODS.names() if found.startswith(f"{name}.")]


def load_method(name: str, method: str) -> Callable[[Any], Any]:
    """A method of a pass. Raises UsageError for an unknown one, or a plugin that cannot be imported."""
    known = methods_of(name)
    if method not in known:
        raise UsageError(
            f"{name} has no method {method!r}", hint=did_you_mean(method, known) or f"it is one of {', '.join(known)}"
        )
    found: Callable[[Any], Any] = METHODS.load(f"{name}.{method}")
    return found
