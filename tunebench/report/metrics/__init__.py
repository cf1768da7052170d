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


def matrix_probe(row: Result) -> str:
    """The name of the probe that does products of the kind that the row's matrix products are."""
    return {"int8": "int8_ops_per_s", "float16": "f16_flops_per_s"}.get(row.multiplies, "flops_per_s")


def evaluate(row: Result) -> dict[str, float | None]:
    """Every metric of one row, by name."""
    return {name: metric.compute(row) for name, metric in load().items()}


def read_probe(row: Result) -> str:
    """The name of the row's probe that found the highest bandwidth, of those that read or copy; empty without one."""
    found = [name for name in row.probe if name.endswith("_bytes_per_s") and ("read" in name or "copy" in name)]
    return max(found, key=row.probe.__getitem__, default="")
