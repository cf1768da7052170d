"""TuneBench beside llama.cpp, from an empty database: the ratios of docs/results.md.

    python benchmarks/against_engines.py --work-dir tunebench-work/against --threads 2

For each model: tune, then bench default, tuned and llama.cpp interleaved in one process on the same weights, then
print the ratios of medians with their 95 % intervals, the share of what the machine did in a probe in between, and how
long the tuning took to come within 5 % of its final decode speed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from tunebench import environment, results, stats
from tunebench.report import metrics
from tunebench.results import Result, TuneResult
from tunebench.spec import EngineName

MODELS = ("tinyllama-1.1b", "llama-7b")
TESTS = ("-p", "128,512", "-n", "64")
REACHED = 0.95  # of the final decode speed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", action="append", help=f"default: {', '.join(MODELS)}")
    parser.add_argument("--scheme", action="append", help="default: q4i8f16_0")
    parser.add_argument("--engine", action="append", help="default: llama_cpp")
    parser.add_argument("--threads", type=int, default=environment.usable_cores())
    parser.add_argument("--time-limit", default="30m", help="of tuning, for each model")
    parser.add_argument("--work-dir", type=Path, default=Path("tunebench-work/against"))
    parser.add_argument("--report-only", action="store_true", help="print the ratios of what is there")
    args = parser.parse_args()
    name = f"against-{args.threads}t"
    if not args.report_only:
        for model in args.model or MODELS:
            _measure(model, args, name)
    _print(args.work_dir / "reports" / name / "results.jsonl")


def _measure(model: str, args: argparse.Namespace, name: str) -> None:
    schemes = [word for scheme in args.scheme or ["q4i8f16_0"] for word in ("-q", scheme)]
    common = ["-m", model, *schemes, "--threads", str(args.threads)]
    common += ["--work-dir", str(args.work_dir), "--name", name]
    _tunebench("tune", "--no-bench", "--time-limit", args.time_limit, *common)
    engines = [word for engine in args.engine or ["llama_cpp"] for word in ("--engine", engine)]
    _tunebench("bench", *TESTS, "--sample-limit", "60s", "--engine", "tvm", *engines, *common)
    _tunebench("report", "--work-dir", str(args.work_dir), "--name", name)


def _tunebench(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "tunebench", *words], check=True)


def _print(path: Path) -> None:
    rows, _ = results.read(path)
    cases = [row for row in rows if isinstance(row, Result) and row.status == "ok"]
    tuned = [row for row in cases if row.schedule == "tuned"]
    print(f"{'model':16s} {'scheme':10s} {'test':6s} {'engine':10s} {'ratio':>6s}  95 % interval   share of limit")
    for row in tuned:
        share = metrics.evaluate(row)["read_share" if row.n_gen else "matrix_share"] or float("nan")
        for other in cases:
            same = (other.run_id, other.model, other.scheme, other.test) == (
                row.run_id,
                row.model,
                row.scheme,
                row.test,
            )
            if same and other.engine != EngineName.TVM:
                found = stats.ratio_interval(other.samples_ns, row.samples_ns)
                print(
                    f"{row.model:16s} {row.scheme:10s} {row.test:6s} {other.engine:10s} {found.ratio:6.2f}  "
                    f"{found.low:.2f} to {found.high:.2f}    {share:7.1%}"
                )
    for tune in (row for row in rows if isinstance(row, TuneResult)):
        curve = [point for point in tune.curve if point["decode_ns"]]
        final = curve[-1]["decode_ns"]
        reached = next(point["wall_s"] for point in curve if point["decode_ns"] * REACHED <= final)
        print(
            f"{tune.model} {tune.scheme}: {REACHED:.0%} of the final decode speed after {reached:.0f} s, "
            f"all in {tune.cost_s['total']:.0f} s, {tune.valid_trials} of {tune.trials} trials valid"
        )


if __name__ == "__main__":
    main()
