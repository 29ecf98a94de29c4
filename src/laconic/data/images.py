"""A folder of images as batches of pixels; its subfolders, if it has any, are the classes, in order of their names."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from laconic.data.named import LABELS, NamedData
from laconic.ir.errors import MissingDependencyError, UsageError
from laconic.ir.program import Program

_KINDS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def read_images(path: Path, program: Program, settings: Path | None, *, batch: int = 8) -> NamedData:
    """The images of a folder as the model takes them. `settings` is the model's preprocessor_config.json, if it has
    one, which transformers' own image processor follows; without one, images are scaled to the model's size and pixels
    to [-1, 1].

    Raises UsageError if there are no images, the model takes none, or the processor makes them of another size;
    MissingDependencyError without Pillow, or without transformers where there are settings.
    """
    name, size = _target(path, program)
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in _KINDS)
    if not files:
        raise UsageError(f"{path} holds no images", hint=f"looked for {', '.join(_KINDS)}")
    prepare = _processor(settings, size) if settings is not None and settings.is_file() else _plain(size)
    tensors = {name: torch.stack([prepare(_opened(file)) for file in files])}
    classes = sorted({file.parent for file in files})
    if len(classes) > 1:
        tensors[LABELS] = torch.tensor([classes.index(file.parent) for file in files])
    return NamedData(str(path), tensors, inputs=[name], batch=batch)


def _processor(settings: Path, size: tuple[int, int]) -> Callable[[Any], torch.Tensor]:
    """From an image to pixels (3, height, width), as the settings say."""
    try:
        import transformers
    except ModuleNotFoundError as problem:
        hint = 'pip install "laconic-compiler[hf]"'
        raise MissingDependencyError("transformers is not installed", hint=hint) from problem
    kind: Any = transformers.AutoImageProcessor
    with _following(settings):
        processor = kind.from_pretrained(settings.parent, backend="pil", local_files_only=True)

    def prepare(image: Any) -> torch.Tensor:
        with _following(settings):
            pixels: torch.Tensor = processor(images=[image], return_tensors="pt")["pixel_values"][0]
        if pixels.shape != (3, *size):
            raise UsageError(
                f"the model's settings make images of {tuple(pixels.shape)}, and the model takes {(3, *size)}",
                where=str(settings),
            )
        return pixels.float()

    return prepare


@contextmanager
def _following(settings: Path) -> Iterator[None]:
    """What a processor raises of settings that make no sense, as a UsageError."""
    try:
        yield
    except (OSError, ValueError, TypeError, KeyError, IndexError, RuntimeError) as problem:
        why = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        said = "images cannot be prepared as the model's settings say"
        raise UsageError(said, where=str(settings), why=why) from problem


def _plain(size: tuple[int, int]) -> Callable[[Any], torch.Tensor]:
    def prepare(image: Any) -> torch.Tensor:
        import numpy as np
        from PIL import Image

        scaled = image.resize((size[1], size[0]), Image.Resampling.BICUBIC)
        return torch.from_numpy(np.asarray(scaled, dtype=np.float32) / 127.5 - 1.0).permute(2, 0, 1)

    return prepare


def _target(path: Path, program: Program) -> tuple[str, tuple[int, int]]:
    """The input that takes images, and their height and width."""
    for declared, node in zip(program.forward.inputs, program.forward.input_nodes(), strict=True):
        shape = node.meta["val"].shape
        if len(shape) == 4 and shape[1] == 3 and isinstance(shape[2], int) and isinstance(shape[3], int):
            return declared.name, (shape[2], shape[3])
    raise UsageError(f"{path} holds images, and the model takes none of a fixed size")


def _opened(file: Path) -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as problem:
        raise MissingDependencyError("Pillow is not installed", hint="pip install pillow") from problem
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError as problem:
        raise UsageError(f"{file} is no image that can be read", why=str(problem)) from problem
