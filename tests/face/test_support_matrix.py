"""The support matrix: six of its rows, the others slow; what makes a hole; the page."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import pytest
import torch

from laconic.codegen import reset_stats
from laconic.codegen.backend.stats import new_record

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

import matrix_checks  # noqa: E402
import support_matrix  # noqa: E402
from matrix_checks import Hole, Subject  # noqa: E402
from matrix_models import ROWS, ZOO  # noqa: E402

FAST = {"llama", "vit", "mixtral"}
EVERY = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in ROWS]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
    torch._dynamo.reset()
    reset_stats()


@pytest.fixture(scope="module", params=EVERY)
def subject(request: pytest.FixtureRequest) -> Subject:
    return Subject(request.param)


def no_holes(found: dict[str, Any]) -> None:
    assert list(support_matrix.holes(found)) == []


SLOW = [pytest.param(check, marks=pytest.mark.slow) for check in ("training", "exact", "onnx")]


@pytest.mark.parametrize("check", ["inference", *SLOW])
def test_results_gradients_and_how_little_is_compiled(subject: Subject, check: str) -> None:
    no_holes(matrix_checks.CHECKS[check](subject))


def test_the_cut_alone_has_eagers_bits_and_finds_the_layers_of_the_configuration(subject: Subject) -> None:
    found = matrix_checks.cut(subject)
    no_holes(found)
    assert found["repeats"]["found"] == found["repeats"]["expected"] >= 6


@pytest.fixture(scope="module")
def small() -> Subject:
    return Subject("vit")


@pytest.mark.parametrize(
    ("graphs", "reason"),
    [
        ([{"nodes": 100, "compiled": 30, "pieces": 3}], ""),
        ([{"nodes": 100, "compiled": 100}], "0 of them cut"),  # the whole graph
        ([{"nodes": 100, "compiled": 41, "pieces": 3}], "59% of the nodes"),
        ([{"nodes": 100, "compiled": 30, "pieces": 6}], "not fewer than 6 repeats"),
        ([{"nodes": 100, "compiled": 30, "pieces": 3, "fallback": "no"}], "fallbacks"),
        ([{"nodes": 100, "compiled": 30, "pieces": 3}] * 2, "2 graphs"),
    ],
)
def test_compiling_more_than_is_promised_is_a_hole(small: Subject, graphs: list[dict[str, Any]], reason: str) -> None:
    reset_stats()
    for graph in graphs:
        vars(new_record()).update(graph | {"repeats": [(25, 6, 3, 1)]})
    if not reason:
        assert matrix_checks.counted(small)["never"] == 0.7
        return
    with pytest.raises(Hole, match=reason):
        matrix_checks.counted(small)


@pytest.mark.parametrize(("wrong", "holds"), [(0.0, True), (1e-6, True), (1e-5, False), (float("nan"), False)])
def test_an_error_beyond_eagers_own_is_a_hole(wrong: float, holds: bool) -> None:
    """Eager is off by 2e-6, so 4e-6 is allowed."""
    exact = [torch.linspace(-1, 1, 9, dtype=torch.float64) * k for k in range(1, 400)]
    draws = iter([({"x": y}, {"results": (y + 2e-6).float()}, {"results": y}) for y in exact])

    def judged(given: dict[str, Any]) -> dict[str, torch.Tensor]:
        return {"results": (given["x"] + 1e-6 + wrong).float()}

    if holds:
        matrix_checks.hold(draws, judged)
    else:
        with pytest.raises(Hole, match="error"):
            matrix_checks.hold(draws, judged)


def test_a_result_that_tells_nothing_is_a_hole() -> None:
    one = {"results": torch.ones(3)}
    with pytest.raises(Hole, match="does not depend"):
        matrix_checks.hold(repeat(({}, one, one)), lambda given: one)
    none = {"results": torch.full((3,), torch.inf)}
    with pytest.raises(Hole, match="not finite"):
        matrix_checks.hold(repeat(({}, none, none)), lambda given: none)


def test_draws_in_which_eager_chose_otherwise_are_left_out_unless_most_are() -> None:
    near, far = {"y": torch.ones(2)}, {"y": torch.full((2,), 2.0)}
    found = matrix_checks.drawn(
        [{"far": k % 3 == 0} for k in range(9)], lambda a: far if a["far"] else near, lambda a: near
    )
    assert [arguments["far"] for arguments, _, _ in found] == [False] * 6
    with pytest.raises(Hole, match="far from float64"):
        list(matrix_checks.drawn([{}] * 9, lambda a: far, lambda a: near))


def test_float64_reaches_what_a_model_makes_in_float32(small: Subject) -> None:
    def run(given: torch.Tensor) -> torch.Tensor:
        return given.float() + torch.zeros(2, dtype=torch.float32) + given.to(torch.float32) + torch.ones(2)

    with matrix_checks.widened():
        assert run(torch.tensor([1e-12, 1.0], dtype=torch.float64)).tolist() == [1 + 2e-12, 3.0]
    assert run(torch.tensor([1e-12, 1.0])).dtype == torch.float32


def test_a_row_that_crashes_is_a_row_with_that_reason(tmp_path: Path) -> None:
    row = support_matrix.measure_apart("no such model", tmp_path)
    assert list(support_matrix.holes(row)) == [("row", "the process ended with 1")]
    assert "✗" in support_matrix.cells(row)


def test_the_committed_result_has_its_rows_and_its_page() -> None:
    data = json.loads(support_matrix.RESULT.read_text())
    assert list(data["models"]) == list(ROWS)
    assert len(ROWS.keys() - ZOO.keys()) == 30
    full = {name for name, row in data["models"].items() if support_matrix.full(row)}
    assert full >= ZOO.keys()
    assert len(full - ZOO.keys()) >= 27
    assert len(data["commit"]) == 40
    assert {"torch", "transformers", "cpu"} <= data["machine"].keys()
    assert support_matrix.page(data) == support_matrix.DOC.read_text()
    for row in data["models"].values():
        for _, reason in support_matrix.holes(row):
            assert reason in support_matrix.DOC.read_text()
