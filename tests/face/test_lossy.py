"""Lossy passes from the command line: what they need, what they write, and that a seed is all that chance has."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as hf
from torch import nn

import laconic
from laconic.cli.main import run
from laconic.models import tokenizer

TEXTS = ["import os\n\n\ndef here() -> str:\n    return os.getcwd()\n" * 4, "class A:\n    pass\n", "x = 1\n" * 90]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Llama of four layers with the zoo's tokenizer, captured with caches, as a saved DIR."""
    path = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
        vocab_size=tokenizer.VOCABULARY,
        max_position_embeddings=64,
    )
    model = hf.LlamaForCausalLM(config)
    for weight in model.parameters():
        nn.init.normal_(weight, std=0.1)
    model.save_pretrained(path / "llama")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (path / "llama" / name).write_bytes((tokenizer.FOLDER / name).read_bytes())
    line = ["optimize", str(path / "llama"), "-o", str(path / "out"), "-p", "none", "-q", "--cache", "1x24"]
    assert run(line) == 0
    return path / "out"


@pytest.fixture
def texts(tmp_path: Path) -> tuple[Path, Path]:
    """What is decided on, and what is judged by."""
    paths = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    for path, more in zip(paths, ("", "# more\n"), strict=True):
        path.write_text("".join(json.dumps({"text": more + text}) + "\n" for text in TEXTS))
    return paths


def plans(folder: Path) -> list[list[str]]:
    found = [json.loads(path.read_text()) for path in sorted((folder / "plans").glob("*.json"))]
    return [[action["layer"] for action in plan["actions"] if "layer" in action] for plan in found]


def test_a_pipeline_is_decided_judged_healed_and_saved(
    saved: Path,
    texts: tuple[Path, Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LACONIC_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "500")  # however long the paths are, no cell is wrapped
    line = ["optimize", str(saved), "-p", "drop-layers{method=influence}", "--heal", "3"]
    line += ["--calibration", str(texts[0]), "--data", str(texts[1]), "--metric", "nats", "--batch", "2"]
    assert run([*line, "-o", str(tmp_path / "out"), "--json"]) == 0
    ledger = json.loads(capfd.readouterr().out)
    assert ledger["pipeline"] == "drop-layers{method=influence},heal{steps=3}"
    assert ledger["verified"]
    first, healed = (row["after"] for row in ledger["passes"])
    assert first["weight_bytes"] < ledger["before"]["weight_bytes"]
    assert len({ledger["before"]["metrics"]["nats"], first["metrics"]["nats"], healed["metrics"]["nats"]}) == 3
    assert list((tmp_path / "cache" / "calibration").glob("heal-*.safetensors"))
    dropped, _ = plans(tmp_path / "out")
    assert len(dropped) == 1
    assert run([*line, "-o", str(tmp_path / "again"), "-q"]) == 0
    for name in ("program.txt", "weights.safetensors"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "out" / name).read_bytes()
    assert run(["explain", str(tmp_path / "out")]) == 0
    assert f"{dropped[0]} dropped" in capfd.readouterr().out
    line = ["eval", str(tmp_path / "out"), "--data", str(texts[1]), "--metric", "nats", "--batch", "2", "--json"]
    assert run(line) == 0
    (row,) = json.loads(capfd.readouterr().out)["figures"]
    assert row["value"] == healed["metrics"]["nats"], "what was saved gives the same figures"
    model = laconic.load(tmp_path / "out")
    assert model.generate([[5, 6, 7]], max_new_tokens=3).shape == (1, 6)


@pytest.mark.slow
def test_the_seed_is_all_that_chance_has(saved: Path, texts: tuple[Path, Path], tmp_path: Path) -> None:
    found = {}
    for seed in (0, 0, 1, 2, 3):
        out = tmp_path / f"{seed}"
        line = ["optimize", str(saved), "-o", str(out), "-p", "drop-layers{keep=0.5,method=random}", "--no-check", "-q"]
        assert run([*line, "--calibration", str(texts[0]), "--seed", str(seed), "--force"]) == 0
        chosen = tuple(plans(out)[0])
        assert found.setdefault(seed, chosen) == chosen
    assert len(set(found.values())) > 1


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["-p", "drop-layers"], "needs activations, and there is no data to decide on"),
        (["-p", "exact", "--heal", "5"], "needs training, and there is no data to decide on"),
        (["-p", "exact", "--calibration", "zoo:moe"], "--calibration says nothing without data"),
        (["-p", "drop-layers{keep=1.2}"], "a share above 0 and up to 1"),
        (["-p", "drop-layers{method=influense}"], "did you mean 'influence'"),
        (["-p", "share-layers{merge=means}"], "no merge operator 'means'"),
    ],
)
def test_slips_cost_nothing(more: list[str], says: str, capfd: pytest.CaptureFixture[str]) -> None:
    """The model does not exist, and that is not what is complained of."""
    assert run(["optimize", "no.such:model", "-o", "out", *more]) == 2
    assert says in capfd.readouterr().err


def test_what_is_decided_on_may_not_judge(
    saved: Path, texts: tuple[Path, Path], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    line = ["optimize", str(saved), "-o", str(tmp_path / "out"), "-p", "drop-layers"]
    assert run([*line, "--calibration", str(texts[0]), "--data", str(texts[0])]) == 2
    assert "overlaps the calibration set" in capfd.readouterr().err
    assert run([*line, "--calibration", str(texts[0]), "--no-check", "-p", "drop-layers{keep=0.1}"]) == 2
    assert "4 of 4 blocks of run 0 cannot be dropped" in " ".join(capfd.readouterr().err.split())
    assert not (tmp_path / "out").exists()
