"""Capture of a model of transformers for generation: entries beside `forward`, over one table of weights and caches."""

from __future__ import annotations

from torch import nn

from laconic.ir.entries import combine
from laconic.ir.errors import UnsupportedError, UsageError
from laconic.ir.hf_causal import capture_causal
from laconic.ir.hf_seq2seq import capture_both
from laconic.ir.program import Program


def capture_cached(model: nn.Module, forward: Program, *, batch: int, length: int) -> Program:
    """The Program `forward` of a model of transformers, with entries that generate, and caches for so many sequences of
    so many tokens: `prefill` of prompts of 2 tokens to all but one, and `decode` of one; of an encoder with a decoder,
    `encode` of a source of as many tokens, and `decode`.

    Raises UsageError for sizes that hold nothing, UnsupportedError for a model whose cache is not of this kind.
    """
    if batch < 1 or length < 3:
        raise UsageError(
            f"a cache of {batch} sequences of {length} tokens", hint="at least one sequence of three tokens"
        )
    facts = {"batch": batch, "length": length}
    try:
        if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
            entries, facts["source"] = capture_both(model, batch=batch, source=length, length=length), length
        else:
            entries = capture_causal(model, batch=batch, length=length)
    except (AttributeError, TypeError, ImportError, StopIteration) as problem:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be captured with a cache",
            why=str(problem).splitlines()[0],
            hint="models of transformers with attention in every layer can",
        ) from problem
    for name, program in entries.items():
        states = {f"{part}_cache_{k}" for part in ("key", "value") for k in range(_layers(program))}
        missing = states - program.forward.updated()
        if missing or not states:
            raise UnsupportedError(
                f"{type(model).__name__} cannot be captured with a cache",
                why=f"{name} does not write into {', '.join(sorted(missing)[:4]) or 'any'}",
                hint="models of transformers with attention in every layer can",
            )
    made = combine({"forward": forward, **entries})
    made.facts["cache"] = facts
    return made


def _layers(program: Program) -> int:
    """How many layers the caches of an entry have."""
    return sum(name.startswith("key_cache_") for name in program.weights)
