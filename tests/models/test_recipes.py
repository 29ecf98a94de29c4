"""The recipes: what they build, and that what they compute in training is what the classes of transformers compute."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from laconic.ir.errors import UsageError
from laconic.models import canvas, text_figures, tokenizer
from laconic.models.canvas import EMPTY, GRID, QUADRANTS
from laconic.models.corpus import Split
from laconic.models.decoders import LlamaGqa, LlamaMha, Moe, MoeSigmoid
from laconic.models.train import recipe
from laconic.models.vit import Vit, right_digits
from laconic.models.vlm import Joined, Vlm, prompt_and_answer, right_cells


def built(made: Any) -> Any:
    torch.manual_seed(0)
    return made.build()


def parameters(model: nn.Module) -> int:
    return sum(weight.numel() for weight in model.parameters())


def test_sizes_fit_the_repository(tmp_path: Path) -> None:
    """In bfloat16, and with a tokenizer each: at most 14 MB a model and 36 MB together."""
    recipes = [LlamaMha(tmp_path), LlamaGqa(tmp_path), Moe(tmp_path), MoeSigmoid(tmp_path), Vit(), Vlm()]
    sizes = [2 * parameters(built(each)["model"]) + 125_000 for each in recipes]
    assert max(sizes) < 14e6
    assert sum(sizes) < 36e6


@pytest.mark.parametrize("kind", [Moe, MoeSigmoid])
def test_all_experts_at_once_are_those_that_are_chosen(kind: Any, tmp_path: Path) -> None:
    student = built(kind(tmp_path))
    model = student["model"]
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.2 if name.endswith("gate.weight") else 0.05)
    ids = torch.randint(0, tokenizer.VOCABULARY, (2, 24))
    with torch.no_grad():
        fast = model(ids, use_cache=False).logits
        model.set_experts_implementation("eager")
        plain = model(ids, use_cache=False).logits
    torch.testing.assert_close(fast, plain, atol=2e-6, rtol=1e-5)


def test_balance_is_judged_layer_by_layer(tmp_path: Path) -> None:
    """Layers that are lopsided in ways that cancel are as bad as each of them."""
    made = Moe(tmp_path)
    student = built(made)
    ids = {"ids": torch.randint(0, tokenizer.VOCABULARY, (2, 33))}
    loss, seen = made.loss(student, ids)
    even = float(loss.detach() - seen["nats"])
    assert even == pytest.approx(made.balance, rel=0.1)
    assert seen["load"].shape == (6, 16)
    torch.testing.assert_close(seen["load"].sum(1), torch.ones(6))
    with torch.no_grad():
        for k, layer in enumerate(student["model"].model.layers):
            layer.mlp.gate.weight.zero_()
            layer.mlp.gate.weight[2 * k % 16] = 40 * layer.post_attention_layernorm.weight
            layer.mlp.gate.weight[(2 * k + 1) % 16] = 40 * layer.post_attention_layernorm.weight
    loss, seen = made.loss(student, ids)
    assert float(loss.detach() - seen["nats"]) > 1.5 * even


def test_the_selection_bias_moves_towards_balance(tmp_path: Path) -> None:
    made = MoeSigmoid(tmp_path)
    student = built(made)
    load = torch.full((6, 16), 1 / 16)
    load[:, 3], load[:, 5] = 0.3, 0.0
    made.after(student, 0, {"load": load}, rate=1.0)
    for layer in student["model"].model.layers:
        bias = layer.mlp.gate.e_score_correction_bias
        assert float(bias[3]) < 0 < float(bias[5])
    assert bias.dtype == torch.float32


def test_muon_moves_the_blocks_and_nothing_else(tmp_path: Path) -> None:
    made = Moe(tmp_path)
    student = built(made)
    moved = {id(weight) for weight in made.matrices(student)}
    for name, weight in student["model"].named_parameters():
        inside = "layers" in name and weight.ndim > 1 and "gate.weight" not in name
        assert (id(weight) in moved) == inside, name


def test_batches_are_a_function_of_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import numpy as np

    stream = np.arange(100_000, dtype=np.int64) % tokenizer.VOCABULARY
    monkeypatch.setattr(tokenizer, "training_stream", lambda folder: (stream, "hash"))
    one, other = LlamaMha(tmp_path), LlamaMha(tmp_path)
    for step in (0, 7, 24, 25, 60):
        assert torch.equal(one.batch(step)["ids"], other.batch(step)["ids"])
        assert one.batch(step)["ids"].shape == (8, 513)
    per_epoch = (len(stream) - 1 - 512) // 512
    starts = [int(row[0]) for step in range(per_epoch // 8) for row in one.batch(step)["ids"]]
    assert len({start % 512 for start in starts}) == 1  # windows of one epoch do not overlap


def test_joined_image_tokens_have_the_bits_of_the_class() -> None:
    model = built(Vlm())["model"].eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim > 1:
                weight.normal_(std=0.05)
    drawn = canvas.draw(Split.TEST, GRID, 2, seed=0)
    ids = prompt_and_answer(drawn.labels)
    mask = torch.ones_like(ids)
    with torch.no_grad():
        plain = model(input_ids=ids, pixel_values=drawn.pixels, attention_mask=mask, use_cache=False).logits
        found = Joined(model)(ids, drawn.pixels, mask)["logits"]
    assert torch.equal(found, plain)


def test_reading_cells_greedily_and_behind_right_answers() -> None:
    model = built(Vlm())["model"].eval()
    drawn = canvas.draw(Split.TEST, GRID, 3, seed=0)
    for told in (False, True):
        right, present = right_cells(model, drawn, told=told)
        assert right.shape == present.shape == (3, 16)
        assert torch.equal(present, drawn.labels != EMPTY)
        assert float(right.double().mean()) < 0.5
    fewer, _ = right_cells(model, drawn, kept=98)
    assert fewer.shape == (3, 16)


def test_reading_with_fewer_patches() -> None:
    model = built(Vit())["model"].eval()
    drawn = canvas.draw(Split.TEST, QUADRANTS, 3, seed=0)
    assert right_digits(model, drawn).shape == right_digits(model, drawn, kept=98).shape == (3, 4)
    assert torch.equal(right_digits(model, drawn), right_digits(model, drawn, kept=196))
    assert not model.vit.embeddings._forward_hooks


def test_novel_tokens_and_windows() -> None:
    ids = torch.tensor([1, 2, 3, 1, 2, 3, 1, 2, 4])
    stream = ids.tolist()

    def novel(window: int) -> list[bool]:
        starts = range(0, len(stream) - 1, window)
        parts = [(stream[s : s + window], stream[s + 1 : s + window + 1]) for s in starts]
        return [each for part in parts for each in text_figures.novel(*part)]

    assert novel(8) == [True, True, True, False, False, False, False, True]
    assert novel(4) == [True, True, True, False, True, True, True, True]
    cut = [batch.shape for batch in text_figures.windows(ids, 4)]
    assert cut == [(2, 5)]
    assert [tuple(b.shape) for b in text_figures.windows(ids[:8], 4)] == [(1, 5), (1, 4)]


def test_an_unknown_recipe(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no recipe 'llama'"):
        recipe("llama", tmp_path)
