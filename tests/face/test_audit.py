"""Audit: planted redundancy is found with the numbers that were planted, and nothing is changed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.export import Dim

import laconic
import laconic.auditing
import laconic.cli.audit
from laconic.cli.main import run
from laconic.ir.errors import UsageError
from laconic.ir.program import Program

WIDTH = 32


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 64), nn.Linear(64, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Planted(nn.Module):
    """Three blocks, the last two equal; a matrix that is rows of another, one that is another transposed, a layer that
    is never called, the same sine twice, a constant, and a shadow of what is there: x * 1."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.blocks[2].load_state_dict(self.blocks[1].state_dict())
        self.large, self.rows, self.turned = (nn.Linear(64, 64, bias=False) for _ in range(3))
        self.rows = nn.Linear(64, 32, bias=False)
        self.spare = nn.Linear(WIDTH, 7)
        with torch.no_grad():
            self.rows.weight.copy_(self.large.weight[16:48])
            self.turned.weight.copy_(self.large.weight.T)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = block(x)
        wide = torch.cat([torch.sin(x), torch.sin(x) * 1], -1)
        wide = wide + torch.arange(64).cos() ** 2
        return self.large(wide).sum() + self.rows(wide).sum() + self.turned(wide)


@pytest.fixture(scope="module")
def program() -> Program:
    return laconic.capture(Planted(), torch.randn(2, WIDTH), dynamic_shapes={"x": {0: Dim("batch")}})


@pytest.fixture(scope="module")
def found(program: Program) -> laconic.Audit:
    before = str(program), {name: w.value._version for name, w in program.weights.items()}
    audit = laconic.audit(program)
    assert (str(program), {name: w.value._version for name, w in program.weights.items()}) == before
    return audit


def nbytes(*tensors: torch.Tensor) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def test_each_planted_redundancy_is_found_with_its_bytes(found: laconic.Audit) -> None:
    block = nbytes(*Block().parameters())
    # What initialisation makes equal beside: the norms' ones and zeros, once in three blocks.
    norms = 2 * WIDTH * 4
    by_spec = {saving.spec: saving for saving in found.savings}
    assert list(by_spec) == ["simplify", "dedup", "dedup{transposed=yes}", "cse", "dce", "dead-units"]
    assert by_spec["dead-units"].actions == {}
    assert by_spec["dedup"].weight_bytes == block + norms + 32 * 64 * 4
    assert by_spec["dedup"].actions["rows of another"] == 1
    assert by_spec["dedup{transposed=yes}"].weight_bytes == by_spec["dedup"].weight_bytes + 64 * 64 * 4
    assert (by_spec["cse"].actions, by_spec["cse"].nodes) == ({"common subexpression": 1}, 1)
    assert by_spec["dce"].actions == {"unused weight": 2}
    assert by_spec["dce"].weight_bytes == (WIDTH * 7 + 7) * 4
    assert by_spec["simplify"].actions["identity"] == 1
    assert by_spec["simplify"].actions["constant"] >= 1


def test_what_the_exact_preset_leaves_is_what_it_leaves(found: laconic.Audit, program: Program) -> None:
    after = laconic.optimize(program).report.after
    assert {name: found.exact[name] for name in ("nodes", "weight_bytes", "flops")} == {
        "nodes": after.nodes,
        "weight_bytes": after.weight_bytes,
        "flops": after.flops,
    }
    assert found.nodes == program.node_count() > after.nodes
    assert found.weight_bytes == program.weight_bytes() > after.weight_bytes


def test_blocks_and_how_alike_they_are(found: laconic.Audit, program: Program) -> None:
    (entry,) = found.entries
    (run,) = entry.runs
    assert (run.run.count, run.run.period, run.run.repeat.saved) == (3, 1, 2 * len(run.run.block(0)))
    assert run.equal == ((1, 2),)
    distances = {(pair.a, pair.b): pair.distance for pair in run.likeness}
    assert distances[1, 2] == 0.0
    assert distances[0, 1] == distances[0, 2] > 0.1
    weights = [name for name in program.weights if name.startswith("blocks.")]
    first, second = (
        torch.cat(
            [program.weights[n].value.detach().double().flatten() for n in weights if n.startswith(f"blocks.{k}")]
        )
        for k in (0, 1)
    )
    mean = ((first.norm() ** 2 + second.norm() ** 2) / 2).sqrt()
    assert distances[0, 1] == pytest.approx(float((first - second).norm() / mean), rel=1e-12)


def test_costs_are_those_of_the_sizes_asked_for(found: laconic.Audit, program: Program) -> None:
    (entry,) = found.entries
    flops = 3 * 2 * (2 * WIDTH * 64) + 2 * 64 * (64 + 32 + 64)
    assert entry.flops_text == f"{flops}*batch"
    assert found.flops == entry.flops == 2 * flops
    larger = laconic.audit(program, sizes={"batch": 10})
    assert larger.flops == 10 * flops
    assert larger.entries[0].peak.bytes > entry.peak.bytes
    assert entry.top_flops[0][1] == 2 * 2 * 64 * 64
    assert found.top_weights[0][1] == 64 * 64 * 4
    with pytest.raises(UsageError, match="no dynamic size 'length'"):
        laconic.audit(program, sizes={"length": 3})


def test_a_module_is_audited_with_its_inputs() -> None:
    found = laconic.audit(nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2)), inputs=(torch.randn(3, 4),))
    assert [mlp.activation for mlp in found.entries[0].structure.mlps] == ["relu"]
    with pytest.raises(UsageError, match="example inputs"):
        laconic.audit(nn.Linear(4, 4))


def test_the_function_is_not_hidden_by_a_module_of_its_name() -> None:
    assert callable(laconic.audit)
    assert laconic.audit is laconic.auditing.audit


def test_as_plain_data_it_names_nodes_and_weights(found: laconic.Audit, program: Program) -> None:
    data: Any = json.loads(json.dumps(found.to_json()))
    (entry,) = data["entries"]
    names = {n.name for n in program.forward.graph.nodes}
    assert {branch["node"] for stream in entry["streams"] for branch in stream["branches"]} <= names
    mlps = [site for site in entry["sites"] if site["kind"] == "mlp"]
    assert [site["up"]["weight"] for site in mlps] == [f"blocks.{k}.up.weight" for k in range(3)]
    assert all("test_audit.py" in site["where"] for site in mlps)
    assert data["exact"]["weight_bytes"] == found.exact["weight_bytes"]


@pytest.fixture
def folder(tmp_path: Path, program: Program) -> str:
    return str(laconic.optimize(program, "none").save(tmp_path / "model"))


def test_the_command_tells_it_in_words(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert run(["audit", folder, "-q", "--size", "batch=10"]) == 0
    said = capfd.readouterr().out
    assert "(batch=10)" in said
    assert "3 blocks, each 1 branch and " in said
    assert "equal weights: blocks 1, 2" in said
    assert "3 x MLP 32 -> 64, relu" in said
    assert "3 x layer norm, eps 1e-05" in said
    assert "dedup{transposed=yes}" in said
    assert max(map(len, said.splitlines())) < 200


def test_the_command_as_json_and_its_usage_errors(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert run(["audit", folder, "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert (data["schema"], data["model"], data["sizes"]) == (1, folder, {"batch": 2})
    assert run(["audit", folder, "-q", "--size", "length=3"]) == 2
    assert "no dynamic size 'length'" in capfd.readouterr().err


class Headed(nn.Module):
    """Attention whose second head adds nothing, an MLP with a dead unit, and a product with an op that has no rule."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.mlp, self.out = Block(), nn.Linear(32, 32)
        with torch.no_grad():
            self.o.weight[:, 8:16] = 0
            self.mlp.down.weight[:, 7] = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        q, k, v = (p(x).reshape(1, 5, 4, 8).transpose(1, 2) for p in (self.q, self.k, self.v))
        x = x + self.o(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(1, 5, 32))
        return torch.fft.fft(self.out(self.mlp(x))).real


def test_axes_are_told_by_what_they_count() -> None:
    found = laconic.audit(Headed(), inputs=(torch.randn(1, 5, 32),), axes=True).axes
    assert found is not None
    told = {
        (own.what, own.size, own.permutable, own.shrinkable, dead)
        for own, dead in zip(found.classes, found.dead, strict=True)
    }
    assert told == {
        ("heads", 4, True, True, 1),
        ("width of queries and keys", 8, True, True, 0),
        ("width of values", 8, True, True, 0),
        ("hidden units", 64, True, True, 1),
        ("residual stream", 32, False, False, 0),
        ("an axis of an op without a rule", 32, False, False, 0),
    }
    heads = next(own for own in found.classes if own.what == "heads")
    assert set(heads.weights) == {f"{m}.{part}" for m in "qkv" for part in ("weight", "bias")} | {"o.weight"}
    assert found.coverage.known == found.coverage.calls - 1  # the transform


def test_the_command_tells_axes(folder: str, capfd: pytest.CaptureFixture[str]) -> None:
    capfd.readouterr()
    assert run(["audit", folder, "-q", "--axes"]) == 0
    said = capfd.readouterr().out
    assert "hidden units" in said
    assert "permute, leave out" in said
    assert "calls have a rule" in said
    assert run(["audit", folder, "--json"]) == 0
    assert "axes" not in json.loads(capfd.readouterr().out)
