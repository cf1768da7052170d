"""Energy that the device used while the samples were taken; None where it has no counter."""

from tunebench.report.metrics import Metric
from tunebench.results import Result


def joules_per_token(row: Result) -> float | None:
    """Joules of the device for a token, all sequences of the batch together."""
    return row.joules_per_token


METRICS = (Metric("joules_per_token", "J/token", False, joules_per_token, "energy of the device for a token"),)
