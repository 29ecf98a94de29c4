"""The reference models as they are stored: their cards, what they are held to, and what can be done with them."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import pytest
import torch
from safetensors import safe_open

from compiled import compiled
from laconic.cli.main import run
from laconic.codegen import stats
from laconic.models import datasets, tokenizer, trained, zoo
from laconic.models.canvas import GRID
from laconic.models.card_page import page
from laconic.models.corpus import Split, committed
from laconic.models.vlm import prompt

DENSE, MIXTURES, VISION = ("llama-gqa", "llama-mha"), ("moe", "moe-sigmoid"), ("vit", "vlm")
TRAINED, NAMES = tuple(zoo.TRAINED), tuple(zoo.names())
CARDS: dict[str, dict[str, Any]] = {
    name: json.loads((trained.FOLDER / name / "card.json").read_text(encoding="utf-8")) for name in NAMES
}
SPLITS = ("selection", "test")


def slow_but(fast: str, *names: str) -> list[Any]:
    return [name if name == fast else pytest.param(name, marks=pytest.mark.slow) for name in names]


def test_checkpoints_are_small_and_those_of_the_cards() -> None:
    sizes = {}
    for name in TRAINED:
        weights = trained.FOLDER / name / "model.safetensors"
        sizes[name] = weights.stat().st_size
        assert hashlib.sha256(weights.read_bytes()).hexdigest() == CARDS[name]["weights"]["sha256"]
        with safe_open(weights, "pt") as file:
            other = [k for k in file.keys() if file.get_slice(k).get_dtype() != "BF16"]  # noqa: SIM118  no mapping
        assert all(key.endswith("e_score_correction_bias") for key in other)
    assert max(sizes.values()) <= 14e6
    assert sum(sizes.values()) <= 36e6


@pytest.mark.parametrize("name", NAMES)
def test_the_page_is_that_of_the_card(name: str) -> None:
    folder = trained.FOLDER / name
    curve = []
    if name in zoo.TRAINED:
        training = json.loads((folder / "training.json").read_text(encoding="utf-8"))
        curve = training["curve"]
        assert curve[-1]["step"] == training["steps"] == CARDS[name]["training"]["steps"]
    assert page(CARDS[name], curve) == (folder / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "least", "novel"), [*((name, 0.8, 0.2) for name in DENSE), *((name, 0.5, 0.1) for name in MIXTURES)]
)
def test_decoders_know_more_than_ngrams(name: str, least: float, novel: float) -> None:
    for split in SPLITS:
        found = CARDS[name]["kneser_ney"][split]
        assert found["all"]["better_by"]["value"] >= least
        assert found["novel"]["better_by"]["value"] >= novel
        assert found["novel"]["better_by"]["low"] > 0


@pytest.mark.parametrize("name", MIXTURES)
def test_experts_are_in_balance_in_every_layer(name: str) -> None:
    router = CARDS[name]["router"]
    assert max(max(row) for row in router["load"]) == pytest.approx(router["max_over_mean"], abs=1e-3)
    assert router["max_over_mean"] < 2
    assert router["min_over_mean"] > 0.2
    if name == "moe-sigmoid":
        assert all(any(abs(x) > 1e-3 for x in row) for row in router["selection_bias"])


@pytest.mark.parametrize("name", VISION)
def test_digits_are_read_and_half_of_the_tokens_do_not_do(name: str) -> None:
    (evaluated,) = (row for row in CARDS[name]["eval"]["test"] if row["metric"] == "top1")
    reading = CARDS[name]["reading"]["test"]
    assert evaluated["value"] > 0.95
    assert reading["greedy"]["value"] > 0.95
    halves = {place: row for place, row in reading.items() if place.startswith("half")}
    assert halves.keys() == {"half at the embedding", *(["half at the decoder"] if name == "vlm" else [])}
    for half in halves.values():
        assert half["loses"]["value"] >= 0.05
        assert half["loses"]["low"] > 0


@pytest.mark.parametrize("name", slow_but("vit", *NAMES))
def test_eval_measures_what_the_card_says(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", f"zoo:{name}", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["data"] == f"zoo:{name}:test"
    for row, said in zip(found["figures"], CARDS[name]["eval"]["test"], strict=True):
        assert {k: row[k] for k in ("metric", "units")} == {k: said[k] for k in ("metric", "units")}
        for key in ("value", "low", "high"):
            assert row[key] == pytest.approx(said[key], rel=1e-3)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("name", slow_but("vlm", *DENSE, *MIXTURES, "vlm"))
def test_generate_says_the_same_when_compiled(name: str) -> None:
    model = trained.load(name)
    inputs, new = (_canvases(), GRID.cells) if name == "vlm" else (_texts(), 32)
    how = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "pad_token_id": 1}
    caches: list[dict[str, Any]] = [{}] if name == "vlm" else [{}, {"cache_implementation": "static"}]
    wanted = [model.generate(**inputs, **how, **cache) for cache in caches]
    assert len(wanted[0][0].unique()) > 3
    model.forward = compiled(model.forward)
    for cache, tokens in zip(caches, wanted, strict=True):
        assert torch.equal(model.generate(**inputs, **how, **cache), tokens)
    assert stats()["rolled"] >= 2
    assert not stats()["fallbacks"]


def _texts() -> dict[str, torch.Tensor]:
    """Two prompts, the second padded at the left."""
    ids, _ = tokenizer.encode(committed(Split.SELECTION)[:1])
    rows = torch.from_numpy(ids[:96]).reshape(2, 48)
    mask = torch.ones_like(rows)
    rows[1, :9], mask[1, :9] = 1, 0
    return {"input_ids": rows, "attention_mask": mask}


def _canvases() -> dict[str, torch.Tensor]:
    ids = prompt(2).clone()
    pixels = datasets.draw(Split.SELECTION, GRID, 2).pixels
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
