"""The state of the device while a case was measured: clocks, heat, what held it back; and the energy of a token."""

from collections.abc import Sequence
from typing import Any

from tunebench.report import words
from tunebench.report.charts import digits
from tunebench.report.table import Table
from tunebench.results import Result

UNITS = {"hz": "Hz", "c": "°C", "w": "W"}  # that the names of what was read end in


def described(row: Result) -> str | None:
    """What was read at the start and at the end of a case, in words; None where nothing was."""
    start, end = (_flat(row.conditions.get(moment)) for moment in ("start", "end"))
    said = [_course(name, start.get(name), end.get(name)) for name in dict.fromkeys([*start, *end])]
    return "; ".join(filter(None, said)) or None


def _flat(state: Any) -> dict[str, Any]:
    return state if isinstance(state, dict) else {}


def _course(name: str, start: Any, end: Any) -> str:
    """`sm clock 1.98 GHz to 1.75 GHz`; empty where neither is known."""
    what, _, unit = name.rpartition("_")
    if unit not in UNITS:
        what, unit = name, ""
    values = list(dict.fromkeys(_value(value, UNITS.get(unit, "")) for value in (start, end)))
    return f"{what.replace('_', ' ')} {' to '.join(values)}" if values != ["unknown"] else ""


def _value(value: Any, unit: str) -> str:
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "none"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "unknown" if value is None else str(value) or "none"
    return words.amount(value, unit) if unit == "Hz" else f"{digits(value)} {unit}".rstrip()


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of a frame that tell their energy or their conditions."""
    lines = [
        (
            *words.who(row),
            row["test_label"],
            row["arm"],
            words.energy(row["joules_per_token"]),
            f"{row['n_throttled']} of {words.whole(row['n_samples'], 'sample')}",
            row["conditions"] or "not read",
        )
        for row in rows
        if row["conditions"] or row["joules_per_token"] is not None or row["n_throttled"]
    ]
    columns = ("model", "scheme", "test", "arm", "energy", "throttled", "start to end")
    note = "Of the whole device. Throttled samples were taken while heat or power held it back, and are slower for it."
    return Table("conditions", "Clocks, heat and energy", columns, lines, note)
