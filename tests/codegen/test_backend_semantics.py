"""What a graph may do under the backend beside computing: views, precision, scopes, sizes, modes, threads, processes,
hooks, and weights that change; against eager."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from compiled import (
    WIDTH,
    Block,
    Outcome,
    Stack,
    agree,
    check,
    compiled,
    drawn,
    made,
    outcome,
    python,
    rolled,
    said,
    same,
)
from laconic.codegen import stats


def slowly(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


class Hidden(Stack):
    """Returns what every block made, and views of the last."""

    def forward(self, x: torch.Tensor) -> Any:
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        return self.head(x), states, x[:, 2:5], x.T, x.unflatten(1, (3, 4)).transpose(0, 2)


class Turned(Block):
    """A stream that is carried the other way round."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x.T + self.branch(x.T)).T


class TurnedStack(Stack):
    def __init__(self) -> None:
        super().__init__(Turned)

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("grad", [True, slowly(False)])
def test_hidden_states_and_views_are_returned(grad: bool) -> None:
    check(made(Hidden), drawn(grad=grad), grad=grad)


@pytest.mark.parametrize("transposed", [True, slowly(False)])
def test_other_layouts(transposed: bool) -> None:
    x = drawn(3, WIDTH).T if transposed else drawn(WIDTH, 3)
    check(made(TurnedStack), x.requires_grad_())


# Precision


class Around(Stack):
    def forward(self, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for block in self.blocks:
                x = block(x)
        return self.head(x)


class Inside(Block):
    def branch(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = F.gelu(self.up(x))
        return self.down(x.to(self.down.weight.dtype))


class Half(Stack):
    """Open over the first blocks, closed in the midst of the model."""

    def forward(self, x: torch.Tensor) -> Any:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            for block in self.blocks[:4]:  # type: ignore[index]
                x = block(x)
        for block in self.blocks[4:]:  # type: ignore[index]
            x = block(x)
        return self.head(x)


def autocast(dtype: torch.dtype) -> Callable[[nn.Module], Callable[..., Any]]:
    def wrap(model: Any) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            with torch.autocast("cpu", dtype=dtype):
                return model(*args)

        return call

    return wrap


def plain(model: Any) -> Any:
    return model


LOW = {
    "outside": (Stack, autocast(torch.bfloat16), torch.bfloat16, None),
    "outside, fp16": (Stack, autocast(torch.float16), torch.float16, None),
    "around": (Around, plain, torch.bfloat16, None),
    "inside": (lambda: Stack(Inside), plain, torch.bfloat16, None),
    "half": (lambda: Half(count=8), plain, torch.bfloat16, None),
    "bf16": (Stack, plain, torch.bfloat16, torch.bfloat16),
    "fp16": (Stack, plain, torch.float16, torch.float16),
}


@pytest.mark.parametrize(
    "case", ["outside", "half", *(slowly(case) for case in sorted(LOW.keys() - {"outside", "half"}))]
)
def test_low_precision(case: str) -> None:
    """As near to the same in fp64 as eager is, by the `tolerance` contract."""
    build, wrap, dtype, cast = LOW[case]
    model = made(build)
    model = model.to(cast) if cast is not None else model
    x = drawn(grad=True).detach().to(cast or torch.float32).requires_grad_()
    eager, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    found = outcome(wrap(compiled(model)), model, [x])
    wanted = outcome(wrap(eager), eager, [x])
    truth = outcome(exact, exact, [x.detach().double().requires_grad_()])  # autocast leaves fp64 alone
    near(found, wanted, truth, torch.finfo(dtype).eps)
    rolled(3)


def near(found: Outcome, eager: Outcome, exact: Outcome, eps: float) -> None:
    mine, theirs = found.named(), eager.named()
    for name, truth in exact.named().items():
        a, b = mine[name], theirs[name]
        assert (a is None) == (b is None) == (truth is None), name
        if a is None or b is None or truth is None:
            continue
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride()), name
        errors = [(t.double() - truth).abs().max().item() for t in (a, b)]
        limit = max(2 * errors[1], 4 * eps * truth.abs().max().item())
        assert errors[0] <= limit, f"{name}: {errors[0]} against {errors[1]}"


# Graphs, sizes, modes


class Broken(Stack):
    """Two halves with a graph break between them."""

    def forward(self, x: torch.Tensor) -> Any:
        for block in self.blocks[:5]:  # type: ignore[index]
            x = block(x)
        torch._dynamo.graph_break()
        for block in self.blocks[5:]:  # type: ignore[index]
            x = block(x)
        return self.head(x)


def test_a_graph_break_in_the_midst() -> None:
    model = made(lambda: Broken(count=10))
    other = copy.deepcopy(model)
    agree(outcome(compiled(model), model, [drawn(grad=True)]), outcome(other, other, [drawn(grad=True)]))
    rolled(4, graphs=2)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("grad", "marked"), [(False, False), slowly(True, False), slowly(False, True), slowly(True, True)]
)
def test_as_many_graphs_as_inductor_over_sizes(grad: bool, marked: bool) -> None:
    model = made(Stack)
    other = copy.deepcopy(model)
    graphs = []

    def counted(graph: Any, examples: Any) -> Any:
        graphs.append(graph)
        return torch._dynamo.lookup_backend("inductor")(graph, examples)

    def over_sizes(call: Any) -> None:
        for size in (6, 3, 8, 5, 11):
            x = drawn(size, WIDTH, grad=grad)
            if marked:
                torch._dynamo.mark_dynamic(x, 0)
            with torch.set_grad_enabled(grad):
                result = call(x)
            wanted = other(x)
            same(result, wanted, 1e-5)
            if grad:
                mine, eager = (torch.autograd.grad(y.sum(), [x, *m.parameters()]) for y, m in
                               ((result, model), (wanted, other)))  # fmt: skip
                for a, b in zip(mine, eager, strict=True):
                    same(a, b, 1e-5)

    over_sizes(compiled(model))
    mine = stats()["graphs"]
    rolled(4, graphs=mine)
    torch._dynamo.reset()
    over_sizes(torch.compile(model, backend=counted))
    assert mine == len(graphs) == (1 if marked else 2)


def test_inference_mode() -> None:
    model = made(Stack)
    call = compiled(model)
    with torch.inference_mode():
        same(call(drawn()), model(drawn()), 1e-5)
    rolled(5)


class Lookup(Stack):
    """Enters inference mode by itself for part of its work."""

    def forward(self, x: torch.Tensor) -> Any:
        with torch.inference_mode():
            for block in self.blocks:
                x = block(x)
        return x


def test_inference_mode_in_the_model() -> None:
    """The result is an ordinary tensor, as under Inductor."""
    model = made(Lookup)
    same(compiled(model)(drawn()), model(drawn()), 1e-5)
    rolled(5)


def test_four_threads() -> None:
    model = made(Stack)
    call = compiled(model)
    inputs = [drawn(seed=k, grad=True) for k in range(20)]
    wanted = [torch.autograd.grad(model(x).square().sum(), x)[0] for x in inputs]
    problems: list[Any] = []

    def run(first: int) -> None:
        try:
            for k in range(first, first + 50):
                x = inputs[k % 20].detach().clone().requires_grad_()
                same(torch.autograd.grad(call(x).square().sum(), x)[0], wanted[k % 20], 1e-5)
        except BaseException as problem:  # noqa: BLE001  to be raised where pytest sees it
            problems.append(problem)

    threads = [threading.Thread(target=run, args=(k,)) for k in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems, problems
    assert stats()["graphs"] <= 4
    rolled(4, graphs=stats()["graphs"])


def test_a_forward_hook_on_one_block() -> None:
    model = made(lambda: Stack(count=9))
    model.blocks[4].register_forward_hook(lambda module, given, result: result * 1.5)  # type: ignore[union-attr]
    done = check(model, drawn(), repeats=3)
    assert len(done["each"][0]["repeats"]) >= 1
    assert done["steps"] > 9, "what the hook does stands apart"


# Several processes

_RANK = """
import copy, sys
import torch
from torch.distributed import destroy_process_group, init_process_group
from torch.nn.parallel import DistributedDataParallel

from compiled import Block, Stack, compiled, drawn, made, same
from laconic.codegen import stats

rank, count, store = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=count)
model = made(lambda: Stack(lambda: Block(256), 12, 256))  # a block is 1 MB, as is the first bucket
other = copy.deepcopy(model)
parallel = DistributedDataParallel(model, bucket_cap_mb=4)
call = compiled(parallel)
for step in range(3):
    model.zero_grad(), other.zero_grad()
    call(drawn(3, 256, seed=10 * step + rank)).square().mean().backward()
    for r in range(count):
        (other(drawn(3, 256, seed=10 * step + r)).square().mean() / count).backward()
    for (name, mine), eager in zip(model.named_parameters(), other.parameters(), strict=True):
        same(mine.grad, eager.grad, 1e-5, name)
done = stats()
assert done["graphs"] > 1 and not done["fallbacks"], done
assert done["rolled"] > 1, done
print("rolled", done["rolled"], "of", done["graphs"])
destroy_process_group()
"""


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_data_parallel_splits_the_graph(count: int, tmp_path: Path) -> None:
    script = tmp_path / "rank.py"
    script.write_text(_RANK)
    ranks = [python(str(script), str(k), str(count), str(tmp_path / "store")) for k in range(count)]
    assert all("rolled" in said(rank) for rank in ranks)


# Weights that change after compiling


class Square(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.second(torch.tanh(self.first(x)))


def load(model: Any) -> None:
    model.load_state_dict(made(lambda: Stack(Square), seed=5).state_dict())


def step(model: Any) -> None:
    torch.optim.Adam(model.parameters(), lr=0.05).step()


def data(model: Any) -> None:
    model.blocks[2].first.weight.data.copy_(drawn(WIDTH, WIDTH, seed=4))
    model.blocks[3].first.bias.data = drawn(WIDTH, seed=6)


def zero(model: Any) -> None:
    with torch.no_grad():
        model.blocks[1].second.weight.zero_()


def replaced(model: Any) -> None:
    model.blocks[2].second.weight = nn.Parameter(drawn(WIDTH, WIDTH, seed=7))


def tied_across(model: Any) -> None:
    model.blocks[3].first.weight = model.blocks[1].first.weight


def tied_inside(model: Any) -> None:
    model.blocks[2].second.weight = model.blocks[2].first.weight


def untied(model: Any) -> None:
    model.blocks[3].first.weight = nn.Parameter(drawn(WIDTH, WIDTH, seed=8))


@pytest.mark.parametrize("grad", [True, slowly(False)])
def test_weights_that_change(grad: bool) -> None:
    model = made(lambda: Stack(Square))
    other = copy.deepcopy(model)
    call = compiled(model)
    before: Outcome | None = None
    for number, change in enumerate([None, load, step, data, zero, replaced, tied_across, tied_inside, untied]):
        for each in (model, other) if change else ():
            change(each)
        found = outcome(call, model, [drawn()], grad=grad)
        agree(found, outcome(other, other, [drawn()], grad=grad))
        if before is not None and (grad or change is not step):
            assert not torch.equal(found.results[0], before.results[0]), "the change shows"
        before = found
        if number == 5:
            assert stats()["graphs"] == 1, "weights are arguments: a change of one compiles nothing"
    rolled(1, graphs=stats()["graphs"])
