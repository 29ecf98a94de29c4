"""The models that were trained here: folders of transformers under `checkpoints`, in the repository, not in the wheel.

Weights are stored in bfloat16 and computed with in float32, as every figure of a card is.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch.export import Dim

from laconic.ir.errors import ModelError
from laconic.ir.hf import load_model
from laconic.ir.source_model import Source
from laconic.models import datasets, tokenizer
from laconic.models.canvas import GRID, QUADRANTS
from laconic.models.corpus import Split, committed

FOLDER = Path(__file__).resolve().parent / "checkpoints"

_BATCH, _LENGTH = 3, 48  # of the example call


def folder(name: str) -> Path:
    """Where a model stands. Raises ModelError if it does not: an installed package does not bring it."""
    found = FOLDER / name
    if not (found / "config.json").is_file():
        raise ModelError(
            f"zoo:{name} is not here",
            where=str(found),
            why="trained models come with the repository, not with the package",
            hint=f"clone the repository, or train it: python -m laconic.models.train {name}",
        )
    return found


def load(name: str) -> Any:
    """A trained model in eval mode and float32. Raises ModelError if it is not here."""
    return load_model(folder(name)).float()


def source(name: str) -> Source:
    """A trained model with an example call from its calibration split; axes batch and, of text, sequence."""
    model = load(name)
    if name == "vit":
        pixels = datasets.draw(Split.CALIBRATION, QUADRANTS, _BATCH).pixels
        return Source(model, (), {"pixel_values": pixels}, {"pixel_values": {0: _batch()}}, name, folder(name))
    inputs = _image_and_question() if name == "vlm" else _text()
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    axes: dict[str, Any] = {"input_ids": {0: _batch()}, "attention_mask": {0: _batch()}, "pixel_values": {0: _batch()}}
    if name != "vlm":
        sequence = Dim("sequence", min=1, max=model.config.max_position_embeddings)
        for key in ("input_ids", "attention_mask"):
            axes[key][1] = sequence
    shapes = {key: axes[key] for key in inputs}
    if name == "vlm":
        from laconic.models.vlm import Joined

        return Source(Joined(model).eval(), (), inputs, shapes, name, folder(name))
    shapes["use_cache"] = None
    return Source(model, (), {**inputs, "use_cache": False}, shapes, name, folder(name))


def _batch() -> Any:
    return Dim("batch", min=1)


def _text() -> dict[str, torch.Tensor]:
    ids, _ = tokenizer.encode(committed(Split.CALIBRATION)[:_BATCH])
    return {"input_ids": torch.from_numpy(ids[: _BATCH * _LENGTH]).reshape(_BATCH, _LENGTH)}


def _image_and_question() -> dict[str, torch.Tensor]:
    from laconic.models.vlm import prompt_and_answer

    drawn = datasets.draw(Split.CALIBRATION, GRID, _BATCH)
    return {"input_ids": prompt_and_answer(drawn.labels), "pixel_values": drawn.pixels}
