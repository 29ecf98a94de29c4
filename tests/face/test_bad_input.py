"""Damaged and hostile input: each is refused with a message, nothing in it is run, and nothing is written or lost."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file

import laconic
import mutations
from laconic.cli.main import run
from laconic.ir.errors import LaconicError, ModelError, UnsupportedError, UsageError
from laconic.ir.program import Program
from laconic.sources import resolve

FAST, THOROUGH = 6, 300


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    mutations.write_models(folder)
    return folder


@pytest.fixture
def copy(models: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the models, to be spoilt."""

    def made(name: str) -> Path:
        source, target = models / name, tmp_path / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
        return target

    return made


def refused(path: Path, *said: str, kind: type[LaconicError] = LaconicError) -> LaconicError:
    with pytest.raises(kind) as caught:
        resolve(str(path))
    for text in said:
        assert text in str(caught.value), str(caught.value)
    return caught.value


def test_every_form_resolves(models: Path) -> None:
    kinds = {
        name: type(resolve(str(models / name))).__name__ for name in ("saved", "dump", "model.pt2", "model.onnx", "hf")
    }
    assert kinds == {
        "saved": "Program",
        "dump": "Program",
        "model.pt2": "Program",
        "model.onnx": "Source",
        "hf": "Source",
    }
    dump, saved = resolve(str(models / "dump")), resolve(str(models / "saved"))
    assert isinstance(dump, Program)
    assert str(dump) == str(saved)


#: A file of a model, and the model.
_FILES = [
    ("model.pt2", ""),
    ("model.onnx", ""),
    ("hf", "config.json"),
    ("hf", "model.safetensors"),
    ("sharded", "model-00002-of-00004.safetensors"),
    ("dump", "program.txt"),
    ("dump", "weights.safetensors"),
    ("saved", "program.txt"),
    ("saved", "weights.safetensors"),
    ("saved", "recipe.yaml"),
]


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "noise", "pickle", "folder"])
@pytest.mark.parametrize(("model", "file"), _FILES, ids=["/".join(f).rstrip("/") for f in _FILES])
def test_files_missing_cut_and_overwritten(
    model: str, file: str, damage: str, copy: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = copy(model)
    victim = path / file if file else path
    content = victim.read_bytes()
    victim.unlink()
    if damage == "folder":
        victim.mkdir()
    elif damage != "missing":
        noise = torch.randint(0, 256, (2000,), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
        made = {
            "empty": b"",
            "cut": content[: len(content) // 2],
            "noise": noise.numpy().tobytes(),
            "pickle": pickle.dumps({"weights": [1.0] * 100}),
        }
        victim.write_bytes(made[damage])
    problem = refused(path)
    assert problem.what
    assert file in str(problem) or path.name in str(problem)
    code = run(["optimize", str(path), "--dry-run", "-q"])
    said = capsys.readouterr().err
    assert code == problem.exit_code
    assert said.startswith("laconic: ")
    assert "Traceback" not in said


def test_pickles_are_refused_by_name(tmp_path: Path) -> None:
    for name in ("model.bin", "model.pt", "model.pth", "model.pkl"):
        torch.save({"a": torch.ones(1)}, tmp_path / name)
        refused(tmp_path / name, "pickles", kind=UnsupportedError)
    (tmp_path / "model.txt").write_text("x")
    refused(tmp_path / "model.txt", "of a kind that is not read", kind=UsageError)


def test_a_pipe_is_not_waited_for(copy: Callable[[str], Path]) -> None:
    for model, file in (
        ("hf", "config.json"),
        ("hf", "model.safetensors"),
        ("dump", "program.txt"),
        ("saved", "recipe.yaml"),
    ):
        path = copy(model)
        (path / file).unlink()
        os.mkfifo(path / file)
        refused(path, file)
        shutil.rmtree(path)


def test_a_dir_without_its_recipe_is_no_dump(copy: Callable[[str], Path]) -> None:
    path = copy("saved")
    (path / "recipe.yaml").unlink()
    refused(path, "recipe.yaml", kind=ModelError)


def test_tensors_in_two_shards_or_not_where_the_index_says(copy: Callable[[str], Path]) -> None:
    path = copy("sharded")
    first, second = sorted(path.glob("model-*.safetensors"))[:2]
    tensors, others = load_file(first), load_file(second)
    name = next(iter(tensors))
    save_file({**others, name: tensors[name]}, second, metadata={"format": "pt"})
    refused(path, "stand in two files", f"{name}: {first.name} and {second.name}", kind=ModelError)
    save_file({k: v for k, v in tensors.items() if k != name}, first, metadata={"format": "pt"})
    refused(path, "not where the index says", f"{name}: not in {first.name}", kind=ModelError)
    first.unlink()
    refused(path, "1 of 4 shards are missing", first.name, kind=ModelError)


@pytest.mark.parametrize("name", ["../hf/model.safetensors", "/etc/passwd", "config.json", "..", "", "a/b.safetensors"])
def test_shards_stand_in_the_folder(name: str, copy: Callable[[str], Path], models: Path) -> None:
    path = copy("sharded")
    index = path / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    data["weight_map"][next(iter(data["weight_map"]))] = name
    index.write_text(json.dumps(data))
    refused(path, "files that are no shards", name, kind=ModelError)


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd"])
def test_external_data_stands_in_the_folder(name: str, copy: Callable[[str], Path], tmp_path: Path) -> None:
    path = copy("model.onnx")
    (tmp_path.parent / "secret").write_bytes(bytes(10_000))
    model = onnx.load(path)
    tensor = max(model.graph.initializer, key=lambda t: len(t.raw_data))
    tensor.ClearField("raw_data")
    tensor.data_location = onnx.TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=name)
    path.write_bytes(model.SerializeToString())
    refused(path, Path(name).name, kind=ModelError)


def test_links_are_followed_to_be_read_and_never_to_be_written(copy: Callable[[str], Path], tmp_path: Path) -> None:
    """As in a cache of downloads, files of a folder may be links; what a DIR's lead to is held to its hash."""
    path, outside = copy("saved"), tmp_path / "outside"
    (path / "weights.safetensors").rename(outside)
    (path / "weights.safetensors").symlink_to(outside)
    found = resolve(str(path))
    assert isinstance(found, Program)
    before = outside.read_bytes()
    laconic.optimize(found).save(path, force=True)
    assert outside.read_bytes() == before
    assert not (path / "weights.safetensors").is_symlink()
    (path / "weights.safetensors").unlink()
    (path / "weights.safetensors").symlink_to("/etc/passwd")
    refused(path, "not the file that was saved", kind=ModelError)


#: Runs commands of laconic where no file may grow beyond so many bytes, as on a full disk, and prints their exit codes.
LIMITED = """
import resource, sys
from laconic.cli.main import run
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
print([run(command.split()) for command in sys.argv[2:]])
"""


def test_a_full_disk_leaves_what_was_there(copy: Callable[[str], Path], models: Path, tmp_path: Path) -> None:
    paths = [copy(name) for name in ("saved", "model.pt2", "model.onnx")]
    before = mutations.tree(tmp_path)
    commands = [
        f"{'optimize' if path.suffix == '' else 'export'} {models / 'saved'} -o {path} --force -q" for path in paths
    ]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LIMITED, "1000", *commands], capture_output=True, text=True
    )
    assert done.stdout.splitlines()[-1] == "[1, 1, 1]", done.stderr
    assert done.stderr.count("laconic: File too large") == 3, done.stderr
    assert done.stderr.count(f"where: {tmp_path}") == 3
    assert "Traceback" not in done.stderr
    assert mutations.tree(tmp_path) == before
    for path in paths:
        resolve(str(path))


def test_both_runtimes_installed(copy: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import importlib.metadata

    real = importlib.metadata.version
    monkeypatch.setattr(
        importlib.metadata, "version", lambda name: "1.31.0" if name.startswith("onnxruntime") else real(name)
    )
    program = resolve(str(copy("saved")))
    assert isinstance(program, Program)
    with pytest.raises(LaconicError, match="uninstall both") as caught:
        laconic.export_onnx(program, tmp_path / "new.onnx")
    assert caught.value.exit_code == 5
    assert not (tmp_path / "new.onnx").exists()


def faults(models: Path, work: Path, count: int, depth: str, *forms: str) -> list[str]:
    """What went wrong with `count` damaged models of each form, in a process of their own."""
    work.mkdir()
    command = [sys.executable, "-W", "ignore", mutations.__file__, str(models), str(work), str(count), depth, *forms]
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    lines = done.stdout.splitlines()
    assert (
        all(any(line.startswith(form) and line.endswith("Error") for line in lines) for form in forms)
        or done.returncode
    )
    found = [line for line in lines if "\tFAULT" in line]
    if done.returncode:
        found.append(f"ended with {done.returncode} after {lines[-1:]}: {done.stderr[-2000:]}")
    else:
        assert len(lines) == count * len(forms)
    return found


def test_random_damage(models: Path, tmp_path: Path) -> None:
    assert faults(models, tmp_path / "work", FAST, "shallow", *mutations.FORMATS) == []


@pytest.mark.slow
@pytest.mark.parametrize("form", mutations.FORMATS)
def test_much_random_damage(form: str, models: Path, tmp_path: Path) -> None:
    """What loads is captured too, and so compared with what it was read from."""
    assert faults(models, tmp_path / "work", THOROUGH, "deep", form) == []
