"""The metrics there are, by name."""

from __future__ import annotations

from laconic.ir.metrics.base import Metric
from laconic.ir.registry import Registry

METRICS = Registry(
    "metric",
    "laconic.metrics",
    {
        "cosine": "laconic.ir.metrics.quality:Cosine",
        "generation": "laconic.ir.metrics.generation:Agreement",
        "kl": "laconic.ir.metrics.quality:Divergence",
        "latency": "laconic.ir.metrics.costs:Latency",
        "memory": "laconic.ir.metrics.costs:Memory",
        "nats": "laconic.ir.metrics.quality:Nats",
        "ppl": "laconic.ir.metrics.quality:Perplexity",
        "recall@1": "laconic.ir.metrics.retrieval:Recall",
        "top1": "laconic.ir.metrics.quality:Accuracy",
    },
)


def load(name: str) -> Metric:
    """A metric by name. Raises UsageError for an unknown name or a plugin that cannot be imported."""
    found: Metric = METRICS.load(name)()
    return found
