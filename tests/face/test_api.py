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
from laconic.ir.errors import UsageError
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


def test_a_recurrent_model_keeps_its_batch_and_fixes_its_sequence(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MambaConfig(
        vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=1, expand=2, time_step_rank=2
    )
    transformers.MambaModel(config).save_pretrained(tmp_path)
    program = laconic.capture(str(tmp_path))
    assert any(line.startswith("input_ids axis 1 =") for line in program.facts["specialized"])
    assert [s.name for s in program.symbols.values()] == ["batch"]
