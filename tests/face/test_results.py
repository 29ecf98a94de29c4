"""The committed results hold what is promised of them, and the pages show them."""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "benchmarks")]

import layer_tables  # noqa: E402
import plots  # noqa: E402
import tables  # noqa: E402
import training  # noqa: E402


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    assert {"torch", "cpu"} <= found["machine"].keys()
    return found


@pytest.mark.parametrize("page", tables.PAGES, ids=lambda page: page.name)
def test_pages_show_the_results(page: Path) -> None:
    assert tables.filled(page.read_text()) == page.read_text(), "make tables"


def test_seconds_to_the_first_result() -> None:
    found = result("compile_time")
    inference, step = found["inference"], found["training"]["24"]["compiled"]
    for depth, allowed in (("24", 0.30), ("48", 0.22), ("80", 0.20)):
        assert inference[depth]["compiled"]["ratio"] <= allowed
        assert inference[depth]["compiled"]["cpu_seconds"] < inference[depth]["inductor-deduplicated"]["cpu_seconds"]
    at = inference["24"]
    assert at["compiled"]["cpu_seconds"] <= 1.25 * at["regional"]["cpu_seconds"]
    assert at["compiled"]["backend_cpu_seconds"] <= 1.2 * inference["2"]["compiled"]["backend_cpu_seconds"]
    assert step["ratio"] <= 0.30
    assert step["gradients_right"]


def test_steady_latency_and_memory() -> None:
    found = result("compile_latency")
    assert len(found["models"]) == 8
    assert found["geometric_mean"]["compiled"] <= 1.03
    assert max(row["ratio"]["compiled"][1] for row in found["models"].values()) <= 1.08
    assert found["training_step"]["ratio"]["compiled"][1] <= 1.10
    for mode, allowed in (("inference", 1.05), ("training", 1.10)):
        assert found["peak_bytes"][mode]["compiled"] <= allowed * found["peak_bytes"][mode]["inductor"]


def test_a_second_process() -> None:
    warm = result("load_time")["warm"]
    assert warm["after a trivial function"]["laconic"]["backend_ratio"][1] <= 0.6
    for found in warm.values():
        assert found["laconic"]["ratio"][1] <= 1.05
        assert found["load"]["ratio"][1] <= 0.5


def test_losses_of_two_hundred_steps() -> None:
    found = result("training")
    assert found["models"].keys() == training.MODELS.keys()
    assert found["steps"] == 200
    for row in found["models"].values():
        assert row["losses"][1] < 0.9 * row["losses"][0]
        assert row["largest_relative_difference"] < 2 * max(row["last_bits_of_weights"]), "more than rounding"
        assert row["dropout"]["standard_errors_apart"] < 3.5


def test_axes() -> None:
    found = result("axes")
    models = {name: row for name, row in found["models"].items() if "problem" not in row}
    assert len([name for name in models if name.startswith("zoo:")]) == 7
    assert len(models) >= 27
    for row in models.values():
        assert row["known_calls"] == row["calls"]
        for kind in ("permuted", "halved"):
            assert row[kind]["worst"] < 1e-10
            assert row[kind]["void"] <= 0.2 * row[kind]["tried"]
    for times in found["times"].values():
        assert times["nodes"] >= 10_000
        assert times["analysis"]["seconds"] < 5
        for what in ("one hidden axis", "all hidden axes", "all axes without a pin"):
            assert times[what]["seconds"] < 2 + 0.002 * times[what]["nodes_touched"]


def test_dropped_blocks_take_their_share_of_the_trunk_along() -> None:
    """Within a tenth, compiled and in ONNX Runtime."""
    rows = [row for row in result("depth_latency")["rows"] if "over_k_of_n" in row]
    assert {(row["model"], row["kind"]) for row in rows} == {
        (model, kind) for model in ("zoo:llama-mha", "zoo:vit") for kind in ("compiled", "onnxruntime")
    }
    assert len(rows) == 12
    assert all(0.9 < row["over_k_of_n"]["median"] < 1.1 for row in rows)


def test_share_hash() -> None:
    """At three rates all runs with the scaling learn, and none of ROAST's do."""
    rows = result("share_hash")["rows"]
    for rate in (0.1, 0.2, 0.4):
        ours, roast = ([r for r in rows if (r["form"], r["rate"]) == (form, rate)] for form in ("share-hash", "ROAST"))
        assert len(ours) == len(roast) == 5
        assert all(row["top1"] > 0.95 for row in ours)
        assert all(row["diverged"] for row in roast)


def test_layers() -> None:
    """States that are judged as a whole are never worse than layers rated one by one, beyond the interval."""
    found = result("layers")
    assert found["rows"]
    kl = {(row["model"], row["pipeline"]): row["figures"]["kl"] for row in found["rows"] if "figures" in row}
    for (model, pipeline), figure in kl.items():
        if "drop-layers" in pipeline and pipeline.endswith("method=search}"):
            other = kl[model, pipeline.replace("search", "influence")]
            assert figure["low"] <= other["high"], f"{pipeline} on {model}"
        tried = pipeline.replace("method=search", "method=exhaustive").replace("branch}", "branch,method=exhaustive}")
        best = kl.get((model, tried))
        if tried != pipeline and best is not None:
            assert figure["value"] <= 1.02 * best["value"], f"{pipeline} on {model}"


def test_corrections_branches_and_healing_are_worth_it() -> None:
    """At equal bytes, beyond the interval."""
    found = result("layers")
    rows = {(row["model"], row["pipeline"]): row for row in found["rows"] if "figures" in row}
    fold = "drop-layers{keep=0.75,method=gates},share-layers{keep=0.67,method=functional}" + layer_tables.HEALED
    pairs = [
        ("share-layers{keep=0.75,donors=0.25}", "share-layers{keep=0.75,method=search}"),
        ("share-layers{keep=0.5,donors=0.375}", "share-layers{keep=0.5,method=search}"),
        ("drop-layers{keep=0.75,unit=branch}", "drop-layers{keep=0.75,method=search}"),
        (fold, "drop-layers{keep=0.5,method=influence}" + layer_tables.HEALED),
        (fold, "collapse-layers{keep=0.5}" + layer_tables.HEALED),
    ]
    pairs += [(name, name.removesuffix(layer_tables.HEALED)) for _, name in rows if name.endswith(layer_tables.HEALED)]
    held = 0
    for model, (better, worse) in itertools.product(found["originals"], pairs):
        plain = worse.replace(",method=search", "") if (model, worse) not in rows else worse
        if (model, better) in rows and (model, plain) in rows:
            ours, theirs = rows[model, better], rows[model, plain]
            assert ours["figures"]["kl"]["value"] < theirs["figures"]["kl"]["low"], f"{better} on {model}"
            assert ours["weight_bytes"] <= theirs["weight_bytes"] * 1.005  # blocks that share keep their norms
            held += 1
    assert held >= 20


def test_the_plot_of_layers_shows_the_results() -> None:
    assert f"layers.json {plots.digest('layers')}" in plots.LAYERS.read_text()
