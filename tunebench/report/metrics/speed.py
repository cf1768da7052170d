"""Throughput and latency. Tokenisation and sampling are not part of the timed work."""

from tunebench import results, stats
from tunebench.report.metrics import Metric, phase
from tunebench.results import Result


def tokens_per_s(row: Result) -> float | None:
    """Median throughput in tokens/s, all sequences of the batch together."""
    return stats.median(results.tokens_per_s(row)) if row.samples_ns else None


def tokens_per_s_spread(row: Result) -> float | None:
    """Half the interquartile range of the throughput, in tokens/s."""
    return stats.spread(results.tokens_per_s(row)) if len(row.samples_ns) > 1 else None


def ttft(row: Result) -> float | None:
    """Median time to the first token, in seconds, of a prefill test."""
    return stats.median(row.samples_ns) / 1e9 if row.samples_ns and phase(row) == "prefill" else None


def tpot(row: Result) -> float | None:
    """Median time per output token of one sequence, in seconds, of a decode test."""
    return stats.median(row.samples_ns) / 1e9 / row.n_gen if row.samples_ns and phase(row) == "decode" else None


METRICS = (
    Metric("tokens_per_s", "tokens/s", True, tokens_per_s, "median throughput of the whole batch"),
    Metric("tokens_per_s_spread", "tokens/s", False, tokens_per_s_spread, "half the interquartile range"),
    Metric("ttft_s", "s", False, ttft, "time to first token: the median prefill time"),
    Metric("tpot_s", "s", False, tpot, "time per output token: the median time of a decode step"),
)
