"""The debug flags of `laconic optimize`, through the command line: what goes where, and which slips are refused."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import pytest
import yaml

from laconic.cli.main import run
from laconic.cli.optimize import _repeated
from laconic.passes import registry

ROOT = Path(__file__).parents[2]
FAULTY = EntryPoint("fast-tanh", "examples.fast_tanh:FastTanh", "laconic.passes")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "160")
    return tmp_path


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The example as a DIR, so that each command need not capture it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT))
        folder = tmp_path_factory.mktemp("captured") / "model"
        assert run(["optimize", "examples.twice:model", "-o", str(folder), "-p", "none", "-q"]) == 0
    return str(folder)


@pytest.fixture
def faulty(monkeypatch: pytest.MonkeyPatch) -> None:
    """The faulty pass of `examples/`, as an installed package would bring it."""
    monkeypatch.setitem(registry.PASSES.table, FAULTY.name, FAULTY.value)


def optimize(capfd: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> tuple[str, list[str]]:
    """stdout, and the lines of stderr, of a dry run."""
    capfd.readouterr()
    assert run(["optimize", *arguments, "--dry-run", "-q"]) == code
    out, err = capfd.readouterr()
    return out, err.splitlines()


def rows(capfd: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads(optimize(capfd, *arguments, "--json")[0])["passes"]
    return found


def test_without_flags_stderr_is_empty(captured: str, capfd: pytest.CaptureFixture[str]) -> None:
    out, err = optimize(capfd, captured)
    assert err == []
    assert "dry run: no DIR was written" in out


def test_prints_go_to_stderr_and_results_to_stdout(captured: str, capfd: pytest.CaptureFixture[str]) -> None:
    out, err = optimize(capfd, captured, "--print-after", "dedup", "--print-after", "dce", "--json")
    assert json.loads(out)["verified"] is True
    assert [line for line in err if line.startswith("***")] == [
        "*** after dedup (2 of 4) ***",
        "*** after dce (4 of 4) ***",
    ]
    assert err.count("laconic program 1") == 2
    assert len([line for line in err if line.startswith("entry forward")]) == 2
    _, err = optimize(capfd, captured, "--print-after-all")
    assert err.count("laconic program 1") == 4


def test_print_changed_says_nothing_of_what_stayed(captured: str, capfd: pytest.CaptureFixture[str]) -> None:
    _, err = optimize(capfd, captured, "-p", "cse,simplify", "--print-changed")
    assert err[0] == "*** after cse (1 of 2): no change ***"
    assert err[1] == "*** after simplify (2 of 2) ***"
    removed = [line for line in err if line.startswith("-")]
    assert len(removed) == 2
    assert all("%mul_2" in line for line in removed)


def test_long_lines_are_not_folded(captured: str, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    _, err = optimize(capfd, captured, "-p", "dce", "--print-after-all")
    assert "  %linear_0: f32[batch, 4] = aten.linear(%x, @first.weight, @first.bias) !0" in err


def test_times_are_a_row_per_pass_and_add_up(captured: str, capfd: pytest.CaptureFixture[str]) -> None:
    out, err = optimize(capfd, captured, "--time-passes", "--json")
    assert json.loads(out)["schema"] == 1
    table = [[cell.strip() for cell in line.split("│")] for line in err if "│" in line]
    assert [row[0] for row in table] == [
        *("captured", "simplify", "dedup", "cse", "dce", "ledger and instruments", "all"),
    ]
    totals = [float(row[5]) for row in table]
    assert totals[-1] == pytest.approx(sum(totals[:-1]), abs=0.001)
    assert table[-1][6] == "100.0%"
    for row in table[:-2]:
        assert float(row[5]) == pytest.approx(sum(map(float, row[1:5])), abs=0.0003)


def test_disabled_and_stopped_passes_stand_in_the_ledger(captured: str, capfd: pytest.CaptureFixture[str]) -> None:
    found = rows(capfd, captured, "--disable-pass", "simplify", "--disable-pass", "cse", "--stop-after", "dedup")
    assert [(row["name"], row["skipped"], row["reason"]) for row in found] == [
        ("simplify", True, "skipped: --disable-pass simplify"),
        ("dedup", False, "2 same bytes"),
        ("cse", True, "skipped: --disable-pass cse"),
        ("dce", True, "skipped: --stop-after dedup"),
    ]
    pipeline = ["-p", "dedup,cse,dedup{slices=no}"]
    found = rows(capfd, captured, *pipeline, "--disable-pass", "dedup{slices=no}")
    assert [row["skipped"] for row in found] == [False, False, True]
    found = rows(capfd, captured, *pipeline, "--disable-pass", "dedup")
    assert [row["skipped"] for row in found] == [True, False, True]
    found = rows(capfd, captured, *pipeline, "--stop-after", "dedup")
    assert [row["skipped"] for row in found] == [False, True, True]


def test_what_ran_stands_in_the_recipe(captured: str, here: Path) -> None:
    assert run(["optimize", captured, "-o", "out", "--stop-after", "dedup", "-q"]) == 0
    recipe = yaml.safe_load((here / "out" / "recipe.yaml").read_text())
    assert recipe["pipeline"] == "simplify,dedup,cse,dce"
    assert recipe["passes"] == ["simplify", "dedup"]
    assert recipe["skipped"] == [{"pass": p, "reason": "skipped: --stop-after dedup"} for p in ("cse", "dce")]
    assert recipe["verified"] is True


def test_bisect_limit_counts_from_one(captured: str, capfd: pytest.CaptureFixture[str]) -> None:
    _, err = optimize(capfd, captured, "--bisect-limit", "1", "--disable-pass", "simplify")
    assert err == [
        "BISECT: running pass (1) dedup on program",
        "BISECT: NOT running pass (2) cse on program",
        "BISECT: NOT running pass (3) dce on program",
    ]
    _, err = optimize(capfd, captured, "--bisect-limit", "-1")
    assert len(err) == 4
    assert not any("NOT" in line for line in err)


def test_dumps_are_models_for_every_command(captured: str, here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    optimize(capfd, captured, "--dump-dir", "dumps")
    names = sorted(path.name for path in (here / "dumps").iterdir())
    assert names == ["000-captured", "001-simplify", "002-dedup", "003-cse", "004-dce"]
    again = rows(capfd, "dumps/002-dedup", "-p", "cse,dce")
    assert [row["after"]["nodes"] for row in again] == [row["after"]["nodes"] for row in rows(capfd, captured)][2:]
    assert run(["diff", "dumps/000-captured", captured, "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["equal"] is True
    assert run(["diff", "dumps/000-captured", "dumps/001-simplify", "--json"]) == 0
    data = json.loads(capfd.readouterr().out)
    assert (data["before"]["nodes"], data["after"]["nodes"], data["equal"]) == (6, 5, False)
    _, err = optimize(capfd, captured, "--dump-dir", "dumps", code=2)
    assert "dumps exists already" in err[0]
    optimize(capfd, captured, "--dump-dir", "dumps", "-p", "cse", "--force")
    assert sorted(path.name for path in (here / "dumps").iterdir()) == ["000-captured", "001-cse"]


@pytest.mark.usefixtures("faulty")
def test_the_line_in_the_message_reproduces_the_failure(
    captured: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    arguments = [captured, "-p", "simplify,dedup{slices=no},fast-tanh,dce", "--seed", "5"]
    arguments += ["--threads", "1", "--no-verify-each"]
    _, err = optimize(capfd, *arguments, code=3)
    assert "--dump-dir" in err[-1]
    _, err = optimize(capfd, *arguments, "--dump-dir", "my dumps", code=3)
    said = err[0]
    assert said == "laconic: the pass 'fast-tanh' failed: the contract 'exact' is broken: result 0 changed"
    assert sorted(path.name for path in (here / "my dumps").iterdir())[-1] == "002-dedup"
    line = err[-1].partition("to reproduce it: ")[2]
    assert line.endswith("--dry-run --seed 5 --threads 1 --no-verify-each")
    assert shlex.split(line)[0] == "laconic"
    assert run([*shlex.split(line)[1:], "-q"]) == 3
    assert capfd.readouterr().err.splitlines()[0] == said


@pytest.mark.usefixtures("faulty")
@pytest.mark.parametrize(
    "flags", [("--disable-pass", "fast-tanh"), ("--bisect-limit", "1"), ("--stop-after", "simplify")]
)
def test_each_way_past_a_faulty_pass(captured: str, capfd: pytest.CaptureFixture[str], flags: tuple[str, str]) -> None:
    optimize(capfd, captured, "-p", "simplify,fast-tanh", code=3)
    assert [row["skipped"] for row in rows(capfd, captured, "-p", "simplify,fast-tanh", *flags)] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--print-after", "cs"], "'cse'"),
        (["--print-after", "fald"], "there is no pass 'fald'"),
        (["--print-after", "nope"], "known: collapse-layers, cse, dce, dead-units, dedup, drop-layers"),
        (["--disable-pass", "simplfy"], "did you mean 'simplify'"),
        (["-p", "cse", "--disable-pass", "dce"], "the pipeline has no pass 'dce'"),
        (["-p", "cse", "--stop-after", "dedup{slices=no}"], "the pipeline has no pass 'dedup{slices=no}'"),
        (["--stop-after", "exact"], "is not one pass"),
        (["--bisect-limit", "-2"], "greater than or equal to -1"),
        (["--bisect-limit", "some"], "valid integer"),
    ],
)
def test_slips_are_usage_errors_before_the_work(
    capfd: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    """The model does not exist, and that is not what is complained of."""
    _, err = optimize(capfd, "no.such:model", *arguments, code=2)
    assert says in "\n".join(err)


def test_what_bears_on_a_failure_is_repeated() -> None:
    assert _repeated(0, 0, True, True) == []
    assert _repeated(5, 2, False, False) == ["--seed", "5", "--threads", "2", "--no-verify-each", "--no-check"]


def test_the_output_inside_the_dumps_is_refused(capfd: pytest.CaptureFixture[str], here: Path) -> None:
    assert run(["optimize", "no.such:model", "-o", "dumps/out", "--dump-dir", "dumps"]) == 2
    assert "dumps/out would stand inside dumps" in capfd.readouterr().err
    assert list(here.iterdir()) == []


@pytest.mark.parametrize("command", ["passes", "doctor", "explain"])
def test_commands_without_progress_take_the_options_too(command: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run([command, "--help"]) == 0
    said = capfd.readouterr().out
    assert all(option in said for option in ("--no-progress", "--quiet", "--verbose"))


def test_dumps_inside_the_output_are_refused(capfd: pytest.CaptureFixture[str], here: Path) -> None:
    assert run(["optimize", "no.such:model", "-o", "out", "--dump-dir", "out/dumps"]) == 2
    assert "inside out" in capfd.readouterr().err
    assert list(here.iterdir()) == []
