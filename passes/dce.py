"""dce: remove what nobody uses.

    %a: f32[2] = aten.neg(%x)
    %b: f32[2] = aten.exp(%x)        ->      %b: f32[2] = aten.exp(%x)
    return %b                                return %b

Calls whose results reach no output, and weights that no entry uses. A call with an effect stays, and so does a random
draw: without it later draws would see another RNG state. States stay, since they belong to the caller. Safe because a
pure call that nobody reads cannot be told from no call.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from laconic.ir.calibration import Calibration
from laconic.ir.program import Alias, Kind, Program
from laconic.ir.rewrite import by_name, dead_nodes, drop_weights
from laconic.passes.base import Contract, Pass, Plan


@dataclass(frozen=True)
class Dce(Pass):
    name: ClassVar[str] = "dce"
    summary: ClassVar[str] = "remove calls and weights that nobody uses"
    contract: ClassVar[Contract] = Contract.EXACT

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        actions: list[dict[str, Any]] = []
        used: set[str] = set()
        for entry in program.entries.values():
            dead = dead_nodes(entry)
            for node in dead:
                actions.append(
                    {"rule": "dead call", "entry": entry.name, "node": node.name, "site": node.meta.get("site")}
                )
            gone = set(dead)
            used |= {name for name, node in entry.weight_nodes().items() if any(u not in gone for u in node.users)}
        for name, weight in program.weights.items():
            if name not in used and weight.kind is not Kind.STATE:
                actions.append({"rule": "unused weight", "weight": name})
        return Plan(self.spec, tuple(actions), reason="every call and weight is used")

    def rewrite(self, program: Program, plan: Plan) -> None:
        nodes = {entry.name: by_name(entry) for entry in program.entries.values()}
        for action in plan.actions:
            if action["rule"] == "dead call":
                program.entries[action["entry"]].graph.erase_node(nodes[action["entry"]][action["node"]])
        drop_weights(program, {a["weight"]: Alias(None) for a in plan.actions if a["rule"] == "unused weight"})
