"""What the reference models are calibrated and measured on: `zoo:NAME:SPLIT`."""

from __future__ import annotations

import torch

from laconic.data.named import ListedData
from laconic.data.text import Text, TextData
from laconic.ir.data import Batch, Data
from laconic.ir.errors import UsageError, did_you_mean
from laconic.ir.metrics.quality import IGNORED
from laconic.ir.program import Program
from laconic.models import canvas, minilm, tokenizer
from laconic.models.canvas import EMPTY, GRID, QUADRANTS, Canvases, Layout
from laconic.models.corpus import Split, committed

TEXT = ("llama-mha", "llama-gqa", "moe", "moe-sigmoid")

_SPLITS = (Split.CALIBRATION, Split.SELECTION, Split.TEST)
#: How many canvases a split of vit or vlm has.
CANVASES = 512
#: Seeds of the canvases of each split.
_SEEDS = {Split.CALIBRATION: 3_000_000, Split.SELECTION: 1_000_000, Split.TEST: 4_000_000}


def zoo_data(name: str, split: str, program: Program, *, batch: int = 8) -> Data:
    """The data of a reference model. Raises UsageError for an unknown name or split."""
    if split not in list(_SPLITS):
        raise UsageError(f"there is no split {split!r}", hint=did_you_mean(split, list(map(str, _SPLITS))))
    kind = Split(split)
    said = f"zoo:{name}:{kind}"
    if name in TEXT:
        texts = [Text(document.text, document.group) for document in committed(kind)]
        return TextData(said, texts, tokenizer.FOLDER / "tokenizer.json", program, batch=batch)
    if name == "vit":
        return ListedData(said, _vit_batches(kind, batch))
    if name == "vlm":
        return ListedData(said, _vlm_batches(kind, batch, program))
    if name == "minilm":
        return _Sentences(said, kind, batch)
    raise UsageError(f"there is no data zoo:{name}", hint=did_you_mean(name, [*TEXT, "vit", "vlm", "minilm"]))


def draw(kind: Split, layout: Layout, count: int = CANVASES) -> Canvases:
    """The canvases of a split, the same every time."""
    return canvas.draw(kind, layout, count, _SEEDS[kind])


def _vit_batches(kind: Split, batch: int) -> list[Batch]:
    drawn = draw(kind, QUADRANTS)
    parts = zip(*(torch.split(part, batch) for part in (drawn.pixels, drawn.labels, drawn.digits)), strict=True)
    return [Batch({"pixel_values": p}, labels=labels, label_units=digits) for p, labels, digits in parts]


def _vlm_batches(kind: Split, batch: int, program: Program) -> list[Batch]:
    from laconic.models.vlm import prompt_and_answer

    drawn = draw(kind, GRID)
    ids = prompt_and_answer(drawn.labels)
    labels = torch.full_like(ids, IGNORED)
    units = torch.full_like(ids, -1)
    answers = slice(ids.shape[1] - GRID.cells - 1, ids.shape[1] - 1)  # each is predicted one position earlier
    labels[:, answers] = torch.where(drawn.labels == EMPTY, IGNORED, ids[:, -GRID.cells :])
    units[:, answers] = drawn.digits
    wanted = {declared.name for declared in program.forward.inputs}
    whole = {"input_ids": ids, "pixel_values": drawn.pixels, "attention_mask": torch.ones_like(ids)}
    kept = {name: value for name, value in whole.items() if name in wanted}
    found = []
    for start in range(0, len(ids), batch):
        part = slice(start, start + batch)
        inputs = {name: value[part] for name, value in kept.items()}
        found.append(Batch(inputs, labels=labels[part], label_units=units[part]))
    return found


class _Sentences(ListedData):
    """The groups of sentences in three parts. Those to be measured on are one batch: a sentence's like is looked for
    among all of them."""

    metrics = ("recall@1",)

    def __init__(self, name: str, kind: Split, batch: int) -> None:
        groups = {k: group for k, group in enumerate(minilm.groups()) if k % len(_SPLITS) == _SPLITS.index(kind)}
        named = [(sentence, k) for k, group in groups.items() for sentence in group]
        together = batch if kind is Split.CALIBRATION else len(named)
        batches = []
        for start in range(0, len(named), together):
            sentences, labels = zip(*named[start : start + together], strict=True)
            inputs = minilm.tokenize(list(sentences))
            mask, units = inputs["attention_mask"].bool(), tuple(map(str, labels))
            batches.append(Batch(inputs, mask, torch.tensor(labels), units))
        super().__init__(name, batches)
