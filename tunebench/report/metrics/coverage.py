"""How much of the time runs under tuned kernels."""

from tunebench.report.metrics import Metric
from tunebench.results import Result


def coverage(row: Result) -> float | None:
    """Share (0..1) of the phase's time under tuned kernels."""
    return row.coverage


METRICS = (Metric("coverage", "share", True, coverage, "share of the phase's time under tuned kernels"),)
