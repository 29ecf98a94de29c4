"""What a pass is: a frozen dataclass of options that plans, then rewrites, and promises a contract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Any, ClassVar

import torch

from laconic.ir.calibration import Calibration
from laconic.ir.moves import Moves
from laconic.ir.program import Program


class Contract(StrEnum):
    """What a pass promises of the outputs.

    EXACT: bit-identical in eager on the same device with the same RNG state. TOLERANCE: algebraically equal; the error
    against fp64 is at most max(2 x the original's, 4 eps max|y|) per tensor. LOSSY: changes them, and says by what
    metric.
    """

    EXACT = "exact"
    TOLERANCE = "tolerance"
    LOSSY = "lossy"


class Needs(StrEnum):
    """What a pass must be given beside the Program."""

    NOTHING = "nothing"
    ACTIVATIONS = "activations"
    GRADIENTS = "gradients"
    TRAINING = "training"


@dataclass(frozen=True)
class Plan:
    """What a pass decided, as plain data: JSON actions, and tensors where new weights are made.

    Every action names its entry, its node or weight, and its `site` where it has one, and holds on its own, so that a
    plan can be saved, replayed bit for bit, and restricted to some sites. An empty plan says why in `reason`.
    """

    spec: str
    actions: tuple[Mapping[str, Any], ...] = ()
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    reason: str = ""

    def restricted(self, sites: set[int]) -> Plan:
        """The part of the plan that touches only these sites."""
        kept = tuple(a for a in self.actions if a.get("site") in sites)
        return replace(self, actions=kept, reason=self.reason if kept else "no action at these sites")


@dataclass(frozen=True)
class PassResult:
    """What a pass returns: the program (a new one if `modified`), what happened in words, and the rows of which
    positions moved or were left out."""

    program: Program
    modified: bool
    reason: str = ""
    actions: int = 0
    moves: Moves = field(default_factory=dict)


@dataclass(frozen=True)
class Pass(ABC):
    """A rewrite with a contract. Subclasses are frozen dataclasses whose fields are the options.

    `plan` decides and changes nothing; `rewrite` does what the plan says to a copy. `reads_values` says whether weight
    values are looked at. `summary` is one line for people, `source` the paper or formula.
    """

    name: ClassVar[str]
    summary: ClassVar[str]
    source: ClassVar[str] = ""

    @property
    @abstractmethod
    def contract(self) -> Contract:
        """What this pass promises as it is configured; a class attribute where no option bears on it."""

    @property
    def reads_values(self) -> bool:
        return False

    @property
    def needs(self) -> Needs:
        """What it must be given as it is configured: of the least pass, nothing."""
        return Needs.NOTHING

    @property
    def spec(self) -> str:
        """The pass with its options as pipeline text, e.g. `dedup{slices=no}`."""
        from laconic.passes.pipeline import print_pass

        return print_pass(self)

    @abstractmethod
    def plan(self, program: Program, calibration: Calibration | None = None) -> Plan:
        """Decide what to rewrite. `calibration` is there if the pass `needs` anything: it gathers statistics at sites,
        and rates candidates."""

    @abstractmethod
    def rewrite(self, program: Program, plan: Plan) -> Moves | None:
        """Do what the plan says to `program`, in place; say which positions of rows moved, if any did."""

    def said(self, plan: Plan) -> str:
        """What a plan does, in words."""
        return describe_actions(plan)

    def apply(self, program: Program, plan: Plan) -> PassResult:
        """The rewritten program, or the very same one if there is nothing to do."""
        if not plan.actions:
            return PassResult(program, False, plan.reason)
        rewritten = program.clone()
        moves = self.rewrite(rewritten, plan)
        return PassResult(rewritten, True, self.said(plan), len(plan.actions), moves or {})


def describe_actions(plan: Plan) -> str:
    """How often each rule of a plan fires: `7 no-op view, 2 copy`."""
    counts: dict[str, int] = {}
    for action in plan.actions:
        counts[action["rule"]] = counts.get(action["rule"], 0) + 1
    return ", ".join(f"{n} {rule}" for rule, n in sorted(counts.items(), key=lambda item: (-item[1], item[0])))
