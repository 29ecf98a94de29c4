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
from laconic.ir.errors import LaconicError
from laconic.ir.metrics.quality import IGNORED, Accuracy, Nats
from laconic.ir.metrics.registry import load as load_metric
from laconic.ir.program import Program
from laconic.ir.quality import Units, difference, figure
from laconic.machine import machine
from laconic.models import canvas, corpus, datasets, minilm, text_figures, tokenizer, trained, zoo
from laconic.models.canvas import EMPTY, GRID, QUADRANTS
from laconic.models.card_page import page
from laconic.models.corpus import Split
from laconic.models.decoders import WINDOW
from laconic.models.kneser_ney import KneserNey
from laconic.models.vit import SIDE, right_digits
from laconic.sources import capture_source

_BATCH = 8
_HELD_OUT = (Split.CALIBRATION, Split.SELECTION, Split.TEST)


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
            "baseline": asdict(figure(Nats(), theirs)),
            "better_by": asdict(difference(Nats(), theirs, ours)),
        }

    def _units(self, nats: NDArray[np.float64], chosen: NDArray[np.bool_]) -> Units:
        names, index = np.unique(self.units, return_inverse=True)
        sums = np.bincount(index[chosen], weights=nats[chosen], minlength=len(names)).astype(np.float64)
        counts = np.bincount(index[chosen], minlength=len(names)).astype(np.float64)
        return Units(tuple(names.tolist()), sums, counts)


def _text(name: str, work: Path) -> dict[str, Any]:
    model = trained.load(name)
    found: dict[str, Any] = {"kneser_ney": {}}
    for kind in (Split.SELECTION, Split.TEST):
        predicted = _predicted(model, kind, work)
        every = np.ones(len(predicted.nats), dtype=np.bool_)
        found["kneser_ney"][str(kind)] = {"all": predicted.against(every), "novel": predicted.against(predicted.novel)}
    if hasattr(model.model.layers[0].mlp, "gate"):
        found["router"] = _router(model)
    stream, digest = tokenizer.training_stream(work)
    found["data"] = {
        "text": "Python's standard library",
        "python": corpus.recorded()["python"],
        "training": {"documents": len(corpus.training_documents()), "tokens": len(stream), "sha256": digest},
        "documents": {str(kind): corpus.recorded()["documents"][kind] for kind in _HELD_OUT},
        "sha256": {str(kind): corpus.recorded()["sha256"][kind] for kind in _HELD_OUT},
    }
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
    """Loads of the experts over the mean of their layer, on all of a split and on one document of it."""
    found: dict[str, Any] = {}
    for kind in (Split.SELECTION, Split.TEST):
        own = [torch.from_numpy(tokenizer.encode([document])[0]) for document in corpus.committed(kind)]
        loads = torch.stack([text_figures.expert_load(model, ids, WINDOW) for ids in own]).double()
        share = loads.sum(0) / loads.sum(0).mean(1, keepdim=True)
        worst = (loads / loads.mean(2, keepdim=True)).amax((1, 2))
        found[str(kind)] = {
            "load": [[round(x, 3) for x in row] for row in share.tolist()],
            "max_over_mean": float(share.max()),
            "min_over_mean": float(share.min()),
            "of_one_document": {"median": float(worst.median()), "greatest": float(worst.max())},
        }
    gate = model.model.layers[0].mlp.gate
    if hasattr(gate, "e_score_correction_bias"):
        biases = [layer.mlp.gate.e_score_correction_bias.tolist() for layer in model.model.layers]
        found["selection_bias"] = [[round(x, 4) for x in row] for row in biases]
    return found


# Vision


def _reading(name: str, kind: Split) -> dict[str, Any]:
    """Digits read right and whole canvases, with all image tokens; and what is lost with a random half of them, dropped
    behind the embedding, and for the vlm between tower and decoder too."""
    model, half = trained.load(name), SIDE * SIDE // 2
    if name == "vit":
        drawn = datasets.draw(kind, QUADRANTS)
        whole, halves = right_digits(model, drawn), {"embedding": right_digits(model, drawn, half)}
    else:
        from laconic.models.vlm import right_cells

        drawn = datasets.draw(kind, GRID)
        whole, _ = right_cells(model, drawn)
        halves = {
            "embedding": right_cells(model, drawn, half, early=True)[0],
            "decoder": right_cells(model, drawn, half)[0],
        }
    present = drawn.labels != EMPTY
    units = _by_digit(whole, present, drawn.digits)
    found: dict[str, Any] = {
        "whole_images": float((whole | ~present).all(1).double().mean()),
        "greedy": asdict(figure(Accuracy(), units)),
    }
    for place, right in halves.items():
        fewer = _by_digit(right, present, drawn.digits)
        lost = asdict(difference(Accuracy(), units, fewer))
        found[f"half at the {place}"] = {"read": asdict(figure(Accuracy(), fewer)), "loses": lost}
    return found


def _by_digit(right: torch.Tensor, present: torch.Tensor, digits: torch.Tensor) -> Units:
    names, index = np.unique(digits[present].numpy().astype(np.str_), return_inverse=True)
    sums = np.bincount(index, weights=right[present].double().numpy()).astype(np.float64)
    return Units(tuple(names.tolist()), sums, np.bincount(index).astype(np.float64))


# The card


def measured(name: str, work: Path) -> dict[str, Any]:
    """The card of a model, measured now. `work` is where the training tokens are kept.

    Raises ModelError if the model is not here, UsageError if there is no such model.
    """
    source = zoo.load(name)
    program = capture_source(source)
    weights = (zoo.folder(name) / "model.safetensors").read_bytes()
    card: dict[str, Any] = {
        "schema": 1,
        "name": name,
        "class": type(next(part for part in source.module.modules() if hasattr(part, "config"))).__name__,
        "weights": {"bytes": len(weights), "sha256": hashlib.sha256(weights).hexdigest()},
        "machine": machine(),
        "eval": {str(split): _evaluated(name, program, split) for split in (Split.SELECTION, Split.TEST)},
    }
    if name in datasets.TEXT:
        card |= _text(name, work)
    elif name in ("vit", "vlm"):
        card["reading"] = {str(kind): _reading(name, kind) for kind in (Split.SELECTION, Split.TEST)}
        card["data"] = canvas.recorded() | {"canvases": {str(kind): datasets.CANVASES for kind in _HELD_OUT}}
    else:
        card["data"] = minilm.recorded()
    if name in zoo.TRAINED:
        training = json.loads((trained.FOLDER / name / "training.json").read_text(encoding="utf-8"))
        card["training"] = {key: training[key] for key in ("seed", "steps", "seconds")}
    return card


def write_card(name: str, work: Path) -> dict[str, Any]:
    """Measure a model and write card.json and README.md into its folder; that of minilm holds nothing else. Raises what
    `measured` raises."""
    card, folder = measured(name, work), trained.FOLDER / name
    curve = []
    if name in zoo.TRAINED:
        curve = json.loads((folder / "training.json").read_text(encoding="utf-8"))["curve"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(page(card, curve), encoding="utf-8")
    return card


def _evaluated(name: str, program: Program, split: Split) -> list[dict[str, Any]]:
    """What `laconic eval zoo:NAME --data zoo:NAME:SPLIT` says."""
    data = datasets.zoo_data(name, str(split), program)
    return figures(program, None, data, [load_metric(metric) for metric in data.metrics])


def main(name: str, work: Path = Path("build/models")) -> None:
    """Measure a trained model and write its card."""
    typer.echo(json.dumps(write_card(name, work)["eval"], indent=1))


if __name__ == "__main__":
    try:
        typer.run(main)
    except LaconicError as problem:
        typer.echo(problem.render(), err=True)
        sys.exit(problem.exit_code)
