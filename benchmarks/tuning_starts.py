"""What a start from another database brings: trials and seconds to 95 % of a run's last speed, and what a bench found.

    tunebench tune -m llama-7b --target cuda --from none --work-dir empty
    tunebench tune -m llama-7b --target cuda --work-dir near
    python benchmarks/tuning_starts.py empty/reports/local near/reports/local

The course of a run is of its kernels by the tuner's own measurements. The bench after it is end to end; it is the one
that compares runs.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tunebench import results, stats
from tunebench.results import Result, TuneResult

REACHED = 0.95
COLUMNS = ("began from", "model", "trials, seconds", "decode: 95 % after", "prefill: 95 % after", "benched, tokens/s")


def main() -> None:
    """Print a row for each tuning run."""
    print(f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}")
    for name in sys.argv[1:]:
        path = Path(name)
        rows, _ = results.read(path / "results.jsonl" if path.is_dir() else path)
        for row in rows:
            if isinstance(row, TuneResult) and row.curve:
                print(f"| {' | '.join(_cells(row, [each for each in rows if isinstance(each, Result)]))} |")


def _cells(row: TuneResult, benched: list[Result]) -> list[str]:
    tuned = [each for each in benched if (each.model, each.scheme, each.schedule) == (row.model, row.scheme, "tuned")]
    speeds = [f"{each.test} {stats.median(results.tokens_per_s(each)):.0f}" for each in tuned if each.samples_ns]
    return [
        row.began_from or "nothing",
        f"{row.model} {row.scheme}",
        f"{row.trials}, {row.cost_s['total']:.0f}",
        _reached(row, "decode"),
        _reached(row, "prefill"),
        ", ".join(speeds) or "-",
    ]


def _reached(row: TuneResult, phase: str) -> str:
    """Trials and seconds until a phase's kernels were nearly as fast as in the end."""
    last_ns = row.curve[-1][f"{phase}_ns"]
    point = next(point for point in row.curve if last_ns >= REACHED * point[f"{phase}_ns"])
    return f"{point['trials']:.0f} trials, {point['wall_s']:.0f} s"


if __name__ == "__main__":
    main()
