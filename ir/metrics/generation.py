"""How long two models say the same when each goes on with its own words."""

from __future__ import annotations

from typing import ClassVar

import torch

from laconic.ir.data import Batch
from laconic.ir.errors import UsageError
from laconic.ir.metrics.base import Metric, Parts, Results, Run, logits_of

PROMPT, NEW = 32, 32  # tokens


class Agreement(Metric):
    """Of `NEW` tokens that both models choose greedily behind the first `PROMPT` of a sample, the share until they
    first differ. Samples that are shorter than the prompt do not count."""

    name = "generation"
    higher = True
    reference: ClassVar[bool] = True
    runs: ClassVar[bool] = True

    def parts(self, results: Results, batch: Batch, reference: Results | None) -> Parts:
        raise UsageError("generation runs the models itself")

    def parts_of_runs(self, run: Run, batch: Batch, reference: Run | None) -> Parts:
        assert reference is not None
        prompts = _prompts(batch)
        weights = torch.zeros(batch.samples, 1, dtype=torch.float64)
        sums = weights.clone()
        if len(prompts):
            ours, theirs = (greedy(model, batch, prompts) for model in (run, reference))
            same = (ours == theirs).long().cumprod(1).sum(1).double() / NEW
            sums[prompts, 0], weights[prompts, 0] = same, 1.0
        return Parts(sums, weights)


def _prompts(batch: Batch) -> torch.Tensor:
    """The samples that are long enough."""
    ids = batch.inputs.get("input_ids")
    if ids is None:
        raise UsageError("generation goes on with text, and the model takes none")
    others = batch.inputs.keys() - {"input_ids", "attention_mask"}
    if others:
        raise UsageError(
            "generation goes on with ids and a mask alone", why=f"the model takes {', '.join(sorted(others))}"
        )
    if batch.mask is not None and not bool(batch.mask[:, 0].all()):
        raise UsageError("generation goes on behind the first tokens, and some are padding", hint="pad at the right")
    lengths = batch.mask.sum(1) if batch.mask is not None else torch.full((len(ids),), ids.shape[1])
    return torch.nonzero(lengths >= PROMPT).flatten()


def greedy(run: Run, batch: Batch, chosen: torch.Tensor) -> torch.Tensor:
    """The tokens that a model chooses behind the prompts of the chosen samples, (chosen, NEW). The whole sequence is
    computed for each: any model that can be called can be asked."""
    ids = torch.zeros(batch.samples, PROMPT + NEW, dtype=batch.inputs["input_ids"].dtype)
    ids[:, :PROMPT] = batch.inputs["input_ids"][:, :PROMPT]
    for length in range(PROMPT, PROMPT + NEW):
        inputs = {"input_ids": ids[:, :length]}
        if "attention_mask" in batch.inputs:
            dtype = batch.inputs["attention_mask"].dtype
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"], dtype=dtype)
        logits = logits_of(run(inputs), "generation")
        ids[:, length] = logits[:, length - 1].argmax(-1)
    return ids[chosen, PROMPT:]
