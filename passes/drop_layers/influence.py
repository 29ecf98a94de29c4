"""What a layer changes on its way through, in one run over the data: influence, and the angle over spans of blocks."""

from __future__ import annotations

from laconic.ir.errors import UsageError
from laconic.ir.statistics.likeness import Similarity
from laconic.passes.drop_layers.task import Choice, DropTask


def least_influence(task: DropTask) -> Choice:
    """Drop the layers of least influence, 1 - cosine of what goes in and what comes out, averaged over tokens.

    Men et al. 2024, "ShortGPT", arXiv:2403.03853.
    """
    scores = influence(task)
    return Choice(task.least(scores), scores)


def influence(task: DropTask) -> tuple[float, ...]:
    """That of each layer: 0 for one that leaves the direction of each token as it is."""
    asked = [Similarity((layer.v, layer.out)) for layer in task.layers]
    found = task.data.statistics(task.program, asked)
    return tuple(1.0 - float(found.mean(statistic, "cosine")[0, 1]) for statistic in asked)


def best_span(task: DropTask) -> Choice:
    """Drop the contiguous blocks over which the stream turns least: the angle of what goes into the first and what
    comes out of the last. The score of a block is the angle of the span that starts with it.

    Gromov et al. 2024, "The Unreasonable Ineffectiveness of the Deeper Layers", arXiv:2403.17887.
    """
    levels, scores = [0] * len(task.layers), [1.0] * len(task.layers)
    if any(layer.block is None for layer in task.layers):
        raise UsageError("a span is one of blocks", hint="unit=block, or another method")
    spans = [
        one.units[k : k + one.budget] for one in task.space.classes for k in range(len(one.units) - one.budget + 1)
    ]
    spans = [span for span in spans if span[-1] - span[0] == len(span) - 1]
    asked = {span: Similarity((task.layers[span[0]].v, task.layers[span[-1]].out)) for span in spans}
    found = task.data.statistics(task.program, list(asked.values()))
    angle = {span: float(found.mean(statistic, "angle")[0, 1]) for span, statistic in asked.items()}
    for one in task.space.classes:
        own = [span for span in spans if set(span) <= set(one.units) and len(span) == one.budget]
        if not own:
            raise UsageError("no span of blocks is free to go", hint="protect less, or another method")
        for span in own:
            scores[span[0]] = angle[span]
        for unit in min(own, key=lambda span: (angle[span], span)):
            levels[unit] = 1
    return Choice(tuple(levels), tuple(scores))
