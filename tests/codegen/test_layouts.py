"""Values that pass between pieces with convolutions are handed over in channels-last order, where nobody can tell."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.nn import functional as F

import laconic
from compiled import agree, check, drawn, made, outcome, rolled, same
from cut_eager import EagerPieces
from laconic.codegen import stats

CHANNELS = 8


class Convolving(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(CHANNELS)
        self.second = nn.Conv2d(CHANNELS, CHANNELS, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(F.relu(self.norm(self.first(x))))


class Picture(nn.Module):
    """Blocks, and behind each of them `between`."""

    def __init__(self, between: Callable[[torch.Tensor, int], Any] = lambda x, k: x) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, CHANNELS, 3, padding=1)
        self.blocks = nn.ModuleList(Convolving() for _ in range(5))
        self.head = nn.Linear(CHANNELS, 4)
        self.between = between

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x)
        for k, block in enumerate(self.blocks):
            x = self.between(block(x), k)
        return self.head(x.mean((2, 3)))


class Returned(Picture):
    """Returns what each block made, and what the first was given."""

    def forward(self, x: torch.Tensor) -> Any:
        states = [self.stem(x)]
        for block in self.blocks:
            states.append(block(states[-1]))
        return states


class Written(Picture):
    """Writes, from outside of the blocks, into what they were given."""

    def forward(self, x: torch.Tensor) -> Any:
        first = x = self.stem(x)
        for k, block in enumerate(self.blocks):
            x = block(x)
            if k == 2:
                first[:, :1].mul_(2)
        return x + first


class Seen(Picture):
    """What the stem is given and the caller gets are views of the input."""

    def forward(self, x: torch.Tensor) -> Any:
        image = x.unflatten(2, (6, 5))
        x = self.stem(image)
        for block in self.blocks:
            x = block(x)
        return x.mean(), image.select(1, 0)


class Recording(Picture):
    """Records gradients, whatever is on around it."""

    def forward(self, x: torch.Tensor) -> Any:
        with torch.enable_grad():
            return super().forward(x)


class Turning(Picture):
    """What is handed over is channels last already, or of a layout of its own."""

    def forward(self, x: torch.Tensor) -> Any:
        x = self.stem(x).contiguous(memory_format=torch.channels_last)
        for block in self.blocks:
            x = block(x)
        x = x.transpose(2, 3)
        for block in self.blocks:
            x = block(x)
        return x


def image(*shape: int) -> torch.Tensor:
    return drawn(*(shape or (2, 3, 6, 5)))


@pytest.mark.parametrize("training", [False, True])
def test_between_convolutions(training: bool) -> None:
    found = check(made(Picture).train(training), image(), grad=training, calls=2, tolerance=2e-5)
    assert found["each"][0]["channels_last"] == 6  # the stem's result and the blocks'


#: `Written` cannot be trained: it writes into what a convolution has saved, and eager raises.
HANDED = [(Picture, False, 6), (Returned, False, 0), (Written, False, 0), (Turning, False, 0)]
HANDED += [(Picture, True, 6), (Returned, True, 0), (Turning, True, 0)]


@pytest.mark.parametrize(("model", "training", "handed"), HANDED)
def test_it_changes_no_bit_where_it_is_not_compiled(
    model: Callable[[], nn.Module], training: bool, handed: int
) -> None:
    module = made(model).train(training)
    other, pieces = copy.deepcopy(module), EagerPieces()
    call = torch.compile(module, backend=pieces, fullgraph=True)
    found, wanted = (outcome(c, m, [image()], grad=training) for c, m in ((call, module), (other, other)))
    agree(found, wanted, tolerance=0.0)
    assert len(pieces.cuts) == 1
    assert [record.channels_last for record in pieces.records] == [handed]


@pytest.mark.slow
@pytest.mark.parametrize("model", [Returned, Written, Turning])
def test_compiled(model: Callable[[], nn.Module]) -> None:
    check(made(model).eval(), image(), repeats=2, grad=False, tolerance=2e-5)


def test_a_view_that_is_returned_is_one_of_the_input() -> None:
    module = made(Seen).eval()
    x = drawn(2, 3, 30)
    with torch.no_grad():
        _, view = torch.compile(module, backend="laconic", options={"strict": True})(x)
    rolled(4)
    assert view.untyped_storage().data_ptr() == x.untyped_storage().data_ptr()


def test_gradients_that_are_recorded_inside() -> None:
    module = made(Recording).eval()
    other = copy.deepcopy(module)
    call = torch.compile(module, backend="laconic", options={"strict": True})
    with torch.no_grad():
        results = [call(image()), other(image())]
    for result in results:
        result.sum().backward()
    for (name, weight), wanted in zip(module.named_parameters(), other.parameters(), strict=True):
        same(weight.grad, wanted.grad, 2e-5, name)
    rolled(4)


def test_nothing_passes_the_caches_by() -> None:
    with torch.no_grad():
        torch.compile(made(Picture).eval(), backend="laconic", options={"strict": True})(image())
    counted = counters["aot_autograd"]
    assert counted["autograd_cache_hit"] + counted["autograd_cache_miss"] == rolled(4)["pieces"]
    assert counted["autograd_cache_bypass"] == 0


@pytest.mark.slow
def test_sizes_that_are_not_known_stay_as_they_are() -> None:
    module = made(Picture).eval()
    call = torch.compile(module, backend="laconic", dynamic=True, options={"strict": True})
    for size in (2, 3, 5):
        found, wanted = (outcome(c, module, [image(size, 3, 6, 6)], grad=False) for c in (call, module))
        agree(found, wanted, tolerance=2e-5)
    assert {each["channels_last"] for each in stats()["each"]} == {0}


def test_where_inductor_turns_nothing() -> None:
    found = check(made(Picture).eval(), image(), grad=False, tolerance=2e-5, inductor={"layout_optimization": False})
    assert found["each"][0]["channels_last"] == 0


def test_a_saved_program(tmp_path: Any) -> None:
    module = made(Picture).eval()
    laconic.optimize(module, inputs={"x": image()}).save(tmp_path / "DIR")
    model = laconic.load(tmp_path / "DIR", compile=True, options={"strict": True})
    found, wanted = (outcome(c, module, [image()], grad=False) for c in (model, module))
    agree(found, wanted, tolerance=2e-5)
    assert rolled(4)["each"][0]["channels_last"] == 6
