"""FoldGPT's gates: one number for each layer, trained together under the budget; the weights stay as they are.

    v' = v + g f(v),  g in [0, 1] drawn anew for each sample, open with chance p        loss = KL(model || gated)

The chances of a class always sum up to what is kept of it: one that rises presses the others down. What a layer is
worth is so learned while others are closed too, which scores of one layer at a time cannot tell; and since what is
drawn is nearly always 0 or 1, attenuating all layers alike, which the norm behind them would hide, wins nothing. The
layers of the smallest chances go. What is left is mended: a short search from there, by whole states.

Where a layer is one branch, the gates of those that stay are then trained as plain factors, and folded into their
output projections if the model so loses less.

"FoldGPT: Simple and Effective Large Language Model Compression Scheme", 2024; its code is not public. The gates are
those of Louizos et al. 2018, arXiv:1712.01312 (hard concrete).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from laconic.ir.data import flat_inputs
from laconic.ir.errors import UsageError
from laconic.ir.interpret import Interpreter, Tap
from laconic.ir.metrics.registry import load as load_metric
from laconic.ir.quality import named_results
from laconic.passes.allocate import State
from laconic.passes.drop_layers.task import Choice, DropTask

_RATE, _FACTOR_RATE = 0.1, 0.01
#: Of the hard concrete distribution: its temperature, and how far it is stretched beyond 0 and 1 before it is clamped.
_HEAT, _MARGIN = 2 / 3, 0.1
_EDGE = 1e-6
#: What `logit + _OPEN` is the logit of: the chance that a gate is above 0.
_OPEN = -_HEAT * math.log(_MARGIN / (1 + _MARGIN))

#: The gate of layer k on a value of so many rows: a factor for each row, or one for all.
Draw = Callable[[int, int], torch.Tensor]


def train_gates(task: DropTask) -> Choice:
    """Drop the layers of each class whose chances to be open end smallest."""
    model = _Model(task)
    chances = _decided(task, model)
    state = task.least(chances)
    if task.repair:
        state = task.mended("mending the choice of gates", state)
    return Choice(state, chances, _factors(task, model, state))


class _Model:
    """The model with a gate on each layer; how far it is then from the model as it is."""

    def __init__(self, task: DropTask) -> None:
        self._task, self._metric = task, load_metric("kl")
        self._draw: Draw | None = None
        taps = [Tap((layer.out, layer.v), self._gate(k), replaces=True) for k, layer in enumerate(task.layers)]
        self._interpreter = Interpreter(task.program, taps)

    def _gate(self, k: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def see(value: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
            if self._draw is None:
                return value
            gate = self._draw(k, len(value)).reshape(-1, *[1] * (value.dim() - 1))
            return before + (gate * (value - before).float()).to(value.dtype)

        return see

    def train(self, raw: torch.Tensor, draw: Draw, rate: float, steps: int, what: str) -> None:
        """Descend the divergence, per position, in what `draw` is a function of. Raises UsageError if it is not
        finite."""
        data, told = self._task.data.data, self._task.progress(what)
        optimizer = torch.optim.Adam([raw], lr=rate)
        order = torch.Generator().manual_seed(self._task.data.seed)
        for step in range(steps):
            k = int(torch.randint(len(data), (), generator=order))
            batch = data.batch(k)
            inputs, entry = flat_inputs(self._task.program, batch, data.place(k)), self._interpreter.entry
            self._draw = None
            reference = named_results(entry, self._interpreter(inputs).results)
            self._draw = draw
            results = named_results(entry, self._interpreter(inputs, gradients=True).results)
            parts = self._metric.parts(results, batch, reference)
            loss = parts.sums.sum() / parts.weights.sum()
            if not torch.isfinite(loss):
                raise UsageError("the gates cannot be trained: the divergence is not finite", hint="method=search")
            (raw.grad,) = torch.autograd.grad(loss, [raw])
            optimizer.step()
            told(step + 1, steps)


def _decided(task: DropTask, model: _Model) -> tuple[float, ...]:
    """The chance of each layer to be open; 1 for those that may not go."""
    raw = torch.zeros(len(task.layers), requires_grad=True)
    classes = [(list(one.units), 1 - one.budget / len(one.units)) for one in task.space.classes]
    free = {unit for units, _ in classes for unit in units}
    noise = torch.Generator().manual_seed(task.data.seed)

    def logits() -> torch.Tensor:
        found = torch.full_like(raw, math.inf)
        for units, kept in classes:
            found = found.index_put((torch.tensor(units),), _shifted(raw[units], kept))
        return found

    def draw(k: int, rows: int) -> torch.Tensor:
        if k not in free:
            return torch.ones(1)
        drawn = torch.rand(rows, generator=noise).clamp(_EDGE, 1 - _EDGE).logit()
        soft = torch.sigmoid((drawn + logits()[k]) / _HEAT)
        return (soft * (1 + 2 * _MARGIN) - _MARGIN).clamp(0, 1)

    model.train(raw, draw, _RATE, task.steps, "training gates")
    with torch.no_grad():
        return tuple(torch.sigmoid(logits() + _OPEN).tolist())


def _shifted(raw: torch.Tensor, kept: float) -> torch.Tensor:
    """Logits that differ as these do, by which the mean chance to be open is `kept`."""
    with torch.no_grad():
        low, high = -raw.max() - 60, -raw.min() + 60
        for _ in range(60):
            middle = (low + high) / 2
            below = torch.sigmoid(raw + middle + _OPEN).mean() < kept
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        chance = torch.sigmoid(raw + low + _OPEN)
        slope = (chance * (1 - chance)).clamp(min=1e-12)
    # The shift is a function of the logits, too: its derivative is the mean weighted by slopes, with a minus.
    mean = (slope * raw).sum() / slope.sum()
    return raw + low - (mean - mean.detach())


def _factors(task: DropTask, model: _Model, state: State) -> dict[int, float]:
    """Factors of the single branches that stay, which can be folded, if by them the model loses less; those of whole
    blocks cannot be."""
    kept = [k for k, layer in enumerate(task.layers) if layer.block is None and not state[k]]
    if not kept:
        return {}
    raw = torch.ones(len(task.layers), requires_grad=True)
    closed = torch.tensor([bool(level) for level in state])
    model.train(raw, lambda k, rows: torch.where(closed, 0.0, raw)[k], _FACTOR_RATE, task.steps // 4, "folding gates")
    factors = {k: float(raw[k].detach()) for k in kept}
    return factors if task.loses(state, factors) < task.loses(state) else {}
