"""`bench`: what is timed is told rightly, and statistics are what they say."""

from __future__ import annotations

import json
import random
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from laconic import bench as module
from laconic.bench import bench, input_at
from laconic.cli.main import run
from laconic.ir.capture import capture_module
from laconic.ir.errors import UsageError
from laconic.ir.program import Program
from laconic.ir.source_model import Source
from laconic.latency import Interval, Spread, by_turns, ratios

ROOT = Path(__file__).parents[2]


class Counting(nn.Module):
    """Writes a state and its input, as a careless model does."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def forward(self, x: torch.Tensor, scale: float = 2.0) -> torch.Tensor:
        self.calls.add_(1)
        x.mul_(scale)
        return self.linear(x) + self.calls


@pytest.fixture(scope="module")
def source() -> Source:
    torch.manual_seed(0)
    dynamic = {"x": {0: torch.export.Dim("batch", max=64)}, "scale": None}
    return Source(Counting(), (torch.randn(3, 4), 2.0), {}, dynamic, name="counting")


@pytest.fixture(scope="module")
def program(source: Source) -> Program:
    return capture_module(source.module, source.args, source.kwargs, source.dynamic_shapes)


def test_the_interval_of_a_median_is_that_of_the_tables() -> None:
    """Ranks and confidences from tables of the sign test: Conover, Practical Nonparametric Statistics."""
    for count, rank, confidence in ((6, 1, 0.96875), (8, 1, 0.9921875), (9, 2, 0.9609375), (10, 2, 0.978515625)):
        found = Interval.of(random.Random(0).sample(range(1, count + 1), count))
        assert (found.low, found.high) == (rank, count + 1 - rank)
        assert found.confidence == pytest.approx(confidence, abs=1e-12)
        assert found.median == (count + 1) / 2
    assert Interval.of([3.0, 1.0]) == Interval(2.0, 1.0, 3.0, 0.5)
    assert Interval.of([7.0]) == Interval(7.0, 7.0, 7.0, 0.0)
    assert Interval.of(list(range(2000))).confidence >= 0.95
    with pytest.raises(ValueError, match="no values"):
        Interval.of([])


def test_the_interval_holds_the_true_median_as_often_as_it_says() -> None:
    generator = random.Random(1)
    held, confidence = 0, 0.0
    for _ in range(2000):
        found = Interval.of([generator.expovariate(1.0) for _ in range(15)])
        held += found.low <= 0.6931471805599453 <= found.high
        confidence = found.confidence
    assert held / 2000 == pytest.approx(confidence, abs=0.015)


def test_quartiles() -> None:
    assert Spread.of([4.0, 1.0, 3.0, 2.0, 5.0]) == Spread(3.0, 2.0, 4.0)
    assert Spread.of([1.0]) == Spread(1.0, 1.0, 1.0)


def test_turns_rotate_inputs_are_fresh_and_what_prepares_is_not_timed() -> None:
    order: list[str] = []

    def way(name: str, seconds: float) -> Any:
        def prepare(inputs: list[torch.Tensor]) -> Any:
            assert float(inputs[0]) == 0.0
            time.sleep(0.004)

            def call() -> None:
                assert not torch.is_grad_enabled()
                order.append(name)
                inputs[0].add_(1)
                time.sleep(seconds)

            return call

        return prepare

    times = by_turns({"a": way("a", 0.0), "b": way("b", 0.02)}, lambda: [torch.zeros(())], repeats=3, warmup=1)
    assert "".join(order) == "ab" + "ba" + "ab" + "ba"
    assert {name: len(found) for name, found in times.items()} == {"a": 3, "b": 3}
    assert min(times["a"]) < 0.004
    assert min(times["b"]) >= 0.02
    assert all(ratio < 1 for ratio in ratios(times, "a", "b"))


def test_bench_runs_the_ways_on_the_size_asked_for(source: Source, program: Program) -> None:
    found = bench(program, source, ["eager", "onnxruntime", "eager"], sizes={"batch": 7}, repeats=6, warmup=1)
    assert found["sizes"] == {"batch": 7}
    assert list(found["milliseconds"]) == ["laconic", "eager", "onnxruntime"]
    assert list(found["ratio"]) == ["eager", "onnxruntime"]
    for spread in found["milliseconds"].values():
        assert 0 < spread["low"] <= spread["median"] <= spread["high"]
    assert found["ratio"]["eager"]["confidence"] == pytest.approx(0.96875)
    assert found["machine"]["torch"] == torch.__version__


def test_a_slow_module_shows_in_the_ratio(source: Source, program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    def slowly(found: Source) -> Any:
        call = module_way(found)
        return lambda inputs: lambda: (time.sleep(0.02), call(inputs)())

    module_way = module.module_way
    monkeypatch.setattr(module, "module_way", slowly)
    found = bench(program, source, ["eager"], repeats=6)
    assert found["ratio"]["eager"]["high"] < 0.5
    assert found["milliseconds"]["eager"]["low"] >= 20


@pytest.mark.parametrize(
    ("against", "sizes", "says"),
    [
        (["egar"], {}, "did you mean 'eager'"),
        (["tensorrt"], {}, "nothing called 'tensorrt'"),
        ([], {"bach": 2}, "did you mean 'batch'"),
        ([], {"batch": 65}, "batch is in [1, 64]"),
        ([], {"batch": 0}, "batch is in [1, 64]"),
    ],
)
def test_unknown_ways_and_sizes(
    source: Source, program: Program, against: list[str], sizes: dict[str, int], says: str
) -> None:
    with pytest.raises(UsageError) as failure:
        bench(program, source, against, sizes=sizes)
    assert says in failure.value.render()


def test_without_a_module_there_is_no_eager(program: Program) -> None:
    with pytest.raises(UsageError, match="no original module"):
        bench(program, None, ["eager"])
    assert input_at(program, {}, 0).sizes == {"batch": 3}


@pytest.fixture
def threads_kept() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads_kept")
def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    line = ["bench", "examples.twice:model", "--repeats", "6", "--warmup", "0", "-q", "--threads", "1"]
    assert run([*line, "--size", "batch=5", "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert (data["sizes"], data["repeats"], data["warmup"], data["machine"]["threads"]) == ({"batch": 5}, 6, 0, 1)
    assert run([*line, "--against", " eager ,"]) == 0
    assert "eager" in capfd.readouterr().out
    for size in ("batch", "batch=", "batch=x", "=3", "batch=1,batch=2", "batch=-1"):
        assert run([*line, "--size", size]) == 2
        assert "--size does not take" in capfd.readouterr().err
    assert run(["optimize", "examples.twice:model", "-o", "out", "-q"]) == 0
    assert run(["bench", "out", "--against", "eager", "-q"]) == 2
    assert "no original module" in capfd.readouterr().err
