"""What a scheme loses: predictions of a text beside those of the float model. None where nobody measured it.

A perplexity is in tokens: so many equally likely ones would be as hard to tell.
"""

from tunebench.report.metrics import Metric
from tunebench.results import Result


def perplexity(row: Result) -> float | None:
    """Of the text under the scheme."""
    return row.quality.perplexity if row.quality else None


def reference_perplexity(row: Result) -> float | None:
    """Of the text under the float model."""
    return row.quality.reference_perplexity if row.quality else None


def kl(row: Result) -> float | None:
    """Mean divergence from the float model, in nats a token."""
    return row.quality.kl if row.quality else None


def same_top(row: Result) -> float | None:
    """Share of tokens whose most likely one is the float model's."""
    return row.quality.same_top if row.quality else None


def decode_perplexity(row: Result) -> float | None:
    """Of the end of the text, a token at a time."""
    return row.quality.decode_perplexity if row.quality else None


METRICS = (
    Metric("perplexity", "tokens", False, perplexity, "of a text under the scheme"),
    Metric("reference_perplexity", "tokens", False, reference_perplexity, "of that text under the float model"),
    Metric("kl", "nats/token", False, kl, "mean divergence from the float model's predictions"),
    Metric("same_top", "share", True, same_top, "tokens whose most likely one is the float model's"),
    Metric("decode_perplexity", "tokens", False, decode_perplexity, "of the end of the text, a token at a time"),
)
