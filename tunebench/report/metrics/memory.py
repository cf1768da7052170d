"""Memory in bytes, None where there is no counter."""

from tunebench.report.metrics import Metric
from tunebench.results import Result


def weights(row: Result) -> float | None:
    """Bytes of the weights."""
    return _count(row, "weights")


def kv_cache(row: Result) -> float | None:
    """Bytes of the KV cache."""
    return _count(row, "kv_cache")


def planned(row: Result) -> float | None:
    """Bytes that weights, cache and the compiler's plan for a step add up to."""
    return _count(row, "planned")


def peak(row: Result) -> float | None:
    """Bytes at the highest point of the case."""
    return _count(row, "peak")


def _count(row: Result, name: str) -> float | None:
    count = row.memory.get(name)
    return None if count is None or count.bytes is None else float(count.bytes)


METRICS = (
    Metric("weights_bytes", "bytes", False, weights, "weights"),
    Metric("kv_cache_bytes", "bytes", False, kv_cache, "KV cache"),
    Metric("planned_bytes", "bytes", False, planned, "planned"),
    Metric("peak_bytes", "bytes", False, peak, "peak during the case"),
)
