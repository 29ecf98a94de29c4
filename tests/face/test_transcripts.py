"""The documentation's transcripts are what the commands print, and show every flag."""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import typer

from laconic.cli.main import app
from laconic.passes import registry

SCRIPT = Path(__file__).parents[2] / "docs" / "transcripts.py"

#: The flags that the public surface names, and what else is new beside them.
FLAGS = (
    *("--print-after", "--print-after-all", "--print-changed", "--dump-dir", "--no-verify-each", "--time-passes"),
    *("--bisect-limit", "--disable-pass", "--stop-after", "--dry-run"),
)


@pytest.fixture(scope="module")
def transcripts() -> ModuleType:
    spec = importlib.util.spec_from_file_location("transcripts", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def undisturbed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The script runs as in a process of its own: it changes the current folder and the environment, imports the
    examples from a copy, and installs a pass."""

    def forget() -> None:
        registry.PASSES.__dict__.pop("table", None)
        for name in [n for n in sys.modules if n.partition(".")[0] == "examples"]:
            del sys.modules[name]

    for name in ("NO_COLOR", "COLUMNS", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    monkeypatch.setattr(sys, "path", [p for p in sys.path if Path(p or ".").resolve() != SCRIPT.parents[1]])
    forget()
    yield
    forget()


@pytest.mark.usefixtures("undisturbed")
def test_the_commands_print_what_the_documentation_shows(
    transcripts: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert transcripts.main(update=False) == 0, capsys.readouterr().out


def test_every_debug_flag_is_shown(transcripts: ModuleType) -> None:
    text = (SCRIPT.parents[1] / "docs" / "debugging.md").read_text(encoding="utf-8")
    shown = {word for block in transcripts.BLOCK.finditer(text) for word in block["command"].split()}
    assert set(FLAGS) <= shown
    assert {"diff", "explain", "bench"} <= shown
    command: typer.core.TyperCommand = typer.main.get_command(app).commands["optimize"]  # type: ignore[attr-defined]
    known = {name for p in command.params for name in (*p.opts, *p.secondary_opts)}
    assert set(FLAGS) <= known


def test_what_is_not_compared_is_times_versions_and_widths_alone(transcripts: ModuleType) -> None:
    same = transcripts.normal
    assert same("a ┃ 0.001 │ 12.3%\n━━╇━━") == same("a   ┃  0.12 │   5.0%\n━╇━━━━━━")
    assert same("torch 2.13.0+cpu") == same("torch 2.14.1")
    assert same("interval of 95 %; A, 2 threads") == same("interval of 95 %; B, 64 threads")
    for one, other in (("3 -> 2", "3 -> 1"), ("%a = exp(%x)", "%a = exp(%y)"), ("a\nb", "a b"), ("skipped", "")):
        assert same(one) != same(other)
