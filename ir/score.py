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

#: What a gate does to its value: a factor (0 drops it, a tensor drops parts), or any function of it.
Setting = float | torch.Tensor | Callable[[torch.Tensor], torch.Tensor]
Candidate = Mapping[str, Setting]


@dataclass(frozen=True)
class Gate:
    """A place at which candidates differ: the value of the node named `node`, as all who read it see it."""

    name: str
    node: str


class Scorer:
    """A metric of a program's `forward` on data, as a function of what its gates do.

    The data, and for a metric that compares the results of the program with all gates open, are kept in memory. Gates
    at one place act one behind the other.

    Raises UsageError for two gates of one name, a place that is none, and a metric that runs the model itself.
    """

    def __init__(self, program: Program, gates: Sequence[Gate], data: Data, metric: Metric) -> None:
        self._metric = metric
        self._settings: Candidate = {}
        self._gates = [gate.name for gate in gates]
        self._refuse(program, gates)
        places = {gate.node: [g.name for g in gates if g.node == gate.node] for gate in gates}
        self._run = Interpreter(
            program, [Tap((node,), self._gate(names), replaces=True) for node, names in places.items()]
        )
        batches = [data.batch(k) for k in range(len(data))]
        self._batches = [(b, flat_inputs(program, b, data.place(k))) for k, b in enumerate(batches)]
        self._open = [self._results(inputs) for _, inputs in self._batches] if metric.reference else None

    def _refuse(self, program: Program, gates: Sequence[Gate]) -> None:
        if self._metric.runs:
            raise UsageError(f"{self._metric.name} runs the model itself", hint="score by a metric of its results")
        twice = {name for name in self._gates if self._gates.count(name) > 1}
        if twice:
            raise UsageError(f"two gates are named {min(twice)!r}")
        nodes = [node.name for node in program.forward.graph.nodes]
        for gate in gates:
            if gate.node not in nodes:
                raise UsageError(
                    f"there is no node {gate.node!r} for the gate {gate.name!r}", hint=did_you_mean(gate.node, nodes)
                )

    def __call__(self, candidate: Candidate) -> float:
        """The metric with these gates set, all others open. Raises UsageError for an unknown gate."""
        for name in candidate:
            if name not in self._gates:
                raise UsageError(f"there is no gate {name!r}", hint=did_you_mean(name, self._gates))
        self._settings = candidate
        try:
            total = weight = 0.0
            for k, (batch, inputs) in enumerate(self._batches):
                part = self._metric.parts(self._results(inputs), batch, self._open[k] if self._open else None)
                total, weight = total + float(part.sums.sum()), weight + float(part.weights.sum())
        finally:
            self._settings = {}
        return self._metric.value(total / weight)

    def _results(self, inputs: list[torch.Tensor]) -> Results:
        return named_results(self._run.entry, self._run(inputs).results)

    def _gate(self, names: Sequence[str]) -> Callable[[torch.Tensor], torch.Tensor]:
        def see(value: torch.Tensor) -> torch.Tensor:
            for name in names:
                setting = self._settings.get(name)
                if setting is not None:
                    value = setting(value) if callable(setting) else value * setting
            return value

        return see
