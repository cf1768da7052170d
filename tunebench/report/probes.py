"""What each device was measured to do: the best that any probe of it reached, in whatever run, through whatever API."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from tunebench.report import words
from tunebench.report.table import Table
from tunebench.results import Result, TuneResult

UNITS = {"bytes": "B", "flops": "flop", "ops": "op"}
PRODUCTS = {
    "flops_per_s": "float32 products",
    "f16_flops_per_s": "float16 products",
    "int8_ops_per_s": "int8 products",
}


@dataclass(frozen=True)
class Best:
    """The highest `rate` that a probe found, in its units/s, and the row beside which it did."""

    rate: float
    row: Result


Probes = dict[str, Best]  # by the probe's name


def device_key(device: str) -> str:
    """The same for every way in which an API writes the name of one device."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def best(rows: Sequence[Result]) -> dict[str, Probes]:
    """The best of each probe of each device, by `device_key`."""
    found: dict[str, Probes] = {}
    for row in rows:
        own = found.setdefault(device_key(row.device), {})
        for name, rate in row.probe.items():
            if name not in own or rate > own[name].rate:
                own[name] = Best(rate, row)
    return found


def said(name: str) -> str:
    """A probe in words: `copy_bytes_per_s` is `copy`, `int8_ops_per_s` is `int8 products`."""
    return PRODUCTS.get(name, name.removesuffix("_bytes_per_s").removesuffix("_per_s").replace("_", " "))


def unit(name: str) -> str:
    """What a probe counts, per second."""
    return UNITS.get(name.removesuffix("_per_s").rpartition("_")[2], "")


def through(row: Result | TuneResult) -> str:
    """What a row was measured through: the target, and how many threads if any."""
    return row.target + (f", {row.n_threads} threads" if row.n_threads else "")


def table(rows: Sequence[Result], runs: dict[str, str]) -> Table:
    """Each probe of each device: its best rate, where it was measured, and what others found through another target."""
    lines = [
        (
            found.row.device,
            said(name),
            words.per_s(found.rate, unit(name)),
            through(found.row),
            runs[found.row.run_id],
            _others(rows, device, name, found.row),
        )
        for device, probes in best(rows).items()
        for name, found in probes.items()
    ]
    columns = ("device", "probe", "best", "through", "run", "other targets' best")
    note = (
        "What shares of the machine are of: the best that any probe of a device reached, over all rows of this report."
    )
    return Table("limits", "What each device was measured to do", columns, lines, note)


def _others(rows: Sequence[Result], device: str, name: str, found: Result) -> str:
    others = [row for row in rows if device_key(row.device) == device and through(row) != through(found)]
    rates: dict[str, float] = {}
    for row in others:
        if name in row.probe:
            rates[through(row)] = max(row.probe[name], rates.get(through(row), 0.0))
    return "; ".join(f"{where}: {words.per_s(rate, unit(name))}" for where, rate in rates.items()) or words.MISSING
