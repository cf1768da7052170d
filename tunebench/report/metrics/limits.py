"""How near a case comes to what the machine was measured to do; a report puts the best of its device in `probe`."""

from tunebench import results, stats
from tunebench.report.metrics import Metric, matrix_probe, phase, read_probe
from tunebench.results import Result


def read_bytes_per_s(row: Result) -> float | None:
    """Bytes/s that a decode test reads: one step reads `bytes_per_token` and makes one token per sequence."""
    if not row.samples_ns or phase(row) != "decode" or not row.bytes_per_token:
        return None
    return row.bytes_per_token * stats.median(results.tokens_per_s(row)) / row.batch


def read_share(row: Result) -> float | None:
    """Share (0..1) of the measured read bandwidth that a decode test reaches."""
    return _share(read_bytes_per_s(row), row.probe.get(read_probe(row)))


def matrix_flops_per_s(row: Result) -> float | None:
    """Operations/s in matrix products of a prefill test, two for a multiply-add."""
    if not row.samples_ns or phase(row) != "prefill" or not row.flops_per_token:
        return None
    return row.flops_per_token * stats.median(results.tokens_per_s(row))


def matrix_share(row: Result) -> float | None:
    """Share (0..1) of the measured matrix rate, of float32 or of int8 products, that a prefill test reaches."""
    return _share(matrix_flops_per_s(row), row.probe.get(matrix_probe(row)))


def _share(achieved: float | None, measured: float | None) -> float | None:
    return achieved / measured if achieved is not None and measured else None


METRICS = (
    Metric("read_bytes_per_s", "bytes/s", True, read_bytes_per_s, "read rate of decode"),
    Metric("read_share", "share", True, read_share, "read rate of decode over the measured bandwidth"),
    Metric("matrix_flops_per_s", "flop/s", True, matrix_flops_per_s, "matrix rate of prefill"),
    Metric("matrix_share", "share", True, matrix_share, "matrix rate of prefill over the measured one"),
)
