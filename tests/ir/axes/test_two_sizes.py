"""Labels found at one size explain the same model at another: every axis of every value, and every number that the
graph spells."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers as hf
from torch import fx, nn

from helpers import sampled
from laconic.ir.axes import analyse, factors
from laconic.ir.axes.dims import Dim, Factor, parts_of, resolve
from laconic.ir.axes.labels import flat
from laconic.ir.capture import capture_module
from laconic.ir.program import Program
from laconic.ir.types import TensorType, TupleType, type_of

IDS = torch.arange(21).reshape(3, 7)
PIXELS = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
TEXT = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
Make = Callable[..., tuple[nn.Module, dict[str, Any]]]


def llama(**changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    base = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    base |= {"intermediate_size": 64, "vocab_size": 100, "head_dim": 8}
    return hf.LlamaForCausalLM(hf.LlamaConfig(**(base | changes))), {**TEXT, "use_cache": False}


def bert(**changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    base = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return hf.BertModel(hf.BertConfig(**(base | {"vocab_size": 100} | changes))), dict(TEXT)


def gpt2(**changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    base = {"n_embd": 32, "n_layer": 2, "n_head": 4, "vocab_size": 100, "n_positions": 64}
    base |= {"bos_token_id": 0, "eos_token_id": 0}
    return hf.GPT2LMHeadModel(hf.GPT2Config(**(base | changes))), {**TEXT, "use_cache": False}


def vit(**changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    base = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    return hf.ViTModel(hf.ViTConfig(**(base | {"image_size": 32, "patch_size": 8} | changes))), {"pixel_values": PIXELS}


def moe(**changes: Any) -> tuple[nn.Module, dict[str, Any]]:
    base = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    base |= {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 2, "vocab_size": 100}
    return hf.Qwen3MoeForCausalLM(hf.Qwen3MoeConfig(**(base | changes))), {**TEXT, "use_cache": False}


CASES: list[tuple[Make, dict[str, Any]]] = [
    (llama, {"intermediate_size": 48}),
    (llama, {"hidden_size": 40}),
    (llama, {"head_dim": 6}),
    (llama, {"num_attention_heads": 8}),
    (llama, {"num_attention_heads": 8, "num_key_value_heads": 4}),
    (llama, {"vocab_size": 90}),
    (bert, {"intermediate_size": 48}),
    (bert, {"hidden_size": 40}),
    (bert, {"num_attention_heads": 2}),
    (bert, {"vocab_size": 90}),
    (gpt2, {"n_inner": 96}),
    (gpt2, {"n_embd": 40, "n_inner": 128}),
    (gpt2, {"n_head": 2}),
    (vit, {"intermediate_size": 48}),
    (vit, {"hidden_size": 40}),
    (vit, {"num_attention_heads": 2}),
    (moe, {"moe_intermediate_size": 32}),
    (moe, {"num_experts": 6}),
    (moe, {"hidden_size": 40}),
    (moe, {"num_experts_per_tok": 3}),
]


@pytest.mark.parametrize("case", sampled(CASES, 10), ids=lambda case: "-".join([case[0].__name__, *case[1]]))
def test_labels_explain_another_size(case: tuple[Make, dict[str, Any]]) -> None:
    make, changes = case
    programs = []
    for config in ({}, changes):
        torch.manual_seed(0)
        module, inputs = make(**config)
        programs.append(capture_module(module.eval(), (), inputs, None, check=False))
    assert unexplained(*programs) == []


def unexplained(a: Program, b: Program) -> list[str]:
    """The axes and numbers of `b` that labels of `a` do not predict. Sizes of factors are read off `b`, each where it
    stands alone first, and must then hold everywhere else."""
    axes = analyse(a)
    pairs = list(zip(a.forward.graph.nodes, b.forward.graph.nodes, strict=True))
    assert [(n.op, n.target if n.op != "output" else "") for n, _ in pairs] == [
        (m.op, m.target if m.op != "output" else "") for _, m in pairs
    ]
    found = [
        (node, dim, size)
        for node, other in pairs
        for label, shape in zip(flat(axes.labels.get(node)), shapes(other), strict=True)
        for dim, size in zip(label, shape, strict=True)
    ]
    sizes = solved([(dim, size) for _, dim, size in found])
    wrong = [
        f"%{node.name}: {predicted(dim, sizes)} for {size}"
        for node, dim, size in found
        if predicted(dim, sizes) != size
    ]
    literals = {
        (literal.node, literal.place): literal.times * predicted(literal.dim, sizes) + literal.plus
        for literal in axes.literals
    }
    splits = {split.node for split in axes.resplits}
    for node, other in pairs:
        for place, number in numbers(node):
            theirs = dict(numbers(other)).get(place)
            if node not in splits and literals.get((node, place), number) != theirs:
                wrong.append(f"%{node.name} {node.target} {place}: {literals.get((node, place), number)} for {theirs}")
    return wrong


def shapes(node: fx.Node) -> list[tuple[int, ...]]:
    if node.op == "output":
        return []
    kind = type_of(node.meta["val"])
    parts = kind.parts if isinstance(kind, TupleType) else (kind,)
    return [part.shape for part in parts if isinstance(part, TensorType)]


def solved(found: list[tuple[Dim, int]]) -> dict[Factor, int]:
    """The sizes of factors that stand alone in some axis, or beside others that are known."""
    sizes: dict[Factor, int] = {}
    while True:
        before = len(sizes)
        for dim, size in found:
            missing = [f for f in factors(dim) if f not in sizes]
            plain = [atom for atom in resolve(dim) if isinstance(atom, Factor)]
            if len(missing) == 1 and missing[0] in plain:
                rest = predicted(dim, {**sizes, missing[0]: 1})
                if size % rest == 0:
                    sizes[missing[0]] = size // rest
        if len(sizes) == before:
            return sizes


def predicted(dim: Dim, sizes: dict[Factor, int]) -> int:
    size = 1
    for atom in resolve(dim):
        size *= (
            sizes.get(atom, atom.size)
            if isinstance(atom, Factor)
            else sum(predicted(part, sizes) for part in parts_of(atom))
        )
    return size


def numbers(node: fx.Node) -> Iterator[tuple[tuple[Any, ...], int]]:
    """The whole numbers among a call's arguments, by their places."""
    if node.op != "call_function":
        return
    holders = [(("args", k), v) for k, v in enumerate(node.args)] + [(("kwargs", k), v) for k, v in node.kwargs.items()]
    for place, value in holders:
        for more, one in (
            [((k,), v) for k, v in enumerate(value)] if isinstance(value, (list, tuple)) else [((), value)]
        ):
            if isinstance(one, int) and not isinstance(one, bool):
                yield (*place, *more), one
