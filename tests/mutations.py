"""Models of every form that is read, damaged at random, and given to `resolve` in a process of its own.

    python tests/mutations.py FOLDER WORK COUNT deep|shallow FORMAT...

copies the intact model of each FORMAT from FOLDER (`write_models`) into the empty WORK, COUNT times, damages the copy,
and prints a line a case: format, number, and `loaded`, the name of a LaconicError, or `FAULT` with what went wrong. A
case that takes too long ends the process by SIGALRM; memory is limited.
"""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import shutil
import signal
import sys
import traceback
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

SECONDS = 30
MEMORY = 16 << 30

#: What is damaged, and which file of which model it is.
FORMATS: dict[str, tuple[str, str]] = {
    ".pt2": ("model.pt2", ""),
    "text in .pt2": ("model.pt2", "model.pt2"),
    ".onnx": ("model.onnx", ""),
    "config.json": ("hf", "config.json"),
    "model.safetensors": ("hf", "model.safetensors"),
    "index": ("sharded", "model.safetensors.index.json"),
    "program.txt": ("dump", "program.txt"),
    "weights.safetensors": ("dump", "weights.safetensors"),
    "recipe.yaml": ("saved", "recipe.yaml"),
}
_TEXTS = (
    "archive/models/model.json",
    "archive/models/model.json",
    "archive/data/weights/model_weights_config.json",
    "archive/data/constants/model_constants_config.json",
    "archive/extra/laconic.json",
)


def write_models(folder: Path) -> None:
    """A small model in every form."""
    import torch
    import transformers
    from torch import nn

    import laconic

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.head = nn.Embedding(17, 8), nn.Linear(8, 17, bias=False)
            self.norm = nn.LayerNorm(8)
            self.register_buffer("ramp", torch.arange(16.0))
            self.register_buffer("low", self.ramp[:8])

        def forward(self, ids: torch.Tensor, scale: torch.Tensor) -> dict[str, torch.Tensor]:
            with torch.no_grad():
                shift = self.ramp[8:] + self.low
            hidden = self.norm(self.embed(ids) * scale + shift)
            return {"logits": self.head(hidden), "pooled": hidden.mean(1)}

    torch.manual_seed(0)
    axes = {0: torch.export.Dim("batch", max=64), 1: torch.export.Dim("tokens")}
    inputs = {"ids": torch.randint(0, 17, (3, 5)), "scale": torch.randn(3, 5, 8)}
    result = laconic.optimize(Model(), inputs=inputs, dynamic_shapes={"ids": axes, "scale": axes})
    result.save(folder / "saved", formats=("pt2", "onnx"))
    for name in ("model.pt2", "model.onnx"):
        (folder / "saved" / name).rename(folder / name)
    shutil.copytree(folder / "saved", folder / "dump")
    for name in ("recipe.yaml", "ledger.json"):
        (folder / "dump" / name).unlink()
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    bert = transformers.BertModel(transformers.BertConfig(**sizes, vocab_size=32, max_position_embeddings=16))
    bert.save_pretrained(folder / "hf")
    bert.save_pretrained(folder / "sharded", max_shard_size="4KB")


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to three random faults: flipped bits, runs of other bytes, a cut, an insertion, a splice, another number."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(_FAULTS)(data, rng)
    return data


def _flip(data: bytes, rng: random.Random) -> bytes:
    out = bytearray(data)
    for _ in range(rng.choice((1, 4, 32))):
        if out:
            out[rng.randrange(len(out))] ^= 1 << rng.randrange(8)
    return bytes(out)


def _run(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    fill = rng.choice((b"\0", b"\xff", b" ", b"9", b"[", bytes([rng.randrange(256)])))
    length = min(rng.choice((1, 8, 64, 512)), len(data) - start)
    return data[:start] + fill * length + data[start + length :]


def _cut(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(len(data) + 1)]


def _insert(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data) + 1)
    return data[:start] + rng.randbytes(rng.choice((1, 2, 8, 200))) + data[start:]


def _splice(data: bytes, rng: random.Random) -> bytes:
    start, source = rng.randrange(len(data) + 1), rng.randrange(len(data) + 1)
    length = rng.choice((4, 16, 128, 1000))
    return data[:start] + data[source : source + length] + data[start + rng.choice((0, length)) :]


def _number(data: bytes, rng: random.Random) -> bytes:
    """Another number where digits stand, as text has them."""
    digits = [k for k, c in enumerate(data) if 48 <= c < 58 and not (k and 48 <= data[k - 1] < 58)]
    if not digits:
        return _flip(data, rng)
    start = rng.choice(digits)
    end = start
    while end < len(data) and 48 <= data[end] < 58:
        end += 1
    other = rng.choice((b"0", b"1", b"-1", b"2", b"17", b"1000000000", b"9" * 19, b"9" * 40, b"1e999", b"null", b"NaN"))
    return data[:start] + other + data[end:]


_FAULTS: tuple[Callable[[bytes, random.Random], bytes], ...] = (_flip, _run, _cut, _insert, _splice, _number, _number)


def damaged(folder: Path, form: str, number: int, target: Path) -> Path:
    """A copy of the model of a format with a fault; the path to give to `resolve`."""
    rng = random.Random(f"{form} {number}")
    model, file = FORMATS[form]
    source = folder / model
    if form == "text in .pt2":
        victim = rng.choice(_TEXTS)
        with zipfile.ZipFile(source) as old, zipfile.ZipFile(target / model, "w") as new:
            for name in old.namelist():
                content = old.read(name)
                new.writestr(name, mutate(content, rng) if name == victim else content)
        return target / model
    if source.is_dir():
        shutil.copytree(source, target / model)
    else:
        shutil.copy(source, target / model)
    spoilt = target / model / file if file else target / model
    spoilt.write_bytes(mutate(spoilt.read_bytes(), rng))
    return target / model


def outcome(path: Path, deep: bool = False) -> str:
    """What `resolve` makes of a model: `loaded`, the name of the error, or FAULT and why. With `deep` what is to be
    captured is captured too, which compares it."""
    from laconic.ir.errors import LaconicError
    from laconic.ir.program import Program
    from laconic.ir.verify import verify
    from laconic.sources import capture_source, resolve

    try:
        found = resolve(str(path))
        if not isinstance(found, Program) and deep:
            found = capture_source(found)
        if isinstance(found, Program):
            verify(found)
        return "loaded"
    except LaconicError as problem:
        said = problem.what.strip()
        return type(problem).__name__ if said else "FAULT an error that says nothing"
    except Exception:  # noqa: BLE001 - whatever comes is what is looked for
        return "FAULT " + json.dumps(traceback.format_exc()[-3000:])


def tree(folder: Path) -> list[tuple[str, int, int]]:
    return sorted((str(p), p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*"))


def main(folder: Path, work: Path, forms: list[str], count: int, deep: bool) -> None:
    warnings.simplefilter("ignore")
    logging.disable()
    for model in sorted({FORMATS[form][0] for form in forms}):  # and all that is needed is imported
        assert outcome(folder / model, deep) == "loaded", outcome(folder / model, deep)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    os.chdir(work)
    for form in forms:
        for number in range(count):
            case = work / "case"
            case.mkdir()
            path = damaged(folder, form, number, case)
            content = tree(work)
            signal.alarm(SECONDS)
            said = outcome(path, deep)
            signal.alarm(0)
            if tree(work) != content:
                said = "FAULT it wrote files or changed what it was given"
            print(form, number, said, sep="\t", flush=True)
            shutil.rmtree(case)


if __name__ == "__main__":
    models, place, cases, depth, *chosen = sys.argv[1:]
    main(Path(models), Path(place), chosen, int(cases), depth == "deep")
