"""The packaged sentence encoder: the same vectors as sentence-transformers, and neighbours that mean something."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from laconic.ir.errors import MissingDependencyError, UnsupportedError, UsageError
from laconic.models import minilm, zoo


@pytest.fixture(scope="module")
def encoder() -> minilm.SentenceEncoder:
    return minilm.load_encoder()


@pytest.fixture(scope="module")
def vectors(encoder: minilm.SentenceEncoder) -> torch.Tensor:
    with torch.no_grad():
        return encoder(**minilm.tokenize(minilm.sentences()))["sentence_embedding"]


def test_same_vectors_as_sentence_transformers(encoder: minilm.SentenceEncoder) -> None:
    from sentence_transformers import SentenceTransformer

    reference = SentenceTransformer(str(minilm.folder()), device="cpu", local_files_only=True)
    long = " ".join(minilm.sentences()[:40])  # beyond the 256 tokens at which texts are cut
    texts = [*minilm.sentences()[:20], long, ""]
    inputs = minilm.tokenize(texts)
    assert inputs["input_ids"].shape == (22, 256)
    expected = reference.encode(texts, convert_to_tensor=True, show_progress_bar=False, batch_size=32)
    with torch.no_grad():
        found = encoder(**inputs)["sentence_embedding"]
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) <= 1e-6


def test_unit_vectors(vectors: torch.Tensor) -> None:
    assert vectors.shape == (64, 384)
    assert torch.allclose(vectors.norm(dim=1), torch.ones(64), atol=1e-6)


def test_padding_changes_nothing(encoder: minilm.SentenceEncoder) -> None:
    short = "It rained all night."
    with torch.no_grad():
        alone = encoder(**minilm.tokenize([short]))["sentence_embedding"][0]
        padded = encoder(**minilm.tokenize([short, max(minilm.sentences(), key=len)]))["sentence_embedding"][0]
        nothing = encoder(torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3, dtype=torch.int64))
    assert float((alone - padded).abs().max()) <= 1e-6
    assert not nothing["sentence_embedding"].any()


def test_nearest_neighbours_lie_in_their_group(vectors: torch.Tensor) -> None:
    group = [k for k, members in enumerate(minilm.groups()) for _ in members]
    similarity = vectors @ vectors.T
    similarity.fill_diagonal_(-2.0)
    nearest = similarity.argmax(1).tolist()
    hits = sum(group[k] == group[n] for k, n in enumerate(nearest))
    assert hits >= 0.8 * len(group)


def test_sentences() -> None:
    every = minilm.sentences()
    words = [len(s.split()) for s in every]
    assert len(every) == len(set(every)) == 64
    assert {len(g) for g in minilm.groups()} == {4, 5}
    assert min(words) == 3
    assert max(words) >= 60


def test_source() -> None:
    source = zoo.load("minilm")
    assert source.name == "minilm"
    assert source.kwargs.keys() == source.dynamic_shapes.keys() == {"input_ids", "attention_mask"}
    sequence = source.dynamic_shapes["input_ids"][1]
    assert (sequence.__name__, sequence.min, sequence.max) == ("sequence", 1, 512)
    assert source.kwargs["attention_mask"].min() == 0


def test_no_texts() -> None:
    with pytest.raises(UsageError, match="no texts"):
        minilm.tokenize([])


def test_unknown_name() -> None:
    assert {"minilm", "llama-mha", "vlm"} <= set(zoo.names())
    with pytest.raises(UsageError, match="did you mean 'minilm'"):
        zoo.load("minlm")


def test_package_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("laconic.models.minilm._PACKAGE", "no_such_package_here")
    with pytest.raises(MissingDependencyError, match=r"laconic-compiler\[demo\]") as caught:
        zoo.load("minilm")
    assert caught.value.exit_code == 5


@pytest.mark.parametrize(
    ("file", "old", "new", "message"),
    [
        ("1_Pooling/config.json", '"pooling_mode_cls_token": false', '"pooling_mode_cls_token": true', "cls_token"),
        ("modules.json", "models.Normalize", "models.Dense", "Pooling -> Dense"),
    ],
)
def test_another_head_is_refused(tmp_path: Path, file: str, old: str, new: str, message: str) -> None:
    for name in ("modules.json", "1_Pooling/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        text = (minilm.folder() / name).read_text()
        (tmp_path / name).write_text(text.replace(old, new) if name == file else text)
    with pytest.raises(UnsupportedError, match=message):
        minilm.load_encoder(tmp_path)


def test_zoo_imports_no_torch() -> None:
    code = "import sys; from laconic.models import zoo; zoo.names(); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
