"""Architectures from small random configurations, with example inputs and named dynamic axes.

`ARCHITECTURES` are two layers deep, for tests of all that a model passes through; `EIGHT` three, enough for a block to
recur, for tests that compare what is found with what the configuration says.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Container
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import nn
from torch.export import Dim

from laconic.ir.capture import capture_module
from laconic.ir.program import Program

Case = tuple[nn.Module, dict[str, Any], dict[str, Any]]

BATCH, SEQUENCE, TARGET = Dim("batch"), Dim("sequence", max=64), Dim("target", max=64)


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 100, shape)


def text(**extra: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs = {"input_ids": _ids(3, 7), "attention_mask": torch.ones(3, 7, dtype=torch.long), **extra}
    axes: dict[str, Any] = {"input_ids": {0: BATCH, 1: SEQUENCE}, "attention_mask": {0: BATCH, 1: SEQUENCE}}
    return inputs, axes | dict.fromkeys(extra)


def bert(layers: int = 2) -> Case:
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=layers, num_attention_heads=4, intermediate_size=64, vocab_size=100
    )
    return hf.BertModel(config), *text()


def gpt2(layers: int = 2) -> Case:
    config = hf.GPT2Config(
        n_embd=32, n_layer=layers, n_head=4, vocab_size=100, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return hf.GPT2LMHeadModel(config), *text(use_cache=False)


def llama(layers: int = 2, **changes: Any) -> Case:
    config = hf.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=100,
        **changes,
    )
    return hf.LlamaForCausalLM(config), *text(use_cache=False)


def t5(layers: int = 2, decoder_layers: int = 2) -> Case:
    layered = {"num_layers": layers, "num_decoder_layers": decoder_layers}
    config = hf.T5Config(d_model=32, num_heads=4, d_kv=8, d_ff=64, vocab_size=100, **layered)
    inputs, axes = text(decoder_input_ids=_ids(3, 5), use_cache=False)
    return hf.T5ForConditionalGeneration(config), inputs, axes | {"decoder_input_ids": {0: BATCH, 1: TARGET}}


def vit(layers: int = 2) -> Case:
    config = hf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=64,
        image_size=32,
        patch_size=8,
    )
    return hf.ViTModel(config), {"pixel_values": torch.randn(3, 3, 32, 32)}, {"pixel_values": {0: BATCH}}


def resnet() -> Case:
    config = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], layer_type="basic")
    model = hf.ResNetForImageClassification(config)
    for name, buffer in model.named_buffers():  # as after training: statistics that do something
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return model, {"pixel_values": torch.randn(3, 3, 32, 32)}, {"pixel_values": {0: BATCH}}


ARCHITECTURES: dict[str, Callable[[], Case]] = {
    "bert": bert,
    "gpt2": gpt2,
    "llama": llama,
    "t5": t5,
    "vit": vit,
    "resnet": resnet,
}


def qwen3_moe(**changes: Any) -> Case:
    settings = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "intermediate_size": 64,
        "moe_intermediate_size": 24,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "norm_topk_prob": True,
        "vocab_size": 100,
        "max_position_embeddings": 64,
    }
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**(settings | changes))), *text(use_cache=False)


def sparse_by_turns() -> Case:
    """An MoE in every second layer."""
    return qwen3_moe(num_hidden_layers=6, decoder_sparse_step=2, norm_topk_prob=False)


def local_by_turns() -> Case:
    """A sliding window in every second layer, with its own rotary table: Gemma 3."""
    config = hf.Gemma3TextConfig(
        hidden_size=32,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=64,
        vocab_size=100,
        sliding_window=4,
        max_position_embeddings=64,
        layer_types=["sliding_attention", "full_attention"] * 3,
        attn_implementation="sdpa",
    )
    return hf.Gemma3ForCausalLM(config), *text(use_cache=False)


def whisper() -> Case:
    config = hf.WhisperConfig(
        d_model=32,
        encoder_layers=3,
        decoder_layers=4,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        vocab_size=100,
        num_mel_bins=8,
        max_source_positions=16,
        max_target_positions=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=1,
    )
    inputs = {"input_features": torch.randn(3, 8, 32), "decoder_input_ids": _ids(3, 5), "use_cache": False}
    axes = {"input_features": {0: BATCH}, "decoder_input_ids": {0: BATCH, 1: TARGET}, "use_cache": None}
    return hf.WhisperForConditionalGeneration(config), inputs, axes


def albert(layers: int, width: int = 64, **changes: Any) -> Case:
    """One block's weights in all blocks, norms too."""
    config = hf.AlbertConfig(
        vocab_size=100,
        embedding_size=16,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=4,
        intermediate_size=128,
        max_position_embeddings=16,
        **changes,
    )
    ids = _ids(2, 7)
    return hf.AlbertModel(config), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, {}


def mamba() -> Case:
    """Its scan is unrolled over the sequence, which so is fixed."""
    config = hf.MambaConfig(
        hidden_size=32,
        num_hidden_layers=3,
        state_size=4,
        intermediate_size=64,
        conv_kernel=3,
        time_step_rank=4,
        vocab_size=100,
        use_cache=False,
    )
    inputs = {"input_ids": _ids(3, 7), "use_cache": False}
    return hf.MambaForCausalLM(config), inputs, {"input_ids": {0: BATCH}, "use_cache": None}


EIGHT: dict[str, Callable[[], Case]] = {
    "bert": partial(bert, 3),
    "gpt2": partial(gpt2, 3),
    "llama": partial(llama, 3, max_position_embeddings=64),
    "qwen3_moe": qwen3_moe,
    "t5": partial(t5, 3, 4),
    "vit": partial(vit, 3),
    "whisper": whisper,
    "mamba": mamba,
}
BY_TURNS: dict[str, Callable[[], Case]] = {"sparse": sparse_by_turns, "local": local_by_turns}


def wide(layers: int, build: Callable[..., Case] = llama, **changes: Any) -> nn.Module:
    """A module whose weights are drawn so wide that each of its blocks has something to do."""
    torch.manual_seed(0)
    module = build(layers, **changes)[0].eval()
    for weight in module.parameters():
        nn.init.normal_(weight, std=0.2)
    return module


def captured(module: nn.Module, build: Callable[..., Case] = llama) -> Program:
    """The Program of a module that `build` made, its axes dynamic. Modules that differ in the values of their weights
    alone are captured once."""
    first: dict[int, str] = {}
    values = module.state_dict(keep_vars=True)
    ties = tuple(first.setdefault(id(value), name) for name, value in values.items())
    key = module.config.to_json_string(), ties
    if key not in _CAPTURED:
        _, inputs, axes = build(1)
        _CAPTURED[key] = capture_module(copy.deepcopy(module), (), inputs, axes)
    made = _CAPTURED[key].clone()
    for name, weight in made.weights.items():
        if name in values:
            made.weights[name] = replace(weight, value=values[name])
    return made


_CAPTURED: dict[Any, Program] = {}


def make(name: str, table: dict[str, Callable[[], Case]] = ARCHITECTURES) -> Case:
    """The module in eval mode, its example arguments and dynamic shapes; the same for the same name."""
    torch.manual_seed(0)
    module, inputs, axes = table[name]()
    return module.eval(), inputs, axes


def inputs_of(
    example: dict[str, Any], sizes: tuple[int, int, int], seed: int, fixed: Container[str] = ()
) -> dict[str, Any]:
    """Arguments like the example's at other sizes (batch, sequence, target), the example's where an axis is fixed."""
    torch.manual_seed(seed)
    batch, sequence, target = sizes
    made: dict[str, Any] = {}
    for name, value in example.items():
        if not isinstance(value, torch.Tensor):
            made[name] = value
        elif value.is_floating_point():
            made[name] = torch.randn(batch, *value.shape[1:])
        elif name == "attention_mask":
            made[name] = (torch.arange(sequence) < torch.randint(1, sequence + 1, (batch, 1))).long()
        else:
            length = target if name == "decoder_input_ids" else sequence
            made[name] = torch.randint(0, 100, (batch, value.shape[1] if name in fixed else length))
    return made
