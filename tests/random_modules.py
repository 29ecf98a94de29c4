"""Random small modules: what people write in eager PyTorch, with what the exact passes look for planted in some.

`random_module(seed)` builds a module step by step. Each step is tried on three copies of the state at different batch
sizes and kept only if it runs on all of them, and if every size it gives is fixed or a multiple of the batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.export import Dim

import random_steps

BATCHES = (3, 1, 5)


@dataclass(frozen=True)
class Step:
    """A piece of eager code: which values it reads, which it makes. `pure`: it may be left out if nobody reads it."""

    reads: tuple[str, ...]
    makes: tuple[str, ...]
    run: Callable[..., Any]
    pure: bool = True


class RandomModule(nn.Module):
    """Runs the steps over named values, starting with inputs and weights, and returns a nest of them."""

    def __init__(
        self, steps: list[Step], weights: dict[str, torch.Tensor], kinds: dict[str, str], results: Any
    ) -> None:
        super().__init__()
        self.steps, self.results, self.rows = steps, results, list(weights)
        for name, value in weights.items():
            if kinds[name] == "parameter":
                same = next((p for p in self._parameters.values() if p is not None and p.data is value), None)
                self.register_parameter(name, same if same is not None else value)  # type: ignore[arg-type]
            else:
                self.register_buffer(name, value)

    def forward(self, x: torch.Tensor, y: torch.Tensor, ids: torch.Tensor) -> Any:
        values = {"x": x, "y": y, "ids": ids, **{name: getattr(self, name) for name in self.rows}}
        for step in self.steps:
            made = step.run(*(values[name] for name in step.reads))
            values.update(zip(step.makes, made if isinstance(made, (tuple, list)) else (made,), strict=True))
        return _fill(self.results, values)


def _fill(results: Any, values: dict[str, torch.Tensor]) -> Any:
    if isinstance(results, dict):
        return {key: _fill(child, values) for key, child in results.items()}
    if isinstance(results, (list, tuple)):
        return type(results)(_fill(child, values) for child in results)
    return values[results]


def example_inputs(batch: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, 4, 6, generator=generator)
    y = torch.randn(batch, 6, generator=generator)
    return x, y, torch.randint(0, 4, (batch, 4), generator=generator)


@dataclass
class Builder:
    """The module being built. `values` holds each value at every batch size; `weights` are shared by none of them."""

    dice: random.Random
    traits: set[str]
    generator: torch.Generator
    values: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    kinds: dict[str, str] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    count: int = 0

    def weight(self, value: torch.Tensor, kind: str, name: str | None = None) -> str:
        """A new weight; a copy of it at every batch size."""
        name = name or f"{kind[0]}{len(self.weights)}"
        requires_grad = kind == "parameter" and value.is_floating_point()
        self.weights[name] = nn.Parameter(value, requires_grad) if kind == "parameter" else value
        self.kinds[name] = kind
        self.values[name] = [value.clone() for _ in BATCHES]
        return name

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.generator) * 0.5

    def pick(self, fits: Callable[[torch.Tensor], bool] = lambda t: True, recent: bool = True) -> str | None:
        """A value that fits at the first batch size; later ones are likelier."""
        names = [n for n, v in self.values.items() if fits(v[0]) and n not in self.weights]
        if not names:
            return None
        return self.dice.choice(names[-6:] if recent and self.dice.random() < 0.7 else names)

    def add(self, run: Callable[..., Any], *reads: str | None, pure: bool = True) -> bool:
        """Try a step at every batch size; keep it if its sizes make sense."""
        if any(r is None for r in reads):
            return False
        names = tuple(str(r) for r in reads)
        made: list[list[torch.Tensor]] = []
        for k in range(len(BATCHES)):
            try:
                got = run(*(self.values[r][k] for r in names))
            except (RuntimeError, IndexError, ValueError, TypeError):
                return False
            made.append(list(got) if isinstance(got, (tuple, list)) else [got])
        if not all(_sensible([world[i] for world in made]) for i in range(len(made[0]))):
            return False
        labels = tuple(f"t{self.count + i}" for i in range(len(made[0])))
        self.count += len(labels)
        for i, label in enumerate(labels):
            self.values[label] = [world[i] for world in made]
        self.steps.append(Step(names, labels, run, pure))
        return True

    def repeat(self) -> bool:
        """Say an earlier step again."""
        pure = [s for s in self.steps if s.pure]
        if not pure:
            return False
        step = self.dice.choice(pure)
        if not self.add(step.run, *step.reads):
            return False
        if self.dice.random() < 0.7:
            return self.add(torch.add, step.makes[-1], self.steps[-1].makes[-1])
        return True

    def owned(self, name: str) -> bool:
        """Whether a value lives in memory of its own, neither a weight's nor an input's."""
        storage = self.values[name][0].untyped_storage().data_ptr()
        others = [*self.weights, "x", "y", "ids"]
        return all(self.values[o][0].untyped_storage().data_ptr() != storage for o in others)


def _sensible(worlds: list[torch.Tensor]) -> bool:
    first = worlds[0]
    if any(w.dim() != first.dim() or w.dtype != first.dtype or w.numel() > 40_000 for w in worlds) or first.dim() > 5:
        return False
    for sizes in zip(*(w.shape for w in worlds), strict=True):
        fixed = len(set(sizes)) == 1
        if sizes[0] == 0 or not (fixed or len({n / b for n, b in zip(sizes, BATCHES, strict=True)}) == 1):
            return False
    return True


#: How often a module has a trait, beside what every module may contain.
_TRAITS = {
    "dead": 0.4, "repeats": 0.45, "no-ops": 0.5, "constants": 0.45, "same weights": 0.5, "rows of weights": 0.2,
    "random": 0.35, "state": 0.4, "in-place": 0.5, "input written": 0.12, "integers": 0.5, "returns inputs": 0.2,
}  # fmt: skip


def random_module(seed: int) -> tuple[RandomModule, tuple[torch.Tensor, ...], dict[str, Any] | None]:
    """A module, example inputs, and dynamic shapes for half of the seeds. Equal seeds give equal modules."""
    dice = random.Random(seed)
    traits = {name for name, chance in _TRAITS.items() if dice.random() < chance}
    builder = Builder(dice, traits, torch.Generator().manual_seed(seed))
    worlds = [example_inputs(batch, seed) for batch in BATCHES]
    for position, name in enumerate(("x", "y", "ids")):
        builder.values[name] = [world[position].clone() for world in worlds]
    random_steps.plant_weights(builder)
    wanted, tries = dice.randint(5, 14), 0
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        while len(builder.steps) < wanted and tries < 200:
            tries += 1
            random_steps.choose(builder)(builder)
        if "repeats" in traits:
            builder.repeat()
    results = _results(builder)
    if "dead" not in traits:
        _prune(builder, set(_names(results)))
    module = RandomModule(builder.steps, builder.weights, builder.kinds, results).eval()
    dynamic = None
    if dice.random() < 0.5:
        batch = Dim("batch", max=64)
        dynamic = {"x": {0: batch}, "y": {0: batch}, "ids": {0: batch}}
    return module, worlds[0], dynamic


def _results(builder: Builder) -> Any:
    """A nest of some values: mostly late ones, sometimes one twice, an input, a weight or views of one another."""
    dice = builder.dice
    made = [name for step in builder.steps for name in step.makes]
    used = {name for step in builder.steps for name in step.reads}
    last = [n for n in made if n not in used] or made or ["x"]
    chosen = dice.sample(last, min(len(last), dice.randint(2, 4)))
    if made and dice.random() < 0.5:
        chosen.append(made[-1] if "repeats" in builder.traits else dice.choice(made))
    if dice.random() < 0.2:
        chosen.append(chosen[0])
    if "returns inputs" in builder.traits:
        chosen.append(dice.choice(["x", "y", *[n for n, k in builder.kinds.items() if k != "state"]]))
    form = dice.randrange(4)
    if form == 0:
        return tuple(chosen)
    if form == 1:
        return {f"out{k}": name for k, name in enumerate(chosen)}
    if form == 2:
        return (chosen[0], {"rest": list(chosen[1:])})
    return list(chosen) if len(chosen) > 1 else chosen[0]


def _names(results: Any) -> list[str]:
    if isinstance(results, str):
        return [results]
    return [n for child in (results.values() if isinstance(results, dict) else results) for n in _names(child)]


def _prune(builder: Builder, live: set[str]) -> None:
    """Leave out pure steps that nobody reads."""
    kept = []
    for step in reversed(builder.steps):
        if not step.pure or live & set(step.makes):
            live |= set(step.reads)
            kept.append(step)
    builder.steps = kept[::-1]
    for name in [n for n in builder.weights if n not in live]:
        del builder.weights[name], builder.kinds[name]
