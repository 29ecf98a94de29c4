"""A pass that breaks its promise: it says `exact` and computes something else. What the documentation of failures runs.

%b: f32[2] = aten.tanh(%a)      ->      %b: f32[2] = aten.hardtanh(%a)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from laconic.ir.calibration import Calibration
from laconic.ir.program import Program
from laconic.ir.rewrite import find
from laconic.passes.base import Contract, Pass, Plan


@dataclass(frozen=True)
class FastTanh(Pass):
    name: ClassVar[str] = "fast-tanh"
    summary: ClassVar[str] = "a faster tanh that is none"
    contract: ClassVar[Contract] = Contract.EXACT

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        actions = [
            {"rule": "tanh", "entry": entry.name, "node": node.name, "site": node.meta.get("site")}
            for entry in program.entries.values()
            for node in entry.calls()
            if node.target is torch.ops.aten.tanh.default
        ]
        return Plan(self.spec, tuple(actions), reason="no tanh")

    def rewrite(self, program: Program, plan: Plan) -> None:
        for action in plan.actions:
            find(program.entries[action["entry"]], action["node"]).target = torch.ops.aten.hardtanh.default
