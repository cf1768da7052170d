"""Base units -> words. The only place where figures are formatted; `-` stands for a missing value."""

from collections.abc import Sequence
from math import isfinite
from typing import Any

from tunebench.report.charts import digits
from tunebench.stats import CONFIDENCE

MISSING = "-"
INTERVAL = f"{100 * CONFIDENCE:g} % interval"


def known(value: float | None) -> bool:
    """Whether there is a finite figure to print."""
    return value is not None and isfinite(value)


def rate(value: float | None, spread: float | None = None) -> str:
    """Tokens/s -> `10.6 ± 0.2 tok/s`."""
    if value is None or not known(value):
        return MISSING
    around = f" ± {_as_precise(spread, digits(value))}" if spread is not None and known(spread) else ""
    return f"{digits(value)}{around} tok/s"


def measured(row: dict[str, Any]) -> str:
    """The throughput of a frame's row -> `10.6 ± 0.2 tok/s, 3 of 12 samples throttled`."""
    throttled = f", {row['n_throttled']} of {row['n_samples']} samples throttled" if row["n_throttled"] else ""
    return rate(row["tokens_per_s"], row["tokens_per_s_spread"]) + throttled


def compared(row: dict[str, Any], name: str) -> str:
    """The ratio `name` of a frame's row -> `1.42x (1.38 to 1.47)`, and what it is called if not a difference."""
    effect = row[f"{name}_effect"]
    figure = ratio(row[name], row[f"{name}_low"], row[f"{name}_high"])
    return figure if effect in (None, "faster", "slower") else f"{figure}, {effect}"


def over_default(row: dict[str, Any]) -> str:
    """The speed-up of a frame's row, with the run that its reference is from where it is not the row's."""
    elsewhere = row["reference_run"] not in (None, row["run"])
    return compared(row, "speedup") + (f": reference from run {row['reference_run']}" if elsewhere else "")


def who(row: dict[str, Any]) -> tuple[str, str]:
    """The model of a frame's row with its place, and its scheme."""
    place = f" ({row['place']})" if row["place"] else ""
    return f"{row['model_label']}{place}", row["scheme"]


def ratio(value: float | None, low: float | None = None, high: float | None = None) -> str:
    """A speed-up -> `1.42x (1.38 to 1.47)`; without its interval where that is unknown."""
    if value is None or not known(value):
        return MISSING
    if low is None or high is None or not (known(low) and known(high)):
        return f"{value:.2f}x"
    return f"{value:.2f}x ({low:.2f} to {high:.2f})"


def figure(value: float | None) -> str:
    """A figure without a unit -> `14.3`, or `0.00108`."""
    return f"{value:.3g}" if value is not None and known(value) else MISSING


def between(value: float | None, interval: Sequence[float] = ()) -> str:
    """A figure with its interval -> `14.3 (12.9 to 15.8)`."""
    return figure(value) + (f" ({figure(interval[0])} to {figure(interval[1])})" if interval else "")


def percent(share: float | None) -> str:
    """A share 0..1 -> `42.0 %`."""
    return f"{share * 100:.1f} %" if share is not None and known(share) else MISSING


def share(value: float | None) -> str:
    """A share 0..1 -> `42.0 %`, `< 0.1 %`, or `unknown`."""
    if value is None or not known(value):
        return "unknown"
    return "< 0.1 %" if 0 < value < 0.0005 else percent(value)


def whole(number: int, what: str) -> str:
    """A number of things -> `1 kernel`, `3 kernels`."""
    return f"{number} {what}{'' if number == 1 else 's'}"


def size(n_bytes: float | None) -> str:
    """Bytes -> `1.23 GB` (powers of 1000)."""
    return _scaled(n_bytes, "B")


def amount(value: float | None, unit: str) -> str:
    """An amount in a base unit -> `1.98 GHz`."""
    return _scaled(value, unit)


def energy(joules: float | None) -> str:
    """Joules of a token -> `0.52 J/token`."""
    return f"{digits(joules)} J/token" if joules is not None and known(joules) else MISSING


def per_s(value: float | None, unit: str) -> str:
    """A rate in base units -> `54.2 GB/s`, `1.30 Tflop/s`."""
    return _scaled(value, f"{unit}/s")


def seconds(value: float | None) -> str:
    """Seconds -> `820 us`, `3.1 ms`, `42 s`, `12 min`, `3.4 h`."""
    if value is None or not known(value):
        return MISSING
    for limit, factor, unit in ((1e-3, 1e6, "us"), (1, 1e3, "ms"), (120, 1, "s"), (7200, 1 / 60, "min")):
        if abs(value) < limit:
            return f"{digits(value * factor)} {unit}"
    return f"{digits(value / 3600)} h"


def count(value: float | None, what: str) -> str:
    """A large number -> `1.2 M tokens`."""
    return " ".join(f"{_scaled(value, '')} {what}".split()) if known(value) else MISSING


def _as_precise(value: float, other: str) -> str:
    """`value` with the decimals of `other`, or more of them where it would read as nothing."""
    shown = f"{value:.{len(other.partition('.')[2])}f}"
    return shown if float(shown) else digits(value)


def _scaled(value: float | None, unit: str) -> str:
    if value is None or not known(value):
        return MISSING
    for limit, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= limit:
            return f"{digits(value / limit)} {prefix}{unit}"
    return f"{digits(value)} {unit}"
