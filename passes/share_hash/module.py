"""Modules whose weights stand in one small array: converted to be trained from scratch, or fitted to what they hold.

    small = share_hash(model, ratio=0.25)            a quarter of the weights, drawn anew
    optimizer = torch.optim.SGD(small.parameters(), lr=0.1)            gradients are scaled already
    optimizer = scale_steps(torch.optim.AdamW(small.parameters()), small)            Adam's steps need it done to them

Scaling: a slot's gradient is the sum of what all that share it ask for, and a weight moves by its scale times what its
slot does. Divided by (sum of scales)^2 / count, a step moves weights by the mean of what they ask for, as one without
sharing does where nothing is shared. Without it steps grow with the number that share, and training diverges.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.utils import parametrize

from laconic.ir.errors import UsageError
from laconic.passes.share_hash.mapping import RandomFold

_ARRAY = "hash_shared"
#: Slots are drawn from the uniform distribution on -0.04 to 0.04.
_SPREAD = 0.04

Optimizer = TypeVar("Optimizer", bound=torch.optim.Optimizer)


class _Folded(nn.Module):
    """A weight as a function of the array; `scale` is a power of two, so that multiplying by it rounds nothing."""

    def __init__(self, fold: RandomFold, table: torch.Tensor, first: int, weight: torch.Tensor, scale: float) -> None:
        super().__init__()
        self.fold, self.first, self.shape, self.scale = fold, first, weight.shape, scale
        self.dtype = None if weight.dtype == torch.float32 else weight.dtype  # the array's own
        self.register_buffer("table", table, persistent=False)

    def forward(self, array: torch.Tensor) -> torch.Tensor:
        flat = self.fold.expand(array, self.table, self.first, self.shape.numel())  # type: ignore[arg-type]
        return (flat * self.scale).reshape(self.shape).to(self.dtype or array.dtype)


def share_hash(module: nn.Module, ratio: float, *, least: int = 1024, seed: int = 0, fit: bool = False) -> nn.Module:
    """A copy of a module whose weights of two axes or more, and of `least` elements, all stand in one array of `ratio`
    of their number. Biases and norms stay, and so do weights that are tied to each other; frozen weights stay out,
    unless all are frozen.

    The array is drawn by the seed, each weight with about the spread that it had; with `fit` it holds what is nearest
    to the weights, slot by slot, which is all of them at a ratio of 1 and little at less.

    Raises UsageError for a ratio that is none, and for a module without such weights.
    """
    if not 0 < ratio <= 1:
        raise UsageError(f"a ratio is above 0 and up to 1, not {ratio}")
    made = copy.deepcopy(module)
    places = _places(made, least)
    if not places:
        raise UsageError(f"no weight has two axes and {least} elements", hint="a smaller `least`")
    firsts: dict[int, int] = {}
    total = 0
    for owner, name in places:
        weight = getattr(owner, name)
        if id(weight) not in firsts:
            firsts[id(weight)] = total
            total += weight.numel()
    fold = RandomFold(total, max(1, int(ratio * total)), seed)
    device, trained = getattr(*places[0]).device, getattr(*places[0]).requires_grad
    table = fold.table.to(device)
    draw = torch.Generator().manual_seed(seed)
    drawn = (torch.rand(fold.slots, generator=draw) * 2 - 1) * _SPREAD
    array = nn.Parameter(drawn.to(device), requires_grad=trained)
    known = {id(w): (w, first) for w, first in ((getattr(o, n), firsts[id(getattr(o, n))]) for o, n in places)}
    scales = {key: scale_of(weight) for key, (weight, _) in known.items()}
    if fit:
        with torch.no_grad():
            array.copy_(fitted(fold, [(weight, first, scales[key]) for key, (weight, first) in known.items()]))
    for owner, name in places:
        weight = getattr(owner, name)
        key = id(weight)
        folded = _Folded(fold, table, firsts[key], weight, scales[key])
        parametrize.register_parametrization(owner, name, folded, unsafe=True)
        owner.parametrizations[name].original = array  # type: ignore[index,union-attr]
    made.register_parameter(_ARRAY, array)
    made.register_forward_pre_hook(_scale_gradients)
    _scale_gradients(made)
    return made


def _scale_gradients(module: nn.Module, *_: Any) -> None:
    """Let gradients of the array be scaled. Asked before each call: a copy of a module has an array without hooks."""
    array: Any = getattr(module, _ARRAY)
    if not getattr(array, "_scaled", False) and array.requires_grad:
        scaling = slot_scale(module)
        array.register_hook(lambda gradient: gradient / scaling.to(gradient))
        array._scaled = True


def _places(module: nn.Module, least: int) -> list[tuple[nn.Module, str]]:
    found = [
        (owner, name, weight)
        for owner in module.modules()
        for name, weight in owner.named_parameters(recurse=False)
        if weight.dim() >= 2 and weight.numel() >= least and weight.is_floating_point()
    ]
    frozen = not any(weight.requires_grad for _, _, weight in found)
    return [(owner, name) for owner, name, weight in found if weight.requires_grad or frozen]


def scale_of(weight: torch.Tensor) -> float:
    """The power of two nearest to what gives slots, of standard deviation s / sqrt(3), the weight's own. Raises
    UsageError for weights that are not finite."""
    spread = float(weight.detach().double().std(correction=min(1, weight.numel() - 1))) or _SPREAD / math.sqrt(3)
    if not math.isfinite(spread):
        raise UsageError("a weight is not finite")
    return float(2.0 ** round(math.log2(spread / (_SPREAD / math.sqrt(3)))))


def fitted(fold: RandomFold, weights: list[tuple[torch.Tensor, int, float]]) -> torch.Tensor:
    """The array that is nearest to weights, each with its first element's number and its scale, (slots,) float64. Least
    squares, slot by slot: sum of scale sign w over sum of scale^2."""
    above, below = torch.zeros(fold.slots, dtype=torch.float64), torch.zeros(fold.slots, dtype=torch.float64)
    for weight, first, scale in weights:
        flat = weight.detach().double().flatten() * fold.signs(fold.table, first, weight.numel()).double()
        fold.collect(above, flat * scale, first)
        fold.collect(below, torch.full_like(flat, scale * scale), first)
    return above / below.clamp(min=1e-300)


def _folded(module: nn.Module) -> Iterator[_Folded]:
    """The weights of a converted module, those that are tied once."""
    seen: set[int] = set()
    for part in module.modules():
        if isinstance(part, _Folded) and part.first not in seen:
            seen.add(part.first)
            yield part


def _sums(module: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    """For each slot the sum of the scales of all that share it, and how many these are, (slots,) float64."""
    array: Any = getattr(module, _ARRAY)
    total, count = torch.zeros(len(array), dtype=torch.float64), torch.zeros(len(array), dtype=torch.float64)
    for part in _folded(module):
        ones = torch.ones(part.shape.numel(), dtype=torch.float64)
        part.fold.collect(total, ones * part.scale, part.first)
        part.fold.collect(count, ones, part.first)
    return total, count.clamp(min=1.0)


def slot_scale(module: nn.Module) -> torch.Tensor:
    """By what the gradient of each slot is divided, (slots,) float64: (sum of scales)^2 / count."""
    total, count = _sums(module)
    return (total.square() / count).clamp(min=1e-12)


def scale_steps(optimizer: Optimizer, module: nn.Module) -> Optimizer:
    """Let an optimizer whose steps do not grow with gradients, as Adam's do not, move each slot by its step over the
    mean scale of what shares it: so weights move as they would by themselves. Decay that is decoupled from the step
    (AdamW) is left as it is."""
    array: Any = getattr(module, _ARRAY)
    total, count = _sums(module)
    rate = (count / total.clamp(min=1e-12)).to(array)
    (group,) = (g for g in optimizer.param_groups if any(p is array for p in g["params"]))
    before: list[torch.Tensor] = []

    def note(*_: Any) -> None:
        before[:] = [array.detach().clone()]

    def scaled(*_: Any) -> None:
        with torch.no_grad():
            decoupled = group.get("decoupled_weight_decay", isinstance(optimizer, torch.optim.AdamW))
            decayed = before[0] * (1 - group["lr"] * group["weight_decay"] if decoupled else 1)
            array.copy_(decayed + (array - decayed) * rate)

    optimizer.register_step_pre_hook(note)
    optimizer.register_step_post_hook(scaled)
    return optimizer
