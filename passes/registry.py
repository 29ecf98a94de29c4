"""The passes there are, by name. Nothing is imported until it is asked for.

Third parties add passes by the entry point group `laconic.passes` (name = "module:Class"). A name given twice is an
error; a plugin that cannot be loaded is reported by name and skipped.
"""

from __future__ import annotations

import importlib
import logging
from functools import cache
from importlib.metadata import entry_points
from typing import TYPE_CHECKING

from laconic.ir.errors import UsageError, did_you_mean

if TYPE_CHECKING:
    from laconic.passes.base import Pass

log = logging.getLogger(__name__)

_BUILTIN = {
    "cse": "laconic.passes.cse:Cse",
    "dce": "laconic.passes.dce:Dce",
    "dedup": "laconic.passes.dedup:Dedup",
    "fold-weights": "laconic.passes.fold_weights:FoldWeights",
    "simplify": "laconic.passes.simplify:Simplify",
}

#: Pipelines with a name. `exact` is the default everywhere and holds only exact passes. `simplify` stands before
#: `dedup`, which finds equal ones among the constants it folds, and so a second run finds nothing.
PRESETS: dict[str, str] = {"exact": "simplify,dedup,cse,dce", "none": ""}
#: Those whose passes, as they are configured, must all have the contract `exact`.
EXACT_PRESETS = frozenset({"exact"})


@cache
def _table() -> dict[str, str]:
    table = dict(_BUILTIN)
    for point in entry_points(group="laconic.passes"):
        if point.name in table:
            raise UsageError(
                f"two passes are named {point.name!r}",
                where=f"{table[point.name]} and {point.value}",
                hint="uninstall one of them",
            )
        table[point.name] = point.value
    return table


def names() -> list[str]:
    """All pass names, sorted."""
    return sorted(_table())


def load(name: str) -> type[Pass]:
    """The class of a pass. Raises UsageError for an unknown name or a plugin that cannot be imported."""
    if name not in _table():
        raise UsageError(f"there is no pass {name!r}", hint=did_you_mean(name, [*names(), *PRESETS]))
    module, _, attribute = _table()[name].partition(":")
    try:
        found: type[Pass] = getattr(importlib.import_module(module), attribute)
    except (ImportError, AttributeError) as problem:
        raise UsageError(f"the pass {name!r} cannot be loaded from {module}", why=str(problem)) from problem
    return found


def load_all() -> list[type[Pass]]:
    """The classes of all passes that can be loaded; broken plugins are logged by name."""
    found = []
    for name in names():
        try:
            found.append(load(name))
        except UsageError as problem:
            log.warning("%s", problem)
    return found
