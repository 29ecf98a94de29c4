"""Placing files and folders: whole or not at all, whatever happens in between."""

import logging
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from laconic.ir import files
from laconic.ir.errors import UsageError
from laconic.ir.files import place_directory, place_file, refuse_existing, temporary_beside

WRITER = """
import sys
from pathlib import Path
from laconic.ir.files import place_directory, temporary_beside
final = Path(sys.argv[1])
number = 0
print("ready", flush=True)
while True:
    number += 1
    with temporary_beside(final) as temporary:
        temporary.mkdir()
        for part in range(20):
            (temporary / f"{part}.txt").write_text(f"{number:09d}" * 100)
        place_directory(temporary, final, force=True)
"""


def folder(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "a.txt").write_text(text)
    return path


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_a_file_is_placed_and_nothing_else_stays(tmp_path: Path) -> None:
    final = tmp_path / "sub" / "model.bin"
    with temporary_beside(final) as temporary:
        assert temporary.parent == final.parent
        assert temporary.name.startswith(f".model.bin.laconic-{os.getpid()}-")
        temporary.write_bytes(b"new")
        place_file(temporary, final, force=False)
    assert final.read_bytes() == b"new"
    assert os.listdir(final.parent) == ["model.bin"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_an_exception_removes_the_temporary(tmp_path: Path, error: type[BaseException]) -> None:
    def interrupted(make: Callable[[Path], object]) -> None:
        with temporary_beside(tmp_path / "model") as temporary:
            make(temporary)
            raise error

    for make in (lambda p: p.write_text("x"), lambda p: folder(p, "x")):
        with pytest.raises(error):
            interrupted(make)
    assert os.listdir(tmp_path) == []


def test_an_existing_file_is_kept_without_force(tmp_path: Path) -> None:
    final = tmp_path / "model"
    final.write_text("old")
    with pytest.raises(UsageError, match="--force"):
        refuse_existing(final, force=False)
    with temporary_beside(final) as temporary:
        temporary.write_text("new")
        with pytest.raises(UsageError, match="--force") as refused:
            place_file(temporary, final, force=False)
        assert refused.value.exit_code == 2
        assert final.read_text() == "old"
        place_file(temporary, final, force=True)
    assert final.read_text() == "new"


def test_a_file_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final, temporary = tmp_path / "model", tmp_path / "new"
    temporary.write_text("new")
    final.write_text("old")
    asked = []

    def once(path: object, force: bool) -> None:
        asked.append(path)
        if len(asked) > 1:
            refuse_existing(final, force)

    monkeypatch.setattr(files, "refuse_existing", once)
    with pytest.raises(UsageError):
        place_file(temporary, final, force=False)
    assert final.read_text() == "old"


def test_files_and_folders_do_not_replace_each_other(tmp_path: Path) -> None:
    folder(tmp_path / "dir", "old")
    (tmp_path / "file").write_text("old")
    (tmp_path / "new").write_text("new")
    with pytest.raises(UsageError, match="is a folder"):
        place_file(tmp_path / "new", tmp_path / "dir", force=True)
    with pytest.raises(UsageError, match="is a file"):
        place_directory(folder(tmp_path / "newdir", "new"), tmp_path / "file", force=True)


def test_a_folder_is_exchanged(tmp_path: Path) -> None:
    final = tmp_path / "out"
    for text, force in (("one", False), ("two", True)):
        with temporary_beside(final) as temporary:
            folder(temporary, text)
            if force:
                with pytest.raises(UsageError, match="--force"):
                    place_directory(temporary, final, force=False)
            place_directory(temporary, final, force=force)
        assert (final / "a.txt").read_text() == text
    assert os.listdir(tmp_path) == ["out"]


def test_the_current_folder_is_not_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    final = folder(tmp_path / "out", "old")
    monkeypatch.chdir(final)
    with temporary_beside(final) as temporary:
        folder(temporary, "new")
        with pytest.raises(UsageError, match="current folder"):
            place_directory(temporary, final, force=True)
    assert (final / "a.txt").read_text() == "old"


def test_without_exchange_it_goes_in_two_steps_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(files, "_rename", lambda source, target, flag: False)
    final = folder(tmp_path / "out", "old")
    with caplog.at_level(logging.WARNING), temporary_beside(final) as temporary:
        folder(temporary, "new")
        place_directory(temporary, final, force=True)
    assert (final / "a.txt").read_text() == "new"
    assert "two steps" in caplog.text
    assert os.listdir(tmp_path) == ["out"]


def test_leftovers_of_the_dead_go_and_those_of_the_living_stay(tmp_path: Path) -> None:
    final = tmp_path / "out"
    gone = folder(tmp_path / f".out.laconic-{dead_pid()}-01234567", "x")
    kept = folder(tmp_path / f".out.laconic-{os.getppid()}-01234567", "x")
    other = folder(tmp_path / f".other.laconic-{dead_pid()}-01234567", "x")
    with temporary_beside(final):
        assert not gone.exists()
        assert kept.exists()
        assert other.exists()


def test_a_folder_set_aside_by_the_dead_is_put_back(tmp_path: Path) -> None:
    folder(tmp_path / f".out.laconic-{dead_pid()}-01234567.old", "old")
    with temporary_beside(tmp_path / "out"):
        assert (tmp_path / "out" / "a.txt").read_text() == "old"


def test_killed_at_any_moment_the_folder_is_whole(tmp_path: Path) -> None:
    final = tmp_path / "out"
    chance = random.Random(0)
    generations = set()
    for _ in range(8):
        process = subprocess.Popen([sys.executable, "-c", WRITER, str(final)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        end = time.monotonic() + 0.1 + 0.3 * chance.random()
        there = final.exists()
        while time.monotonic() < end:
            assert final.exists() or not there
            there = there or final.exists()
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        if final.exists():
            texts = {(final / f"{part}.txt").read_text() for part in range(20)}
            assert len(texts) == 1
            generations.add(texts.pop())
    assert len(generations) > 1
    with temporary_beside(final):
        assert os.listdir(tmp_path) == ["out"]
