"""Judging candidates without rewriting: gates in one interpreter.

A search that asks what a model loses if it drops this block or that expert need not make a program for each. The
values that candidates change pass through gates, put into the graph once; a candidate is what the gates do, and judging
it costs what running the model costs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch

from laconic.ir.data import Data, flat_inputs
from laconic.ir.errors import UsageError, did_you_mean
from laconic.ir.interpret import Interpreter, Tap
from laconic.ir.metrics.base import Metric, Results
from laconic.ir.program import Program
from laconic.ir.quality import named_results

#: What a gate does to its value: a factor (0 drops it, a tensor drops parts), or any function of it and, where the gate
#: has one, of what lies beside it.
Setting = float | torch.Tensor | Callable[..., torch.Tensor]
Candidate = Mapping[str, Setting]

#: Bytes of results to compare with that are kept in memory; those beyond are computed again each time.
_KEPT = 2 << 30


@dataclass(frozen=True)
class Gate:
    """A place at which candidates differ: the value of the node named `node`, a weight's too, as all who read it see
    it. `beside` names a node that stands before it, such as what goes into the block that it comes out of."""

    name: str
    node: str
    beside: str = ""


def passed_by(value: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
    """The setting of a gate on what comes out of a block, beside what goes into it, by which the block is skipped."""
    return before


def scaled_by(factor: float) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """The setting of a gate on what comes out of a layer, beside what goes into it, that scales what the layer adds."""
    return lambda value, before: before + factor * (value - before)


def replaced_by(value: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """The setting of a gate on a weight by which its readers are given another one."""
    return lambda given: value


class Gated:
    """A program's `forward` with gates: what it returns is a function of what they do. Gates at one place act one
    behind the other. `taps` see values as they are then.

    Raises UsageError for two gates of one name, and for a place that is none.
    """

    def __init__(self, program: Program, gates: Sequence[Gate], taps: Sequence[Tap] = ()) -> None:
        self._settings: Candidate = {}
        self._gates = [gate.name for gate in gates]
        twice = {name for name in self._gates if self._gates.count(name) > 1}
        if twice:
            raise UsageError(f"two gates are named {min(twice)!r}")
        nodes = [node.name for node in program.forward.graph.nodes]
        for gate in gates:
            for node in (gate.node, gate.beside or gate.node):
                if node not in nodes:
                    raise UsageError(
                        f"there is no node {node!r} for the gate {gate.name!r}", hint=did_you_mean(node, nodes)
                    )
        places: dict[str, list[Gate]] = {}
        for gate in gates:
            places.setdefault(gate.node, []).append(gate)
        self._run = Interpreter(program, [*(self._tap(node, own) for node, own in places.items()), *taps])

    def __call__(self, candidate: Candidate, inputs: list[torch.Tensor]) -> Results:
        """The results with these gates set, all others open. Raises UsageError for an unknown gate."""
        for name in candidate:
            if name not in self._gates:
                raise UsageError(f"there is no gate {name!r}", hint=did_you_mean(name, self._gates))
        self._settings = candidate
        try:
            return named_results(self._run.entry, self._run(inputs).results)
        finally:
            self._settings = {}

    def _tap(self, node: str, gates: Sequence[Gate]) -> Tap:
        """The gates at one node, as one tap."""
        beside = list(dict.fromkeys(gate.beside for gate in gates if gate.beside))

        def see(value: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
            for gate in gates:
                setting = self._settings.get(gate.name)
                if callable(setting):
                    value = setting(value, others[beside.index(gate.beside)]) if gate.beside else setting(value)
                elif setting is not None:
                    value = value * setting
            return value

        return Tap((node, *beside), see, replaces=True)


class Scorer:
    """A metric of a program's `forward` on data, as a function of what its gates do.

    The data, and for a metric that compares the results of the program with all gates open, are kept in memory.

    Raises UsageError for a metric that runs the model itself, and what `Gated` raises.
    """

    def __init__(self, program: Program, gates: Sequence[Gate], data: Data, metric: Metric) -> None:
        if metric.runs:
            raise UsageError(f"{metric.name} runs the model itself", hint="score by a metric of its results")
        self._metric, self._run = metric, Gated(program, gates)
        batches = [data.batch(k) for k in range(len(data))]
        self._batches = [(b, flat_inputs(program, b, data.place(k))) for k, b in enumerate(batches)]
        self._open: dict[int, Results] = {}
        self._room = _KEPT

    @property
    def tokens(self) -> list[int]:
        """How many positions count in each batch."""
        return [batch.tokens for batch, _ in self._batches]

    def __call__(self, candidate: Candidate, batches: Sequence[int] | None = None) -> float:
        """The metric with these gates set, all others open, on all batches or those that are named. Raises UsageError
        for an unknown gate."""
        total = weight = 0.0
        for k in range(len(self._batches)) if batches is None else batches:
            batch, inputs = self._batches[k]
            reference = self._reference(k) if self._metric.reference else None
            part = self._metric.parts(self._run(candidate, inputs), batch, reference)
            total, weight = total + float(part.sums.sum()), weight + float(part.weights.sum())
        return self._metric.value(total / weight)

    def _reference(self, k: int) -> Results:
        """The results of batch k with all gates open."""
        found = self._open.get(k)
        if found is None:
            found = self._run({}, self._batches[k][1])
            size = sum(value.nbytes for value in found.values())
            if size <= self._room:
                self._open[k], self._room = found, self._room - size
        return found
