"""What a program returns on several inputs, each time from the same state of the random generator.

This is what contracts compare, what a saved DIR and a .pt2 are held to bit for bit, and an ONNX file to a tolerance.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from laconic.ir.errors import VerificationError
from laconic.ir.inputs import Case
from laconic.ir.moves import Moves
from laconic.ir.program import Program
from laconic.ir.run import Outcome, evaluate

log = logging.getLogger(__name__)

#: The state of the generator that every compared run starts from.
SEED = 0


@dataclass(frozen=True)
class Outcomes:
    """What a program returns on each case, which of that shares memory, and the state of the random generator left."""

    cases: list[Case]
    outcomes: list[Outcome]
    generators: list[torch.Tensor]
    sharing: list[frozenset[tuple[str, str]]]

    @classmethod
    def of(cls, program: Program, cases: Sequence[Case]) -> Outcomes:
        """Run the entry `forward` on every case.

        A drawn case on which the program itself raises is left out, and logged; a given one raises. Raises
        VerificationError if none is left.
        """
        found = cls([], [], [], [])
        for case in cases:
            try:
                inputs = case.clone()
                outcome, generator = _run(program, inputs)
            except Exception as problem:  # an op's own check of sizes or values: any type
                if case.given:
                    raise
                log.info("left out: the program does not run on %s: %s", case, problem)
                continue
            found.cases.append(case)
            found.outcomes.append(outcome)
            found.generators.append(generator)
            found.sharing.append(_sharing(program, inputs, outcome))
        if not found.cases:
            raise VerificationError(
                "there is no input on which the program runs, so nothing can be compared",
                hint="give example inputs",
            )
        return found

    def moved(self, moves: Moves) -> Outcomes:
        """The same with states whose positions went elsewhere."""
        return replace(self, outcomes=[outcome.moved(moves) for outcome in self.outcomes])

    def __iter__(self) -> Iterator[tuple[Case, Outcome]]:
        return iter(zip(self.cases, self.outcomes, strict=True))


def run_case(program: Program, case: Case) -> Outcome:
    """Run the entry `forward` once on a copy of the case's inputs."""
    return _run(program, case.clone())[0]


def _sharing(program: Program, inputs: list[torch.Tensor], outcome: Outcome) -> frozenset[tuple[str, str]]:
    """The pairs of names whose tensors lie in one storage: of a value that is returned, with another or with an input
    or row. Seen in memory, whatever the graph says."""
    homes = {f"input {i.name}": t for i, t in zip(program.forward.inputs, inputs, strict=True)}
    homes.update({f"weight {name}": w.value for name, w in program.weights.items()})
    returned = {name: v for name, v in outcome.tensors().items() if isinstance(v, torch.Tensor)}
    places: dict[int, list[str]] = {}
    for name, tensor in {**homes, **returned}.items():
        if tensor.numel() and tensor.device.type != "meta":
            places.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return frozenset(
        (a, b) for names in places.values() for k, b in enumerate(names) if b in returned for a in names[:k]
    )


def _run(program: Program, inputs: list[torch.Tensor]) -> tuple[Outcome, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)  # no other device's
        return evaluate(program, program.forward, inputs), torch.get_rng_state()
