"""Numbers derived from a result: one module per topic, each with a tuple `METRICS`."""

from collections.abc import Callable
from dataclasses import dataclass

from tunebench import registry
from tunebench.results import Result
from tunebench.spec import Test


@dataclass(frozen=True)
class Metric:
    """One number of a row, in the base unit `unit`; `compute` gives None where the row has nothing for it."""

    name: str
    unit: str
    higher_is_better: bool
    compute: Callable[[Result], float | None]
    summary: str


def load() -> dict[str, Metric]:
    """Every metric, by name."""
    return registry.load(__name__, "METRICS", Metric)


def phase(row: Result) -> str:
    """`prefill`, `decode` or `both`, from the token counts of the row."""
    return Test(row.n_prompt, row.n_gen, row.n_depth).phase


def matrix_probe(row: Result) -> float | None:
    """Operations/s that the machine was measured to do of the kind that the row's matrix products are."""
    return row.probe.get({"int8": "int8_ops_per_s", "float16": "f16_flops_per_s"}.get(row.multiplies, "flops_per_s"))


def evaluate(row: Result) -> dict[str, float | None]:
    """Every metric of one row, by name."""
    return {name: metric.compute(row) for name, metric in load().items()}


def read_probe(row: Result) -> float | None:
    """The measured bandwidth: of reading, or on a GPU of a copy."""
    return row.probe.get("read_bytes_per_s", row.probe.get("copy_bytes_per_s"))
