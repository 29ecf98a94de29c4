"""A saved Program compiled without Dynamo: right at every size, warm in a second process."""

from __future__ import annotations

import copy
import logging
import subprocess
import sys
import threading
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import laconic
from block_programs import FLAT, operands
from compiled import Stack, made
from helpers import bits, parse, tensors_in
from laconic.codegen import stats
from laconic.codegen.backend import programs
from laconic.codegen.backend.options import Options
from laconic.codegen.backend.programs import CompiledEntry
from laconic.ir.errors import LaconicError, MissingDependencyError, ModelError, UsageError, VerificationError

STRICT = {"strict": True}


class Counted(Stack):
    """Blocks, an input and a state that are written into, and a result that is read from the state before that."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(2))
        self.register_buffer("last", torch.zeros(2))

    def forward(self, x: torch.Tensor) -> Any:
        before = self.calls.clone()
        self.last.copy_(self.calls)
        self.calls.add_(1)
        y = super().forward(x)
        x.mul_(0.5)
        return {"y": y, "before": before, "calls": self.calls, "rows": x.shape[0]}


def save(model: nn.Module, inputs: tuple[Any, ...], axes: Any, folder: Path) -> Path:
    return laconic.optimize(model, inputs=inputs, dynamic_shapes=axes).save(folder)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    batch = {0: Dim("batch", max=64)}
    return save(made(Counted), (torch.randn(3, 12),), {"x": batch}, tmp_path_factory.mktemp("program") / "out")


def assert_close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    mine, other = tensors_in(found), tensors_in(wanted)
    assert len(mine) == len(other)
    for a, b in zip(mine, other, strict=True):
        assert (a.dtype, a.shape, a.stride()) == (b.dtype, b.shape, b.stride())
        assert (a.double() - b.double()).abs().max() <= tolerance * b.double().abs().max()


def test_it_computes_what_eager_does_at_every_size_and_writes_what_it_writes(saved: Path) -> None:
    eager, mine = laconic.load(saved), laconic.load(saved, compile=True, options=STRICT)
    for size in (3, 8, 64, 2):
        x = torch.randn(size, 12)
        given, other = x.clone(), x.clone()
        found, wanted = mine(given), eager(x=other)
        assert_close(found, wanted)
        assert bits(given) == bits(other) == bits(x * 0.5)
        assert (found["before"], found["rows"]) == (pytest.approx(wanted["before"]), size)
        assert found["calls"] is mine.calls
        assert bits(dict(mine.named_buffers())) == bits(dict(eager.named_buffers()))
    done = stats()
    assert (done["graphs"], done["rolled"], done["pieces"]) == (1, 1, done["each"][0]["pieces"])
    assert done["each"][0]["repeats"][0][1] == 5
    assert done["compiled"] < done["nodes"]
    assert str(mine.program) == str(eager.program)
    assert_close(mine(torch.ones(1, 12))["y"], eager(torch.ones(1, 12))["y"])  # a size of 1 is compiled by itself
    assert stats()["graphs"] == 2


def test_it_refuses_what_eager_refuses(saved: Path) -> None:
    eager, mine = laconic.load(saved), laconic.load(saved, compile=True, options=STRICT)
    x = torch.ones(3, 12)
    wrong: list[tuple[Any, ...]] = [(), (x[:, :11],), (x.expand(22, 3, 12).reshape(66, 12),), (x, 1), (x.double(),)]
    for args, kwargs in [*((args, {}) for args in wrong), ((), {"y": x})]:
        with pytest.raises(UsageError) as expected:
            eager(*args, **kwargs)
        with pytest.raises(UsageError) as found:
            mine(*args, **kwargs)
        assert str(found.value) == str(expected.value)


def test_weights_are_arguments(saved: Path) -> None:
    eager, mine = laconic.load(saved), laconic.load(saved, compile=True, options=STRICT)
    mine = laconic.load(saved, compile=True, options=STRICT)
    done = stats()["each"][1]
    assert done["cache_hits"]["fxgraph_cache_hit"] == done["pieces"]
    x = torch.randn(3, 12)
    before = mine(x.clone())["y"]
    changed = {name: value * 1.5 for name, value in eager.state_dict().items()}
    for model in (eager, mine):
        model.load_state_dict(changed)
        model.blocks.get_submodule("1").up.weight = nn.Parameter(changed["blocks.2.up.weight"].t().contiguous().t())
        model.head.bias.data.numpy()[:] = 7.0
    assert not torch.allclose(mine(x.clone())["y"], before)
    assert_close(mine(x.clone())["y"], eager(x.clone())["y"])
    for model in (eager, mine):
        up = model.blocks.get_submodule("3").up.weight
        up.data = up.data.flatten().view(12, 24).t()  # the same tensor at the same address, with other strides
    assert_close(mine(x.clone())["y"], eager(x.clone())["y"])
    mine.head.bias = nn.Parameter(torch.ones(5))
    with pytest.raises(UsageError, match=r"head\.bias.*f32\[4\], is f32\[5\]"):
        mine(x.clone())


@pytest.mark.slow
def test_a_second_process_compiles_nothing(saved: Path) -> None:
    """Both are of their own: torch's keys tell which module has imported it first, here one of the tests'."""
    script = (
        "import torch, laconic\n"
        f"model = laconic.load({str(saved)!r}, compile=True, options={STRICT})\n"
        "print(model(torch.ones(7, 12))['y'].sum().item())\n"
        "done = laconic.codegen.stats()['each'][0]\n"
        "names = [f'{cache}_cache_{outcome}' for cache in ('autograd', 'fxgraph') for outcome in ('hit', 'miss')]\n"
        "print(done['pieces'], *(done['cache_hits'][name] for name in names))\n"
    )
    for cold in (True, False):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
        total, counts = done.stdout.splitlines()
        pieces, *found = map(int, counts.split())
        assert found == ([0, pieces, 0, pieces] if cold else [pieces, 0, pieces, 0])
        assert float(total) == pytest.approx(laconic.load(saved)(torch.ones(7, 12))["y"].sum().item(), rel=1e-5)


class Noisy(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(4):
            x = torch.sin(x + torch.rand_like(x)) * torch.cos(x) + torch.randn(4)
        return x


def test_random_draws_are_drawn_anew(tmp_path: Path) -> None:
    """With Inductor's `fallback_random` they are eager's, bit for bit: call by call and repeat by repeat."""
    path = save(Noisy(), (torch.zeros(4),), None, tmp_path / "out")
    settings = {"strict": True, "inductor": {"fallback_random": True}}
    eager, mine = laconic.load(path), laconic.load(path, compile=True, options=settings)
    assert stats()["each"][0]["repeats"][0][1] == 4
    drawn = []
    for model in (eager, mine):
        torch.manual_seed(3)
        drawn.append([model(torch.zeros(4)) for _ in range(3)])
    assert_close(drawn[1], drawn[0])
    assert not torch.allclose(drawn[1][0], drawn[1][1])


def test_sizes_that_only_occur_in_others(tmp_path: Path) -> None:
    program = parse(FLAT)
    mine = CompiledEntry(program, "forward", Options(strict=True))
    symbol = next(iter(program.forward.input_nodes()[0].meta["val"].shape[0].node.expr.free_symbols))
    for size in (4, 6, 9):
        x = torch.randn(size, 8)
        function = mine.function({symbol: size})
        assert function is not None
        assert_close(
            list(function(*operands(program, {"x": x}))), laconic.ir.run.evaluate(program, program.forward, [x]).results
        )
    assert stats()["graphs"] == 1


def test_threads_share_a_model(saved: Path) -> None:
    mine, eager = laconic.load(saved, compile=True, options=STRICT), laconic.load(saved)
    wrong: list[Exception] = []

    def work(seed: int) -> None:
        own = copy.deepcopy(mine)
        try:
            for step in range(25):
                x = torch.randn(1 + (seed + step) % 4, 12)
                assert_close(own(x.clone())["y"], Stack.forward(reference, x))
        except Exception as problem:  # noqa: BLE001 - of another thread
            wrong.append(problem)

    reference = made(Counted)
    reference.requires_grad_(False)
    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong, wrong[0]
    assert stats()["graphs"] == 2
    assert_close(mine(torch.ones(2, 12))["y"], eager(torch.ones(2, 12))["y"])


def test_autocast_and_inference_mode_around_it_change_nothing(saved: Path) -> None:
    x = torch.randn(3, 12)
    wanted = laconic.load(saved)(x.clone())["y"]
    mine = laconic.load(saved, compile=True, options=STRICT)
    for number, size in enumerate((3, 1)):
        with torch.inference_mode(), torch.autocast("cpu", dtype=torch.bfloat16):
            assert_close(mine(x[:size].clone())["y"], wanted[:size])
        assert stats()["graphs"] == 1 + number
    with torch.autocast("cpu", dtype=torch.bfloat16):
        again = laconic.load(saved, compile=True, options=STRICT)
    assert_close(again(x.clone())["y"], wanted)


# When a step fails


def test_a_step_that_fails_is_counted_and_computed_in_eager(
    saved: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*args: Any) -> Any:
        raise RuntimeError("a fault of ours")

    x = torch.randn(3, 12)
    wanted = bits(laconic.load(saved)(x.clone()))
    for step in ("cut_program", "compile_pieces", "drive"):
        with monkeypatch.context() as patch:
            patch.setattr(programs, step, broken)
            with caplog.at_level(logging.WARNING, "laconic"):
                mine = laconic.load(saved, compile=True)
            assert "a fault of ours" in caplog.text
            assert stats()["each"][-1]["fallback"] == "RuntimeError: a fault of ours"
            assert bits(mine(x.clone())) == wanted
            mine(torch.randn(1, 12))
            with pytest.raises(RuntimeError, match="a fault of ours"):
                laconic.load(saved, compile=True, options=STRICT)
        caplog.clear()
    assert stats()["fallbacks"] == {"RuntimeError: a fault of ours": 3}


def test_a_program_that_is_refused_runs_in_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    text = FLAT.replace(
        "return (%t2", "%n: int(n) = aten.sym_size.int(%x, 0)\n%f: float(?) = torch.sym_float(%n)\nreturn (%f"
    )
    program = parse(text)
    symbol = next(iter(program.forward.input_nodes()[0].meta["val"].shape[0].node.expr.free_symbols))
    assert CompiledEntry(program, "forward", Options()).function({symbol: 4}) is None
    assert stats()["refused"] == {"a result is neither a tensor nor a whole number": 1}
    with pytest.raises(VerificationError, match="not compiled"):
        CompiledEntry(program, "forward", Options(strict=True))


def test_without_a_compiler_it_runs_in_eager_with_one_warning(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "has_compiler", lambda: False)
    x = torch.randn(3, 12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        mine = laconic.load(saved, compile=True)
        found = bits(mine(x.clone()))
        mine(torch.randn(1, 12))
    assert [str(w.message) for w in caught if "C++" in str(w.message)][1:] == []
    assert found == bits(laconic.load(saved)(x.clone()))
    with pytest.raises(MissingDependencyError):
        laconic.load(saved, compile=True, options=STRICT)


@pytest.mark.parametrize("options", [{"pipeline": "cse"}, {"stict": True}, {"inductor": 3}])
def test_options_that_there_are_not(saved: Path, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        laconic.load(saved, compile=True, options=options)
    with pytest.raises(UsageError, match="compile=True"):
        laconic.load(saved, options=options)


def test_a_damaged_dir_is_not_compiled(saved: Path, tmp_path: Path) -> None:
    import shutil

    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    text = (folder / "program.txt").read_text()
    (folder / "program.txt").write_text(text.replace("f32[4]", "f32[5]"))
    with pytest.raises(ModelError, match="not the file that was saved"):
        laconic.load(folder, compile=True)
    assert issubclass(ModelError, LaconicError)
