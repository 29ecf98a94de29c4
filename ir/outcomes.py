"""What a program returns on several inputs, each time from the same state of the random generator.

This is what contracts compare, what a saved DIR and a .pt2 are held to bit for bit, and an ONNX file to a tolerance.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from laconic.ir.errors import VerificationError
from laconic.ir.inputs import Case
from laconic.ir.moves import Moves, moved
from laconic.ir.program import Program
from laconic.ir.run import Outcome, evaluate

log = logging.getLogger(__name__)

#: The state of the generator that every compared run starts from.
SEED = 0


@dataclass(frozen=True)
class Outcomes:
    """What a program returns on each case, which of that shares memory, the state of the random generator left, and the
    states that each case began with, where they are not the program's own."""

    cases: list[Case]
    outcomes: list[Outcome]
    generators: list[torch.Tensor]
    sharing: list[frozenset[tuple[str, str]]]
    began: list[dict[str, torch.Tensor]]

    @classmethod
    def of(cls, program: Program, cases: Sequence[Case]) -> Outcomes:
        """Run every case: those of `forward` with the program's own states, those of other entries one after another,
        each with the states that the one before it left.

        A drawn case on which the program itself raises is left out, and logged; a given one raises. Raises
        VerificationError if none is left.
        """
        return cls._run_all(program, cases, None)

    def again(self, program: Program, moves: Moves | None = None) -> Outcomes:
        """What another program returns on these cases, each from the states that it began with here, which are where
        `moves` say: so that a case tells what it does itself, and nothing of what others left. A state that the program
        holds otherwise begins with what the case before left of it.
        """
        return self._run_all(program, self.cases, [_began(program, states, moves or {}) for states in self.began])

    @classmethod
    def _run_all(
        cls, program: Program, cases: Sequence[Case], given: Sequence[Mapping[str, torch.Tensor]] | None
    ) -> Outcomes:
        found = cls([], [], [], [], [])
        left: dict[str, torch.Tensor] = {}
        for k, case in enumerate(cases):
            began = {} if case.entry == "forward" else {**left, **(given[k] if given else {})}
            try:
                inputs = case.clone()
                outcome, generator = _run(with_states(program, began), case.entry, inputs)
            except Exception as problem:  # an op's own check of sizes or values: any type
                if case.given:
                    raise
                log.info("left out: the program does not run on %s: %s", case, problem)
                continue
            found.cases.append(case)
            found.outcomes.append(outcome)
            found.generators.append(generator)
            found.sharing.append(_sharing(program, case.entry, inputs, outcome))
            found.began.append(began)
            if case.entry != "forward":
                left = {**left, **outcome.states}
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


def _began(program: Program, states: Mapping[str, torch.Tensor], moves: Moves) -> dict[str, torch.Tensor]:
    """The states of a case as another program has them, but for those that it holds otherwise."""
    there = {name: moved(v, moves[name]) if name in moves else v for name, v in states.items()}
    rows = program.weights
    return {
        n: v for n, v in there.items() if n in rows and (v.shape, v.dtype) == (rows[n].value.shape, rows[n].value.dtype)
    }


def run_case(program: Program, case: Case) -> Outcome:
    """Run the case's entry once on a copy of its inputs."""
    return _run(program, case.entry, case.clone())[0]


def with_states(program: Program, states: Mapping[str, torch.Tensor]) -> Program:
    """The program with other states, of which the names are the program's."""
    if not states:
        return program
    changed = {name: replace(program.weights[name], value=value) for name, value in states.items()}
    return replace(program, weights={**program.weights, **changed})


def _sharing(program: Program, entry: str, inputs: list[torch.Tensor], outcome: Outcome) -> frozenset[tuple[str, str]]:
    """The pairs of names whose tensors lie in one storage: of a value that is returned, with another or with an input
    or row. Seen in memory, whatever the graph says."""
    homes = {f"input {i.name}": t for i, t in zip(program.entries[entry].inputs, inputs, strict=True)}
    homes.update({f"weight {name}": w.value for name, w in program.weights.items()})
    returned = {name: v for name, v in outcome.tensors().items() if isinstance(v, torch.Tensor)}
    places: dict[int, list[str]] = {}
    for name, tensor in {**homes, **returned}.items():
        if tensor.numel() and tensor.device.type != "meta":
            places.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
    return frozenset(
        (a, b) for names in places.values() for k, b in enumerate(names) if b in returned for a in names[:k]
    )


def _run(program: Program, entry: str, inputs: list[torch.Tensor]) -> tuple[Outcome, torch.Tensor]:
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(SEED)  # no other device's
        return evaluate(program, program.entries[entry], inputs), torch.get_rng_state()
