"""How much of the time runs under tuned kernels."""

from tunebench.report.metrics import Metric
from tunebench.results import Result


def coverage(row: Result) -> float | None:
    """Share (0..1) of the phase's time under tuned kernels; None where a kernel of it was never measured."""
    return row.coverage if all(kernel.share for kernel in row.kernels) else None


METRICS = (Metric("coverage", "share", True, coverage, "share of the phase's time under tuned kernels"),)
