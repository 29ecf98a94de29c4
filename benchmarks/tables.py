"""Write the tables of README.md, between `<!-- table:NAME -->` and `<!-- /table -->`, from the committed results."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]


def first_light() -> str:
    data = json.loads((ROOT / "benchmarks/results/first_light.json").read_text())
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


def main() -> None:
    readme = ROOT / "README.md"
    text = re.sub(
        r"(<!-- table:first_light -->\n).*?(<!-- /table -->)",
        lambda m: f"{m[1]}{first_light()}\n{m[2]}",
        readme.read_text(),
        flags=re.DOTALL,
    )
    readme.write_text(text)


if __name__ == "__main__":
    main()
