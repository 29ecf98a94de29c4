"""The command line, as a person uses it: exit codes, one-screen errors, nothing left half-written."""

from __future__ import annotations

import json
import os
import pty
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from laconic.cli.main import run

USER_CODE = """
import torch
from torch import nn


class Small(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)
        self.b.load_state_dict(self.a.state_dict())

    def forward(self, x):
        return self.b(self.a(x) * 1)


class Branching(nn.Module):
    def forward(self, x):
        if x.sum() > 0:  # the culprit
            return x
        return -x


def small():
    return Small(), {"x": torch.randn(3, 8)}, {"x": {0: torch.export.Dim("batch")}}


def other():
    module = Small()
    with torch.no_grad():
        module.a.bias.add_(0.5)
    return module, {"x": torch.randn(3, 8)}, {"x": {0: torch.export.Dim("batch")}}


def branching():
    return Branching(), (torch.ones(2),)


def broken():
    module = Small()
    module.a.weight.data[0, 0] = float("nan")
    return module, (torch.ones(2, 8),)


def failing():
    raise ValueError("no weights today")


def wrong():
    return 3


def fixed():
    return Small(), {"x": torch.randn(3, 8)}


class Reshapes(nn.Module):
    def forward(self, x):
        return x.reshape(3, -1, 8) * 2


def reshapes():
    return Reshapes(), {"x": torch.randn(3, 4, 8)}, {"x": {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")}}
"""
BROKEN_CODE = {
    "unclosed.py": "import torch\n\ndef made(:\n",
    "unfound.py": "import torch\nfrom torch import nothing_of_this_name\n",
    "needs.py": "import torch\nimport a_module_that_is_not_there\n",
}


@pytest.fixture(autouse=True)
def user_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of the user's with a module of their own, which is the current one."""
    (tmp_path / "mine.py").write_text(USER_CODE)
    for name, code in BROKEN_CODE.items():
        (tmp_path / name).write_text(code)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    sys.modules.pop("mine", None)
    return tmp_path


def failed(capfd: pytest.CaptureFixture[str], code: int, *arguments: str) -> str:
    """Run, expect this exit code and one screen of error; returns it."""
    assert run(list(arguments)) == code
    error = capfd.readouterr().err
    assert "Traceback" not in error
    assert 0 < len(error.splitlines()) <= 24
    return error


def test_help_is_fast_and_imports_no_torch() -> None:
    command = [sys.executable, "-X", "importtime", "-m", "laconic", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "| torch" not in shown.stderr
    assert "optimize" in shown.stdout
    best = min(_seconds([sys.executable, "-m", "laconic", "--help"]) for _ in range(5))
    assert best < 0.3


def _seconds(command: list[str]) -> float:
    """Processor seconds, which a busy machine does not stretch."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def test_optimize_writes_a_dir_and_the_ledger(user_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["optimize", "mine:small", "-o", "out", "--json", "--format", "onnx", "--format", "pt2"]) == 0
    ledger = json.loads(capfd.readouterr().out)
    assert ledger["schema"] == 1
    assert ledger["verified"] is True
    fired = {row["name"]: row["modified"] for row in ledger["passes"]}
    assert fired == {"dedup": True, "simplify": True, "cse": False, "dce": False}
    assert ledger["after"]["weight_bytes"] * 2 == ledger["before"]["weight_bytes"]
    assert {p.name for p in (user_folder / "out").iterdir()} >= {"model.onnx", "model.pt2", "program.txt"}
    assert run(["eval", "out", "--against", "mine:small", "--json", "--repeats", "2"]) == 0
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert all(row["max-abs"] == 0.0 and row["memory MB"] > 0 for row in rows)
    assert all(
        row[f"{name} low"] <= row[name] <= row[f"{name} high"] for row in rows for name in ("latency ms", "ratio")
    )


def test_an_axis_that_the_model_fixes_is_no_failure(capfd: pytest.CaptureFixture[str], user_folder: Path) -> None:
    assert run(["optimize", "mine:reshapes", "-o", "out"]) == 0
    text = (user_folder / "out" / "program.txt").read_text()
    assert 'fact specialized = ["x axis 0 = 3"]' in text
    assert "size tokens in [1, inf] like 4" in text


def test_dry_run_writes_nothing(user_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = sorted(p.name for p in user_folder.iterdir())
    assert run(["optimize", "mine:small", "--dry-run", "-p", "simplify,cse"]) == 0
    assert "simplify" in capfd.readouterr().out
    assert sorted(p.name for p in user_folder.iterdir() if p.name != "__pycache__") == before


def test_eval_tells_models_apart(capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        run(["eval", "mine:small", "--against", "mine:other", "--metric", "max-abs", "--metric", "cosine", "--json"])
        == 0
    )
    rows = json.loads(capfd.readouterr().out)["rows"]
    assert all(row["max-abs"] > 0.01 and row["cosine"] < 1 for row in rows)


def test_export_and_passes_and_doctor(user_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["export", "mine:small", "-o", "small.onnx", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["format"] == "onnx"
    assert run(["export", "mine:small", "-o", "small.pt2"]) == 0
    assert torch.export.load("small.pt2").module()(x=torch.ones(5, 8)).shape == (5, 8)
    capfd.readouterr()
    assert run(["passes", "--json"]) == 0
    listed = json.loads(capfd.readouterr().out)
    assert {"cse", "dce", "dedup", "simplify"} <= {p["name"] for p in listed["passes"]}
    assert run(["doctor", "--json"]) == 0
    assert "torch" in {p["name"] for p in json.loads(capfd.readouterr().out)["parts"]}


@pytest.mark.parametrize(
    ("code", "arguments", "says"),
    [
        (2, ["optimize", "mine:small", "-o", "x", "-p", "simplfy"], "simplify"),
        (2, ["optimize", "mine:small", "-o", "x", "-p", "dedup{slces=no}"], "slices"),
        (2, ["optimize", "mine:small", "-o", "x", "-p", "dedup{slices=perhaps}"], "yes or no"),
        (2, ["optimize", "mine:small", "-o", "x", "-p", "cse,,dce"], "pipeline:1:5"),
        (2, ["optimize", "mine:smal", "-o", "x"], "mine:small"),
        (2, ["optimize", "nowhere:small", "-o", "x"], "nowhere"),
        (2, ["optimize", "zoo:minilmm", "-o", "x"], "minilm"),
        (2, ["optimize", "mine.py", "-o", "x"], "MODEL is one of"),
        (2, ["optimize", "mine", "-o", "x"], "mine.py"),
        (2, ["optimize", "mine:wrong", "-o", "x"], "must return"),
        (2, ["optimize", "mine:failing", "-o", "x"], "no weights today"),
        (2, ["optimize", "mine:small"], "-o DIR"),
        (2, ["optimize", "mine:small", "-o", "x", "--format", "onx"], "onnx"),
        (2, ["eval", "mine:small", "--metric", "max-abs"], "--against"),
        (2, ["eval", "mine:small", "--metric", "latncy"], "latency"),
        (2, ["export", "mine:small", "-o", "x.bin"], "F.onnx"),
        (2, ["optimise", "mine:small"], "optimize"),
        (2, ["optimize", "mine:small", "--dri-run"], "dry-run"),
        (2, ["optimize", "unclosed:made", "-o", "x"], "unclosed.py:3"),
        (2, ["optimize", "unfound:made", "-o", "x"], "unfound.py:2"),
        (2, ["optimize", "needs:made", "-o", "x"], "needs.py:2"),
        (2, ["eval", "mine:small", "--against", "mine:fixed"], "axis 0 is dynamic in the one, fixed at 3"),
        (4, ["optimize", "mine:branching", "-o", "x"], "mine.py:19"),
        (1, ["optimize", "mine:broken", "-o", "x"], "a.weight: 1 of 64"),
    ],
)
def test_failures(
    user_folder: Path, capfd: pytest.CaptureFixture[str], code: int, arguments: list[str], says: str
) -> None:
    assert says in failed(capfd, code, *arguments)
    assert not (user_folder / "x").exists()
    assert not list(user_folder.glob(".x*"))


def test_an_existing_output_is_refused_before_the_work(user_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (user_folder / "out").mkdir()
    start = time.perf_counter()
    assert "--force" in failed(capfd, 2, "optimize", "mine:small", "-o", "out")
    assert time.perf_counter() - start < 1
    assert list((user_folder / "out").iterdir()) == []


def test_damaged_weights_of_a_folder(user_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = user_folder / "folder"
    folder.mkdir()
    assert "config.json" in failed(capfd, 1, "optimize", "folder", "-o", "x")
    (folder / "config.json").write_text('{"model_type": "bert", "architectures": ["BertModel"]}')
    assert "safetensors" in failed(capfd, 1, "optimize", "folder", "-o", "x")
    (folder / "model.safetensors").write_bytes(b"\x10\x00")
    assert "model.safetensors" in failed(capfd, 1, "optimize", "folder", "-o", "x")


@pytest.mark.parametrize("moment", [0.2, 1.5, 3.0, 5.0])
def test_ctrl_c_leaves_terminal_and_disk_clean(user_folder: Path, moment: float) -> None:
    """In a terminal of its own: the cursor is shown again, the exit code is 130, no file is left."""
    master, slave = pty.openpty()
    command = [sys.executable, "-m", "laconic", "optimize", "mine:small", "-o", "out", "--format", "onnx"]
    environment = {**os.environ, "TERM": "xterm", "PYTHONPATH": str(user_folder)}
    child = subprocess.Popen(
        command, stdin=slave, stdout=slave, stderr=slave, cwd=user_folder, env=environment, start_new_session=True
    )
    os.close(slave)
    time.sleep(moment)
    child.send_signal(signal.SIGINT)
    shown = b""
    while True:
        try:
            chunk = os.read(master, 65536)
        except OSError:
            break
        if not chunk:
            break
        shown += chunk
    child.wait()
    os.close(master)
    text = shown.decode(errors="replace")
    assert text.count("\x1b[?25l") == text.count("\x1b[?25h"), "the cursor is shown again"
    assert child.returncode in (130, 0)
    assert "Traceback" not in text
    left = {p.name for p in user_folder.iterdir()} - {"mine.py", "__pycache__", *BROKEN_CODE}
    assert left == ({"out"} if child.returncode == 0 else set())
