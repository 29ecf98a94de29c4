"""The plots in the docs, drawn from committed results.

    python benchmarks/plots.py

Each SVG says in a comment which results it shows; a test holds it to them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from statistics import median
from typing import Any

from layer_tables import kept, single

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "docs" / "images"
LAYERS = FOLDER / "layers.svg"


def digest(name: str) -> str:
    """What a plot of results says it shows."""
    return hashlib.sha256((ROOT / f"benchmarks/results/{name}.json").read_bytes()).hexdigest()


def curves(data: dict[str, Any], kind: str, model: str) -> dict[str, list[tuple[float, list[float]]]]:
    """For each method the shares of the blocks' bytes that are kept, and the divergences of all seeds."""
    found: dict[str, dict[float, list[float]]] = {}
    for row in data["rows"]:
        read = single(row["pipeline"])
        if row["model"] != model or "refused" in row or read is None:
            continue
        if not read[0].startswith(kind) and (kind, read[0]) != ("drop", "collapse-layers"):
            continue
        named = read[2].replace("method=", "").replace("unit=branch", "branches")
        label = f"LaCo {named}".strip() if read[0] == "collapse-layers" else named
        found.setdefault(label, {}).setdefault(round(kept(data, row), 3), []).append(row["figures"]["kl"]["value"])
    return {label: sorted(points.items()) for label, points in found.items()}


def draw_layers() -> None:
    import matplotlib.pyplot as plt

    data = json.loads((ROOT / "benchmarks/results/layers.json").read_text())
    models = list(data["originals"])
    plt.rcParams["svg.hashsalt"] = "laconic"
    figure, panels = plt.subplots(2, len(models), figsize=(4.2 * len(models), 8), squeeze=False)
    for column, model in enumerate(models):
        for row, (kind, title) in enumerate((("drop", "blocks dropped"), ("share", "blocks that share"))):
            panel = panels[row][column]
            for label, points in curves(data, kind, model).items():
                x, y = [share for share, _ in points], [median(values) for _, values in points]
                if label == "random":
                    low, high = [min(values) for _, values in points], [max(values) for _, values in points]
                    panel.fill_between(x, low, high, color="0.9", zorder=0)
                    panel.plot(x, y, color="0.6", marker=".", label="random, least to greatest")
                else:
                    style = "--" if label == "exhaustive" else "-"
                    panel.plot(x, y, style, marker=".", label=label)
            panel.set(title=f"{model}: {title}", xlabel="share of the blocks' bytes", yscale="log")
            panel.set_ylabel("divergence, nats (test split)")
            panel.invert_xaxis()
            if panel.get_lines():
                panel.legend(fontsize=6)
    figure.tight_layout()
    FOLDER.mkdir(exist_ok=True)
    figure.savefig(LAYERS, metadata={"Date": None})
    text = LAYERS.read_text().replace("<svg ", f"<!-- layers.json {digest('layers')} -->\n<svg ", 1)
    LAYERS.write_text("\n".join(line.rstrip() for line in text.splitlines()) + "\n")


if __name__ == "__main__":
    draw_layers()
