"""Half of the blocks' weights: files, memory and every export shrink by what was computed, and the model generates."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers as hf

import laconic
from laconic.ir.program import Program

pytestmark = pytest.mark.slow

LAYERS, WIDTH, HIDDEN = 8, 384, 1024
MATRICES = 4 * (4 * WIDTH * WIDTH + 3 * WIDTH * HIDDEN)  # bytes of a block's
NORMS = 4 * 2 * WIDTH

#: Loads a DIR, runs it, and says how many bytes are resident then.
CHILD = """
import sys
import torch
import laconic
model = laconic.load(sys.argv[1])
ids = torch.arange(14).reshape(2, 7)
model(input_ids=ids, attention_mask=torch.ones_like(ids))
lines = open("/proc/self/status").read().splitlines()
print(next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmRSS")))
"""


@pytest.fixture(scope="module")
def program() -> Program:
    torch.manual_seed(0)
    config = hf.LlamaConfig(
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        intermediate_size=HIDDEN,
        vocab_size=200,
        max_position_embeddings=64,
    )
    ids = torch.arange(14).reshape(2, 7)
    module = hf.LlamaForCausalLM(config).eval()
    return laconic.capture(module, cache=(1, 24), input_ids=ids, attention_mask=torch.ones_like(ids))


@pytest.fixture(scope="module")
def whole(program: Program, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole") / "out"
    return laconic.optimize(program, "none").save(folder, formats=["onnx", "pt2", "hf"])


def sizes(folder: Path) -> dict[str, int]:
    """Bytes of the weights and of each export; of ONNX that of `forward`."""
    onnx = [file for file in folder.glob("model.onnx*") if file.name in ("model.onnx", "model.onnx.data")]
    files = {"DIR": [folder / "weights.safetensors"], "onnx": onnx, "pt2": [folder / "model.pt2"]}
    if (folder / "hf").exists():
        files["hf"] = [folder / "hf" / "model.safetensors"]
    return {name: sum(file.stat().st_size for file in found) for name, found in files.items()}


def resident(folder: Path) -> int:
    said = subprocess.run([sys.executable, "-c", CHILD, str(folder)], check=True, capture_output=True, text=True)
    return int(said.stdout)


@pytest.mark.parametrize("kind", ["drop", "share"])
def test_half_the_blocks_is_half_everywhere(kind: str, program: Program, whole: Path, tmp_path: Path) -> None:
    pipeline = "drop-layers{keep=0.5,method=random}" if kind == "drop" else "share-layers{keep=0.5,method=fixed}"
    computed = LAYERS // 2 * (MATRICES + (NORMS if kind == "drop" else 0))
    ids = torch.arange(80).reshape(8, 10)
    result = laconic.optimize(program, pipeline, calibration=[{"input_ids": ids, "attention_mask": ids + 1 > 0}])
    caches = program.weight_bytes() - sum(w.value.nbytes for w in program.weights.values() if w.trainable)
    fewer = caches // 2 if kind == "drop" else 0  # a block's caches go with it
    assert program.weight_bytes() - result.program.weight_bytes() == pytest.approx(computed + fewer, abs=0.01 * caches)
    folder = result.save(tmp_path / "out", formats=["onnx", "pt2", *(["hf"] if kind == "drop" else [])])
    before, after = sizes(whole), sizes(folder)
    for name in after:
        assert before[name] - after[name] == pytest.approx(computed, rel=0.02), name
    assert resident(whole) - resident(folder) == pytest.approx(computed, rel=0.15)
    loaded = laconic.load(folder)
    said = loaded.generate([[5, 6, 7]], max_new_tokens=8)
    assert torch.equal(said, result.model.generate([[5, 6, 7]], max_new_tokens=8))
    inputs = {"input_ids": ids[:2, :7].contiguous(), "attention_mask": torch.ones(2, 7, dtype=torch.long)}
    with torch.no_grad():
        assert torch.equal(loaded(**inputs)["logits"], result.model(**inputs)["logits"])
