"""The saved DIR: reads back to the same bits, refuses what was damaged, and is never half there."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

import laconic
from helpers import bits
from laconic import artefact
from laconic.ir.errors import ModelError, UsageError, VerificationError
from laconic.ir.metrics.differences import bit_equal

#: Saves to one DIR again and again in a child that is killed; after each kill the DIR must load and compute.
KILLER = """
import os, random, signal, sys, time, torch, laconic
torch.set_num_threads(1)
moments = random.Random(0)
target = sys.argv[1]
results = []
for seed in range(2):
    torch.manual_seed(seed)
    model = torch.nn.Sequential(*[torch.nn.Linear(64, 64) for _ in range(4)])
    results.append(laconic.optimize(model, inputs=(torch.ones(2, 64),)))
wanted = [bytes(r.model(torch.ones(2, 64)).numpy()) for r in results]
results[0].save(target)
seen = set()
for kill in range(20):
    child = os.fork()
    if child == 0:
        while True:
            for result in results:
                result.save(target, force=True)
    time.sleep(0.02 + moments.random() * 0.3)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    seen.add(wanted.index(bytes(laconic.load(target)(torch.ones(2, 64)).numpy())))
left = [name for name in os.listdir(os.path.dirname(target)) if name != "out"]
results[0].save(target, force=True)
print(sorted(seen), len(left), os.listdir(os.path.dirname(target)))
"""


class Counting(nn.Module):
    """Weights of every awkward kind: tied, transposed, a view of another, counted, complex, empty."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.turned = nn.Parameter(torch.randn(8, 4).t())
        base = torch.randn(16)
        self.register_buffer("low", base[:8])
        self.register_buffer("wide", base[:12])
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
        self.register_buffer("none", torch.zeros(0, 3))
        self.register_buffer("turn", torch.randn(8, dtype=torch.complex64))
        self.register_buffer("spread", torch.randn(1, 8).expand(3, 8))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        self.seen.add_(1)
        y = self.second(self.first(x)) + self.low + self.wide[:8] + self.spread.sum(0)
        return {"y": y @ self.turned.t(), "turned": (y * self.turn).abs(), "n": self.none.sum() + self.seen}


@pytest.fixture(scope="module")
def result() -> laconic.Result:
    torch.manual_seed(0)
    batch = {0: torch.export.Dim("batch")}
    return laconic.optimize(Counting(), inputs={"x": torch.randn(3, 8)}, dynamic_shapes={"x": batch})


@pytest.fixture(scope="module")
def saved(result: laconic.Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return result.save(tmp_path_factory.mktemp("saved") / "out")


def test_it_reads_back_to_the_same_bits_and_state(result: laconic.Result, saved: Path) -> None:
    one, two = laconic.load(saved), laconic.load(saved)
    for batch in (1, 3, 6):
        x = torch.randn(batch, 8)
        a, b = one(x), two(x=x)
        assert all(bit_equal(a[k], b[k]) for k in a)
    assert one.seen == 3
    assert set(one.state_dict()) >= {"first.weight", "second.weight", "seen", "low"}
    assert one.second.weight is one.first.weight


def test_a_storage_is_written_once(saved: Path, result: laconic.Result) -> None:
    weights = sum(w.value.numel() * w.value.element_size() for w in result.program.weights.values())
    assert (saved / "weights.safetensors").stat().st_size < weights + 4096
    assert {p.name for p in saved.iterdir()} == {
        "program.txt",
        "weights.safetensors",
        "recipe.yaml",
        "ledger.json",
        "plans",
    }


def test_alignment_survives(tmp_path: Path) -> None:
    """Weights that start off a boundary, as a mapped file gives them, come back as they were."""
    room = torch.randn(64 * 64 + 6)
    linear = nn.Linear(64, 64)
    linear.weight = nn.Parameter(room[6:].view(64, 64))
    result = laconic.optimize(linear, inputs=(torch.randn(1, 64),))
    reloaded = laconic.load(result.save(tmp_path / "out"))
    assert reloaded.program.weights["weight"].value.data_ptr() % 64 == linear.weight.data_ptr() % 64
    x = torch.randn(1, 64)
    assert bit_equal(reloaded(x), linear(x).detach())


def test_an_existing_dir_is_left_alone_without_force(result: laconic.Result, saved: Path) -> None:
    before = (saved / "program.txt").read_bytes()
    with pytest.raises(UsageError, match="exists"):
        result.save(saved)
    assert (saved / "program.txt").read_bytes() == before
    assert os.listdir(saved.parent) == ["out"]


@pytest.mark.parametrize("name", ["program.txt", "weights.safetensors", "recipe.yaml", "ledger.json", "plans/2.json"])
@pytest.mark.parametrize("damage", ["missing", "cut", "changed"])
def test_damage_is_named(saved: Path, tmp_path: Path, name: str, damage: str) -> None:
    copy = tmp_path / "copy"
    subprocess.run(["cp", "-r", str(saved), str(copy)], check=True)
    file = copy / name
    content = file.read_bytes()
    if damage == "missing":
        file.unlink()
    elif damage == "cut":
        file.write_bytes(content[: len(content) // 2])
    else:
        middle = content.index(b"weights.safetensors: ") + 30 if name == "recipe.yaml" else len(content) // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(ModelError) as caught:
        laconic.load(copy)
    assert ("weights.safetensors" if damage == "changed" and name == "recipe.yaml" else name) in str(caught.value)


def test_an_unverified_dir_is_refused(tmp_path: Path) -> None:
    result = laconic.optimize(nn.Linear(4, 4), inputs=(torch.ones(1, 4),), check=False)
    folder = result.save(tmp_path / "out")
    assert yaml.safe_load((folder / "recipe.yaml").read_text())["verified"] is False
    with pytest.raises(VerificationError, match="UNVERIFIED"):
        laconic.load(folder)
    laconic.load(folder, allow_unverified=True)(torch.ones(1, 4))


#: A change to recipe.yaml, and what must be said of it.
_RECIPES = [
    (lambda r: r.update(hashes={}), "hashes are of"),
    (lambda r: r["hashes"].pop("program.txt"), "hashes are of"),
    (lambda r: r["hashes"].update({"model.onnx": "0"}), "model.onnx is missing"),
    (lambda r: r["hashes"].update({"ledger.json": "0"}), "ledger.json is not the file that was saved"),
    (lambda r: r["hashes"].update({"plans/1.json": "0"}), "plans/1.json is not the file that was saved"),
    (lambda r: r["hashes"].update({"../x": "0"}), "names '../x', which is no file in the DIR"),
    (lambda r: r["hashes"].update({"/etc/passwd": "0"}), "names '/etc/passwd', which is"),
    (lambda r: r["hashes"].update({"plans/../ledger.json": "0"}), "names 'plans/../ledger.json', which is"),
    (lambda r: r["hashes"].update({".": "0"}), "names '.', which is"),
    (lambda r: r["hashes"].update({"a\0": "0"}), "which is no file in the DIR"),
    (lambda r: r["hashes"].update({3: "0"}), "hashes has 3"),
    (lambda r: r["hashes"].update({"ledger.json": 0}), "hashes has 'ledger.json': 0"),
    (lambda r: r.update(versions=[]), "versions is not what"),
    (lambda r: r.update(format=99), "has format 99; this laconic reads format 1"),
    (lambda r: r.update(format="1"), "names no format"),
    (lambda r: r.pop("format"), "lacks 'format'"),
    (lambda r: r.pop("verified"), "lacks 'verified'"),
    (lambda r: r["hashes"].update({"program.txt": "0"}), "is not the file that was saved"),
]


@pytest.mark.parametrize(("change", "message"), _RECIPES, ids=[m for _, m in _RECIPES])
def test_another_recipe_is_refused(
    saved: Path, tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(saved, copy)
    recipe = yaml.safe_load((copy / "recipe.yaml").read_text())
    change(recipe)
    (copy / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    with pytest.raises(ModelError, match=message):
        laconic.load(copy)


def test_what_a_link_leads_to_is_held_to_its_hash(saved: Path, tmp_path: Path) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    shutil.move(tmp_path / "copy" / "ledger.json", tmp_path / "ledger.json")
    (tmp_path / "copy" / "ledger.json").symlink_to(tmp_path / "ledger.json")
    laconic.load(tmp_path / "copy")
    (tmp_path / "ledger.json").write_text("{}")
    with pytest.raises(ModelError, match=r"ledger.json is not the file that was saved"):
        laconic.load(tmp_path / "copy")


def test_all_files_but_the_recipe_are_hashed(saved: Path) -> None:
    hashes = yaml.safe_load((saved / "recipe.yaml").read_text())["hashes"]
    there = {str(p.relative_to(saved)) for p in saved.rglob("*") if p.is_file()}
    assert hashes.keys() == there - {"recipe.yaml"}
    assert "plans/1.json" in hashes
    assert hashes == {name: hashlib.sha256((saved / name).read_bytes()).hexdigest() for name in hashes}


@pytest.mark.parametrize("text", ["[" * 5000, "a: " + "{b: " * 3000, "- 1", "x", "", "d: 2024-99-99", "\0"], ids=str)
def test_what_is_no_recipe_is_refused(saved: Path, tmp_path: Path, text: str) -> None:
    shutil.copytree(saved, tmp_path / "copy")
    (tmp_path / "copy" / "recipe.yaml").write_text(text)
    with pytest.raises(ModelError, match=r"recipe\.yaml cannot be read"):
        laconic.load(tmp_path / "copy")


def test_the_seed_of_the_checks_stands_in_the_recipe(result: laconic.Result, tmp_path: Path) -> None:
    artefact.save(result.program, result.report, result.plans, tmp_path / "out", seed=17)
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["seed"] == 17


def test_force_replaces_a_dir_or_an_empty_folder_and_nothing_else(result: laconic.Result, tmp_path: Path) -> None:
    foreign = tmp_path / "model"
    foreign.mkdir()
    result.save(foreign, force=True)
    result.save(foreign, force=True)
    (foreign / "recipe.yaml").rename(foreign / "config.json")
    before = sorted(os.listdir(foreign))
    with pytest.raises(UsageError, match="neither empty nor a DIR"):
        result.save(foreign, force=True)
    assert sorted(os.listdir(foreign)) == before
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match="is a file"):
        result.save(tmp_path / "file", force=True)
    assert (tmp_path / "file").read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["file", "model"]


class Scaled(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.shape[1] ** -0.5


class Halved(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, float]:
        return x + 1, x.shape[1] / 2


class Compared(nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, bool]:
        return x + 1, x.shape[0] > 2


@pytest.mark.parametrize("module", [Scaled, Halved, Compared])
def test_numbers_that_depend_on_sizes_survive(module: type[nn.Module], tmp_path: Path) -> None:
    axes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}
    result = laconic.optimize(module(), inputs={"x": torch.randn(3, 4)}, dynamic_shapes={"x": axes})
    reloaded = laconic.load(result.save(tmp_path / "out"))
    for shape in ((3, 4), (2, 7)):
        x = torch.randn(shape)
        assert bits(reloaded(x)) == bits(module()(x))


class Named(nn.Module):
    def forward(self, größe: torch.Tensor, *, maß: torch.Tensor) -> torch.Tensor:
        return größe + maß


def test_names_need_not_be_ascii(tmp_path: Path) -> None:
    axes = {0: torch.export.Dim("größe")}
    inputs = {"größe": torch.ones(3, 4), "maß": torch.ones(3, 4)}
    result = laconic.optimize(Named(), inputs=inputs, dynamic_shapes={"größe": axes, "maß": axes})
    reloaded = laconic.load(result.save(tmp_path / "out"))
    assert bits(reloaded(größe=torch.ones(2, 4), maß=torch.ones(2, 4))) == bits(torch.full((2, 4), 2.0))


def test_failing_while_saving_leaves_nothing(
    result: laconic.Result, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("laconic.artefact._write_recipe", fail)
    with pytest.raises(KeyboardInterrupt):
        result.save(tmp_path / "out")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_kill_at_twenty_moments_leaves_the_old_dir_or_the_new_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", KILLER, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("[0, 1]"), "both programs were found in place"
    assert done.stdout.rstrip().endswith("['out']"), (
        "what killed savers left beside the DIR is cleaned by the next save"
    )
