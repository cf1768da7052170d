"""The runs of a report: what each is called, what it was, and its rows that a later run measured again."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from tunebench.report import words
from tunebench.report.table import Table
from tunebench.results import Result, TuneResult

Row = Result | TuneResult
UNNAMED = "without a run"
DIGITS = 4  # of a run's id that are shown where two runs would have one name
VERSIONS = ("tunebench", "tvm")


def names(rows: Sequence[Row]) -> dict[str, str]:
    """What each run is called, by its id: as its user named it, or by its start, with its id where two collide."""
    found = {run: _name(members) for run, members in _by_run(rows).items()}
    often = Counter(found.values())
    return {run: f"{name} ({run[:DIGITS]})" if often[name] > 1 and run else name for run, name in found.items()}


def _by_run(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """The rows of each run, in the order of their starts."""
    found: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.test_time):
        found.setdefault(row.run_id, []).append(row)
    return found


def _name(members: Sequence[Row]) -> str:
    given = next((row.run_name for row in members if row.run_name), "")
    return given or (_minute(members[0].test_time) if members[0].run_id else "") or UNNAMED


def _minute(time: str) -> str:
    """`2026-11-28 11:25` of a time in ISO 8601."""
    return time[:16].replace("T", " ")


def table(rows: Sequence[Row], called: dict[str, str]) -> Table:
    """Every run: when it started, what it ran with and on, and how many rows it left."""
    lines = [(called[run], *_described(members)) for run, members in _by_run(rows).items()]
    columns = ("run", "started", "commit", "versions", "device", "rows")
    note = "Rows of one run were interleaved on one machine. Of a case the latest is shown, others as *Earlier runs*."
    return Table("runs", "Runs", columns, lines, note)


def _described(members: Sequence[Row]) -> tuple[str, ...]:
    commits = [_commit(row.environment.get("git")) for row in members]
    versions = [_versions(row.environment.get("versions")) for row in members]
    cases = sum(isinstance(row, Result) for row in members)
    tuned = len(members) - cases
    counts = [f"{cases} benched"] * bool(cases) + [f"{tuned} tuned"] * bool(tuned)
    devices = [f"{row.device} ({row.target})" for row in members]
    return (
        _minute(members[0].test_time) or words.MISSING,
        _each(commits),
        _each(versions),
        _each(devices),
        ", ".join(counts),
    )


def _commit(git: Any) -> str:
    known = isinstance(git, dict) and git.get("commit")
    return f"{str(git['commit'])[:8]}{', modified' * bool(git.get('modified'))}" if known else ""


def _versions(versions: Any) -> str:
    if not isinstance(versions, dict):
        return ""
    wanted = [name for name in VERSIONS if name in versions] or list(versions)[:1]
    return ", ".join(f"{name} {versions[name]}" for name in wanted)


def _each(values: Sequence[str]) -> str:
    """The distinct ones of `values` that say something."""
    return "; ".join(dict.fromkeys(filter(None, values))) or words.MISSING


def earlier(rows: Sequence[dict[str, Any]]) -> Table:
    """The rows of a frame whose case was measured again later, and how the latest compares with each."""
    lines = [
        (
            row["run"],
            *words.who(row),
            row["test_label"],
            row["arm"],
            words.measured(row),
            words.over_default(row),
            words.ratio(row["change"], row["change_low"], row["change_high"]),
            _verdict(row),
        )
        for row in rows
        if not row["latest"]
    ]
    case, figures = ("run", "model", "scheme", "test", "arm"), ("throughput", "over default")
    columns = (*case, *figures, "latest over it", "beyond the noise floor")
    note = (
        "Rows whose case was measured again later; other tables show the latest. *Latest over it* is the ratio of the "
        f"times with its {words.INTERVAL}; two runs are not interleaved."
    )
    return Table("earlier", "Earlier runs", columns, lines, note)


def _verdict(row: dict[str, Any]) -> str:
    effect = row["change_effect"]
    if effect in ("faster", "slower", "no clear difference"):
        beyond = "no" if effect.startswith("no") else f"yes, {effect}"
        return f"{beyond} ({words.percent(row['change_noise'])}), but not interleaved"
    return effect or row["reason"] or "the latest has no figure"
