"""Six architectures from small random configurations, with example inputs and named dynamic axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn
from torch.export import Dim

Case = tuple[nn.Module, dict[str, Any], dict[str, Any]]

BATCH, SEQUENCE, TARGET = Dim("batch"), Dim("sequence", max=64), Dim("target", max=64)


def _ids(*shape: int) -> torch.Tensor:
    return torch.randint(0, 100, shape)


def _text(**extra: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    inputs = {"input_ids": _ids(3, 7), "attention_mask": torch.ones(3, 7, dtype=torch.long), **extra}
    axes: dict[str, Any] = {"input_ids": {0: BATCH, 1: SEQUENCE}, "attention_mask": {0: BATCH, 1: SEQUENCE}}
    return inputs, axes | dict.fromkeys(extra)


def bert() -> Case:
    config = hf.BertConfig(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, vocab_size=100
    )
    return hf.BertModel(config), *_text()


def gpt2() -> Case:
    config = hf.GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=100, n_positions=64, bos_token_id=0, eos_token_id=0
    )
    return hf.GPT2LMHeadModel(config), *_text(use_cache=False)


def llama() -> Case:
    config = hf.LlamaConfig(
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=64,
        vocab_size=100,
    )
    return hf.LlamaForCausalLM(config), *_text(use_cache=False)


def t5() -> Case:
    config = hf.T5Config(d_model=32, num_layers=2, num_heads=4, d_kv=8, d_ff=64, vocab_size=100)
    inputs, axes = _text(decoder_input_ids=_ids(3, 5), use_cache=False)
    return hf.T5ForConditionalGeneration(config), inputs, axes | {"decoder_input_ids": {0: BATCH, 1: TARGET}}


def vit() -> Case:
    config = hf.ViTConfig(
        hidden_size=32,
        num_hidden_layers=2,
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


def make(name: str) -> Case:
    """The module in eval mode, its example arguments and dynamic shapes; the same for the same name."""
    torch.manual_seed(0)
    module, inputs, axes = ARCHITECTURES[name]()
    return module.eval(), inputs, axes
