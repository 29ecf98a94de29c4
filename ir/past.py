"""What a Program that generates promises: entries of these names, with these inputs, over caches of a size.

`prefill` takes a prompt and `decode` one token more; where a source is read, `encode` takes it with the first token.
Where images stand among tokens, `vision` makes the features of them that `prefill` takes. `facts["cache"]` has the
sequences (`batch`) and tokens (`length`) that the caches hold, `source`, the tokens of a source, and `image_token`.
"""

from __future__ import annotations

import torch

from laconic.ir.errors import UsageError
from laconic.ir.program import Program
from laconic.ir.types import nbytes

#: The entries that generate.
PREFILL, DECODE = "prefill", "decode"
#: What stands for `prefill` where there is a source to read.
ENCODE = "encode"
#: The sides of a model with two towers.
VISION, TEXT = "vision", "text"
#: What `vision` takes, (images, channels, height, width), and makes: (images, features, width).
PIXELS, FEATURES = "pixel_values", "image_features"
#: The entries that keep caches.
PAST = frozenset({PREFILL, ENCODE, DECODE})


def refuse_without_past(program: Program, cannot: str) -> None:
    """Raise UsageError for a Program without the entries that generate; `cannot` says what follows from that."""
    if DECODE not in program.entries or "cache" not in program.facts:
        raise UsageError(
            f"the model has no entry {DECODE!r}, so {cannot}",
            why=f"its entries are {', '.join(program.entries)}",
            hint="capture or optimize it with cache=(batch, length), or --cache BATCHxLENGTH",
        )


def generating(program: Program) -> list[str]:
    """The entries that generate, in the order in which they run, `decode` last."""
    return [name for name in (VISION, PREFILL, ENCODE, DECODE) if name in program.entries]


def cache_size(program: Program) -> tuple[int, int]:
    """The sequences and tokens that the caches of a Program that can generate hold."""
    facts = program.facts["cache"]
    return int(facts["batch"]), int(facts["length"])


def cache_bytes_per_token(program: Program) -> float | None:
    """The bytes that the caches hold for one token of one sequence, those of a source aside; None without caches."""
    if "cache" not in program.facts or DECODE not in program.entries:
        return None
    batch, length = cache_size(program)
    updated = program.entries[DECODE].updated()
    return sum(nbytes(program.weights[name].value) for name in updated) / (batch * length)


def example(batch: int, length: int, tokens: int, at: int, seed: int = 0) -> dict[str, torch.Tensor]:
    """Inputs for so many tokens from a place of the cache on; low token ids, which every vocabulary has."""
    places = torch.arange(at, at + tokens)
    mask = torch.zeros(batch, length, dtype=torch.long)
    mask[:, : at + tokens] = 1
    return {
        "input_ids": (torch.arange(batch * tokens) * (seed + 1) % 29 + 2).reshape(batch, tokens),
        "attention_mask": mask,
        "position_ids": places.expand(batch, tokens).clone(),
        "cache_position": places,
    }
