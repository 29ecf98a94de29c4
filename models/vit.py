"""The recipe of the image classifier: four digits on a canvas, read by one token."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from laconic.models import canvas
from laconic.models.canvas import EMPTY, QUADRANTS, SIZE, Canvases
from laconic.models.corpus import Split
from laconic.models.training import Recipe

PATCH = 8
SIDE = SIZE // PATCH  # patches
_BATCH = 32
_LOOKED_AT = 512  # canvases
_SELECTION_SEED, _TRAINING_SEED = 1_000_000, 0
_EASY = 0.9  # the helper's loss below which textures grow
_GROWTH = 0.004  # a step


def tower_config(layers: int, **more: Any) -> Any:
    """A ViT of width 128 with two heads of 64, on 196 patches of 8 pixels."""
    from transformers import ViTConfig

    return ViTConfig(
        image_size=SIZE,
        patch_size=PATCH,
        hidden_size=128,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=512,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        **more,
    )


@torch.no_grad()
def start_tower(vit: Any) -> None:
    """Starting values without which the classifier stays at chance for hundreds of steps: positions as sines of both
    axes, patches projected by an orthogonal matrix, a small CLS token."""
    embeddings = vit.embeddings
    width = embeddings.cls_token.shape[-1]
    quarter = width // 4
    frequency = torch.exp(-math.log(1000.0) * torch.arange(quarter) / quarter)
    angle = torch.arange(SIDE)[:, None] * frequency * math.pi / 2
    axis = torch.cat([angle.sin(), angle.cos()], 1)
    both = torch.cat([axis[:, None].expand(-1, SIDE, -1), axis[None].expand(SIDE, -1, -1)], 2)
    embeddings.position_embeddings.zero_()
    embeddings.position_embeddings[0, 1:] = 0.5 * both.reshape(SIDE * SIDE, width)
    projection = embeddings.patch_embeddings.projection
    nn.init.orthogonal_(projection.weight.view(width, -1), gain=0.7)
    projection.bias.zero_()
    nn.init.normal_(embeddings.cls_token, std=0.5)


class Growing(Recipe):
    """A recipe whose canvases get their textures as soon as a helper can read them without."""

    seed = 0
    layout = QUADRANTS

    def __init__(self) -> None:
        super().__init__()
        self.numbers = {"texture": 0.0, "helper": 2.3}

    def canvases(self, step: int) -> Canvases:
        return canvas.draw(Split.TRAIN, self.layout, _BATCH, _TRAINING_SEED + step, texture=self.numbers["texture"])

    def after(self, student: Any, step: int, seen: dict[str, torch.Tensor], rate: float) -> None:
        mean = 0.95 * self.numbers["helper"] + 0.05 * float(seen["helper"])
        grown = self.numbers["texture"] + (_GROWTH if mean < _EASY else 0.0)
        self.numbers = {"texture": min(1.0, grown), "helper": mean}


class Vit(Growing):
    """Eight blocks of 128; the CLS token says the four digits. A helper that is thrown away reads each quadrant from
    the mean of its patches, two blocks before the end."""

    name = "vit"
    steps = 6000
    other_rate = 0.0007

    def build(self) -> nn.Module:
        from transformers import ViTForImageClassification

        config = tower_config(8, num_labels=4 * 10, attn_implementation="eager")
        model = ViTForImageClassification(config)
        start_tower(model.vit)
        return nn.ModuleDict({"model": model, "helper": nn.Sequential(nn.LayerNorm(128), nn.Linear(128, 10))})

    def matrices(self, student: Any) -> list[nn.Parameter]:
        return [weight for weight in student["model"].vit.layers.parameters() if weight.ndim == 2]

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        drawn = self.canvases(step)
        return {"pixels": drawn.pixels, "labels": drawn.labels}

    def loss(self, student: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        found = student["model"](pixel_values=batch["pixels"], output_hidden_states=True)
        labels = batch["labels"].flatten()
        nats = F.cross_entropy(found.logits.float().reshape(-1, 10), labels)
        patches = found.hidden_states[-3][:, 1:].reshape(_BATCH, 2, SIDE // 2, 2, SIDE // 2, 128)
        helped = F.cross_entropy(student["helper"](patches.mean((2, 4))).float().reshape(-1, 10), labels)
        return nats + 0.5 * helped, {"nats": nats.detach(), "helper": helped.detach()}

    def look(self, student: Any) -> dict[str, float]:
        right = right_digits(student["model"], canvas.draw(Split.SELECTION, QUADRANTS, _LOOKED_AT, _SELECTION_SEED))
        return {"selection": float(right.float().mean()), "texture": self.numbers["texture"]}


@torch.no_grad()
def right_digits(model: Any, canvases: Canvases, kept: int | None = None, *, seed: int = 0) -> torch.Tensor:
    """Which digits an image classifier of 4 x 10 logits reads right, (n, 4) bool.

    With `kept`, as many patch tokens, drawn at random for each canvas, go on behind the embedding, and the CLS token.
    """
    assert bool((canvases.labels != EMPTY).all())
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for pixels in torch.split(canvases.pixels, 64):
        with thinned(model.vit.embeddings, chosen_patches(len(pixels), kept, generator)):
            parts.append(model(pixel_values=pixels).logits.reshape(-1, 4, 10).argmax(-1))
    return torch.cat(parts) == canvases.labels


def chosen_patches(count: int, kept: int | None, generator: torch.Generator) -> torch.Tensor:
    """Which patches are kept of each of `count` canvases, drawn at random, in order, (count, kept); None: all."""
    order = torch.rand((count, SIDE * SIDE), generator=generator).argsort(1)
    return order[:, :kept].sort(1).values


@contextmanager
def thinned(embeddings: nn.Module, chosen: torch.Tensor) -> Iterator[None]:
    """Within, the embeddings of a tower are those of CLS and the chosen patches (canvases, kept)."""
    kept = torch.cat([torch.zeros((len(chosen), 1), dtype=torch.int64), 1 + chosen], 1)
    hook = embeddings.register_forward_hook(
        lambda _, inputs, found: found.gather(1, kept[:, :, None].expand(-1, -1, found.shape[-1]))
    )
    try:
        yield
    finally:
        hook.remove()
