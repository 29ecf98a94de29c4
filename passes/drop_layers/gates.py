"""FoldGPT's gates: one number for each layer, trained together under the budget; the weights stay as they are.

    v' = v + g f(v),  g = a^2 / (a^2 + epsilon)        loss = KL(model || gated) + penalty |mean g - keep|

As epsilon falls from 0.1 to 1e-4 each gate goes to 0 or to 1. What a layer is worth is so learned while the others are
attenuated too, which scores of one layer at a time cannot tell. The layers of the smallest gates go; where a layer is
one branch, the gates of those that stay are folded into their output projections.

"FoldGPT: Simple and Effective Large Language Model Compression Scheme", 2024; the form of the gate and its schedule are
those of the gate literature (smoothed L0), since its code is not public.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from laconic.ir.data import flat_inputs
from laconic.ir.errors import UsageError
from laconic.ir.interpret import Interpreter, Tap
from laconic.ir.metrics.registry import load as load_metric
from laconic.ir.quality import named_results
from laconic.passes.allocate import State
from laconic.passes.drop_layers.task import Choice, DropTask

_RATE = 0.05
_FIRST, _LAST = 0.1, 1e-4
#: For this share of the steps epsilon stays what it is at first: gates move before they narrow.
_WIDE = 1 / 3
#: The penalty is so many times the loss at first, and grows by as much each tenth of the steps in which the gates leave
#: more open than the budget allows.
_PENALTY, _GROWTH = 1.0, 1.5


def train_gates(task: DropTask) -> Choice:
    """Drop the layers of each class whose gates end smallest."""
    gates = _Training(task).run()
    state = task.least(gates)
    return Choice(state, gates, _factors(task, state, gates))


class _Training:
    def __init__(self, task: DropTask) -> None:
        self._task, self._metric = task, load_metric("kl")
        self._raw = torch.ones(len(task.layers), requires_grad=True)
        self._epsilon = _FIRST
        self._open = True
        taps = [Tap((layer.out, layer.v), self._gate(k), replaces=True) for k, layer in enumerate(task.layers)]
        self._interpreter = Interpreter(task.program, taps)
        free = {unit for one in task.space.classes for unit in one.units}
        self._free = torch.tensor([k in free for k in range(len(task.layers))])

    def _gates(self) -> torch.Tensor:
        squared = self._raw.square()
        return torch.where(self._free, squared / (squared + self._epsilon), 1.0)

    def _gate(self, k: int) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
        def see(value: torch.Tensor, before: torch.Tensor) -> torch.Tensor:
            if self._open or not self._free[k]:
                return value
            return before + (self._values[k] * (value - before).float()).to(value.dtype)

        return see

    def run(self) -> tuple[float, ...]:
        task, data = self._task, self._task.data.data
        optimizer = torch.optim.Adam([self._raw], lr=_RATE)
        order = torch.Generator().manual_seed(task.data.seed)
        told, penalty = task.progress("training gates"), _PENALTY
        for step in range(task.steps):
            narrowed = max(0.0, (step / max(1, task.steps - 1) - _WIDE) / (1 - _WIDE))
            self._epsilon = _FIRST * (_LAST / _FIRST) ** narrowed
            # Steps keep to the width of the gate, sqrt(epsilon): closed gates stay closed as it narrows.
            optimizer.param_groups[0]["lr"] = _RATE * (self._epsilon / _FIRST) ** 0.5
            loss, excess = self._losses(int(torch.randint(len(data), (), generator=order)))
            if not torch.isfinite(loss):
                raise UsageError("the gates cannot be trained: the divergence is not finite", hint="method=search")
            scale = max(float(loss.detach()), 1e-3)
            (gradient,) = torch.autograd.grad(loss + penalty * scale * excess, [self._raw])
            self._raw.grad = gradient
            optimizer.step()
            if float(excess.detach()) > 0.5 / len(task.layers) and (step + 1) % max(1, task.steps // 10) == 0:
                penalty *= _GROWTH
            told(step + 1, task.steps)
        with torch.no_grad():
            return tuple(self._gates().tolist())

    def _losses(self, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The divergence on a batch, per position, and how far the mean gate of the classes is from what is kept."""
        data = self._task.data.data
        batch = data.batch(k)
        inputs = flat_inputs(self._task.program, batch, data.place(k))
        entry = self._interpreter.entry
        self._open = True
        reference = named_results(entry, self._interpreter(inputs).results)
        self._open, self._values = False, self._gates()
        results = named_results(entry, self._interpreter(inputs, gradients=True).results)
        parts = self._metric.parts(results, batch, reference)
        excess = [
            (self._values[list(one.units)].mean() - (1 - one.budget / len(one.units))).abs()
            for one in self._task.space.classes
        ]
        return parts.sums.sum() / parts.weights.sum(), torch.stack(excess).sum()


def _factors(task: DropTask, state: State, gates: tuple[float, ...]) -> dict[int, float]:
    """The gates of single branches that stay, which can be folded; those of whole blocks cannot."""
    free = [unit for one in task.space.classes for unit in one.units]
    return {k: gates[k] for k in free if not state[k] and task.layers[k].block is None}
