"""Capture of a model of transformers for generation: entries beside `forward`, over one table of weights and caches."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sympy
import torch
from torch import nn
from torch.export import Dim

from laconic.ir.capture import inference
from laconic.ir.entries import combine
from laconic.ir.errors import UnsupportedError, UsageError
from laconic.ir.hf_agreement import refuse_disagreement
from laconic.ir.hf_causal import capture_causal
from laconic.ir.hf_config import FACT, noted
from laconic.ir.hf_seq2seq import capture_both
from laconic.ir.hf_static import not_cached
from laconic.ir.hf_towers import capture_towers, image_token
from laconic.ir.past import PAST
from laconic.ir.program import Program
from laconic.ir.types import type_of


def capture_cached(model: nn.Module, forward: Program, *, batch: int, length: int) -> Program:
    """The Program `forward` of a model of transformers, with entries that generate, and caches for so many sequences of
    so many tokens: `prefill` of prompts of 2 tokens to all but one, and `decode` of one; of an encoder with a decoder,
    `encode` of a source of as many tokens, and `decode`; where images stand among tokens, `vision` too.

    Raises UsageError for caches beyond the machine's memory, UnsupportedError for a model whose cache is not of this
    kind, or whose logits are not those of the entries.
    """
    examples = _examples(forward)
    with inference(model):
        entries, facts = _entries(model, examples, batch, length)
        made = combine({"forward": forward, **entries})
        made.facts["cache"] = facts
        refuse_disagreement(model, made, examples)
    return made


def with_entries(
    model: nn.Module, program: Program, *, cache: tuple[int, int] | None = None, towers: bool = False
) -> Program:
    """The Program `program` of a model with the entries that are asked for: those that generate, with a cache of so
    many sequences and tokens, or those of its two sides. A model of transformers leaves its configuration in it.

    Raises UsageError if both are, and what `capture_cached` and `capture_pair` raise.
    """
    said = noted(model)
    if said is not None:
        program.facts[FACT] = said
    if cache is not None and towers:
        raise UsageError("either a cache or towers", why="with a cache, a model that sees has the entry 'vision' too")
    if cache is not None:
        batch, length = _size(cache)
        return capture_cached(model, program, batch=batch, length=length)
    return capture_pair(model, program) if towers else program


def _size(cache: Any) -> tuple[int, int]:
    """The sequences and tokens of a cache. Raises UsageError for what holds nothing, or says no size."""
    sizes = tuple(cache) if isinstance(cache, (tuple, list)) else ()
    if len(sizes) != 2 or not all(type(size) is int for size in sizes) or sizes[0] < 1 or sizes[1] < 3:
        raise UsageError(
            f"a cache of {cache!r}", hint="sequences and tokens, as (4, 2048): at least one sequence of three tokens"
        )
    return sizes


def capture_pair(model: nn.Module, forward: Program) -> Program:
    """The Program `forward` of a model of transformers, with the entries `vision` and `text` for its two sides, whose
    axes are dynamic where those of `forward` are.

    Raises UnsupportedError for a model without such sides.
    """
    with inference(model):
        return combine({"forward": forward, **capture_towers(model, _examples(forward), _dynamic(forward))})


def _examples(forward: Program) -> dict[str, torch.Tensor]:
    """The first example of a Program, by name of input."""
    entry = forward.forward
    given = forward.examples[0] if forward.examples else ()
    return {declared.name: value for declared, value in zip(entry.inputs, given, strict=False)}


def _dynamic(forward: Program) -> dict[str, dict[int, Any]]:
    """The dynamic axes of a Program's inputs, by name and axis, as torch.export takes them."""
    dims = {key: Dim(symbol.name, min=symbol.low, max=symbol.high) for key, symbol in forward.symbols.items()}
    return {
        node.meta["name"]: {
            axis: dims[size.name]
            for axis, size in enumerate(type_of(node.meta["val"]).shape)  # type: ignore[union-attr]
            if isinstance(size, sympy.Symbol)
        }
        for node in forward.forward.input_nodes()
    }


def _entries(
    model: nn.Module, examples: Mapping[str, torch.Tensor], batch: int, length: int
) -> tuple[dict[str, Program], dict[str, int]]:
    """The entries that generate, each captured by itself, and what is to be known of their caches."""
    facts = {"batch": batch, "length": length}
    try:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            entries, facts["source"] = capture_both(model, batch=batch, source=length, length=length), length
        else:
            entries = capture_causal(model, examples, batch=batch, length=length)
            token = image_token(model)
            facts |= {} if token is None else {"image_token": token}
    except (AttributeError, TypeError, ImportError) as problem:
        raise not_cached(model, str(problem).splitlines()[0]) from problem
    except UnsupportedError as problem:
        refused = not_cached(model, problem.why or problem.what)
        if problem.what == refused.what:
            raise
        raise UnsupportedError(refused.what, where=problem.where, why=refused.why, hint=refused.hint) from problem
    for name, program in entries.items():
        states = {f"{part}_cache_{k}" for part in ("key", "value") for k in range(_layers(program))}
        missing = states - program.forward.updated()
        if name in PAST and (missing or not states):
            raise not_cached(model, f"{name} does not write into {', '.join(sorted(missing)[:4]) or 'any'}")
    return entries, facts


def _layers(program: Program) -> int:
    """How many layers the caches of an entry have."""
    return sum(name.startswith("key_cache_") for name in program.weights)
