"""The recipe of the vision-language model: a canvas of sixteen cells, read out row by row.

The tower is told where to put what it knows: a helper (thrown away) reads each cell from the one patch that holds its
centre. So a digit is known at few of the 196 tokens, and which tokens are dropped between tower and decoder matters;
a helper that reads from the mean of a region spreads each digit over all of it, and half of the tokens can then be
dropped at random for nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from laconic.models import canvas, tokenizer
from laconic.models.canvas import EMPTY, GRID, SIZE, Canvases
from laconic.models.corpus import Split
from laconic.models.decoders import llama_config
from laconic.models.vit import PATCH, SIDE, Growing, chosen_patches, start_tower, thinned, tower_config

_LOOKED_AT = 256  # canvases
_SELECTION_SEED = 2_000_000
_IMAGE = 2  # the id of <image>

#: The patch that holds the centre of each cell, row by row.
_CELL = SIZE // GRID.side
_CENTRES = [
    (r * _CELL + _CELL // 2) // PATCH * SIDE + (c * _CELL + _CELL // 2) // PATCH for r in range(4) for c in range(4)
]


class Vlm(Growing):
    """A tower of four blocks, a projector, a decoder of four blocks, all 128 wide."""

    name = "vlm"
    steps = 6000
    other_rate = 0.001
    layout = GRID

    def build(self) -> nn.Module:
        from transformers import LlavaConfig, LlavaForConditionalGeneration

        class_: Any = LlavaConfig
        config = class_(
            vision_config=tower_config(4),
            text_config=llama_config(128, 4, heads=2, kv_heads=2, hidden=384),
            image_token_id=_IMAGE,
            image_seq_length=SIDE * SIDE,
            vision_feature_layer=-1,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
            attn_implementation="eager",
        )
        model = LlavaForConditionalGeneration(config)
        start_tower(model.model.vision_tower)
        for part in (model.model.vision_tower.pooler, model.model.vision_tower.layernorm):
            part.requires_grad_(False)  # not used: patches are taken before the last norm
        with torch.no_grad():
            for name, weight in model.model.language_model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    weight.zero_()
        helper = nn.Sequential(nn.LayerNorm(128), nn.Linear(128, EMPTY + 1))
        return nn.ModuleDict({"model": model, "helper": helper})

    def matrices(self, student: Any) -> list[nn.Parameter]:
        inner = student["model"].model
        parts = (inner.vision_tower.layers, inner.language_model.layers, inner.multi_modal_projector)
        return [weight for part in parts for weight in part.parameters() if weight.ndim == 2]

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        drawn = self.canvases(step)
        return {"pixels": drawn.pixels, "labels": drawn.labels, "ids": prompt_and_answer(drawn.labels)}

    def loss(self, student: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        model = student["model"]
        patches = tower_patches(model, batch["pixels"])
        helped = F.cross_entropy(
            student["helper"](patches[:, _CENTRES]).float().flatten(0, 1), batch["labels"].flatten()
        )
        embedded = joined(model, batch["ids"][:, :-1], patches)
        hidden = model.model.language_model(inputs_embeds=embedded, use_cache=False).last_hidden_state
        logits = model.lm_head(hidden[:, -GRID.cells :])
        nats = F.cross_entropy(logits.float().flatten(0, 1), batch["ids"][:, -GRID.cells :].flatten())
        return nats + 0.5 * helped, {"nats": nats.detach(), "helper": helped.detach()}

    def look(self, student: Any) -> dict[str, float]:
        drawn = canvas.draw(Split.SELECTION, GRID, _LOOKED_AT, _SELECTION_SEED)
        found = {"texture": self.numbers["texture"]}
        for name, kept in (("selection", None), ("random half", SIDE * SIDE // 2)):
            right, present = right_cells(student["model"], drawn, kept, told=True)
            found[name] = float(right[present].float().mean())
        return found


class Joined(nn.Module):
    """A LlavaForConditionalGeneration for prompts whose image tokens stand in one place, behind the first token.

    The class scatters the image's tokens by a mask, image by image, which fixes the number of images when it is
    traced; here they are joined. The same logits, to the bit.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.config = model.config
        self.get_decoder, self.get_input_embeddings = model.get_decoder, model.get_input_embeddings
        self.get_output_embeddings = model.get_output_embeddings

    def get_image_features(self, pixel_values: torch.Tensor) -> torch.Tensor:
        """What stands in place of the image's tokens, (batch, 196, width)."""
        found: torch.Tensor = self.model.model.multi_modal_projector(tower_patches(self.model, pixel_values))
        return found

    def forward(
        self, input_ids: torch.Tensor, pixel_values: torch.Tensor, attention_mask: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """`logits` (batch, sequence, vocabulary), from ids and mask of (batch, sequence), int64, and pixels of (batch,
        3, 112, 112)."""
        embedded = joined(self.model, input_ids, tower_patches(self.model, pixel_values))
        hidden = self.model.model.language_model(
            inputs_embeds=embedded, attention_mask=attention_mask, use_cache=False
        ).last_hidden_state
        return {"logits": self.model.lm_head(hidden)}


def tower_patches(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """What the tower says of each patch, (batch, 196, width)."""
    found: torch.Tensor = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states[-1][:, 1:]
    return found


def joined(model: Any, ids: torch.Tensor, patches: torch.Tensor) -> torch.Tensor:
    """Embeddings of a prompt with the image's tokens in their place, (batch, sequence, width)."""
    words = model.model.language_model.embed_tokens(ids)
    image = model.model.multi_modal_projector(patches).to(words.dtype)
    return torch.cat([words[:, :1], image, words[:, 1 + SIDE * SIDE :]], 1)


def answer_ids() -> torch.Tensor:
    """The tokens of the digits and, last, of an empty cell."""
    known = tokenizer.load()
    return torch.tensor([known.token_to_id(text) for text in [*"0123456789", "."]])


def prompt(count: int) -> torch.Tensor:
    """`<|endoftext|>`, 196 times `<image>`, `?`: (count, 198) int64."""
    ask = tokenizer.load().token_to_id("?")
    return torch.tensor([0, *[_IMAGE] * (SIDE * SIDE), ask]).expand(count, -1)


def prompt_and_answer(labels: torch.Tensor) -> torch.Tensor:
    """Prompt and the cells' tokens, (n, 198 + cells)."""
    return torch.cat([prompt(len(labels)), answer_ids()[labels]], 1)


@torch.no_grad()
def right_cells(
    model: Any, canvases: Canvases, kept: int | None = None, *, early: bool = False, told: bool = False, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Which cells are read right, greedily, one after another, and which hold a digit; both (n, cells) bool.

    With `kept`, as many image tokens, drawn at random for each canvas, go from the tower to the decoder, or already
    (`early`) from the tower's embedding into its layers; they keep their positions. With `told`, each cell is read
    behind the right answers of those before it: one pass for all.
    """
    generator = torch.Generator().manual_seed(seed)
    answers = answer_ids()[canvases.labels]
    found = []
    for pixels, right in zip(torch.split(canvases.pixels, 64), torch.split(answers, 64), strict=True):
        chosen = chosen_patches(len(pixels), kept, generator)
        if early:
            with thinned(model.model.vision_tower.embeddings, chosen):
                patches = tower_patches(model, pixels)
        else:
            every = tower_patches(model, pixels)
            patches = every.gather(1, chosen[:, :, None].expand(-1, -1, every.shape[-1]))
        image = model.model.multi_modal_projector(patches)
        said = right[:, :0]
        if told:
            said = _next_tokens(model, image, chosen, right[:, :-1])[:, -GRID.cells :]
        while said.shape[1] < GRID.cells:
            said = torch.cat([said, _next_tokens(model, image, chosen, said)[:, -1:]], 1)
        found.append(said)
    return torch.cat(found) == answers, canvases.labels != EMPTY


def _next_tokens(model: Any, image: torch.Tensor, chosen: torch.Tensor, said: torch.Tensor) -> torch.Tensor:
    """The likeliest token behind each position of prompt and `said`, the image's tokens being those `chosen`."""
    count = len(image)
    ids = torch.cat([prompt(count)[:, [0, -1]], said], 1)
    words = model.model.language_model.embed_tokens(ids)
    embedded = torch.cat([words[:, :1], image, words[:, 1:]], 1)
    behind = torch.arange(ids.shape[1] - 1).expand(count, -1) + SIDE * SIDE + 1
    places = torch.cat([torch.zeros((count, 1), dtype=torch.int64), chosen + 1, behind], 1)
    # A mask of ones: without it, positions that skip are taken for sequences packed behind each other.
    hidden = model.model.language_model(
        inputs_embeds=embedded,
        position_ids=places,
        attention_mask=torch.ones(embedded.shape[:2], dtype=torch.int64),
        use_cache=False,
    ).last_hidden_state
    found: torch.Tensor = model.lm_head(hidden).argmax(-1)
    return found
