"""The reference models as they are stored: their cards, what they are held to, and what can be done with them."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from compiled import compiled
from laconic.cli.main import run
from laconic.codegen import stats
from laconic.data.load import load_data
from laconic.data.named import NamedData
from laconic.ir.data import refuse_overlap
from laconic.ir.errors import UsageError
from laconic.models import canvas, corpus, datasets, tokenizer, trained, zoo
from laconic.models.canvas import GRID, QUADRANTS
from laconic.models.card import measured
from laconic.models.card_page import page
from laconic.models.corpus import Split, committed
from laconic.models.vlm import prompt

DENSE, MIXTURES, VISION = ("llama-gqa", "llama-mha"), ("moe", "moe-sigmoid"), ("vit", "vlm")
DECODERS, TRAINED, NAMES = DENSE + MIXTURES, tuple(zoo.TRAINED), tuple(zoo.names())
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


@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_has_the_shape_that_passes_need(name: str) -> None:
    config = trained.load(name).config
    heads, caches = config.num_attention_heads, config.num_key_value_heads
    width = config.head_dim if name != "moe-sigmoid" else config.qk_head_dim
    assert config.max_position_embeddings >= 512
    assert width % 64 == 0
    if name == "llama-mha":
        assert (heads, config.num_hidden_layers >= 10, config.hidden_size % 128) == (caches, True, 0)
    elif name == "llama-gqa":
        assert config.hidden_size > 2 * caches * width
    else:
        experts = getattr(config, "n_routed_experts", None) or config.num_local_experts
        assert (config.num_hidden_layers, experts, config.num_experts_per_tok, config.norm_topk_prob) == (
            6,
            16,
            2,
            True,
        )
    if name == "moe-sigmoid":
        assert (config.n_group, config.topk_group, config.n_shared_experts, config.v_head_dim % 64) == (4, 2, 1, 0)


def test_image_models_have_196_patches_and_a_class_token() -> None:
    vit, vlm = trained.load("vit"), trained.load("vlm")
    tower = next(part for part in vlm.modules() if type(part).__name__ == "ViTEmbeddings")
    for embeddings in (vit.vit.embeddings, tower):
        assert embeddings.cls_token.numel() == 128
        assert embeddings.position_embeddings.shape == (1, 197, 128)


@pytest.mark.parametrize("name", TRAINED)
def test_a_card_agrees_with_itself_and_with_the_training(name: str) -> None:
    card = CARDS[name]
    training = json.loads((trained.FOLDER / name / "training.json").read_text(encoding="utf-8"))
    assert card["training"] == {key: training[key] for key in ("seed", "steps", "seconds")}
    for split in SPLITS:
        evaluated = {row["metric"]: row for row in card["eval"][split]}
        if name in VISION:
            read = card["reading"][split]
            same = {key: pytest.approx(evaluated["top1"][key], abs=2e-3) for key in ("value", "low", "high")}
            assert read["greedy"] == same
            for half in (row for place, row in read.items() if place.startswith("half")):
                assert half["loses"]["value"] == pytest.approx(read["greedy"]["value"] - half["read"]["value"])
            continue
        whole = card["kneser_ney"][split]["all"]
        same = {key: pytest.approx(evaluated["nats"][key], rel=1e-6) for key in ("value", "low", "high")}
        assert whole["model"] == same
        for part in card["kneser_ney"][split].values():
            assert part["better_by"]["value"] == pytest.approx(part["baseline"]["value"] - part["model"]["value"])
    if name in VISION:
        assert {key: card["data"][key] for key in ("digits", "sha256")} == canvas.recorded()
    else:
        assert card["data"]["sha256"] == corpus.recorded()["sha256"]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_a_card_says_what_is_measured(name: str, tmp_path: Path) -> None:
    found, said = measured(name, tmp_path), CARDS[name]
    texts = [card["data"].get("training", {}).get("sha256") for card in (found, said)]
    near = 1e-3 if texts[0] == texts[1] else 0.05  # the library of another Python, another baseline
    assert leaves_of(found) == {key: near_to(value, near) for key, value in leaves_of(said).items()}


def leaves_of(card: dict[str, Any]) -> dict[str, Any]:
    """All that a card says, by path, but for the machine and what it hashes."""
    found: dict[str, Any] = {}

    def walk(value: Any, path: str) -> None:
        pairs = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
        for key, inner in pairs or ():
            walk(inner, f"{path}.{key}")
        if pairs is None and not path.startswith((".machine", ".data.training", ".data.python")):
            found[path] = value

    walk(card, "")
    return found


def near_to(value: Any, near: float) -> Any:
    return pytest.approx(value, rel=near, abs=near) if isinstance(value, float) else value


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
    for split in SPLITS:
        load = router[split]["load"]
        assert (len(load), {len(row) for row in load}) == (6, {16})
        assert [sum(row) for row in load] == pytest.approx([16.0] * 6, abs=0.02)
        assert max(map(max, load)) == pytest.approx(router[split]["max_over_mean"], abs=1e-3)
        assert router[split]["max_over_mean"] < 2
        assert router[split]["min_over_mean"] > 0.2


def test_the_selection_bias_is_that_of_the_checkpoint_and_not_zero() -> None:
    said = CARDS["moe-sigmoid"]["router"]["selection_bias"]
    with safe_open(trained.FOLDER / "moe-sigmoid" / "model.safetensors", "pt") as file:
        names = [f"model.layers.{k}.mlp.gate.e_score_correction_bias" for k in range(6)]
        stored = [file.get_tensor(name).tolist() for name in names]
    assert said == [pytest.approx(row, abs=1e-4) for row in stored]
    assert all(max(map(abs, row)) > 0.1 for row in said)


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


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_eval_measures_what_the_card_says(name: str, capfd: pytest.CaptureFixture[str]) -> None:
    assert run(["eval", f"zoo:{name}", "--json"]) == 0
    found = json.loads(capfd.readouterr().out)
    assert found["data"] == f"zoo:{name}:test"
    for row, said in zip(found["figures"], CARDS[name]["eval"]["test"], strict=True):
        assert {k: row[k] for k in ("metric", "units")} == {k: said[k] for k in ("metric", "units")}
        for key in ("value", "low", "high"):
            assert row[key] == pytest.approx(said[key], rel=1e-3)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("name", slow_but("", *DENSE, *MIXTURES, "vlm"))
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


@pytest.mark.slow
def test_canvases_from_a_file_overlap_with_those_of_their_split(caplog: pytest.LogCaptureFixture) -> None:
    program: Any = None  # canvases need none
    drawn = NamedData("x.npz", {"pixel_values": datasets.draw(Split.TEST, QUADRANTS).pixels}, inputs=["pixel_values"])
    refuse_overlap(load_data("zoo:vit:selection", program, split="test"), drawn)
    assert not caplog.records
    with pytest.raises(UsageError, match="overlaps the calibration set") as problem:
        refuse_overlap(load_data("zoo:vit:test", program, split="calibration"), drawn)
    assert problem.value.why == "512 of its 512 samples are in both"
    assert "zoo:vit:test is a test split" in caplog.text
