"""A folder of images as batches of pixels; its subfolders, if it has any, are the classes, in order of their names."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from laconic.data.named import LABELS, NamedData
from laconic.ir.errors import MissingDependencyError, UsageError
from laconic.ir.program import Program
from laconic.ir.weight_files import read_json

_KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_images(path: Path, program: Program, settings: Path | None, *, batch: int = 8) -> NamedData:
    """The images of a folder at the model's size. `settings` is the model's preprocessor_config.json, if it has one:
    it names mean and standard deviation (0.5 each where it does not).

    Raises UsageError if there are no images or the model takes none; MissingDependencyError without Pillow.
    """
    name, size = _target(path, program)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _KINDS)
    if not files:
        raise UsageError(f"{path} holds no images", hint=f"looked for {', '.join(_KINDS)}")
    told = read_json(settings, "it says how pixels are scaled") if settings is not None and settings.is_file() else {}
    mean, deviation = (torch.tensor(told.get(key, [0.5] * 3))[:, None, None] for key in ("image_mean", "image_std"))
    pixels = torch.stack([(_pixels(file, size) - mean) / deviation for file in files])
    tensors = {name: pixels}
    classes = sorted({file.parent for file in files})
    if len(classes) > 1:
        tensors[LABELS] = torch.tensor([classes.index(file.parent) for file in files])
    return NamedData(str(path), tensors, inputs=[name], batch=batch)


def _target(path: Path, program: Program) -> tuple[str, tuple[int, int]]:
    """The input that takes images, and their height and width."""
    for declared, node in zip(program.forward.inputs, program.forward.input_nodes(), strict=True):
        shape = node.meta["val"].shape
        if len(shape) == 4 and shape[1] == 3 and isinstance(shape[2], int) and isinstance(shape[3], int):
            return declared.name, (shape[2], shape[3])
    raise UsageError(f"{path} holds images, and the model takes none of a fixed size")


def _pixels(file: Path, size: tuple[int, int]) -> torch.Tensor:
    """An image in [0, 1], (3, height, width)."""
    try:
        from PIL import Image
    except ModuleNotFoundError as problem:
        raise MissingDependencyError("Pillow is not installed", hint="pip install pillow") from problem
    import numpy as np

    try:
        with Image.open(file) as image:
            scaled: Any = image.convert("RGB").resize((size[1], size[0]), Image.Resampling.BICUBIC)
    except OSError as problem:
        raise UsageError(f"{file} is no image that can be read", why=str(problem)) from problem
    return torch.from_numpy(np.asarray(scaled, dtype=np.float32) / 255.0).permute(2, 0, 1)
