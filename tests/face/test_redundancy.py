"""What was planted in a model is what its audit ranks first."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

import laconic
from architectures import bert, gpt2, llama, qwen3_moe
from laconic.auditing import audit_program
from laconic.cli.main import run
from laconic.ir.capture import capture_module
from laconic.ir.data import Batch
from laconic.page import heat_map, page
from laconic.redundancy import Table, find_redundancy
from laconic.schema import schema_of
from sequences import Ragged


def tables(make: Callable[[], Any], plant: Callable[[Any], None], data: Ragged | None = None) -> dict[str, Table]:
    torch.manual_seed(0)
    model, inputs, axes = make()
    model.eval()
    with torch.no_grad():
        plant(model)
    program = capture_module(model, (), inputs, axes)
    return {table.name: table for table in find_redundancy(program, data or Ragged(lengths=(9, 6, 8), rows=3))}


def nothing(model: Any) -> None:
    pass


@pytest.fixture(scope="module")
def planted() -> dict[str, Table]:
    """Of eight blocks: 3 is 1 again, 2 has an attention that adds nothing, 6 adds nothing at all, 4 has a dead channel,
    5 an outlier in its keys, and the queries of 0 are what block 7 projects its heads with."""

    def plant(model: Any) -> None:
        blocks = model.model.layers
        blocks[3].load_state_dict(blocks[1].state_dict())
        for weight in (blocks[2].self_attn.o_proj.weight, blocks[6].self_attn.o_proj.weight):
            weight.zero_()
        blocks[6].mlp.down_proj.weight.zero_()
        blocks[4].mlp.up_proj.weight[11] = 0
        blocks[5].self_attn.k_proj.weight[3] *= 50
        blocks[0].self_attn.q_proj.weight.copy_(blocks[7].self_attn.o_proj.weight)

    return tables(lambda: llama(8), plant)


def test_a_duplicate_block(planted: dict[str, Table]) -> None:
    found = planted["alike blocks of stream 0"].findings
    assert (found[0].what, found[0].score) == ("blocks 1 and 3", 0.0)
    assert found[1].score > 0.1
    assert found[0].weight_bytes > 30_000


def test_zero_branches(planted: dict[str, Table]) -> None:
    found = planted["branches"].findings
    assert {(f.what, f.where.split(" ")[0]) for f in found[:3]} == {
        ("attention", "model.layers.2"),
        ("attention", "model.layers.6"),
        ("mlp", "model.layers.6"),
    }
    assert found[2].score < 1e-6 < 1e-3 < found[3].score


def test_a_block_without_influence(planted: dict[str, Table]) -> None:
    found = planted["blocks of stream 0"]
    assert (found.findings[0].what, round(found.findings[0].score, 5)) == ("block 6", 0.0)
    assert found.findings[1].score > 1e-4
    assert len(found.matrix) == 9
    assert found.matrix[6][7] < 1e-3 < found.matrix[0][8]


@pytest.mark.slow
def test_a_duplicated_expert_and_one_that_is_never_chosen() -> None:
    def plant(model: Any) -> None:
        experts = model.model.layers[1].mlp.experts
        experts.gate_up_proj[5] = experts.gate_up_proj[2]
        experts.down_proj[5] = experts.down_proj[2]
        router = model.model.layers[2].mlp.gate.weight
        for a, b in ((0, 1), (2, 4), (5, 6)):
            router[b] = -router[a]  # of each pair one is above zero
        router[3] = 0

    found = tables(qwen3_moe, plant)
    alike = found["alike experts"].findings
    assert (alike[0].what, alike[0].score) == ("experts 2 and 5", 0.0)
    assert "layers.1" in alike[0].where
    assert len(alike) == 1, "the others have nothing in common"
    loads = [table for name, table in found.items() if name.startswith("experts of ")]
    assert len(loads) == 3
    assert (loads[2].findings[0].what, loads[2].findings[0].score) == ("expert 3", 0.0)
    assert loads[2].findings[1].score > 0
    for table in loads:
        assert sum(f.score for f in table.findings) == pytest.approx(len(table.findings))
        assert all(row[k] == 1.0 for k, row in enumerate(table.matrix) if sum(row))
        assert all(sum(row) == pytest.approx(2.0) for row in table.matrix if sum(row)), "each with one other"


def test_a_dead_channel(planted: dict[str, Table]) -> None:
    found = planted["hidden channels"].findings
    assert found[0].what == "channel 11, always zero"
    assert found[0].score == 0.0
    assert "layers.4" in found[0].where
    assert found[1].score > 0


def test_a_branch_without_effect_in_front_of_a_norm() -> None:
    """The norm behind a branch is none of what the branch does."""

    def plant(model: Any) -> None:
        for layer in model.encoder.layer:
            layer.attention.output.LayerNorm.weight.mul_(3.0)
        dense = model.encoder.layer[1].attention.output.dense
        dense.weight.zero_()
        dense.bias.zero_()

    found = tables(lambda: bert(3), plant)["branches"].findings
    assert (found[0].what, found[0].score) == ("attention", 0.0)
    assert "layer.1.attention" in found[0].where
    assert found[1].score > 1e-3


def test_what_a_cache_holds_where_one_matrix_makes_all() -> None:
    def plant(model: Any) -> None:
        packed = model.transformer.h[1].attn.c_attn  # queries, keys and values of 32
        packed.weight[:, 64 + 5] *= 40

    found = tables(lambda: gpt2(2), plant)["cache outliers"].findings
    assert (found[-1].what, found[-1].score > 2 * found[-2].score) == ("values", True)
    assert "h.1" in found[-1].where


@pytest.mark.slow
def test_many_dead_channels_are_one_finding() -> None:
    def plant(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight[:20] = 0

    (found, *others) = tables(lambda: llama(2), plant)["hidden channels"].findings
    assert found.what == "channels 0, 1, 2, 3, 4, 5, 6, 7 and 12 more, always zero"
    assert found.weight_bytes == 20 * 3 * 32 * 4
    assert all("always zero" not in other.what for other in others)


def test_an_outlier_channel_stands_last(planted: dict[str, Table]) -> None:
    found = planted["cache outliers"].findings
    assert (found[-1].what, found[-1].score > 1.3 * found[-2].score) == ("keys", True)
    assert "layers.5" in found[-1].where


def test_equal_matrices_anywhere(planted: dict[str, Table]) -> None:
    parts = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    parts += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    equal = {(f"1.{part}", f"3.{part}") for part in parts}
    equal |= {("0.self_attn.q_proj", "7.self_attn.o_proj"), ("2.self_attn.o_proj", "6.self_attn.o_proj")}  # planted, 0
    found = planted["alike matrices"].findings
    named = {f"model.layers.{a}.weight and model.layers.{b}.weight" for a, b in equal}
    assert {f.where for f in found[: len(named)]} == named
    assert [f.score == 0.0 for f in found] == [k < len(named) for k in range(len(found))]


@pytest.mark.slow
def test_repeated_tokens() -> None:
    class Repeated(Ragged):
        def batch(self, k: int) -> Batch:
            found = super().batch(k)
            found.inputs["input_ids"][:, 1::2] = found.inputs["input_ids"][:, ::2]
            return found

    repeated = tables(lambda: llama(2), nothing, Repeated(lengths=(8, 8), rows=2))["alike tokens"].findings
    plain = tables(lambda: llama(2), nothing, Ragged(lengths=(8, 8), rows=2))["alike tokens"].findings
    assert repeated[0].score == pytest.approx(0.0, abs=1e-6)
    assert repeated[0].what == "100% of tokens"
    assert plain[0].score > 0.1


@pytest.fixture
def callable_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "planted.py").write_text(
        "import torch\nfrom torch import nn\n\n"
        "class Block(nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16)\n\n"
        "    def forward(self, x):\n"
        "        return x + self.down(torch.nn.functional.gelu(self.up(x)))\n\n"
        "def model():\n"
        "    torch.manual_seed(0)\n"
        "    made = nn.Sequential(*(Block() for _ in range(4)))\n"
        "    with torch.no_grad():\n"
        "        made[2].down.weight.zero_()\n        made[2].down.bias.zero_()\n"
        "    return made.eval(), (torch.randn(2, 5, 16),), ({0: torch.export.Dim('batch', min=1)},)\n\n"
        "def data():\n"
        "    return [{'input': torch.randn(3, 5, 16)} for _ in range(2)]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("LACONIC_CACHE_DIR", str(tmp_path / "cache"))
    return "planted:model"


def test_the_command_line(callable_model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    line = ["audit", callable_model, "--calibration", "planted:data", "--html", str(tmp_path / "page.html"), "-q"]
    assert run([*line, "--json"]) == 0
    document = json.loads(capfd.readouterr().out)
    jsonschema.validate(document, schema_of("audit"))
    named = {table["name"]: table for table in document["redundancy"]}
    assert named["branches"]["findings"][0]["score"] == 0.0
    written = (tmp_path / "page.html").read_text()
    assert "<svg" in written
    assert "http" not in written.replace("http://www.w3.org", "")
    assert "<script" not in written
    assert run([*line]) == 2  # the page is there
    assert run([*line, "--force"]) == 0
    said = capfd.readouterr().out
    assert "branches (size of what a branch adds" in said
    found = laconic.audit(callable_model, calibration="planted:data")
    assert found.to_json()["redundancy"] == document["redundancy"]


def test_a_page_without_calibration_and_with_awkward_names() -> None:
    torch.manual_seed(0)
    model, inputs, axes = llama(2)
    document = {"model": "<b>&", **audit_program(capture_module(model.eval(), (), inputs, axes)).to_json()}
    said = page(document)
    assert "&lt;b&gt;&amp;" in said
    assert "<b>" not in said


def test_a_heat_map_of_equal_numbers() -> None:
    assert heat_map([[0.5, 0.5], [0.5, 0.5]]).count("<rect") == 4
