"""The Python interface: what arguments it takes, and how it refuses others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch.export import Dim

import laconic
from laconic.evaluate import evaluate_programs
from laconic.ir.errors import UsageError, VerificationError
from laconic.ir.source_model import Source
from laconic.passes.cse import Cse
from laconic.sources import capture_source


class Small(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (x + 1) * (x + 1)


X = torch.rand(3, 8)


def names(pipeline: Any) -> list[str]:
    result = laconic.optimize(Small(), pipeline, inputs=(X,))
    return [p.name for p in result.report.rows]


def test_a_pipeline_is_a_text_or_a_list_of_passes_and_texts() -> None:
    assert names(["cse"]) == names("cse") == names([Cse()]) == ["cse"]
    assert names(["cse,dce", Cse()]) == ["cse", "dce", "cse"]


@pytest.mark.parametrize("pipeline", [["csee"], [Cse], [3], 3])
def test_what_is_no_pass_is_refused(pipeline: Any) -> None:
    with pytest.raises(laconic.LaconicError):
        laconic.optimize(Small(), pipeline, inputs=(X,))


@pytest.mark.parametrize(
    "inputs", [(torch.rand(3, 7),), (torch.rand(8),), (X.double(),), ("x",), {"y": X}, {"x": None}, X]
)
def test_inputs_that_do_not_fit_are_refused(inputs: Any) -> None:
    program = laconic.capture(Small(), X)
    with pytest.raises(UsageError):
        laconic.optimize(program, inputs=inputs)


class Reshapes(nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.reshape(3, -1, 8) + y


def test_an_axis_that_the_model_fixes_is_given_up_and_the_others_stay() -> None:
    batch, tokens = Dim("batch"), Dim("tokens")
    kwargs = {"x": torch.rand(3, 4, 8), "y": torch.rand(3, 4, 8)}
    axes = {0: batch, 1: tokens}
    program = capture_source(Source(Reshapes(), (), kwargs, {"x": axes, "y": axes}, "reshapes"))
    assert program.facts["specialized"] == ["x axis 0 = 3", "y axis 0 = 3"]
    assert [s.name for s in program.symbols.values()] == ["tokens"]


def drops_relu(program: Any) -> Any:
    changed = program.clone()
    graph: fx.Graph = changed.forward.graph
    for node in list(graph.nodes):
        if "relu" in str(node.target):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
    return changed


def test_a_pass_that_is_right_only_on_the_example_is_caught() -> None:
    from laconic.ir.inputs import cases
    from laconic.ir.outcomes import Outcomes

    program = laconic.capture(nn.ReLU(), X)
    changed = drops_relu(program)
    chosen = cases(program, program.forward)
    gaps = [
        not torch.equal(a.results[0], b.results[0])
        for (_, a), (_, b) in zip(Outcomes.of(program, chosen), Outcomes.of(changed, chosen), strict=True)
    ]
    assert gaps[-1]
    assert not any(gaps[:-1])


def captured(x: torch.Tensor, axes: Any = None) -> Any:
    return laconic.capture(Small(), x, dynamic_shapes={"x": axes} if axes else None)


@pytest.mark.parametrize(
    ("other", "says"),
    [
        (captured(X), "axis 0 is dynamic in the one, fixed at 3 in the other"),
        (captured(torch.rand(2, 3, 8)), "one has 2 axes, the other 3"),
        (captured(X.double(), {0: Dim("b")}), "dtypes"),
        (captured(torch.rand(3, 7), {0: Dim("b")}), "axis 1 is 8 in the one, fixed at 7"),
    ],
)
def test_models_of_other_axes_are_not_measured_against_each_other(other: Any, says: str) -> None:
    with pytest.raises(UsageError, match=says):
        evaluate_programs(captured(X, {0: Dim("b")}), other, ["max-abs"])


def test_only_sizes_that_both_take_are_measured() -> None:
    rows = evaluate_programs(captured(X, {0: Dim("b")}), captured(X, {0: Dim("b", min=3, max=4)}), ["max-abs"])["rows"]
    assert 1 < len(rows) < 5
    assert all(row["max-abs"] == 0 for row in rows)
    with pytest.raises(UsageError, match="'x' must be"):
        evaluate_programs(captured(X, {0: Dim("b")}), captured(torch.rand(7, 8), {0: Dim("b", min=6)}), ["max-abs"])


@pytest.mark.slow
def test_a_recurrent_model_keeps_its_batch_and_fixes_its_sequence(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1, expand=2, time_step_rank=2
    )
    transformers.MambaModel(config).save_pretrained(tmp_path)
    program = laconic.capture(str(tmp_path))
    assert any(line.startswith("input_ids axis 1 =") for line in program.facts["specialized"])
    assert [s.name for s in program.symbols.values()] == ["batch"]


class Returning(nn.Module):
    """Returns the state it writes, the input it writes, an equal value of its own, and a part of the state."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("total", torch.zeros(3))
        self.register_buffer("last", torch.zeros(3))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.total.add_(x)
        x.mul_(2)
        twice = x * 2
        self.last.copy_(twice)
        return {"total": self.total, "x": x, "twice": twice, "part": self.total[1:]}


def test_a_result_is_the_written_tensor_only_where_the_module_returns_that(tmp_path: Path) -> None:
    result = laconic.optimize(Returning(), inputs=(torch.ones(3),))
    assert "part" in result.program.facts["copies"][0]
    for model in (Returning(), result.model, laconic.load(result.save(tmp_path / "out"))):
        x = torch.ones(3)
        first = model(x)
        assert first["x"] is x
        assert first["total"] is model.get_buffer("total")
        first["twice"].add_(100)
        second = model(torch.ones(3))
        assert first["total"].tolist() == [2.0, 2.0, 2.0]
        assert second["twice"].tolist() == [4.0, 4.0, 4.0]
        assert model.get_buffer("last").tolist() == [4.0, 4.0, 4.0]


def test_models_made_of_one_program_have_states_of_their_own(tmp_path: Path) -> None:
    program = laconic.capture(Returning(), torch.ones(3))
    one, two = laconic.optimize(program), laconic.optimize(program, "cse")
    one.model(torch.ones(3))
    assert two.model(torch.ones(3))["total"].tolist() == [1.0, 1.0, 1.0]
    assert laconic.load(one.save(tmp_path / "out"))(torch.ones(3))["total"].tolist() == [1.0, 1.0, 1.0]


def test_saving_what_was_written_into_since_is_refused(tmp_path: Path) -> None:
    module = nn.Linear(3, 3)
    result = laconic.optimize(module, inputs=(torch.ones(1, 3),))
    with torch.no_grad():
        module.weight.mul_(2)
    with pytest.raises(VerificationError, match="'weight' was written into"):
        result.save(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_derived_sizes_are_checked() -> None:
    class Halves(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x[: y.shape[0]] + y

    half = Dim("half")
    shapes = {"x": {0: 2 * half}, "y": {0: half}}
    model = laconic.optimize(Halves(), inputs=(torch.ones(6), torch.ones(3)), dynamic_shapes=shapes).model
    assert model(torch.ones(10), torch.ones(5)).shape == (5,)
    for x, y in ((5, 4), (8, 3), (7, 4)):
        with pytest.raises(UsageError, match="must be"):
            model(torch.ones(x), torch.ones(y))


class Rebinding(nn.Module):
    """Writes a state without reading it, and rebinds another."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("last", torch.zeros(3))
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.last.copy_(x)
        self.calls = self.calls + 1
        return x * self.calls


def test_states_that_are_only_written_or_rebound_are_captured_and_exported(tmp_path: Path) -> None:
    module = Rebinding()
    result = laconic.optimize(module, inputs=(torch.ones(3),))
    assert module.calls == 0
    folder = result.save(tmp_path / "out", formats=("pt2", "onnx"))
    for model in (result.model, laconic.load(folder), torch.export.load(folder / "model.pt2").module()):
        assert [model(torch.ones(3)).tolist() for _ in range(2)] == [[1.0] * 3, [2.0] * 3]


def test_an_input_laid_out_otherwise_gives_right_values() -> None:
    class Strided(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.as_strided(x.contiguous(), (4, 3), (6, 2))

    model = laconic.optimize(Strided(), inputs=(torch.randn(4, 6),)).model
    x = torch.randn(6, 4).t()
    assert torch.equal(model(x), Strided()(x))

    class Writing(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.mul_(2)

    with pytest.raises(UsageError, match="strides"):
        laconic.optimize(Writing(), inputs=(torch.randn(4, 6),)).model(x)


class Cache:
    def __init__(self) -> None:
        self.table: torch.Tensor | None = None
        self.calls = 0


def test_objects_that_a_module_holds_are_left_as_they_were() -> None:
    class Lazy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cache = Cache()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.cache.calls += 1
            if self.cache.table is None:
                self.cache.table = torch.arange(6.0)
            return x + self.cache.table

    module = Lazy()
    result = laconic.optimize(module, inputs=(torch.ones(6),))
    assert module.cache.table is None
    assert module.cache.calls == 0
    assert torch.equal(result.model(torch.ones(6)), module(torch.ones(6)))


@pytest.mark.parametrize(
    "op",
    [
        lambda x: x.type_as(x),
        lambda x: x.sum_to_size(x.shape),
        lambda x: torch.broadcast_tensors(x, x)[1],
        lambda x: torch.atleast_2d(x, x)[1],
        lambda x: torch.unsafe_split(x, 4)[0],
        lambda x: torch.einsum("ij->ij", x),
    ],
)
def test_a_copy_of_a_view_that_no_schema_declares_stays_one(op: Any) -> None:
    class Copying(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return op(x).clone()

    x = torch.randn(4, 6)
    result = laconic.optimize(Copying(), inputs=(x,))
    assert result.model(x).data_ptr() != x.data_ptr()


def test_a_wrong_call_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="'y'"):
        laconic.optimize(nn.Linear(3, 3), inputs={"input": torch.ones(1, 3), "y": torch.ones(1)})
