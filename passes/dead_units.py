"""dead-units: channels, heads and experts that are provably zero, or that nothing uses, are left out.

    %h = aten.linear(%x, @up, @bias)     row 3 of @up is zero        %h = aten.linear(%x, @up', @bias')
    %a = aten.gelu(%h)                                         ->    %a = aten.gelu(%h)
    %y = aten.linear(%a, @down)                                      %y = aten.linear(%a, @down', @folded)

A unit goes if everything that gathers over its axis holds there what does not count (`laconic.ir.axes.dead`): zero
where products are summed, -inf under a softmax and where the greatest are chosen. One that is constant, whatever the
inputs are, goes too if what it adds has a bias to go to. What is proved holds for all inputs and all dynamic sizes, on
values that are finite; states are taken to be what entries made of what they begin with.

Left alone: axes that the caller sees, whose sizes enter values (a residual stream under a norm), or whose positions
matter. Of an axis that is dead altogether one position stays.

A shorter sum rounds otherwise: the contract is `tolerance`. A bias that takes constants becomes a constant under a new
name, and the old name leads nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch

from laconic.ir.axes import analyse
from laconic.ir.axes.dead import dead_positions
from laconic.ir.calibration import Calibration
from laconic.ir.program import Program
from laconic.passes.axes import AxesPass, class_action
from laconic.passes.base import Plan


@dataclass(frozen=True)
class DeadUnits(AxesPass):
    """`constants`: leave out units that are constant but not zero, too."""

    constants: bool = True

    name: ClassVar[str] = "dead-units"
    summary: ClassVar[str] = "leave out channels, heads and experts that are provably zero, constant or unused"

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        axes = analyse(program)
        found = dead_positions(axes, constants=self.constants)
        actions: list[dict[str, Any]] = []
        tensors: dict[str, torch.Tensor] = {}
        for factor, positions in found.kept.items():
            action = class_action(axes, factor, positions, "dead units", found.ends[factor][0].node)
            for fold in found.folds[factor]:
                entry, node = program.entry_of(fold.gather.node).name, fold.gather.node.name
                action["folds"].append({"entry": entry, "node": node})
                tensors[f"{entry}.{node}"] = fold.constants
            actions.append(action)
        return Plan(self.spec, tuple(actions), tensors, "no unit of a free axis is provably zero, constant or unused")

    def said(self, plan: Plan) -> str:
        gone = sum(action["size"] - len(action["positions"]) for action in plan.actions)
        folds = len(plan.tensors)
        told = f", their constants in {folds} {'bias' if folds == 1 else 'biases'}" if folds else ""
        return f"{gone} dead units of {len(plan.actions)} axes{told}"
