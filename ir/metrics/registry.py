"""The metrics there are, by name."""

from __future__ import annotations

from laconic.ir.errors import UsageError
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
    """A metric by name. Raises UsageError for an unknown name or a plugin that is no metric of this name."""
    kind = METRICS.load(name)
    if not (isinstance(kind, type) and issubclass(kind, Metric)):
        raise UsageError(f"the metric {name!r} is no class derived from laconic.ir.metrics.base.Metric")
    if getattr(kind, "name", None) != name:
        raise UsageError(
            f"the metric {name!r} calls itself {getattr(kind, 'name', None)!r}", hint="give its class that name"
        )
    try:
        return kind()
    except TypeError as problem:
        raise UsageError(f"the metric {name!r} cannot be made", why=str(problem)) from problem
