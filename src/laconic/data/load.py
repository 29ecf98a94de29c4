"""DATA, as people name it: zoo:NAME, a .jsonl or .txt, a .safetensors or .npz, a folder of images, module:callable."""

from __future__ import annotations

import logging
import re
from pathlib import Path

from laconic.data.images import read_images
from laconic.data.named import NamedData, listed, read_tensors
from laconic.data.text import TextData, read_texts
from laconic.ir.data import Data
from laconic.ir.errors import UsageError
from laconic.ir.program import Program

log = logging.getLogger(__name__)

FORMS = "zoo:NAME[:SPLIT], a .jsonl or .txt, a .safetensors or .npz, a folder of images, or package.module:callable"


def load_data(said: str | Path, program: Program, *, folder: Path | None = None, split: str, batch: int = 8) -> Data:
    """What DATA names, for a program. `folder` holds the model's tokenizer.json and preprocessor_config.json; `split`
    is the one of zoo:NAME where none is named.

    Raises UsageError for an unknown form or name, and for data that the program does not take.
    """
    said = str(said)
    if said.startswith("zoo:"):
        from laconic.models.datasets import zoo_data

        name, _, own = said.removeprefix("zoo:").partition(":")
        if split == "calibration" and own == "test":
            log.warning("%s is a test split: decisions that are made on it cannot be judged on it", said)
        return zoo_data(name, own or split, program, batch=batch)
    path = Path(said)
    if path.is_dir():
        return read_images(path, program, None if folder is None else folder / "preprocessor_config.json", batch=batch)
    if path.suffix in (".jsonl", ".txt") and path.is_file():
        if folder is None:
            raise UsageError(f"{said} is text, and the model has no tokenizer", hint="name one with --tokenizer")
        return TextData(said, read_texts(path), folder / "tokenizer.json", program, batch=batch)
    inputs = [declared.name for declared in program.forward.inputs]
    if path.suffix in (".safetensors", ".npz") and path.is_file():
        return NamedData(said, read_tensors(path), inputs=inputs, batch=batch)
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*", said):
        from laconic.sources import call_named

        return listed(said, call_named(said), inputs)
    raise UsageError(f"there is no data {said!r}", hint=f"DATA is one of: {FORMS}")
