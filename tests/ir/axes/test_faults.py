"""Rules and rewriter with a fault put in: each is seen by little programs that compute something else then, or are
refused by what checks them. If it were not, the tests of this folder would prove nothing about that line."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import pytest
import torch

from axes_oracles import captured, try_permutations, try_shrinks
from axes_programs import CASES, Case
from laconic.ir.axes import analysis, positions
from laconic.ir.axes.call import Call
from laconic.ir.axes.dims import Dim, Factor, Sum, fresh, parts_of, resolve
from laconic.ir.axes.labels import Axes, Label, Several
from laconic.ir.axes.rules import norms, parts, pointwise, products, rule
from laconic.ir.errors import LaconicError

#: The module, which has the name of its function.
rewrite = import_module("laconic.ir.axes.rewriter")
BY_NAME = {case.name: case for case in CASES}
Patch = Callable[[pytest.MonkeyPatch], None]
FAULTS: dict[str, tuple[Patch, list[str]]] = {}


def fault(name: str, *cases: str) -> Callable[[Patch], Patch]:
    def register(patch: Patch) -> Patch:
        FAULTS[name] = (patch, list(cases))
        return patch

    return register


def op(monkeypatch: pytest.MonkeyPatch, name: str, function: Any) -> None:
    monkeypatch.setitem(rule.rules, name, function)


def silenced(call: Call, method: str) -> Call:
    """The call, of which one method does nothing."""
    setattr(call, method, lambda *args, **kwargs: None)
    return call


def without(monkeypatch: pytest.MonkeyPatch, method: str, *names: str) -> None:
    """The rules of these ops with one method of their calls doing nothing."""
    for name in names:
        original = rule.rules[name]
        op(monkeypatch, name, lambda call, original=original: original(silenced(call, method)))


@fault("broadcasting does not join", "residual", "where")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    def loose(call: Call, labels: Any) -> list[Dim]:
        rows = list(labels)
        widest = max(rows, key=len)
        return list(widest)

    monkeypatch.setattr(pointwise, "broadcast", loose)


@fault("a sum's offset is forgotten", "gate and up stacked", "gate and up in chunks", "rotate half")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    def flat(dim: Dim, kept: Any) -> torch.Tensor:
        found = torch.zeros(1, dtype=torch.int64)
        for atom in resolve(dim):
            if isinstance(atom, Factor):
                own = torch.tensor(list(kept[atom])) if atom in kept else torch.arange(atom.size)
            else:
                own = torch.cat([flat(part, kept) for part in parts_of(atom)])
            found = (found[:, None] * atom.size + own).flatten()
        return found

    monkeypatch.setattr(positions, "old_positions", flat)
    monkeypatch.setattr(rewrite, "old_positions", flat)


@fault("parts of a split are not joined with the whole", "gate and up in chunks", "split", "split evenly")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "cut", lambda call, dim, sizes: [fresh(size) for size in sizes])


@fault("positions used as numbers are not seen", "arange as data", "argmax as a number")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Axes, "observe", lambda *args: None)


@fault("the start of a slice is not spelled again", "unequal parts", "halves added")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "literal", "aten.slice")


@fault("the scale of attention comes from the new width", "attention", "shared keys")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite._Rewrite, "_scales", lambda self: None)


@fault("flip has no pin", "flip")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pin", "aten.flip")


@fault("roll has no pin", "roll")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pin", "aten.roll")


@fault("cumsum has no pin", "cumsum")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pin", "aten.cumsum")


@fault("what is sorted is not in order", "sort")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    op(monkeypatch, "aten.sort", pointwise_twice)


def pointwise_twice(call: Call) -> Any:
    label: Label = tuple(call.dims(call.operand))
    return Several((label, label))


@fault("the number of groups is not spelled again", "depthwise", "groups")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "literal", "aten.conv1d")


@fault("a mean does not count", "mean")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pin", "aten.mean")


@fault("a norm does not count", "layer norm", "rms norm")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pin", "aten.layer_norm", "aten.rms_norm")


@fault("a softmax does not count", "softmax")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "pin", "aten.softmax")


@fault("what is repeated is taken for what is interleaved", "repeat")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(call: Call) -> Label:
        dims = call.dims(call.operand)
        return tuple((*dim, *fresh(n)) for dim, n in zip(dims, call.given("repeats"), strict=True))

    op(monkeypatch, "aten.repeat", wrong)


@fault("what is interleaved is taken for what is repeated", "repeat interleave")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(call: Call) -> Label:
        dims = call.dims(call.operand)
        dims[-1] = (*fresh(call.given("repeats")), *dims[-1])
        return tuple(dims)

    op(monkeypatch, "aten.repeat_interleave.self_int", wrong)


@fault("interleaved parts are taken for parts one behind the other", "gate and up interleaved", "interleaved rotation")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(call: Call, dim: Dim, size: Any, step: Any) -> Dim:
        outer = fresh(size)
        call.join(dim, (Sum([()] * step), *outer))
        return outer

    monkeypatch.setattr(parts, "_strided", wrong)


@fault("a norm's weight is not joined", "layer norm", "rms norm")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(norms, "_vectors", lambda call, names: [])


@fault("a bias is not joined", "relu", "gelu")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(call: Call) -> Label:
        *rows, inner = call.dims(call.given("input"))
        weight = call.dims(call.given("weight"))
        call.join(inner, weight[-1])
        return (*rows, *weight[:-1])

    op(monkeypatch, "aten.linear", wrong)


@fault("what is summed over is not joined", "relu", "gate and up stacked")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    without(monkeypatch, "join", "aten.linear")


@fault("the axes of a mask are not joined", "a mask for each head")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "broadcast", lambda call, labels: list(max(labels, key=len)))


@fault("what updates a state is not joined with it", "a state written over")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    original = analysis._results

    def loose(axes: Axes, entry: Any) -> None:
        with monkeypatch.context() as inside:
            inside.setattr(axes, "join", lambda *dims: None)
            original(axes, entry)

    monkeypatch.setattr(analysis, "_results", loose)


@fault("how many bins are counted is not spelled again", "how often each was chosen")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(call: Call) -> Any:
        return call.fresh(call.shape)

    op(monkeypatch, "aten.histc", wrong)


@fault("types are not computed again", "gate and up in chunks", "attention", "relu")
def _(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrite, "propagate", lambda *args: set())


def wrong_of(case: Case) -> str:
    """What is wrong with what comes of a program whose axes are permuted and halved; empty if nothing is."""
    torch.manual_seed(1)
    program = captured(case.weights, case.function, [torch.randn(shape) for shape in case.inputs])
    try:
        for tried in (try_permutations(program), try_shrinks(program, proved=False)):
            worst = max((trial.moved for trial in tried[1]), default=0.0)
            if worst > 1e-10:
                return f"results moved: {worst}"
    except (LaconicError, RuntimeError, AssertionError, IndexError) as problem:
        return f"{type(problem).__name__}: {problem}"
    return ""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "case"), [(name, case) for name, (_, cases) in FAULTS.items() for case in cases])
def test_a_fault_is_seen(name: str, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert wrong_of(BY_NAME[case]) == ""
    FAULTS[name][0](monkeypatch)
    assert wrong_of(BY_NAME[case])
