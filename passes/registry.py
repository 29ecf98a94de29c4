"""The passes there are, by name. Third parties add passes by the entry point group `laconic.passes` (name =
"module:Class")."""

from __future__ import annotations

from typing import TYPE_CHECKING

from laconic.ir.registry import Registry

if TYPE_CHECKING:
    from laconic.passes.base import Pass

PASSES = Registry(
    "pass",
    "laconic.passes",
    {
        "collapse-layers": "laconic.passes.collapse_layers:CollapseLayers",
        "cse": "laconic.passes.cse:Cse",
        "dce": "laconic.passes.dce:Dce",
        "dead-units": "laconic.passes.dead_units:DeadUnits",
        "dedup": "laconic.passes.dedup:Dedup",
        "drop-layers": "laconic.passes.drop_layers:DropLayers",
        "fold-weights": "laconic.passes.fold_weights:FoldWeights",
        "heal": "laconic.passes.heal:Heal",
        "permute-units": "laconic.passes.permute_units:PermuteUnits",
        "share-atoms": "laconic.passes.share_atoms:ShareAtoms",
        "share-hash": "laconic.passes.share_hash:ShareHash",
        "share-layers": "laconic.passes.share_layers:ShareLayers",
        "share-rows": "laconic.passes.share_rows:ShareRows",
        "simplify": "laconic.passes.simplify:Simplify",
    },
)

#: Pipelines with a name. `exact` is the default everywhere and holds only exact passes. `simplify` stands before
#: `dedup`, which finds equal ones among the constants it folds, and so a second run finds nothing.
PRESETS: dict[str, str] = {
    "exact": "simplify,dedup,cse,dce",
    "fold": "drop-layers{method=gates},share-layers{method=functional},heal",
    "laco": "collapse-layers",
    "none": "",
    "shortgpt": "drop-layers{method=influence}",
}
#: Those whose passes, as they are configured, must all have the contract `exact`.
EXACT_PRESETS = frozenset({"exact"})


def names() -> list[str]:
    """All pass names, sorted."""
    return PASSES.names()


def load(name: str) -> type[Pass]:
    """The class of a pass. Raises UsageError for an unknown name or a plugin that cannot be imported."""
    found: type[Pass] = PASSES.load(name, others=tuple(PRESETS))
    return found


def load_all() -> list[type[Pass]]:
    """The classes of all passes that can be loaded; broken plugins are logged by name."""
    return PASSES.load_all()
