"""The text that decoders are trained and measured on: what is held out stays out."""

from __future__ import annotations

from pathlib import Path

import pytest

from laconic.ir.errors import ModelError
from laconic.models import corpus
from laconic.models.corpus import Document, Split, committed, library, repeated, split


def made(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def prose(seed: int, lines: int = 60) -> str:
    """Lines that share next to nothing with those of another seed."""
    return "".join(f"value_{seed}_{k} = make({seed * 1000 + k}, other_{seed}_{k * k})\n" for k in range(lines))


def test_held_out_documents_are_what_was_committed() -> None:
    for kind in (Split.CALIBRATION, Split.SELECTION, Split.TEST):
        assert sum(len(d.text) for d in committed(kind)) > 400_000


def test_no_package_is_in_two_splits() -> None:
    groups = {kind: {d.group for d in committed(kind)} for kind in (Split.CALIBRATION, Split.SELECTION, Split.TEST)}
    assert not groups[Split.TEST] & groups[Split.SELECTION]
    assert not groups[Split.CALIBRATION] & (groups[Split.TEST] | groups[Split.SELECTION])


@pytest.mark.slow
def test_training_leaves_out_what_is_held_out() -> None:
    training = corpus.training_documents()
    held = [d for kind in (Split.SELECTION, Split.TEST) for d in committed(kind)]
    assert not {d.group for d in training} & {d.group for d in held}
    assert not {d.text for d in training} & {d.text for d in held}
    assert len(training) > 1000


def test_training_leaves_out_what_repeats_a_held_out_document_under_another_name(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    held = max(committed(Split.TEST), key=lambda d: len(d.text))
    training = {d.group for d in committed(Split.CALIBRATION)}
    documents = [
        Document("moved.py", min(training), held.text),
        Document("grown.py", min(training), prose(1, 20) + held.text + prose(2, 20)),
        Document("part.py", max(training), held.text[: len(held.text) // 2]),
        Document("own.py", min(training), prose(3)),
        Document("little.py", max(training), prose(4, 400) + held.text[:2_000]),  # quotes it, says something else
    ]
    monkeypatch.setattr(corpus, "library", lambda: documents)
    monkeypatch.setattr(corpus, "repeated", lambda documents: set())
    assert [d.path for d in corpus.training_documents()] == ["own.py", "little.py"]


def test_tests_belong_to_what_they_test(tmp_path: Path) -> None:
    files = {f"m{k}.py": prose(k) for k in range(500)}
    files |= {"_shelf.py": prose(900), "shelf.py": prose(901), "test/test_shelf_more.py": prose(902)}
    files |= {"test/test_nobody.py": prose(903), "package/inner.py": prose(904), "short.py": "x = 1\n"}
    documents = {d.path: d for d in library(made(tmp_path, files))}
    assert documents["_shelf.py"].group == documents["shelf.py"].group == "shelf"
    assert documents["test/test_shelf_more.py"].group == "shelf"
    assert documents["test/test_nobody.py"].group == "test/nobody"
    assert documents["package/inner.py"].group == "package"
    assert "short.py" not in documents
    parts = split(list(documents.values()))
    assert {len({d.group for d in parts[kind] if d.group == "shelf"}) for kind in parts} == {0, 1}


def test_a_library_without_modules_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="holds 1 modules"):
        library(made(tmp_path, {"one.py": prose(1)}))


def test_what_repeats_a_larger_file_goes() -> None:
    documents = [
        Document("a.py", "a", prose(1, 100)),
        Document("b.py", "b", prose(1, 80)),  # the first part of a
        Document("c.py", "c", prose(2, 100)),
        Document("d.py", "d", prose(1, 30) + prose(3, 100)),  # less than half of it repeats
    ]
    assert repeated(documents) == {"b.py"}


def test_a_changed_split_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("splits.json", "test.jsonl"):
        (tmp_path / name).write_bytes((corpus.FOLDER / name).read_bytes())
    with (tmp_path / "test.jsonl").open("a") as file:
        file.write("\n")
    monkeypatch.setattr(corpus, "FOLDER", tmp_path)
    with pytest.raises(ModelError, match="not the file that was committed"):
        committed(Split.TEST)
