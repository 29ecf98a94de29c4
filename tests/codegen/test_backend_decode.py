"""Decoding with a StaticCache: the caches are the caller's, and are written in place."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from compiled import compiled, python, rolled, said, same
from laconic.codegen import stats

SIZES = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def llama(layers: int, **sizes: int) -> Any:
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(**(SIZES | sizes), num_hidden_layers=layers)
    return transformers.LlamaForCausalLM(config).eval()


def static_cache(model: Any, length: int) -> tuple[Any, list[torch.Tensor]]:
    """A cache whose tensors are there, and these."""
    import transformers

    cache = transformers.StaticCache(config=model.config, max_cache_len=length)
    heads, width = model.config.num_key_value_heads, model.config.head_dim
    cache.early_initialization(2, heads, width, torch.float32, torch.device("cpu"))
    return cache, [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


@torch.no_grad()
def decode(model: Any, forward: Any, length: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Feed a prompt eagerly, then tokens one by one; the logits of each step, and the caches."""
    cache, tensors = static_cache(model, length)
    places = [tensor.data_ptr() for tensor in tensors]
    prompt = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    logits = model(prompt, past_key_values=cache, use_cache=True).logits
    found = []
    for _ in range(6):
        token = logits[:, -1:].argmax(-1)
        logits = forward(input_ids=token, past_key_values=cache, use_cache=True).logits
        found.append(logits)
    now = [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]
    assert [tensor.data_ptr() for tensor in now] == places, "written in place"
    return found, now


def test_decode_steps() -> None:
    model = llama(6, num_key_value_heads=2)
    wanted, caches = decode(model, model, 16)
    found, written = decode(model, compiled(model), 16)
    for mine, eager in zip([*found, *written], [*wanted, *caches], strict=True):
        same(mine, eager, 1e-5)
    done = rolled(5)
    assert done["pieces"] <= 3
    assert caches[-1][:, :, :11].abs().sum() > 0 == caches[-1][:, :, 11:].abs().sum()


@pytest.mark.slow
def test_generate() -> None:
    """One compilation for the prompt, one for all that is decoded."""
    model = llama(12, num_key_value_heads=2)
    prompt = torch.tensor([[3, 1, 4, 1, 5], [9, 2, 6, 5, 3]])
    how = {"max_new_tokens": 20, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted = model.generate(prompt, cache_implementation="static", **how)
    model.forward = compiled(model.forward)
    assert torch.equal(model.generate(prompt, cache_implementation="static", **how), wanted)
    rolled(12, graphs=2)
    cache, tensors = static_cache(model, 24)  # as long as generate makes its own
    places = [tensor.data_ptr() for tensor in tensors]
    assert torch.equal(model.generate(prompt, past_key_values=cache, **how), wanted)
    assert [t.data_ptr() for layer in cache.layers for t in (layer.keys, layer.values)] == places
    assert all(tensor.abs().sum((0, 1, 3)).count_nonzero() == 24 for tensor in tensors)
    rolled(11, graphs=3)  # the prompt anew, since this cache has its tensors; no decode step
    cache, _ = static_cache(model, 40)  # compiled anew, for any length
    assert torch.equal(model.generate(prompt, past_key_values=cache, **how), wanted)
    assert not stats()["fallbacks"]
    assert not stats()["refused"]


_MEMORY = """
from pathlib import Path
import torch
from test_backend_decode import llama, static_cache
from compiled import compiled
from laconic.codegen import stats

def status(key):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(key + ":"))

def peak(call):
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    call()
    return status("VmHWM") - before

torch.set_num_threads(1)
model = llama(6, num_key_value_heads=4)
cache, tensors = static_cache(model, 65536)
size = tensors[0].nbytes
with torch.no_grad():
    for tensor in tensors:
        tensor.zero_()
    call = compiled(model)
    token = torch.tensor([[3], [9]])
    def step(forward):
        forward(input_ids=token, past_key_values=cache, use_cache=True)
    for forward in (model, call, call, model):
        step(forward)
    assert stats()["rolled"] == stats()["graphs"], stats()
    print(size, peak(lambda: step(model)), peak(lambda: step(call)), peak(lambda: tensors[0].clone()))
"""


@pytest.mark.slow
def test_no_cache_is_copied() -> None:
    """By the kernel's peak of resident pages; which sees a copy of one cache of one layer."""
    script = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\n{_MEMORY}"
    text = said(python("-c", script, MALLOC_MMAP_THRESHOLD_="65536"))
    size, eager, mine, copy = (int(word) for word in text.split()[-4:])
    assert copy > 0.9 * size
    assert mine < 0.5 * size, text
    assert mine < eager + 0.1 * size, text
