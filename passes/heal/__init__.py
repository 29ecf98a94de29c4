"""heal: a short fine-tune of what passes before it changed, so that the model says again what the original said.

    loss = KL(original || healed) + weight * mean over the last blocks of |h - h'|^2 / |h'|^2      (or nats for KL)

What is trained: matrices that several blocks share now or that hold other values, corrections, the norms of all blocks,
and of blocks that were dropped the neighbours. A weight that k places read is moved by 1/k of the rate, since its
gradient is the sum of theirs. `lora` lets all other matrices of blocks move too, in as many directions, which are added
into them in the end. `train` may name more: all weights of `blocks`, or `all`.

Nothing is healed where nothing was changed: `heal` behind an exact pipeline, or with no steps, returns the program as
it is. With one seed, and one number of threads, it gives the same weights; a run that was stopped goes on where it was.

"FoldGPT: Simple and Effective Large Language Model Compression Scheme", 2024: its tail-layer distillation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from laconic.ir.calibration import Calibration
from laconic.ir.program import Program
from laconic.passes.base import Contract, Needs, Pass, Plan
from laconic.passes.heal.changed import Change
from laconic.passes.heal.training import Healing, Settings
from laconic.passes.options import check_least


@dataclass(frozen=True)
class Heal(Pass):
    """`rate`: the learning rate at its height. `tail`: how many last blocks are held to the original's, each counting
    `weight`. Raises ValueError for numbers that are none."""

    steps: int = 200
    rate: float = 0.0005
    train: Literal["changed", "blocks", "all"] = "changed"
    loss: Literal["kl", "nats"] = "kl"
    tail: int = 2
    weight: float = 0.1
    lora: int = 0

    name: ClassVar[str] = "heal"
    summary: ClassVar[str] = "fine-tune what was changed until the model says again what the original said"
    contract: ClassVar[Contract] = Contract.LOSSY
    source: ClassVar[str] = "FoldGPT 2024"

    def __post_init__(self) -> None:
        check_least(0, steps=self.steps, tail=self.tail, lora=self.lora, weight=self.weight)
        if not self.rate > 0:
            raise ValueError(f"option 'rate' is above 0, not {self.rate}")

    @property
    def reads_values(self) -> bool:
        return True

    @property
    def needs(self) -> Needs:
        return Needs.TRAINING if self.steps else Needs.NOTHING

    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        if not self.steps:
            return Plan(self.spec, reason="no steps")
        assert calibration is not None
        original = calibration.original or program
        change = Change(original, program)
        rows = change.rows(self.train)
        if not rows:
            return Plan(self.spec, reason="no weight was changed by the passes before")
        widened = [row for row in change.matrices() if row not in rows] if self.lora else []
        settings = Settings(self.steps, self.rate, self.loss, self.tail, self.weight, self.lora)
        healed = Healing(original, program, rows, widened, calibration, settings).run()
        actions = tuple(_action(program, row) for row in healed)
        return Plan(self.spec, actions, {f"healed.{row}": value for row, value in healed.items()})

    def rewrite(self, program: Program, plan: Plan) -> None:
        for action in plan.actions:
            row = action["row"]
            program.weights[row] = replace(program.weights[row], value=plan.tensors[f"healed.{row}"])

    def said(self, plan: Plan) -> str:
        return f"{len(plan.actions)} weights trained for {self.steps} steps"


def _action(program: Program, row: str) -> dict[str, Any]:
    """Where a row is first read."""
    for entry in program.entries.values():
        node = entry.weight_nodes().get(row)
        if node is not None and node.users:
            user = next(iter(node.users))
            return {
                "rule": "heal",
                "row": row,
                "entry": entry.name,
                "node": user.name,
                "site": user.meta.get("site", -1),
            }
    return {"rule": "heal", "row": row, "entry": "forward", "node": "", "site": -1}
