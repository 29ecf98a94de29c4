"""cse: compute what is computed twice once.

    %a: f32[2] = aten.exp(%x)                %a: f32[2] = aten.exp(%x)
    %b: f32[2] = aten.exp(%x)        ->      %c: f32[2] = aten.add.Tensor(%a, %a)
    %c: f32[2] = aten.add.Tensor(%a, %b)

Two calls are one if op, constants (by type and repr: 1 is not 1.0) and operands are, operands counting as equal if they
were merged before. Random draws, effects and unset memory are never merged. Two equal results that callers receive as
two tensors stay two: merging them would let a write into one show in the other.

What stays is moved up to its operands: it serves several places and belongs to none, such as the first of several equal
layers, which would otherwise no longer be equal to the others.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from laconic.ir.alias import Aliasing
from laconic.ir.calibration import Calibration
from laconic.ir.program import Entry, Program
from laconic.ir.rewrite import hoist, substitute
from laconic.ir.signature import Interner, signature
from laconic.ir.traits import traits
from laconic.passes.base import Contract, Pass, Plan


@dataclass(frozen=True)
class Cse(Pass):
    name: ClassVar[str] = "cse"
    summary: ClassVar[str] = "compute common subexpressions once"
    contract: ClassVar[Contract] = Contract.EXACT

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        actions = [action for entry in program.entries.values() for action in _merges(entry)]
        return Plan(self.spec, tuple(actions), reason="no two calls compute the same")

    def rewrite(self, program: Program, plan: Plan) -> None:
        for entry in program.entries.values():
            merged = {a["node"]: a["with"] for a in plan.actions if a["entry"] == entry.name}
            substitute(entry, merged)
            hoist(entry, set(merged.values()))


def _merges(entry: Entry) -> list[dict[str, Any]]:
    aliasing = Aliasing(entry)
    number: dict[fx.Node, int] = {}
    intern = Interner()
    first: dict[int, fx.Node] = {}
    actions = []
    for node in entry.graph.nodes:
        if node.op == "output":
            continue
        mergeable = node.op == "call_function" and traits(node).pure and not traits(node).unset
        key: Hashable = signature(node, lambda n: number[n]) if mergeable else ("once", node.name)
        number[node] = intern(key)
        kept = first.setdefault(number[node], node)
        if kept is not node and aliasing.may_replace(node, kept):
            aliasing.replaced(node, kept)
            actions.append(
                {
                    "rule": "common subexpression",
                    "entry": entry.name,
                    "node": node.name,
                    "with": kept.name,
                    "site": node.meta.get("site"),
                }
            )
    return actions
