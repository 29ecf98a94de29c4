"""Model cards: what a reference model was trained on, what it reaches on held-out data, and by how much it beats what
knows no context. `python -m laconic.models.card NAME` measures a model and writes its card (README.md, card.json)."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from numpy.typing import NDArray

from laconic.data.text import Window, windows
from laconic.figures import figures
from laconic.ir.errors import LaconicError, UsageError, did_you_mean
from laconic.ir.metrics.quality import IGNORED, Accuracy, Nats
from laconic.ir.quality import Figure, Units, difference, figure
from laconic.machine import machine
from laconic.models import corpus, datasets, text_figures, tokenizer, trained
from laconic.models.canvas import EMPTY, GRID, QUADRANTS
from laconic.models.corpus import Split
from laconic.models.decoders import WINDOW
from laconic.models.kneser_ney import KneserNey
from laconic.models.vit import SIDE, right_digits
from laconic.sources import capture_source

_BATCH = 8


def measured(name: str, work: Path) -> dict[str, Any]:
    """The figures of a trained model; `work` is where the training tokens are kept. Raises ModelError if it is not
    here, UsageError if there is no such model."""
    if name in datasets.TEXT:
        return _text(name, work)
    if name in ("vit", "vlm"):
        return _vision(name)
    raise UsageError(f"there is no card for {name!r}", hint=did_you_mean(name, [*datasets.TEXT, "vit", "vlm"]))


# Text


@dataclass(frozen=True)
class _Predicted:
    """Each predicted token of a split: nats of the model and of the baseline, whether it is novel, its package."""

    nats: NDArray[np.float64]
    baseline: NDArray[np.float64]
    novel: NDArray[np.bool_]
    units: NDArray[np.str_]

    def against(self, chosen: NDArray[np.bool_]) -> dict[str, Any]:
        """Model, baseline and their paired difference on the chosen tokens."""
        ours, theirs = self._units(self.nats, chosen), self._units(self.baseline, chosen)
        return {
            "tokens": int(chosen.sum()),
            "model": asdict(figure(Nats(), ours)),
            "kneser_ney": asdict(figure(Nats(), theirs)),
            "better_by": asdict(difference(Nats(), theirs, ours)),
        }

    def _units(self, nats: NDArray[np.float64], chosen: NDArray[np.bool_]) -> Units:
        names, index = np.unique(self.units, return_inverse=True)
        sums = np.bincount(index[chosen], weights=nats[chosen], minlength=len(names)).astype(np.float64)
        counts = np.bincount(index[chosen], minlength=len(names)).astype(np.float64)
        return Units(tuple(names.tolist()), sums, counts)


def _text(name: str, work: Path) -> dict[str, Any]:
    model = trained.load(name)
    found: dict[str, Any] = {"splits": {}}
    for kind in (Split.SELECTION, Split.TEST):
        predicted = _predicted(model, kind, work)
        every = np.ones(len(predicted.nats), dtype=np.bool_)
        found["splits"][str(kind)] = {"all": predicted.against(every), "novel": predicted.against(predicted.novel)}
    if hasattr(model.model.layers[0].mlp, "gate"):
        found["router"] = _router(model)
    found["training_tokens"] = tokenizer.training_stream(work)[1]
    return found


def _predicted(model: Any, kind: Split, work: Path) -> _Predicted:
    parts: list[tuple[Window, NDArray[np.float64]]] = []
    baseline = _baseline(work)
    for document in corpus.committed(kind):
        ids, _ = tokenizer.encode([document])
        nats = -np.log(baseline.probabilities(ids))
        for k, window in enumerate(windows(ids.tolist(), WINDOW, document.group)):
            parts.append((window, nats[k * WINDOW + 1 : (k + 1) * WINDOW + 1]))
    parts.sort(key=lambda part: -len(part[0].ids))
    ours = [nats for k in range(0, len(parts), _BATCH) for nats in _nats(model, [w for w, _ in parts[k : k + _BATCH]])]
    return _Predicted(
        nats=np.concatenate(ours),
        baseline=np.concatenate([nats for _, nats in parts]),
        novel=np.concatenate([_novel(window) for window, _ in parts]),
        units=np.concatenate([np.full(len(nats), window.unit) for window, nats in parts]),
    )


@cache
def _baseline(work: Path) -> KneserNey:
    return KneserNey(tokenizer.training_stream(work)[0], tokenizer.VOCABULARY)


@torch.no_grad()
def _nats(model: Any, chosen: Sequence[Window]) -> list[NDArray[np.float64]]:
    """Of each window, nats of the tokens that follow its own."""
    longest = max(len(window.ids) for window in chosen)
    ids = torch.tensor([[*window.ids, *[1] * (longest - len(window.ids))] for window in chosen])
    logits = model(input_ids=ids, use_cache=False).logits.double().log_softmax(-1)
    found = []
    for row, window in zip(logits, chosen, strict=True):
        following = torch.tensor([token for token in window.following if token != IGNORED], dtype=torch.int64)
        found.append(-row[: len(following)].gather(1, following[:, None]).flatten().numpy())
    return found


def _novel(window: Window) -> NDArray[np.bool_]:
    predicted = [k for k, token in enumerate(window.following) if token != IGNORED]
    return np.array(text_figures.novel(window.ids, window.following), dtype=np.bool_)[predicted]


def _router(model: Any) -> dict[str, Any]:
    ids, _ = tokenizer.encode(corpus.committed(Split.SELECTION))
    load = text_figures.expert_load(model, torch.from_numpy(ids), WINDOW).double()
    share = load / load.mean(1, keepdim=True)
    found: dict[str, Any] = {
        "load": [[round(x, 3) for x in row] for row in share.tolist()],
        "max_over_mean": float(share.max()),
        "min_over_mean": float(share.min()),
    }
    gate = model.model.layers[0].mlp.gate
    if hasattr(gate, "e_score_correction_bias"):
        biases = [layer.mlp.gate.e_score_correction_bias.tolist() for layer in model.model.layers]
        found["selection_bias"] = [[round(x, 4) for x in row] for row in biases]
    return found


# Vision


def _vision(name: str) -> dict[str, Any]:
    model = trained.load(name)
    program = capture_source(trained.source(name))
    found: dict[str, Any] = {"splits": {}}
    for kind in (Split.SELECTION, Split.TEST):
        data = datasets.zoo_data(name, str(kind), program)
        (row,) = figures(program, None, data, [Accuracy()])
        found["splits"][str(kind)] = {"per_digit": {part: row[part] for part in ("value", "low", "high")}} | _half(
            name, model, kind
        )
    return found


def _half(name: str, model: Any, kind: Split) -> dict[str, Any]:
    """With all image tokens and with a random half of them: digits read right, and all of an image."""
    if name == "vit":
        drawn = datasets.draw(kind, QUADRANTS)
        present = torch.ones_like(drawn.labels, dtype=torch.bool)
        right = {kept: right_digits(model, drawn, kept) for kept in (None, SIDE * SIDE // 2)}
    else:
        from laconic.models.vlm import right_cells

        drawn = datasets.draw(kind, GRID)
        present = drawn.labels != EMPTY
        right = {kept: right_cells(model, drawn, kept)[0] for kept in (None, SIDE * SIDE // 2)}
    whole, half = (_by_digit(found, present, drawn.digits) for found in right.values())
    every = next(iter(right.values()))
    return {
        "whole_images": float((every | ~present).all(1).double().mean()),
        "greedy": asdict(whole[0]),
        "random_half": asdict(half[0]),
        "half_loses": asdict(difference(Accuracy(), whole[1], half[1])),
    }


def _by_digit(right: torch.Tensor, present: torch.Tensor, digits: torch.Tensor) -> tuple[Figure, Units]:
    names, index = np.unique(digits[present].numpy(), return_inverse=True)
    sums = np.bincount(index, weights=right[present].double().numpy()).astype(np.float64)
    units = Units(tuple(map(str, names)), sums, np.bincount(index).astype(np.float64))
    return figure(Accuracy(), units), units


# The card


def write_card(name: str, work: Path) -> dict[str, Any]:
    """Measure a model and write card.json and README.md into its folder."""
    folder = trained.folder(name)
    training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    weights = (folder / "model.safetensors").read_bytes()
    card = {
        "schema": 1,
        "name": name,
        "class": config["architectures"][0],
        "weights": {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest(), "dtype": "bfloat16"},
        "training": {key: training[key] for key in ("seed", "steps", "seconds")},
        "machine": machine(),
        "python": sys.version.split()[0],
        **measured(name, work),
    }
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(_page(card, training["curve"]), encoding="utf-8")
    return card


def _page(card: dict[str, Any], curve: Sequence[dict[str, float]]) -> str:
    from laconic.models.train import recipe

    said = (type(recipe(card["name"], Path("build"))).__doc__ or "").strip()
    lines = [f"# zoo:{card['name']}", "", " ".join(said.split()), ""]
    about = "the standard library's text" if card["name"] in datasets.TEXT else "handwritten digits on canvases"
    lines += [
        f"`{card['class']}`, {card['weights']['bytes'] / 1e6:.1f} MB in bfloat16, trained on {about} with seed "
        f"{card['training']['seed']} in {card['training']['steps']:,} steps "
        f"({card['training']['seconds'] / 60:.0f} minutes on {card['machine']['cpu']}, {card['machine']['threads']} "
        f"threads, torch {card['machine']['torch']}). Figures are of the stored weights in float32, 95 % intervals by "
        f"{'package' if card['name'] in datasets.TEXT else 'digit'}; `laconic eval zoo:{card['name']}` measures them "
        "again. All of them, the curve and the hashes: `card.json`, `training.json`.",
        "",
    ]
    rows = _text_rows(card) if card["name"] in datasets.TEXT else _vision_rows(card)
    lines += [*rows, "", *_router_lines(card), "| step | minutes | " + " | ".join(_columns(curve)) + " |"]
    lines.append("|---" * (2 + len(_columns(curve))) + "|")
    for row in curve[:: max(1, len(curve) // 8)]:
        values = " | ".join(f"{row[name]:.3f}" for name in _columns(curve))
        lines.append(f"| {row['step']:,} | {row['seconds'] / 60:.1f} | {values} |")
    return "\n".join(lines) + "\n"


def _columns(curve: Sequence[dict[str, float]]) -> list[str]:
    return [name for name in curve[-1] if name not in ("step", "seconds")]


def _text_rows(card: dict[str, Any]) -> list[str]:
    lines = ["| nats per token | model | 5-gram Kneser-Ney | better by |", "|---|---|---|---|"]
    for split, parts in card["splits"].items():
        for part, row in parts.items():
            cells = " | ".join(_interval(row[key]) for key in ("model", "kneser_ney", "better_by"))
            lines.append(f"| {split}, {part} ({row['tokens']:,} tokens) | {cells} |")
    return lines


def _vision_rows(card: dict[str, Any]) -> list[str]:
    lines = ["| digits read right | all tokens | a random half | loses | whole images |", "|---|---|---|---|---|"]
    for split, row in card["splits"].items():
        cells = " | ".join(_interval(row[key]) for key in ("greedy", "random_half", "half_loses"))
        lines.append(f"| {split} | {cells} | {row['whole_images']:.3f} |")
    return lines


def _router_lines(card: dict[str, Any]) -> list[str]:
    if "router" not in card:
        return []
    router = card["router"]
    said = (
        f"Load of an expert over the mean of its layer, on the selection split: {router['min_over_mean']:.2f} to "
        f"{router['max_over_mean']:.2f}."
    )
    if "selection_bias" in router:
        greatest = max(abs(x) for row in router["selection_bias"] for x in row)
        said += f" Selection biases reach {greatest:.3f}."
    return [said, ""]


def _interval(found: dict[str, float]) -> str:
    return f"{found['value']:.3f} [{found['low']:.3f}, {found['high']:.3f}]"


def main(name: str, work: Path = Path("build/models")) -> None:
    """Measure a trained model and write its card."""
    typer.echo(json.dumps(write_card(name, work)["splits"], indent=1))


if __name__ == "__main__":
    try:
        typer.run(main)
    except LaconicError as problem:
        typer.echo(problem.render(), err=True)
        sys.exit(problem.exit_code)
