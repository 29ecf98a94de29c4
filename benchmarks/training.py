"""Training under the backend against eager: losses of 200 Adam steps on three small models.

    python benchmarks/training.py benchmarks/results/training.json

Without dropout, same seed and data: the largest relative difference of the losses, step by step; beside it what a
change in the last bit of weights does to eager's own curve, since any other order of sums does as much (training is
chaotic: rounding grows by orders of magnitude in 200 steps), and Inductor's difference. With
dropout, whose draws differ: the loss over the last quarter of the steps, by several seeds, as a difference of means in
units of its standard error (Welch). The graph must have been rolled, in training too.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

NUDGES = 6
STEPS, SEEDS, LAYERS, WIDTH, HEADS, VOCABULARY, BATCH, LENGTH = 200, 8, 6, 32, 4, 48, 8, 16


def main(out: Path) -> None:
    from laconic.machine import machine

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = folder
        models = {name: measure(build) for name, build in MODELS.items()}
    out.write_text(json.dumps({"schema": 1, "machine": machine(), "steps": STEPS, "models": models}, indent=1) + "\n")


def measure(build: Callable[[float], nn.Module], steps: int = STEPS, seeds: int = SEEDS) -> dict[str, Any]:
    """The figures of one model, which is built for a dropout."""
    print(build.__name__, file=sys.stderr, flush=True)
    start = made(build, 0.0)
    eager, mine, other = (copy.deepcopy(start) for _ in range(3))
    wanted = curve(eager, eager, steps)
    found = curve(mine, compiled(mine), steps)
    counts = rolled()
    nudges = [nudged(start, seed) for seed in range(NUDGES)]
    return {
        "losses": [wanted[0], wanted[-1]],
        "largest_relative_difference": largest(found, wanted),
        "inductor": largest(curve(other, torch.compile(other), steps), wanted),
        "last_bits_of_weights": [largest(curve(model, model, steps), wanted) for model in nudges],
        **counts,
        "dropout": with_dropout(build, steps, seeds),
    }


def nudged(model: nn.Module, seed: int) -> nn.Module:
    """The model with every second number of its weights, by chance, moved by its last bit."""
    other = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in other.parameters():
            moved = torch.nextafter(weight, torch.full_like(weight, torch.inf))
            weight.copy_(torch.where(torch.randint(2, weight.shape, generator=generator).bool(), moved, weight))
    return other


def with_dropout(build: Callable[[float], nn.Module], steps: int, seeds: int) -> dict[str, Any]:
    """Loss over the last quarter, eager and compiled, for several seeds of the draws."""
    start = made(build, 0.1)
    model = copy.deepcopy(start)
    call = compiled(model)
    tails: dict[str, list[float]] = {"eager": [], "laconic": []}
    for seed in range(seeds):
        for name, each in (("eager", model), ("laconic", call)):
            model.load_state_dict(start.state_dict())
            torch.manual_seed(1000 * (name == "eager") + seed)
            tails[name].append(statistics.mean(curve(model, each, steps)[-(steps // 4) :]))
    means = {name: statistics.mean(values) for name, values in tails.items()}
    error = sum(statistics.variance(values) / len(values) for values in tails.values()) ** 0.5
    return {
        "seeds": seeds,
        "mean_loss": means,
        "spread": {name: statistics.stdev(values) for name, values in tails.items()},
        "standard_errors_apart": abs(means["laconic"] - means["eager"]) / error,
    }


def curve(model: nn.Module, call: Callable[..., Any], steps: int) -> list[float]:
    """Losses of Adam steps on data of a fixed seed, which can be learnt."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    losses = []
    for step in range(steps):
        given, target = model.data(torch.Generator().manual_seed(step))  # type: ignore[operator]
        loss = nn.functional.cross_entropy(call(given).flatten(0, -2), target.flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def largest(found: list[float], wanted: list[float]) -> float:
    return max(abs(a - b) / abs(b) for a, b in zip(found, wanted, strict=True))


def made(build: Callable[[float], nn.Module], dropout: float) -> nn.Module:
    torch.manual_seed(0)
    return build(dropout).train()


def compiled(model: nn.Module) -> Any:
    from laconic.codegen import reset_stats

    torch._dynamo.reset()
    reset_stats()
    return torch.compile(model, backend="laconic", options={"strict": True})


def rolled() -> dict[str, int]:
    """What the backend counted. Raises RuntimeError if it compiled anything whole."""
    from laconic.codegen import stats

    done = stats()
    if done["rolled"] != done["graphs"] or done["fallbacks"]:
        raise RuntimeError(f"a graph was not rolled: {done['refused'] or done['fallbacks']}")
    return {name: done[name] for name in ("graphs", "nodes", "compiled")}


# Models


class Language(nn.Module):
    """A Hugging Face language model on text in which each token follows from the one two before it."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, tokens: torch.Tensor) -> Any:
        return self.inner(input_ids=tokens, use_cache=False).logits

    def data(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(VOCABULARY, (BATCH, LENGTH + 1), generator=generator)
        for k in range(2, LENGTH + 1):
            tokens[:, k] = (3 * tokens[:, k - 2] + 1) % VOCABULARY
        return tokens[:, :-1], tokens[:, 1:]


class Pictures(nn.Module):
    """A Hugging Face image classifier on noise with a bright stripe, whose place is the class."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, pixels: torch.Tensor) -> Any:
        return self.inner(pixel_values=pixels).logits

    def data(self, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        target = torch.randint(8, (BATCH,), generator=generator)
        pixels = torch.randn(BATCH, 3, 16, 16, generator=generator)
        for k, place in enumerate(target.tolist()):
            pixels[k, :, 2 * place : 2 * place + 2] += 1.0
        return pixels, target


def gpt2(dropout: float) -> nn.Module:
    import transformers

    sizes = {"n_layer": LAYERS, "n_embd": WIDTH, "n_head": HEADS, "n_positions": LENGTH, "vocab_size": VOCABULARY}
    drops = {"resid_pdrop": dropout, "embd_pdrop": dropout, "attn_pdrop": 0.0}
    return Language(transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes, **drops)))


def llama(dropout: float) -> nn.Module:
    """Llama has no dropout but on attention's weights."""
    import transformers

    sizes = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS // 2, "vocab_size": VOCABULARY}
    config = transformers.LlamaConfig(**sizes, **heads, attention_dropout=dropout, attn_implementation="eager")
    return Language(transformers.LlamaForCausalLM(config))


def vit(dropout: float) -> nn.Module:
    import transformers

    sizes = {"num_hidden_layers": LAYERS, "hidden_size": WIDTH, "intermediate_size": 2 * WIDTH}
    form = {"num_attention_heads": HEADS, "image_size": 16, "patch_size": 4, "num_labels": 8}
    config = transformers.ViTConfig(**sizes, **form, hidden_dropout_prob=dropout)
    return Pictures(transformers.ViTForImageClassification(config))


MODELS: dict[str, Callable[[float], nn.Module]] = {"gpt2": gpt2, "llama": llama, "vit": vit}

if __name__ == "__main__":
    main(Path(sys.argv[1]))
