"""Whether the entries that generate say what the model says by itself: a prompt and one token more, one of the prompts
padded. Caches, masks and positions are put together by the capture, so that a model which takes them otherwise shows
here, not in its users' texts."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from laconic.ir.errors import UnsupportedError, UsageError
from laconic.ir.outcomes import with_states
from laconic.ir.past import DECODE, ENCODE, FEATURES, PIXELS, PREFILL, VISION, cache_size, example
from laconic.ir.precise import evaluate_precise
from laconic.ir.program import Program
from laconic.ir.run import Outcome, evaluate

#: The largest difference of logits, as a part of their norm, that is taken for rounding in float32.
_ALLOWED = 1e-3


@torch.no_grad()
def refuse_disagreement(model: nn.Module, program: Program, examples: Mapping[str, torch.Tensor]) -> None:
    """Raise UnsupportedError if the logits of a prompt, or of the token after it, are not the model's; UsageError if
    the caches do not hold the prompt of the model's example, where images stand in it."""
    try:
        sourced = ENCODE in program.entries
        with _in_float32(model):
            pairs = list(_sourced(model, program) if sourced else _prompted(model, program, examples))
    except (IndexError, RuntimeError) as problem:
        raise UnsupportedError(
            f"{type(model).__name__} cannot be captured with a cache of {cache_size(program)[1]} tokens",
            why=f"it does not run on so many: {str(problem).splitlines()[0]}",
            hint="capture with a shorter cache, of as many tokens as it has positions for at most",
        ) from problem
    for name, ours, theirs in pairs:
        difference = float((ours - theirs).norm() / theirs.norm())
        if not difference <= _ALLOWED:
            raise UnsupportedError(
                f"{type(model).__name__} cannot be captured with a cache",
                why=f"the logits of {name} are {difference:.1%} away from the model's own: it takes caches, masks or "
                "positions in a way that is not known",
                hint="models of transformers whose attention looks back at all tokens can",
            )


def _prompted(
    model: Any, program: Program, examples: Mapping[str, torch.Tensor]
) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """What prompts give here and there that fill the cache but for one token; the first of them is shorter, and padded
    on the left."""
    batch, length = cache_size(program)
    given: dict[str, torch.Tensor] = {}
    tokens = length - 1
    if VISION in program.entries:
        tokens = examples["input_ids"].shape[1]
        if tokens >= length:
            raise UsageError(
                f"a cache of {length} tokens does not hold the {tokens} of the model's example",
                hint=f"--cache {batch}x{tokens + 1}, or larger",
            )
        given[PIXELS] = examples[PIXELS][:1].expand(batch, -1, -1, -1).contiguous()
    prompt, step = example(batch, length, tokens, 0), example(batch, length, 1, tokens)
    if VISION in program.entries:
        prompt["input_ids"] = examples["input_ids"][:1].repeat(batch, 1)
    whole = prompt["input_ids"].clone()
    prompt["input_ids"][0, 1:] = whole[0, :-1]
    for inputs in (prompt, step):
        inputs["attention_mask"][0, 0] = 0
        inputs["position_ids"][0] = (inputs["position_ids"][0] - 1).clamp(min=0)
    if given:
        prompt[FEATURES] = _run(program, VISION, given).results[0]
    first = _run(program, PREFILL, prompt)
    second = _run(with_states(program, first.states), DECODE, step)
    for row in sorted({0, batch - 1}):
        ids = whole[row, : tokens - 1] if row == 0 else whole[row]
        ids = torch.cat([ids, step["input_ids"][row]])[None]
        own = {name: value[row : row + 1] for name, value in given.items()}
        said = _logits(model, input_ids=ids, attention_mask=torch.ones_like(ids), **own)
        yield PREFILL, first.results[0][row, -1], said[-2]
        yield DECODE, second.results[0][row, -1], said[-1]


def _sourced(model: Any, program: Program) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
    """What sources give here and there; the first of them is shorter."""
    batch, _ = cache_size(program)
    source = int(program.facts["cache"]["source"])
    ids = example(batch, source, source, 0)["input_ids"]
    mask = torch.ones_like(ids)
    mask[0, -1] = 0
    start, then = torch.full((batch, 1), 2), torch.full((batch, 1), 3)
    given = {"input_ids": ids, "attention_mask": mask, "decoder_input_ids": start, "cache_position": torch.tensor([0])}
    first = _run(program, ENCODE, given)
    after = given | {"decoder_input_ids": then, "cache_position": torch.tensor([1])}
    second = _run(with_states(program, first.states), DECODE, after)
    for row in sorted({0, batch - 1}):
        own = ids[row : row + 1, : int(mask[row].sum())]
        said = _logits(model, input_ids=own, decoder_input_ids=torch.tensor([[2, 3]]))
        yield ENCODE, first.results[0][row, -1], said[0]
        yield DECODE, second.results[0][row, -1], said[1]


@contextmanager
def _in_float32(model: nn.Module) -> Iterator[None]:
    """The model's halves as float32: their own rounding would hide what is looked for."""
    halves = [t for t in (*model.parameters(), *model.buffers()) if t.dtype in (torch.float16, torch.bfloat16)]
    kept = [tensor.data for tensor in halves]
    try:
        for tensor in halves:
            tensor.data = tensor.data.float()
        yield
    finally:
        for tensor, data in zip(halves, kept, strict=True):
            tensor.data = data


def _run(program: Program, name: str, given: Mapping[str, torch.Tensor]) -> Outcome:
    """What an entry gives; of halves, computed in float64."""
    entry = program.entries[name]
    inputs = [given[declared.name] for declared in entry.inputs]
    rows = program.weights.values()
    halves = any(row.value.dtype in (torch.float16, torch.bfloat16) for row in rows)
    return evaluate_precise(program, entry, inputs) if halves else evaluate(program, entry, inputs)


def _logits(model: Any, **inputs: torch.Tensor) -> torch.Tensor:
    """The model's own logits of the last two tokens of one sequence, (2, vocabulary)."""
    takes = inspect.signature(model.forward).parameters
    last = {"logits_to_keep": 2} if "logits_to_keep" in takes else {}
    return model(**inputs, **last)["logits"][0, -2:]  # type: ignore[no-any-return]
