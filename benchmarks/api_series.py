"""GPU APIs beside CUDA, as in docs/results.md: python benchmarks/api_series.py --work-dir WORK

Tunes llama-7b on each target from what its database holds, benches all targets interleaved in one run, and prints what
each has of CUDA's speed and what its tuned kernels gain over DLight's. CUDA itself must have been tuned before.
"""

from __future__ import annotations

import argparse
import gc
import time
from pathlib import Path

from tunebench import results, stats
from tunebench.cli import app
from tunebench.report.sources import over_default
from tunebench.results import Result

FIRST = "cuda"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--target", action="append", help="default: webgpu, dawn and opencl")
    parser.add_argument("-m", "--model", default="llama-7b")
    parser.add_argument("-q", "--scheme", default="q4f16_1")
    parser.add_argument("--prompt", default="512")
    parser.add_argument("--time-limit", default="4m", help="of tuning, for each target")
    parser.add_argument("--trials", default="48", help="of each kernel")
    parser.add_argument("--work-dir", type=Path, default=Path("tunebench-work/apis"))
    parser.add_argument("--no-tune", action="store_true")
    args = parser.parse_args()
    targets = args.target or ["webgpu", "dawn", "opencl"]
    common = ["-m", args.model, "-q", args.scheme, "--prompt", args.prompt, "--work-dir", str(args.work_dir)]
    for target in [] if args.no_tune else targets:
        start = time.monotonic()
        limits = ["--time-limit", args.time_limit, "--trials", args.trials, "--no-bench", "--name", "apis"]
        app.app(["tune", "--target", target, *common, *limits], standalone_mode=False)
        gc.collect()
        print(f"-- {target} tuned in {time.monotonic() - start:.0f} s", flush=True)
    every = [word for target in (FIRST, *targets) for word in ("--target", target)]
    bench = ["-p", args.prompt, "-n", "128", "--schedule", "tuned", "--name", "apis"]
    app.app(["bench", *every, *common, *bench], standalone_mode=False)
    rows, _ = results.read(args.work_dir / "reports" / "apis" / "results.jsonl")
    _print([row for row in rows if isinstance(row, Result) and row.status == "ok"])


def _print(rows: list[Result]) -> None:
    last = rows[-1].run_id
    run = [row for row in rows if row.run_id == last]
    first = {row.test: row for row in run if row.target == FIRST}
    for row in run:
        rate = stats.median(results.tokens_per_s(row))
        words = [f"{rate:.0f} tok/s"]
        if row.target != FIRST:
            ratio = stats.ratio_interval(first[row.test].samples_ns, row.samples_ns)
            words.append(f"{ratio.ratio:.2f}x {FIRST} ({ratio.low:.2f} to {ratio.high:.2f})")
        largest = max(kernel.chunk for kernel in row.kernels)
        words.append(f"{over_default([k for k in row.kernels if k.chunk == largest]):.2f}x DLight, kernel by kernel")
        print(f"{row.target} {row.test}: {', '.join(words)}")


if __name__ == "__main__":
    main()
