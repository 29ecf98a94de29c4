"""When a step of the backend fails: right results all the same, counted and logged; with `strict`, an error. What fails
when a compiled model runs is the user's own."""

from __future__ import annotations

import copy
import logging
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from compiled import WIDTH, Block, Stack, agree, compiled, drawn, made, outcome, python, rolled, said, same
from laconic.codegen import stats
from laconic.codegen.backend import backend, inductor
from laconic.passes.cse import Cse

pytestmark = pytest.mark.usefixtures("no_caches")

Failed = torch._dynamo.exc.BackendCompilerFailed


class FaultError(RuntimeError):
    """What the tests plant."""


def fault(*args: Any, **kwargs: Any) -> Any:
    raise FaultError("planted")


class Updated(Stack):
    """The stream is updated in place, which is said otherwise before the graph is read."""

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = block(x).add_(1)
        return self.head(x)


#: Steps that only a graph of another form takes.
PREPARING = {
    "parts": (backend, "parts_beside_their_tuple"),
    "numbers": (backend, "numbers_beside_their_use"),
    "out of place": (backend, "out_of_place"),
    "copies": (backend, "read_through_copies"),
}
#: Step -> where the fault is planted.
BEFORE = PREPARING | {
    "read": (backend, "read_dynamo"),
    "search": (backend, "find_repeats"),
    "moves": (backend, "moves_that_complete_first_blocks"),
    "cut": (backend, "cut"),
    "layouts": (backend, "hand_over_channels_last"),
    "settings": (backend, "piece_settings"),
    "context": (backend, "fresh_context"),
    "one piece": (backend, "_compile_piece"),
    "driver": (backend, "drive"),
}


@pytest.mark.parametrize("step", BEFORE)
def test_a_step_around_the_pieces(step: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """The graph is compiled whole, as it was handed over: here by what changes nothing, to be told by its bits."""
    monkeypatch.setattr(*BEFORE[step], fault)
    given: list[Any] = []
    monkeypatch.setattr(backend, "compile_graph", lambda graph, *args: given.append(graph) or graph.forward)
    model = made(Updated if step in PREPARING else Stack)
    other = copy.deepcopy(model)
    call = torch.compile(model, backend="laconic")
    with caplog.at_level(logging.WARNING, "laconic"):
        agree(outcome(call, model, [drawn()]), outcome(other, other, [drawn()]), 0.0)
    done = stats()
    assert done["fallbacks"] == {"FaultError: planted": 1}
    assert (done["graphs"], done["rolled"], done["pieces"], done["steps"], done["compiled"]) == (1, 0, 0, 0, 0)
    assert len(given) == (4 if step == "driver" else 1), "three pieces, and the whole graph"
    assert "planted" in caplog.text
    assert "in fault" in caplog.text, "the traceback is logged"
    torch._dynamo.reset()
    with pytest.raises(Failed, match="FaultError: planted"):
        compiled(model)(drawn())


def fails_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let what compiles graphs fail at its n-th."""
    real, calls = backend.compile_graph, []

    def compile_graph(*args: Any) -> Any:
        calls.append(args)
        return fault() if len(calls) == number else real(*args)

    monkeypatch.setattr(backend, "compile_graph", compile_graph)


#: Place -> whether the graph is still rolled, and how the fault is planted before the forward, or before the backward.
DURING: dict[str, tuple[bool, bool, Callable[[pytest.MonkeyPatch], None]]] = {
    "second piece": (False, False, lambda patch: fails_at(patch, 2)),
    "passes": (True, False, lambda patch: patch.setattr(Cse, "plan", fault)),
    "passes of a backward": (True, True, lambda patch: patch.setattr(Cse, "plan", fault)),
    "unit": (True, False, lambda patch: patch.setattr(inductor, "write_unit", fault)),
    "unit that does not compile": (True, False, lambda patch: patch.setattr(inductor, "write_unit", lambda *a: "!")),
    "unit of a backward": (True, True, lambda patch: patch.setattr(inductor, "write_unit", fault)),
}


@pytest.mark.parametrize(
    "place", [pytest.param(name, marks=[] if name == "unit of a backward" else pytest.mark.slow) for name in DURING]
)
def test_a_step_while_pieces_are_compiled(
    place: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """By Inductor itself: the whole graph, a piece without passes, or kernels in files of their own."""
    still_rolled, late, plant = DURING[place]
    model = made(Stack)
    other = copy.deepcopy(model)
    call = torch.compile(model, backend="laconic")
    with caplog.at_level(logging.WARNING, "laconic"):
        if not late:
            plant(monkeypatch)
        result = call(drawn())
        if late:
            assert stats()["fallbacks"] == {}
            plant(monkeypatch)
        result.backward(drawn(*result.shape, seed=9))
    wanted = other(drawn())
    wanted.backward(drawn(*result.shape, seed=9))
    same(result, wanted, 1e-5)
    for (name, mine), eager in zip(model.named_parameters(), other.parameters(), strict=True):
        same(mine.grad, eager.grad, 1e-5, name)
    assert sum(stats()["fallbacks"].values()) == 1
    assert stats()["rolled"] == still_rolled
    assert "a step of laconic failed" in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("place", DURING)
def test_strict_tells(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    _, late, plant = DURING[place]
    call = compiled(made(Stack))
    if late:
        result = call(drawn())
        plant(monkeypatch)
        with pytest.raises(RuntimeError, match="planted"):
            result.sum().backward()
        return
    plant(monkeypatch)
    with pytest.raises(Failed, match=r"planted|CppCompileError|C\+\+ compile error"):
        call(drawn())


def test_what_does_not_compile_at_all_is_the_users_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "compile_graph", fault)
    with pytest.raises(Failed, match="FaultError: planted"):
        torch.compile(made(Stack), backend="laconic")(drawn())
    assert stats()["fallbacks"] == {"FaultError: planted": 1}


# Errors of the model's own


class UsersError(Exception):
    pass


@torch.library.custom_op("laconic_test::picky", mutates_args=())
def picky(x: torch.Tensor, complaint: str) -> torch.Tensor:
    if x.max() > 90:
        raise UsersError(complaint)
    return x * 1.0


@picky.register_fake
def _picky(x: torch.Tensor, complaint: str) -> torch.Tensor:
    return torch.empty_like(x)


def _backward(context: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
    return picky(gradient, "too steep for me"), None


picky.register_autograd(_backward)


class Picky(Block):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.branch(picky(x, "too large for me")) * 0.1


def test_what_an_op_raises_is_the_users() -> None:
    model = made(lambda: Stack(Picky))
    call = compiled(model)
    for _ in range(2):
        same(call(drawn()), model(drawn()), 1e-5)
        with pytest.raises(UsersError, match="too large for me") as raised:
            call(drawn() * 1000)
        assert any(f.name == "picky" for f in traceback.extract_tb(raised.tb)), "where it was raised"
        assert any("call(drawn() * 1000)" in (f.line or "") for f in traceback.extract_tb(raised.tb)), "from where"
        with pytest.raises(UsersError, match="too steep for me"):
            (call(drawn()) * 1e9).sum().backward()
    rolled(4)


class Embedded(Stack):
    """Every block looks something up."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(10, WIDTH) for _ in range(5))

    def forward(self, index: torch.Tensor) -> Any:
        x = torch.ones(index.shape[0], WIDTH)
        for block, table in zip(self.blocks, self.tables, strict=True):
            x = block(x + table(index))
        return self.head(x)


@pytest.mark.slow
def test_an_index_out_of_range() -> None:
    """The error that Inductor's kernels raise."""
    model = made(Embedded)
    errors = []
    for backend_name in ("laconic", "inductor"):
        torch._dynamo.reset()
        call = torch.compile(model, backend=backend_name)
        same(call(torch.tensor([1, 2, 9])), model(torch.tensor([1, 2, 9])), 1e-5)
        with pytest.raises(Exception) as raised:  # noqa: PT011
            call(torch.tensor([1, 2, 10]))
        errors.append((type(raised.value), str(raised.value).split(", ")[-1]))  # apart from the kernel's name
        same(call(torch.tensor([1, 2, 3])), model(torch.tensor([1, 2, 3])), 1e-5)
    assert errors[0] == errors[1]
    assert "out of bounds" in errors[0][1]
    rolled(4)


# Without a compiler, and what is logged

_NO_COMPILER = """
import sys, warnings
import torch
from compiled import Stack, compiled, drawn, made
from laconic.codegen import stats
from laconic.ir.errors import MissingDependencyError

class Broken(Stack):
    def forward(self, x):
        x = super().forward(x)
        torch._dynamo.graph_break()
        return x.relu() + x.tanh()

model = made(Broken)
with warnings.catch_warnings(record=True) as seen:
    warnings.simplefilter("always")
    call = torch.compile(model, backend="laconic")
    for size in (3, 5):
        assert torch.equal(call(drawn(size, 12)), model(drawn(size, 12)))
told = [str(w.message) for w in seen if "C++ compiler" in str(w.message)]
assert len(told) == 1, told
done = stats()
assert done["graphs"] >= 2 and done["rolled"] == 0, done
assert done["fallbacks"] == {"there is no C++ compiler": done["graphs"]}, done
torch._dynamo.reset()
try:
    compiled(model)(drawn())
except torch._dynamo.exc.BackendCompilerFailed as problem:
    assert isinstance(problem.inner_exception, MissingDependencyError), problem
    assert "install g++" in str(problem)
else:
    raise AssertionError("strict")
"""


def test_without_a_compiler(tmp_path: Path) -> None:
    said(python("-c", _NO_COMPILER, CXX="/nowhere/g++", PATH="/nowhere", TORCHINDUCTOR_CACHE_DIR=str(tmp_path)))


_LOGGED = """
import logging, sys
import torch
from compiled import Stack, drawn, made
if "own" in sys.argv:
    logging.basicConfig(format="mine: %(message)s")
torch.compile(made(Stack), backend="laconic")(drawn())
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "own", "wanted", "unwanted"),
    [
        ("codegen", "", "laconic.codegen.backend.backend: 26 calls in", "mine:"),
        ("+all", "own", "mine: 26 calls in", "laconic.codegen"),
        ("", "", "", "calls in"),
        ("-codegen", "", "", "calls in"),
        ("codgen", "", "LACONIC_LOGS names 'codgen'", "calls in"),
    ],
)
def test_laconic_logs(spec: str, own: str, wanted: str, unwanted: str) -> None:
    """As the variable says, without the command line."""
    text = said(python("-c", _LOGGED, own, LACONIC_LOGS=spec), code=1 if spec == "codgen" else 0)
    assert wanted in text
    assert unwanted not in text
