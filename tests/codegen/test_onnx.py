"""Writing .onnx: names, axes, dtypes and values as in the Program, checked in ONNX Runtime before it is placed."""

import logging
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import nn
from torch.export import Dim

pytest.importorskip("onnxruntime")

import laconic
from laconic.codegen.onnx import runtime, write, write_onnx
from laconic.codegen.onnx.runtime import Session
from laconic.ir.capture import capture_module
from laconic.ir.errors import MissingDependencyError, UnsupportedError, UsageError, VerificationError
from laconic.ir.inputs import draw
from laconic.ir.program import Program
from laconic.ir.run import evaluate

BATCH = Dim("batch", max=100)
F32, F16, I64, BOOL = 1, 10, 7, 9

PLAIN = """
import sys
for name in ("laconic", "transformers", "torch"):
    sys.modules[name] = None
import numpy, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1])
numpy.save(sys.argv[3], session.run(["logits"], {"ids": numpy.load(sys.argv[2])})[0])
"""


class Tied(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.embed = nn.Embedding(40, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.norm = nn.LayerNorm(width)

    def forward(self, ids: torch.Tensor, scale: float = 1.0) -> dict[str, Any]:
        q, k, v = self.qkv(self.norm(self.embed(ids) * scale))[:, None].chunk(3, dim=-1)
        y = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]
        return {"logits": nn.functional.linear(y, self.embed.weight), "flag": None, "parts": (y, 3)}


class Function(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function
        self.register_buffer("w", torch.arange(4.0))

    def forward(self, x: torch.Tensor) -> Any:
        return self.function(self, x)


def tied() -> Program:
    torch.manual_seed(0)
    shapes = {"ids": {0: BATCH, 1: Dim("tokens")}, "scale": None}
    return capture_module(Tied(), (), {"ids": torch.randint(0, 40, (3, 5)), "scale": 2.0}, shapes)


def function(body: Any, x: torch.Tensor, dynamic: bool = True) -> Program:
    return capture_module(Function(body), (x,), {}, {"x": {0: BATCH}} if dynamic else None)


def boundary(path: Path) -> tuple[list[Any], list[Any]]:
    graph = onnx.load(path, load_external_data=False).graph

    def told(value: Any) -> tuple[str, int, list[Any]]:
        kind = value.type.tensor_type
        return value.name, kind.elem_type, [d.dim_param or d.dim_value for d in kind.shape.dim]

    return [told(v) for v in graph.input], [told(v) for v in graph.output]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Program, Any]:
    program = tied()
    return program, write_onnx(program, tmp_path_factory.mktemp("onnx") / "model.onnx")


def test_names_axes_and_dtypes_are_the_programs(exported: tuple[Program, Any]) -> None:
    inputs, outputs = boundary(exported[1].path)
    assert inputs == [("ids", I64, ["batch", "tokens"])]
    assert outputs == [("logits", F32, ["batch", "tokens", 40]), ("parts.0", F32, ["batch", "tokens", 8])]


def test_a_tied_weight_is_stored_once(exported: tuple[Program, Any]) -> None:
    program, report = exported
    graph = onnx.load(report.path).graph
    assert [list(i.dims) for i in graph.initializer].count([40, 8]) == 1
    assert [list(i.dims) for i in graph.initializer].count([8, 40]) == 0
    stored = sum(len(onnx.numpy_helper.to_array(i).tobytes()) for i in graph.initializer)
    assert program.weight_bytes() <= stored < program.weight_bytes() + 512


def test_the_report_tells_what_stands_there(exported: tuple[Program, Any]) -> None:
    _, report = exported
    model = onnx.load(report.path)
    assert report.opset == model.opset_import[0].version
    assert report.ir_version == model.ir_version
    assert report.nodes == len(model.graph.node)
    assert report.bytes == report.path.stat().st_size
    assert report.data_path is None
    assert len(report.checks) >= 3
    assert all(difference < 1e-5 for difference in report.checks)
    assert 0 < report.worst <= 1
    sources = {entry.value for node in model.graph.node for entry in node.metadata_props if entry.key == "source"}
    assert any("test_onnx.py" in source for source in sources)
    assert str(Path.cwd()).encode() not in report.path.read_bytes()


def test_a_plain_python_without_torch_runs_it(exported: tuple[Program, Any], tmp_path: Path) -> None:
    import numpy as np

    program, report = exported
    case = draw(program, program.forward, {"batch": 4, "tokens": 9}, seed=5)
    np.save(tmp_path / "in.npy", case.inputs[0].numpy())
    files = [str(report.path), str(tmp_path / "in.npy"), str(tmp_path / "out.npy")]
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", PLAIN, *files], check=True)
    wanted = evaluate(program, program.forward, case.inputs).results[0]
    torch.testing.assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")), wanted, rtol=0, atol=1e-5)


def test_nothing_is_printed_or_warned(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    program = function(lambda self, x: x + 1, torch.randn(3, 4))
    capfd.readouterr()
    level = logging.getLogger("torch.onnx").level
    with caplog.at_level(logging.WARNING):
        write_onnx(program, tmp_path / "m.onnx")
    assert capfd.readouterr() == ("", "")
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert logging.getLogger("torch.onnx").level == level


class Cache(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("keys", torch.ones(4, 2))

    def forward(self, x: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
        self.keys.index_copy_(0, at, x)
        x.mul_(2)
        return self.keys.sum(0) + x


def test_states_and_written_inputs_are_inputs_and_outputs(tmp_path: Path) -> None:
    program = capture_module(Cache(), (torch.randn(2, 2), torch.tensor([0, 2])), {})
    path = write_onnx(program, tmp_path / "m.onnx").path
    inputs, outputs = boundary(path)
    assert [name for name, *_ in inputs] == ["x", "at", "state.keys"]
    assert [name for name, *_ in outputs] == ["output", "state.keys.next", "x.next"]
    x, keys = torch.randn(2, 2), torch.zeros(4, 2)
    found = Session(path).run({"x": x, "at": torch.tensor([3, 1]), "state.keys": keys})
    assert torch.equal(found["state.keys.next"], keys.index_copy(0, torch.tensor([3, 1]), x))
    assert torch.equal(found["x.next"], x * 2)


def test_unused_inputs_stay(tmp_path: Path) -> None:
    class Unused(nn.Module):
        def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return x + 1

    program = capture_module(Unused(), (torch.randn(3), torch.randn(5)), {})
    inputs, _ = boundary(write_onnx(program, tmp_path / "m.onnx").path)
    assert inputs == [("x", F32, [3]), ("y", F32, [5])]


def test_no_inputs_at_all(tmp_path: Path) -> None:
    class Nothing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(3))

        def forward(self) -> torch.Tensor:
            return self.w * 2

    program = capture_module(Nothing(), (), {})
    assert boundary(write_onnx(program, tmp_path / "m.onnx").path) == ([], [("output", F32, [3])])


def test_results_that_are_inputs_weights_or_one_another(tmp_path: Path) -> None:
    def body(self: Any, x: torch.Tensor) -> dict[str, Any]:
        y = x * 2
        return {"a": y, "x": y, "same": x, "again": x, "w": self.w, "none": None, "k": 3}

    program = function(body, torch.randn(3, 4))
    inputs, outputs = boundary(write_onnx(program, tmp_path / "m.onnx").path)
    axes = ["batch", 4]
    assert inputs == [("x", F32, axes)]
    assert outputs == [
        ("a", F32, axes),
        ("x.out", F32, axes),
        ("same", F32, axes),
        ("again", F32, axes),
        ("w", F32, [4]),
    ]


@pytest.mark.parametrize(
    "body",
    [
        lambda self, x: (self.w, self.w * 1),
        lambda self, x: (self.w, self.w),
        lambda self, x: (self.w.view(2, 2).view(4), self.w),
        lambda self, x: (x, x * 1),
    ],
)
@pytest.mark.parametrize("exact", [False, True])
def test_every_result_has_a_node_of_its_own(tmp_path: Path, body: Any, exact: bool) -> None:
    program = function(body, torch.randn(4), dynamic=False)
    path = write_onnx(laconic.optimize(program, "exact").program if exact else program, tmp_path / "m.onnx").path
    graph = onnx.load(path).graph
    assert [o.name for o in graph.output] == ["0", "1"]
    assert {"0", "1"} <= {name for node in graph.node for name in node.output}


def test_a_weight_that_is_a_result_is_not_folded_into_a_second_copy(tmp_path: Path) -> None:
    class Doubled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(64))

        def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
            return self.w, self.w * 2

    graph = onnx.load(write_onnx(capture_module(Doubled(), (), {}), tmp_path / "m.onnx").path).graph
    assert [list(i.dims) for i in graph.initializer].count([64]) == 1


def test_numbers_about_sizes_are_scalars(tmp_path: Path) -> None:
    program = function(lambda self, x: (x.shape[0], x.shape[0] * 2 + 1, x * 1, x.shape[0] > 50), torch.randn(3, 4))
    path = write_onnx(program, tmp_path / "m.onnx").path
    assert [(kind, axes) for _, kind, axes in boundary(path)[1]] == [
        (I64, []),
        (I64, []),
        (F32, ["batch", 4]),
        (BOOL, []),
    ]
    found = Session(path).run({"x": torch.randn(60, 4)})
    assert [found[n].tolist() for n in ("0", "1", "3")] == [60, 121, True]


def test_a_result_that_a_pass_made_a_number(tmp_path: Path) -> None:
    program = function(lambda self, x: (x * 1, x.shape[0]), torch.randn(3, 4))
    first, _ = program.forward.output_values
    program.forward.output_node.args = ((first, 7),)
    path = write_onnx(program, tmp_path / "m.onnx").path
    assert Session(path).run({"x": torch.randn(2, 4)})["1"].item() == 7


def test_dtypes_are_kept(tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def forward(self, a: Any, b: Any, c: Any, d: Any, e: Any, f: Any) -> tuple[Any, ...]:
            return a + a, b * 2, c - 1, d + 3, e * e, f.flip(0), a > 1, c.float().mean(), b.argmax()

    dtypes = (torch.float64, torch.float16, torch.int32, torch.uint8, torch.int16, torch.bool)
    program = capture_module(Mixed(), tuple(torch.randint(0, 2, (3, 4)).to(dtype) for dtype in dtypes), {})
    inputs, outputs = boundary(write_onnx(program, tmp_path / "m.onnx").path)
    codes = [11, F16, 6, 2, 5, BOOL]
    assert [kind for _, kind, _ in inputs] == codes
    assert [kind for _, kind, _ in outputs] == [*codes, BOOL, F32, I64]


def test_bfloat16_travels_by_its_bits(tmp_path: Path) -> None:
    program = function(lambda self, x: (x.float() * 2, x.reshape(-1, 2)), torch.randn(3, 4).bfloat16())
    path = write_onnx(program, tmp_path / "m.onnx").path
    x = torch.randn(2, 4).bfloat16()
    found = Session(path).run({"x": x})
    assert torch.equal(found["0"], x.float() * 2)
    assert torch.equal(found["1"], x.reshape(-1, 2))


def test_what_onnx_runtime_lacks_is_named(tmp_path: Path) -> None:
    program = capture_module(nn.Sequential(nn.Linear(4, 4)).bfloat16(), (torch.randn(3, 4).bfloat16(),), {})
    with pytest.raises(UnsupportedError, match=r"NOT_IMPLEMENTED.*Gemm"):
        write_onnx(program, tmp_path / "m.onnx")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        (lambda self, x: x + torch.rand_like(x), ["random", "aten.rand_like", "test_onnx.py:"]),
        (lambda self, x: torch.fft.fft(x), ["complex", "aten.fft_fft", "test_onnx.py:"]),
        (lambda self, x: torch.special.i1e(x), ["special_i1e", "test_onnx.py:"]),
    ],
)
def test_what_onnx_cannot_say_is_refused_with_its_line(tmp_path: Path, body: Any, words: list[str]) -> None:
    with pytest.raises(UnsupportedError) as refused:
        write_onnx(function(body, torch.randn(3, 4), dynamic=False), tmp_path / "m.onnx")
    assert all(word in str(refused.value) for word in words)
    assert os.listdir(tmp_path) == []


def test_large_weights_stand_beside_and_stale_ones_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(write, "EXTERNAL_DATA_BYTES", 1000)
    path = tmp_path / "m.onnx"
    data = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        program = capture_module(nn.Linear(40, 40), (torch.randn(3, 40),), {}, ({0: BATCH},))
        report = write_onnx(program, path, force=bool(seed))
        assert report.data_path is not None
        data.append(report.data_path.name)
        assert sorted(os.listdir(tmp_path)) == sorted(["m.onnx", data[-1]])
        assert report.bytes == path.stat().st_size + report.data_path.stat().st_size
    assert data[0] != data[1]
    x = torch.randn(2, 40)
    wanted = evaluate(program, program.forward, [x]).results[0]
    torch.testing.assert_close(Session(path).run({"input": x})["output"], wanted)
    monkeypatch.setattr(write, "EXTERNAL_DATA_BYTES", 10**9)
    write_onnx(program, path, force=True)
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_a_wrong_model_is_not_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "m.onnx"
    path.write_text("old")
    real = write.to_onnx
    program = function(lambda self, x: x * self.w, torch.randn(3, 4))

    def wrong(given: Program, opset: int) -> Any:
        changed = given.clone()
        row = changed.weights["w"]
        changed.weights["w"] = type(row)(row.name, row.value * (1 + 1e-5), row.kind)
        return real(changed, opset)

    monkeypatch.setattr(write, "to_onnx", wrong)
    with pytest.raises(VerificationError, match="nothing was written"):
        write_onnx(program, path, force=True)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["m.onnx"]


def test_float64_that_onnx_rounds_is_refused(tmp_path: Path) -> None:
    program = capture_module(nn.LayerNorm(4, eps=1e-5).double(), (torch.randn(3, 4).double(),), {})
    with pytest.raises(VerificationError, match="epsilon in float32"):
        write_onnx(program, tmp_path / "m.onnx")


def test_opsets(tmp_path: Path) -> None:
    program = function(lambda self, x: torch.nn.functional.gelu(x), torch.randn(3, 4))
    for opset in (18, runtime.default_opset()):
        report = write_onnx(program, tmp_path / "m.onnx", opset=opset, force=True)
        assert report.opset == opset == onnx.load(report.path).opset_import[0].version
        assert runtime.takes(opset, report.ir_version)
    assert not runtime.takes(10_000, 13)
    with pytest.raises(UsageError, match="opset 3"):
        write_onnx(program, tmp_path / "n.onnx", opset=3)


def test_without_onnx_runtime_it_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = function(lambda self, x: x + 1, torch.randn(3, 4))
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(MissingDependencyError, match=r"laconic-compiler\[cpu\]") as missing:
        write_onnx(program, tmp_path / "m.onnx")
    assert missing.value.exit_code == 5


def test_names_and_what_is_in_the_way(tmp_path: Path) -> None:
    program = function(lambda self, x: x + 1, torch.randn(3, 4))
    with pytest.raises(UsageError, match=r"\.onnx"):
        write_onnx(program, tmp_path / "m.bin")
    (tmp_path / "m.onnx").write_text("old")
    with pytest.raises(UsageError, match="--force"):
        write_onnx(program, tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").read_text() == "old"
