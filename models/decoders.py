"""Recipes of the text models: two dense decoders and two mixtures of experts, on the standard library's text."""

from __future__ import annotations

from abc import abstractmethod
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from laconic.models import corpus, text_figures, tokenizer
from laconic.models.corpus import Split
from laconic.models.training import Recipe

WINDOW = 512  # tokens
_BATCH = 8
_LOOK_WINDOWS = 96
_EXPERTS = "laconic_dense_all"

_SHARED: dict[str, Any] = {
    "vocab_size": tokenizer.VOCABULARY,
    "max_position_embeddings": WINDOW,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 1,
}


class Decoder(Recipe):
    """A decoder trained to predict the next token of the library's text, in windows of 512."""

    def __init__(self, cache_folder: Path) -> None:
        super().__init__()
        self._cache_folder = cache_folder

    @abstractmethod
    def config(self) -> Any:
        """The transformers configuration."""

    def build(self) -> nn.Module:
        from transformers import AutoModelForCausalLM

        class_: Any = AutoModelForCausalLM
        model = class_.from_config(self.config(), attn_implementation="sdpa", dtype=torch.float32)
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if name.endswith(("o_proj.weight", "down_proj.weight", "down_proj")):
                    weight.zero_()  # each branch starts by adding nothing
        return nn.ModuleDict({"model": model})

    def matrices(self, student: Any) -> list[nn.Parameter]:
        return [
            weight
            for name, weight in student["model"].model.layers.named_parameters()
            if weight.ndim >= 2 and not name.endswith("mlp.gate.weight")
        ]

    @cached_property
    def _tokens(self) -> NDArray[np.int64]:
        return tokenizer.training_stream(self._cache_folder)[0]

    @cached_property
    def _look_ids(self) -> torch.Tensor:
        ids, _ = tokenizer.encode(corpus.committed(Split.SELECTION))
        return torch.from_numpy(ids[: _LOOK_WINDOWS * WINDOW + 1])

    def batch(self, step: int) -> dict[str, torch.Tensor]:
        """Windows of 513 tokens: each epoch starts them elsewhere and orders them anew."""
        per_epoch = (len(self._tokens) - 1 - WINDOW) // WINDOW
        rows = []
        for k in range(step * _BATCH, (step + 1) * _BATCH):
            epoch, place = divmod(k, per_epoch)
            generator = np.random.default_rng((self.seed, epoch))
            offset, order = int(generator.integers(WINDOW)), generator.permutation(per_epoch)
            start = offset + int(order[place]) * WINDOW
            rows.append(self._tokens[start : start + WINDOW + 1])
        return {"ids": torch.from_numpy(np.stack(rows))}

    def loss(self, student: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        logits = student["model"](input_ids=batch["ids"][:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1).float(), batch["ids"][:, 1:].flatten()), {}

    def look(self, student: Any) -> dict[str, float]:
        return {"selection": float(text_figures.token_nats(student["model"], self._look_ids, WINDOW).mean())}


def llama_config(width: int, layers: int, heads: int, kv_heads: int, hidden: int) -> Any:
    """A Llama of heads of 64, on the zoo's tokenizer."""
    from transformers import LlamaConfig

    return LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=64,
        intermediate_size=hidden,
        **_SHARED,
    )


class LlamaMha(Decoder):
    """Ten blocks of 256, four heads with keys and values of their own."""

    name = "llama-mha"
    steps = 2000

    def config(self) -> Any:
        return llama_config(256, 10, heads=4, kv_heads=4, hidden=256)


class LlamaGqa(Decoder):
    """Eight blocks of 192, three query heads over one key-value head: the stream is wider than keys and values."""

    name = "llama-gqa"
    steps = 3000

    def config(self) -> Any:
        return llama_config(192, 8, heads=3, kv_heads=1, hidden=256)


class Mixture(Decoder):
    """A decoder with experts, kept in balance by a loss per layer.

    The loss is `experts * sum(share of tokens * mean probability)`, 1 when all are used alike, for each layer on its
    own: Fedus et al. 2021, "Switch Transformers" (arXiv:2101.03961). Summed over layers first, as transformers does,
    it allows each layer to be lopsided in a way of its own.
    """

    balance: ClassVar[float]
    _routed: list[tuple[torch.Tensor, torch.Tensor]]

    def build(self) -> nn.Module:
        from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

        ALL_EXPERTS_FUNCTIONS.register(_EXPERTS, all_experts)
        student: Any = super().build()
        found: nn.Module = student
        student["model"].set_experts_implementation(_EXPERTS)
        self._routed = routed = []
        for layer in student["model"].model.layers:
            layer.mlp.gate.register_forward_hook(lambda _, inputs, found: routed.append((found[0], found[2])))
        return found

    @abstractmethod
    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        """What a router's logits (tokens, experts) say of each expert; rows sum to one."""

    def loss(self, student: Any, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        self._routed.clear()
        nats, _ = super().loss(student, batch)
        loads, means = [], []
        for logits, chosen in self._routed:
            experts = logits.shape[-1]
            loads.append(F.one_hot(chosen, experts).float().mean((0, 1)))
            means.append(self.probabilities(logits.float()).mean(0))
        self._routed.clear()
        load = torch.stack(loads).detach()
        unbalance = (load * torch.stack(means)).sum(1).mean() * load.shape[1]
        worst = load.max() * load.shape[1]
        return nats + self.balance * unbalance, {"nats": nats.detach(), "worst load": worst, "load": load}

    def look(self, student: Any) -> dict[str, float]:
        found = super().look(student)
        load = text_figures.expert_load(student["model"], self._look_ids[: 16 * WINDOW + 1], WINDOW)
        share = load / load.float().mean(1, keepdim=True)
        self._routed.clear()
        return found | {"max load": float(share.max()), "min load": float(share.min())}


class Moe(Mixture):
    """Six blocks of 128, sixteen experts of 64, the best two by a softmax that is made to sum to one again."""

    name = "moe"
    steps = 3000
    balance = 0.1

    def config(self) -> Any:
        from transformers import Qwen3MoeConfig

        class_: Any = Qwen3MoeConfig
        return class_(
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=64,
            num_experts=16,
            num_experts_per_tok=2,
            norm_topk_prob=True,
            moe_intermediate_size=64,
            intermediate_size=256,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            **_SHARED,
        )

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        return logits.softmax(-1)


class MoeSigmoid(Mixture):
    """Six blocks of 128, sixteen experts in four groups of which two are looked at, sigmoid scores, a shared expert.

    The selection bias keeps the balance (DeepSeek-AI 2024, "DeepSeek-V3 Technical Report", arXiv:2412.19437): after
    each step it goes up by `speed` for experts with less than the mean load and down for the others. The loss of
    balance is small beside it.
    """

    name = "moe-sigmoid"
    steps = 3000
    balance = 0.002
    speed = 0.003

    def config(self) -> Any:
        from transformers import DeepseekV3Config

        return DeepseekV3Config(
            hidden_size=128,
            num_hidden_layers=6,
            num_attention_heads=2,
            num_key_value_heads=2,
            kv_lora_rank=64,
            q_lora_rank=None,
            qk_nope_head_dim=32,
            qk_rope_head_dim=32,
            v_head_dim=64,
            n_routed_experts=16,
            num_experts_per_tok=2,
            n_group=4,
            topk_group=2,
            n_shared_experts=1,
            norm_topk_prob=True,
            routed_scaling_factor=1.0,
            first_k_dense_replace=0,
            moe_intermediate_size=64,
            intermediate_size=256,
            **_SHARED,
        )

    def probabilities(self, logits: torch.Tensor) -> torch.Tensor:
        scores = logits.sigmoid()
        return scores / scores.sum(-1, keepdim=True)

    @torch.no_grad()
    def after(self, student: Any, step: int, seen: dict[str, torch.Tensor], rate: float) -> None:
        load = seen["load"]
        for layer, own in zip(student["model"].model.layers, load, strict=True):
            layer.mlp.gate.e_score_correction_bias += self.speed * rate * torch.sign(own.mean() - own)


def all_experts(
    experts: Any, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
) -> torch.Tensor:
    """Every expert for every token as two matrix products, those that were not chosen times zero: equal to computing
    the chosen ones, and on few small experts faster than sorting tokens.

    `hidden_states` (tokens, width), `top_k_index` and `top_k_weights` (tokens, k).
    """
    count, twice, width = experts.gate_up_proj.shape
    gates = torch.zeros(len(hidden_states), count, dtype=top_k_weights.dtype, device=hidden_states.device)
    gates = gates.scatter(1, top_k_index, top_k_weights)
    both = F.linear(hidden_states, experts.gate_up_proj.reshape(count * twice, width)).reshape(-1, count, twice)
    gate, up = both.chunk(2, dim=-1)
    inner = experts.act_fn(gate) * up * gates.unsqueeze(-1)
    down = experts.down_proj.permute(1, 0, 2).reshape(width, -1)
    return F.linear(inner.flatten(1), down).to(hidden_states.dtype)
