"""Capture: what the Program says of a module, what stays untouched, and what is refused with the user's line."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim
from torch.nn import functional as F

from helpers import bits, ops
from laconic.ir.capture import capture_module
from laconic.ir.errors import FixedAxisError, ModelError, UnsupportedError
from laconic.ir.inputs import cases
from laconic.ir.program import Alias, Kind, Role
from laconic.ir.run import Runnable


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("factor", torch.ones(4), persistent=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(ids) * self.factor)  # type: ignore[no-any-return]


def test_tied_weights_are_one_row_and_an_alias() -> None:
    program = capture_module(Tied(), (torch.tensor([[1, 2]]),), {})
    assert list(program.weights) == ["embed.weight", "factor"]
    assert program.aliases == {"head.weight": Alias("embed.weight")}
    assert program.weight_bytes() == 7 * 4 * 4 + 4 * 4
    assert program.weights["embed.weight"].trainable
    assert program.weights["embed.weight"].kind is Kind.PARAMETER
    assert not program.weights["factor"].persistent


def test_weights_are_shared_with_the_module_and_states_are_not() -> None:
    module = Counter()
    program = capture_module(module, (torch.ones(2, 3),), {})
    assert program.weights["scale"].value.data_ptr() == module.scale.data_ptr()
    assert program.weights["total"].value.data_ptr() != module.total.data_ptr()


class Counter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))
        self.register_buffer("total", torch.zeros(3))
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.total: torch.Tensor
        self.calls: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.total.add_((x * self.scale).sum(0))
        self.calls += 1
        return self.total / self.calls


def test_a_mutated_buffer_is_a_state_and_its_update_an_output() -> None:
    module = Counter()
    before = bits(dict(module.named_buffers()))
    program = capture_module(module, (torch.ones(2, 3),), {}, {"x": {0: Dim("batch")}})
    assert bits(dict(module.named_buffers())) == before
    kinds = {name: w.kind for name, w in program.weights.items()}
    assert kinds == {"scale": Kind.PARAMETER, "total": Kind.STATE, "calls": Kind.STATE}
    assert program.forward.updated() == {"total", "calls"}
    model = Runnable(program)
    for size in (1, 2, 4):
        x = torch.randn(size, 3)
        with torch.no_grad():
            assert bits(model(x)) == bits(module(x))
    assert bits(dict(model.named_buffers())) == bits(dict(module.named_buffers()))


class Writes(nn.Module):
    def forward(self, cache: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        cache[:, 1:2].copy_(x)
        return cache.sum(1)


def test_a_mutated_input_is_an_update_too() -> None:
    cache = torch.zeros(2, 4)
    program = capture_module(Writes(), (cache, torch.ones(2, 1)), {})
    assert [(o.role, o.name) for o in program.forward.outputs] == [
        (Role.INPUT_UPDATE, "cache"),
        (Role.RESULT, "output"),
    ]
    mine = torch.zeros(2, 4)
    Runnable(program)(mine, torch.ones(2, 1) * 5)
    assert mine[:, 1].tolist() == [5.0, 5.0]


def test_the_examples_are_left_as_they_were() -> None:
    cache = torch.zeros(2, 4)
    capture_module(Writes(), (cache, torch.ones(2, 1)), {})
    assert not cache.any()


class Fixed(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.reshape(3, -1) + y


def test_an_axis_that_the_model_fixes_is_a_fact(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, logger="laconic"):
        program = capture_module(
            Fixed(), (torch.ones(3, 4), torch.ones(3, 4)), {}, {name: {0: Dim.AUTO, 1: Dim.AUTO} for name in "xy"}
        )
    assert "y axis 0 = 3" in program.facts["specialized"]
    assert "y axis 0 = 3" in caplog.text


def test_an_axis_that_stays_free_keeps_the_users_name_and_range() -> None:
    program = capture_module(Counter(), (torch.ones(2, 3),), {}, {"x": {0: Dim("rows", max=8)}})
    (size,) = program.symbols.values()
    assert (size.name, size.low, size.high, size.hint) == ("rows", 1, 8, 2)
    assert "specialized" not in program.facts


class Dropping(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.drop(self.norm(x))  # type: ignore[no-any-return]


def test_capture_is_in_eval_mode_and_each_submodules_mode_is_restored() -> None:
    module = Dropping().train()
    module.norm.eval()
    program = capture_module(module, (torch.randn(4, 3),), {})
    assert (module.training, module.norm.training, module.drop.training) == (True, False, True)
    assert "dropout" not in str(ops(program))
    assert not program.forward.updated()


def test_the_mode_is_restored_when_capture_fails() -> None:
    class Fails(Dropping):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x if x.sum() > 0 else -x

    module = Fails().train()
    with pytest.raises(UnsupportedError):
        capture_module(module, (torch.randn(4, 3),), {})
    assert module.training
    assert module.norm.training


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_named_and_counted(bad: float) -> None:
    module = Tied()
    with torch.no_grad():
        module.embed.weight[2, 1:3] = bad
    with pytest.raises(ModelError, match=r"embed.weight: 2 of 28 values"):
        capture_module(module, (torch.tensor([[1, 2]]),), {})


def test_infinite_buffers_are_allowed_since_masks_hold_them() -> None:
    module = Tied()
    module.factor[1] = float("-inf")
    capture_module(module, (torch.tensor([[1, 2]]),), {})


class Branches(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.sum() > 0:  # the line that is named
            return x
        return -x


class Nonzero(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x[x > 0]  # the line that is named


@pytest.mark.parametrize("module", [Branches(), Nonzero()], ids=["branch", "size"])
def test_control_flow_that_depends_on_values_is_refused_at_the_users_line(module: nn.Module) -> None:
    with pytest.raises(UnsupportedError) as caught:
        capture_module(module, (torch.randn(2, 3),), {})
    name, _, rest = caught.value.where.partition(":")
    with open(__file__) as file:
        text = file.read().splitlines()[int(rest.split(":")[0]) - 1]
    assert name.endswith("test_capture.py")
    assert "the line that is named" in text
    assert caught.value.hint


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        whole = torch.zeros(6)
        self.register_buffer("whole", whole)
        self.register_buffer("part", whole[:3])
        self.whole: torch.Tensor
        self.part: torch.Tensor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.part.add_(x)
        return self.whole.sum() + x


def test_a_state_that_shares_memory_with_another_buffer_is_refused_by_name() -> None:
    with pytest.raises(UnsupportedError) as caught:
        capture_module(Shared(), (torch.ones(3),), {})
    assert "'part'" in str(caught.value) or "whole and part" in str(caught.value)


class Draws(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        torch.rand_like(x)
        return F.dropout(x, 0.5, training=True)


def test_dead_random_draws_are_kept_since_later_ones_depend_on_them() -> None:
    program = capture_module(Draws(), (torch.ones(4, 4),), {})
    assert "aten.rand_like.default" in ops(program)
    assert program.facts["capture"]["bit_identical_cases"] >= 2


class Strided(nn.Module):
    """matmul asks whether its matrix requires gradients, even under no_grad."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(6, 6))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(x.transpose(0, 1), self.weight)


@pytest.mark.parametrize("trained", [True, False])
def test_products_take_the_path_that_they_take_in_the_module(trained: bool) -> None:
    module = Strided().requires_grad_(trained)
    x = torch.randn(5, 4, 6)
    program = capture_module(module, (x,), {})
    with torch.no_grad():
        assert bits(Runnable(program)(x)) == bits(module(x))


class Nested(nn.Module):
    def forward(self, x: torch.Tensor, extra: dict[str, Any], flag: bool = True, scale: float = 2.0) -> dict[str, Any]:
        y = x * scale if flag else x
        return {"twice": (y, y), "list": [extra["a"], None, 3], "same": x}


def test_trees_constants_and_what_is_returned_twice_survive() -> None:
    module = Nested()
    x, a = torch.randn(2), torch.randn(3)
    program = capture_module(module, (x, {"a": a}), {"scale": 3.0})
    found = Runnable(program)(x, {"a": a}, scale=3.0)
    assert bits(found) == bits(module(x, {"a": a}, scale=3.0))
    assert found["twice"][0] is found["twice"][1]
    assert found["same"] is x
    assert found["list"][0] is a


class Remembers(nn.Module):
    """Keeps Python state of every kind, and a tensor that is no buffer."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.inner = nn.Identity()
        self.writes = writes
        self.calls = 0
        self.last: torch.Tensor | None = None
        self.history: list[int] = []
        self.t = torch.zeros(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        self.inner.seen = x  # type: ignore[assignment]
        self.last = x * 2
        self.history.append(1)
        if self.writes:
            self.t.add_(1)
        return x + self.t


@pytest.mark.parametrize("writes", [False, True])
def test_python_state_is_put_back_also_when_capture_fails(writes: bool) -> None:
    module = Remembers(writes)
    try:
        capture_module(module, (torch.ones(2, 4),), {})
    except UnsupportedError:
        assert writes
    assert (module.calls, module.last, module.history, hasattr(module.inner, "seen")) == (0, None, [], False)
    assert not module.t.any()
    assert module.training


def test_no_generator_is_seeded_for_good(monkeypatch: pytest.MonkeyPatch) -> None:
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    before = torch.get_rng_state()
    program = capture_module(Draws(), (torch.ones(4, 4),), {}, check=False)
    monkeypatch.undo()
    assert torch.equal(torch.get_rng_state(), before)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: pytest.fail("seeds every device"))
    capture_module(Draws(), (torch.ones(4, 4),), {})
    assert torch.equal(torch.get_rng_state(), before)
    assert not seeded
    assert program.facts["model"] == "Draws"


class PositionalOnly(nn.Module):
    def forward(self, x: torch.Tensor, /) -> torch.Tensor:
        return x * 2


class Variadic(nn.Module):
    def forward(self, *args: torch.Tensor, scale: float = 2.0, **more: torch.Tensor) -> torch.Tensor:
        return args[0] * scale + more["w"]


class Both(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x * 2 + y


def hooked() -> nn.Module:
    module = Both()
    module.register_forward_pre_hook(lambda _, given: (given[0] + 1, given[1]))
    module.register_forward_hook(lambda _, given, result: result + given[0])
    return module


X = torch.arange(12.0).reshape(3, 4)


@pytest.mark.parametrize(
    ("module", "args", "kwargs"),
    [
        (PositionalOnly(), (X,), {}),
        (hooked(), (X, X + 1), {}),
        (Variadic(), (X,), {"w": X}),
        (Variadic(), (X,), {"w": X, "scale": 3.0}),
        (Both(), (X, X), {}),
        (Both(), (X,), {"y": X}),
    ],
)
def test_the_module_is_called_as_the_user_called_it(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    program = capture_module(module, args, kwargs)
    assert program.facts["capture"]["bit_identical_cases"] == 5
    assert bits(Runnable(program)(*args, **kwargs)) == bits(module(*args, **kwargs))


def test_the_same_tensor_twice_is_two_inputs_with_axes_of_their_own() -> None:
    program = capture_module(Both(), (X, X), {}, {"x": {0: (b := Dim("b"))}, "y": {0: b}})
    assert [i.name for i in program.forward.inputs] == ["x", "y"]
    y = torch.randn(5, 4)
    assert bits(Runnable(program)(torch.ones(5, 4), y)) == bits(Both()(torch.ones(5, 4), y))


@pytest.mark.parametrize("kind", ["attention", "layer", "stack"])
def test_attention_of_torch_is_captured_without_its_fast_path(kind: str) -> None:
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    modules = {"attention": nn.MultiheadAttention(8, 2, batch_first=True), "layer": layer}
    module = modules.get(kind) or nn.TransformerEncoder(layer, 2)
    x = torch.randn(2, 5, 8)
    program = capture_module(module.eval(), (x, x, x) if kind == "attention" else (x,), {})
    assert program.facts["fastpath"] == "off"
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.parametrize("dim", [Dim("b"), Dim.DYNAMIC])
def test_an_example_of_size_one_on_a_dynamic_axis_is_said_to_be_the_problem(dim: Any) -> None:
    with pytest.raises(FixedAxisError, match="size of 0 or 1"):
        capture_module(PositionalOnly(), (X[:1],), {}, {"x": {0: dim}})


def test_what_torch_suggests_is_shown() -> None:
    with pytest.raises(FixedAxisError) as caught:
        capture_module(Both(), (X, X + 1), {}, {"x": {0: Dim("b")}, "y": {0: Dim("c")}})
    assert "Suggested fixes:\nc = b" in caught.value.why
    assert len(caught.value.why.splitlines()) <= 6


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ({0: Dim("b", min=2, max=6)}, [("b", 2)]),
        ({0: Dim("b", max=6)}, [("b", 1)]),
        ({0: Dim.AUTO(min=2)}, [("s0", 2)]),
        ({0: Dim.AUTO, 1: Dim("s0")}, [("s1", 1), ("s0", 1)]),
        ({0: Dim("s1"), 1: Dim.AUTO}, [("s1", 1), ("s2", 1)]),
    ],
)
def test_names_are_the_users_or_unused_and_a_least_size_that_was_asked_for_stays(
    axes: dict[int, Any], expected: list[tuple[str, int]]
) -> None:
    program = capture_module(PositionalOnly(), (X,), {}, {"x": axes})
    assert [(s.name, s.low) for s in program.symbols.values()] == expected


class Casts(nn.Module):
    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight.to(torch.complex64)


def test_float8_weights_are_captured_and_nan_is_found_in_every_dtype() -> None:
    assert capture_module(Casts(torch.ones(4).to(torch.float8_e4m3fn)), (X,), {}).weights
    bad = torch.tensor([1.0, float("nan")])
    for weight in (bad.to(torch.float8_e4m3fn), torch.complex(torch.ones(2), bad)):
        with pytest.raises(ModelError, match="weight: 1 of 2 values"):
            capture_module(Casts(weight), (X[:, :2],), {})


def test_a_sparse_buffer_is_refused_by_name() -> None:
    module = nn.Identity()
    module.register_buffer("mask", torch.eye(3).to_sparse())
    with pytest.raises(UnsupportedError, match="'mask' has the layout"):
        capture_module(module, (X,), {})


@pytest.mark.parametrize(
    "example",
    [
        torch.tensor([3, 70], dtype=torch.uint16),
        torch.tensor([0, 2**63 - 1, -(2**63)]),
        torch.tensor([5, 2**63 - 1]),
        torch.tensor([-1, 0]).view(torch.uint64),
        torch.tensor([-1, -7]).view(torch.uint64),
    ],
    ids=["u16", "all i64", "i64", "all u64", "u64"],
)
def test_whole_numbers_of_any_size_are_drawn_within_their_range(example: torch.Tensor) -> None:
    class Views(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.view_as(x)

    program = capture_module(Views(), (example,), {})
    (declared,) = program.forward.inputs
    assert (declared.low, declared.high) == (min(example.tolist()), max(example.tolist()))
    for case in cases(program, program.forward):
        assert all(declared.low <= value <= declared.high for value in case.inputs[0].tolist())


def test_floating_inputs_are_also_drawn_beyond_the_range_of_the_example() -> None:
    program = capture_module(nn.ReLU(), (torch.rand(40, 40),), {})
    *rest, wide = cases(program, program.forward)
    (x,) = wide.inputs
    assert wide.wide
    assert not any(case.wide or bool((case.inputs[0] < 0).any()) for case in rest)
    assert -2 <= x.min() < -1.5
    assert 1.5 < x.max() <= 2
    zeros = x[x == 0]
    assert zeros.signbit().any()
    assert not zeros.signbit().all()
    huge = capture_module(nn.ReLU(), (torch.tensor([3e38, -3e38]),), {})
    assert all(bool(case.inputs[0].isfinite().all()) for case in cases(huge, huge.forward))
