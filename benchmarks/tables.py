"""Write the tables of README.md, docs and models, between `<!-- table:NAME -->` and `<!-- /table -->`, from the
committed results and model cards."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median
from typing import Any

import layer_tables

ROOT = Path(__file__).parents[1]


def first_light() -> str:
    data = result("first_light")
    lines = [
        "| model, exact preset | nodes | weight bytes | largest difference | ONNX nodes |",
        "|---|---|---|---|---|",
    ]
    for name, row in data["models"].items():
        nodes, weights = row["nodes"], row["weight_bytes"]
        lines.append(
            f"| {name} | {nodes[0]} → {nodes[1]} | {weights[0]:,} → {weights[1]:,} | {row['max_abs']:g} | "
            f"{row['onnx']['nodes']} |"
        )
    return "\n".join([*lines, "", latency(data)])


def latency(data: dict[str, Any]) -> str:
    found, machine = data["latency"], data["machine"]
    parts = [
        f"{name} {found['ratio'][name][1]:.2f} ({found['ratio'][name][0]:.2f}–{found['ratio'][name][2]:.2f})"
        for name in found["milliseconds"]
        if name != "module"
    ]
    return (
        f"Time of {found['model']} on {found['shape'][0]} sentences, as a ratio to the eager module "
        "(median, quartiles): "
        f"{', '.join(parts)}. {machine['cpu']}, {machine['threads']} threads, torch {machine['torch']}. "
        "All but the first are small random models, whose equal weights are initial zeros and ones. "
        "[Script and result](benchmarks/README.md)"
    )


def onnx_nodes() -> str:
    data = result("onnx_nodes")
    lines = [
        "| 12 layers, random weights | torch, not optimised | opset 20 | said once | newest opset | said once | time |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in data["models"].items():
        ours, newest = row["ours"], row["newest"]
        times = ", ".join(f"{r['ratio']:.2f} ({r['quartiles'][0]:.2f}–{r['quartiles'][2]:.2f})" for r in row["latency"])
        lines.append(
            f"| {name} | {row['raw']} | {ours['nodes']} | {ours['nodes_with_functions']} | "
            f"{newest['nodes']} ({newest['opset']}) | {newest['nodes_with_functions']} | {times} |"
        )
    shapes = " and ".join("x".join(map(str, r["shape"][:2])) for r in next(iter(data["models"].values()))["latency"])
    pairs = next(iter(data["models"].values()))["latency"][0]["pairs"]
    return "\n".join(
        [
            *lines,
            "",
            "Standard-op nodes of the ONNX export after the preset `exact`, axes dynamic; *said once*: repeated layers "
            "as local functions. Time in ONNX Runtime as a ratio to torch's export: geometric mean (quartiles) of "
            f"{pairs} pairs, for text of {shapes} tokens and 1 and 4 images. {data['machine']['cpu']}, one thread, "
            f"onnxruntime {data['machine']['onnxruntime']}.",
        ]
    )


def costs() -> str:
    memory, graph = result("memory"), result("graph_10k")["graphs"]
    static, dynamic = graph["static"], graph["dynamic"]
    return (
        f"`laconic optimize` of a Hugging Face folder of {memory['model_bytes'] / 1e9:.1f} GB, capture, checks and "
        f"saving included: peak memory {memory['ratio']:.2f} x the model above what imports take. The preset with "
        f"every pass verified, on {static['nodes'][0]:,} nodes: {static['seconds']:.1f} s "
        f"({dynamic['seconds']:.1f} s with dynamic axes)."
    )


WAYS = {
    "compiled": 'backend="laconic"',
    "compiled-without-passes": "the same without our passes",
    "inductor": "Inductor",
    "inductor-deduplicated": "Inductor, `use_graph_deduplication`",
    "nested-region": "Inductor, `nested_compile_region` by hand",
    "regional": "`layer.compile()` by hand",
}


def compile_time() -> str:
    data = result("compile_time")
    inference, training = data["inference"], data["training"]
    depths = list(inference)
    step = next(iter(training))
    heads = [f"{depth} layers" for depth in depths]
    lines = [
        f"| CPU seconds to the first result (over Inductor's) | {' | '.join(heads)} | training step, {step} layers "
        "| gradients |",
        "|---|" + "---|" * (len(depths) + 2),
    ]
    for way, label in WAYS.items():
        cells = [_seconds(inference[depth][way]) for depth in depths]
        row = training[step][way]
        right = "right" if row["gradients_right"] else f"**wrong**, {row['gradient_error']:.2g} x"
        lines.append(f"| {label} | {' | '.join(cells)} | {_seconds(row)} | {right} |")
    note = (
        "A Llama-shaped model of width 256, in a process of its own with empty caches; median of "
        f"{len(inference[depths[0]]['inductor']['each'])}. Gradients: the largest error of a parameter's, relative to "
        f"its largest value. {_where(data)}"
    )
    return "\n".join([*lines, "", note])


def _where(data: dict[str, Any]) -> str:
    return f"{data['machine']['cpu']}, one thread, torch {data['machine']['torch']}."


def _seconds(row: dict[str, Any]) -> str:
    return f"{row['cpu_seconds']:.1f} ({row['ratio']:.2f})"


def compile_latency() -> str:
    data = result("compile_latency")
    lines = [
        "| time of a call over Inductor's (quartiles) | with our passes | without | pieces, calls of them |",
        "|---|---|---|---|",
    ]
    rows = {**data["models"], "training step, 24 layers of Llama": data["training_step"]}
    for name, row in rows.items():
        cells = [
            f"{row['ratio'][way][1]:.3f} ({row['ratio'][way][0]:.3f}–{row['ratio'][way][2]:.3f})"
            for way in ("compiled", "compiled-without-passes")
        ]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['pieces']}, {row['steps']} |")
    mean, peaks = data["geometric_mean"], data["peak_bytes"]
    lines.append(
        f"| **geometric mean of the models** | {mean['compiled']:.3f} | {mean['compiled-without-passes']:.3f} | |"
    )
    memory = ", ".join(
        f"{mode} {peaks[mode]['compiled'] / peaks[mode]['inductor']:.2f}" for mode in ("inference", "training")
    )
    note = (
        f"Medians of pairs of calls in one process, {data['pairs']} of each model. Peak memory of a call over "
        f"Inductor's: {memory}. "
        f"{_where(data)}"
    )
    return "\n".join([*lines, "", note])


def load_time() -> str:
    data = result("load_time")
    lines = ["| CPU seconds to the first result, caches on disk filled | after imports | after a trivial function |"]
    lines.append("|---|---|---|")
    labels = {
        "inductor": "torch.compile, Inductor",
        "laconic": 'torch.compile, `backend="laconic"`',
        "load": "`laconic.load(DIR, compile=True)`",
    }
    warm = data["warm"]
    for way, label in labels.items():
        cells = [f"{found[way]['cpu'][1]:.2f} ({found[way]['ratio'][1]:.2f})" for found in warm.values()]
        lines.append(f"| {label} | {' | '.join(cells)} |")
    backend = " and ".join(f"{found['laconic']['backend_ratio'][1]:.2f}" for found in warm.values())
    note = (
        f"{data['model']['layers']} layers of Llama in a new process, median of {data['repeats']} (over Inductor's of "
        f"the same turn). Of torch.compile's seconds most are Dynamo's; those inside the backend are {backend} of "
        f"Inductor's. {_where(data)}"
    )
    return "\n".join([*lines, "", note])


def training() -> str:
    data = result("training")
    lines = [
        "| model | losses apart | Inductor's | eager's, last bits changed | with dropout, means apart |",
        "|---|---|---|---|---|",
    ]
    for name, row in data["models"].items():
        lines.append(
            f"| {name} | {row['largest_relative_difference']:.1e} | {row['inductor']:.1e} | "
            f"{min(row['last_bits_of_weights']):.1e} to {max(row['last_bits_of_weights']):.1e} | "
            f"{row['dropout']['standard_errors_apart']:.1f} standard errors |"
        )
    seeds = next(iter(data["models"].values()))["dropout"]["seeds"]
    note = (
        f"{data['steps']} Adam steps against eager: the largest relative difference of a loss, beside Inductor's, and "
        "that of eager against itself where half of the weights are moved by their last bit (rounding grows that much "
        "in so many steps); with dropout, the mean loss of the last quarter over "
        f"{seeds} seeds each (Welch). {_where(data)}"
    )
    return "\n".join([*lines, "", note])


def axes() -> str:
    data = result("axes")
    lines = [
        "| model | calls with a rule | free axes of weights | weight elements with a free axis | permuted | halved |",
        "|---|---|---|---|---|---|",
    ]
    for name, row in data["models"].items():
        if "problem" in row:
            lines.append(f"| {name} | {row['problem']} | | | | |")
            continue
        trials = [
            f"{row[kind]['tried'] - row[kind]['void']} of {row[kind]['tried']}, {row[kind]['worst']:.0e}"
            for kind in ("permuted", "halved")
        ]
        lines.append(
            f"| {name} | {row['known_calls'] / row['calls']:.0%} of {row['calls']:,} | "
            f"{row['free_weight_axes']} of {row['weight_axes']} | "
            f"{row['elements_with_a_free_axis'] / row['weight_elements']:.0%} | {' | '.join(trials)} |"
        )
    times = data["times"]
    static, dynamic = times["static"], times["dynamic"]
    one, most = "one hidden axis", "all axes without a pin"
    note = (
        f"Permuted and halved: trials that say something, of those tried (at most {data['most']}, drawn, and all "
        "at once), and the largest error in float64, relative to the largest result. A trial says nothing if the "
        "results do not move even with one weight alone permuted, or with zeros put in. On "
        f"{static['nodes']:,} nodes the analysis takes {static['analysis']['seconds']:.1f} s "
        f"({dynamic['analysis']['seconds']:.1f} s with dynamic axes), halving one axis {static[one]['seconds']:.1f} s "
        f"({dynamic[one]['seconds']:.1f} s), halving {static[most]['axes']} axes, by which "
        f"{static[most]['nodes_touched']:,} calls change, {static[most]['seconds']:.1f} s "
        f"({dynamic[most]['seconds']:.1f} s). {_where(data)}"
    )
    return "\n".join([*lines, "", note])


def layers() -> str:
    data = result("layers")
    return f"{layer_tables.methods(data)} {_where(data)}"


def layers_together() -> str:
    data = result("layers")
    return f"{layer_tables.together(data)} {_where(data)}"


def depth_latency() -> str:
    data = result("depth_latency")
    lines = [
        "| model | blocks | compiled, ms | of the trunk, over k / n | ONNX Runtime, ms | of the trunk, over k / n |",
        "|---|---|---|---|---|---|",
    ]
    places = {(row["model"], row["left"]): row["blocks"] for row in data["rows"]}
    for (model, left), blocks in places.items():
        cells = []
        for kind in ("compiled", "onnxruntime"):
            keys = ("model", "left", "kind")
            (row,) = (row for row in data["rows"] if tuple(row[key] for key in keys) == (model, left, kind))
            over = row.get("over_k_of_n")
            cells.append(f"{row['milliseconds']['median']:.1f}")
            cells.append(f"{over['median']:.3f} [{over['low']:.3f}, {over['high']:.3f}]" if over else "")
        lines.append(f"| {model} | {left} of {blocks} | {' | '.join(cells)} |")
    inputs = "; ".join(f"{row['model']}: {row['input']}" for row in data["rows"] if row["left"] == 0)
    inputs = "; ".join(dict.fromkeys(inputs.split("; ")))
    note = (
        "By what share of the trunk (all blocks against none) dropping k of n makes a call shorter, over k / n: "
        f"medians of {data['turns']} turns with 95 % intervals. {inputs}. {_where(data)}"
    )
    return "\n".join([*lines, "", note])


def share_hash() -> str:
    data = result("share_hash")
    rates = sorted({row["rate"] for row in data["rows"]})
    lines = [
        f"| numbers in matrices | {' | '.join(f'rate {rate}' for rate in rates)} |",
        f"|---|{'---|' * len(rates)}",
    ]
    for form in dict.fromkeys(row["form"] for row in data["rows"]):
        cells, numbers = [], 0
        for rate in rates:
            own = [row for row in data["rows"] if (row["form"], row["rate"]) == (form, rate)]
            numbers, failed = own[0]["numbers"], sum(row["diverged"] for row in own)
            cells.append(f"{failed} of {len(own)} diverge" if failed else f"{median(row['top1'] for row in own):.3f}")
        lines.append(f"| {form}: {numbers:,} | {' | '.join(cells)} |")
    return "\n".join(
        [*lines, "", f"Top-1 of 8 x 8 digits, test split, median of five seeds, SGD with momentum. {_where(data)}"]
    )


def zoo() -> str:
    lines = [
        "| model | weights | measured on the test split | against | better by |",
        "|---|---|---|---|---|",
    ]
    for path in sorted(ROOT.glob("models/checkpoints/*/card.json")):
        card = json.loads(path.read_text())
        size = f"{card['weights']['bytes'] / 1e6:.1f} MB"
        said = ", ".join(f"{row['metric']} {_interval(row)}" for row in card["eval"]["test"])
        against, better = "", ""
        if "kneser_ney" in card:
            parts = card["kneser_ney"]["test"]
            against = f"5-gram Kneser-Ney, nats {parts['all']['baseline']['value']:.3f}"
            better = f"{_interval(parts['all']['better_by'])}; novel tokens {_interval(parts['novel']['better_by'])}"
        if "reading" in card:
            half = card["reading"]["test"]["half at the embedding"]
            against, better = f"a random half of the tokens, {_interval(half['read'])}", _interval(half["loses"])
        lines.append(
            f"| [{card['name']}](checkpoints/{card['name']}/README.md) | {size} | {said} | {against} | {better} |"
        )
    return "\n".join(
        [
            *lines,
            "",
            "95 % intervals by package, digit or group. `laconic eval zoo:NAME` gives the third column, "
            "`python -m laconic.models.card NAME` all.",
        ]
    )


def _interval(row: dict[str, float]) -> str:
    return f"{row['value']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"


def result(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())
    return found


TABLES = {
    "first_light": first_light,
    "onnx_nodes": onnx_nodes,
    "costs": costs,
    "compile_time": compile_time,
    "compile_latency": compile_latency,
    "load_time": load_time,
    "training": training,
    "axes": axes,
    "depth_latency": depth_latency,
    "layers": layers,
    "layers_together": layers_together,
    "share_hash": share_hash,
    "zoo": zoo,
}


PAGES = tuple(
    ROOT / page for page in ("README.md", "docs/torch-compile.md", "docs/axes.md", "docs/layers.md", "models/README.md")
)


def filled(text: str) -> str:
    """A page with its tables as the results say."""
    for name, table in TABLES.items():
        pattern = rf"(<!-- table:{name} -->\n).*?(<!-- /table -->)"
        text = re.sub(pattern, lambda m, table=table: f"{m[1]}{table()}\n{m[2]}", text, flags=re.DOTALL)
    return text


def main() -> None:
    for page in PAGES:
        page.write_text(filled(page.read_text()))


if __name__ == "__main__":
    main()
