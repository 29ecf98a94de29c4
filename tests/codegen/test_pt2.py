"""Writing .pt2: loads where neither laconic nor transformers exists, with the same bits."""

import io
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.export import Dim

from laconic.codegen import pt2
from laconic.codegen.pt2 import write_pt2
from laconic.ir.capture import capture_module
from laconic.ir.errors import UnsupportedError, UsageError, VerificationError
from laconic.ir.inputs import draw
from laconic.ir.metrics.differences import bit_equal
from laconic.ir.program import Program
from laconic.ir.run import evaluate

PLAIN = """
import sys
for name in ("laconic", "transformers"):
    sys.modules[name] = None
import torch
for path in sys.argv[1:]:
    program = torch.export.load(path)
    given = torch.load(path + ".in", weights_only=True)
    with torch.no_grad():
        torch.save(program.module()(**given), path + ".out")
"""


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(17, 8)
        self.qkv = nn.Linear(8, 24)
        self.register_buffer("steps", torch.zeros(1))

    def forward(self, ids: torch.Tensor, scale: float = 1.0) -> dict[str, torch.Tensor]:
        self.steps.add_(1)
        q, k, v = self.qkv(self.embed(ids) * scale).split(8, dim=-1)
        y = nn.functional.scaled_dot_product_attention(q, k, v)
        return {"y": y, "logits": y @ self.embed.weight.T, "steps": self.steps + 0}


def program() -> Program:
    torch.manual_seed(0)
    shapes = {"ids": {0: Dim("batch"), 1: Dim("tokens")}, "scale": None}
    return capture_module(Block(), (), {"ids": torch.randint(0, 17, (3, 5)), "scale": 2.0}, shapes)


def bert() -> Program:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, vocab_size=50
    )
    shapes = {"input_ids": {0: Dim.AUTO, 1: Dim.AUTO}}
    return capture_module(transformers.BertModel(config), (), {"input_ids": torch.randint(0, 50, (2, 5))}, shapes)


def test_a_plain_python_gets_the_same_bits(tmp_path: Path) -> None:
    """Also of a model of transformers, whose output class exists only there."""
    wanted = {}
    for name, captured in (("block", program()), ("bert", bert())):
        path = str(write_pt2(captured, tmp_path / f"{name}.pt2"))
        sizes = {s.name: s.hint + 2 + k for k, s in enumerate(captured.symbols.values())}
        case = draw(captured, captured.forward, sizes, seed=1)
        torch.save({captured.forward.inputs[0].name: case.inputs[0]}, path + ".in")
        wanted[path] = evaluate(captured, captured.forward, case.inputs).results
    subprocess.run([sys.executable, "-I", "-W", "ignore", "-c", PLAIN, *wanted], check=True)
    for path, results in wanted.items():
        found = list(torch.load(path + ".out", weights_only=True).values())
        assert len(found) == len(results) > 1
        assert all(bit_equal(a, b) for a, b in zip(found, results, strict=True))


def test_no_user_data_is_stored(tmp_path: Path) -> None:
    path = write_pt2(program(), tmp_path / "model.pt2")
    with zipfile.ZipFile(path) as archive:
        samples = [name for name in archive.namelist() if "sample_inputs" in name]
        assert samples
        for name in samples:
            pickled = archive.read(name)
            assert not pickled or torch.load(io.BytesIO(pickled), weights_only=True) is None
    assert str(Path.cwd()).encode() not in path.read_bytes()


def test_random_draws_are_kept(tmp_path: Path) -> None:
    class Noise(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + torch.rand_like(x)

    captured = capture_module(Noise(), (torch.ones(2),), {})
    state = torch.get_rng_state()
    loaded = torch.export.load(write_pt2(captured, tmp_path / "model.pt2"))
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(3)
    found = loaded.module()(torch.ones(2))
    torch.manual_seed(3)
    assert torch.equal(found, torch.ones(2) + torch.rand(2))


def test_a_file_that_computes_something_else_is_not_placed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "model.pt2"
    path.write_bytes(b"old")
    real = pt2.to_exported

    def wrong(captured: Program) -> torch.export.ExportedProgram:
        exported = real(captured)
        exported.state_dict["qkv.bias"] = nn.Parameter(exported.state_dict["qkv.bias"].detach() + 1e-3)
        return exported

    monkeypatch.setattr(pt2, "to_exported", wrong)
    with pytest.raises(VerificationError, match="nothing was written"):
        write_pt2(program(), path, force=True)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["model.pt2"]


def test_names_and_what_is_in_the_way(tmp_path: Path) -> None:
    captured = program()
    with pytest.raises(UsageError, match=r"\.pt2"):
        write_pt2(captured, tmp_path / "model.bin")
    (tmp_path / "model.pt2").write_text("old")
    with pytest.raises(UsageError, match="--force"):
        write_pt2(captured, tmp_path / "model.pt2")
    assert (tmp_path / "model.pt2").read_text() == "old"


def test_ops_of_other_libraries_are_refused(tmp_path: Path) -> None:
    @torch.library.custom_op("laconictest::twice", mutates_args=())
    def twice(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    twice.register_fake(torch.empty_like)

    class Foreign(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return twice(x)

    captured = capture_module(Foreign(), (torch.ones(2),), {})
    with pytest.raises(UnsupportedError, match=r"laconictest\.twice"):
        write_pt2(captured, tmp_path / "model.pt2")
    assert os.listdir(tmp_path) == []


def test_what_torch_cannot_serialize_is_said(tmp_path: Path) -> None:
    class Truth(nn.Module):
        def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
            return x * 1, x.shape[0] > 50

    captured = capture_module(Truth(), (torch.ones(3),), {}, ({0: Dim("n", max=100)},))
    with pytest.raises(UnsupportedError, match="truth value"):
        write_pt2(captured, tmp_path / "model.pt2")
