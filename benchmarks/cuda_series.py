"""A GPU through CUDA, as in docs/results.md: python benchmarks/cuda_series.py --work-dir tunebench-work/cuda

Each step tunes from what the database holds and benches beside PyTorch in float16; `--step` picks some. At the end it
prints the ratios: over PyTorch in the same run, and of decode at depth and in batches to one sequence at depth 0.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from tunebench import results, stats
from tunebench.cli import app
from tunebench.report import metrics
from tunebench.results import Result, TuneResult
from tunebench.spec import EngineName

PEER = ("--engine", "tvm", "--engine", "torch")
TUNED = ("--schedule", "tuned")
DECODE = ("--phase", "decode")


@dataclass(frozen=True)
class Step:
    """One workload: what tune and bench share, and what is benched."""

    common: tuple[str, ...]
    bench: tuple[str, ...]
    report: str = ""  # rows of their own report, as a context is not part of a case
    tune: tuple[str, ...] = ()
    alone: bool = False  # in a process of its own, whose memory is nobody else's


STEPS = {
    "q4": Step(("-m", "llama-7b", "-q", "q4f16_1", "--prompt", "512"), ("-p", "512", "-n", "128", *PEER)),
    "q0": Step(("-m", "llama-7b", "-q", "q0f16", "--prompt", "512"), ("-p", "512", "-n", "128", *PEER)),
    "memory": Step(
        ("-m", "llama-7b", "-q", "q4f16_1", "--prompt", "512"), ("-p", "512", "-n", "128", *TUNED), "memory", alone=True
    ),
    "depth": Step(
        ("-m", "llama-7b", "-q", "q4f16_1", "--prompt", "512", "--context", "4352"),
        ("-p", "0", "-n", "128", "-d", "0,4096", *PEER, *TUNED),
        "depth",
        ("--depth", "2048", *DECODE),
    ),
    "batch4": Step(
        ("-m", "llama-7b", "-q", "q4f16_1", "--prompt", "16", "--batch", "4"),
        ("-p", "0", "-n", "128", *TUNED),
        tune=DECODE,
    ),
    "batch16": Step(
        ("-m", "llama-7b", "-q", "q4f16_1", "--prompt", "16", "--batch", "16"),
        ("-p", "0", "-n", "128", *TUNED),
        tune=DECODE,
    ),
    "llama-3-8b": Step(
        ("-m", "llama-3-8b", "-q", "q4f16_1", "--prompt", "512"), ("-p", "512", "-n", "128", *PEER, *TUNED)
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--step", action="append", choices=STEPS, help="default: all")
    parser.add_argument("--time-limit", default="8m", help="of tuning, for each step")
    parser.add_argument("--trials", default="64", help="of each kernel")
    parser.add_argument("--work-dir", type=Path, default=Path("tunebench-work/cuda"))
    args = parser.parse_args()
    for name in args.step or STEPS:
        _run(name, STEPS[name], args)
    for path in sorted((args.work_dir / "reports").glob("cuda*/results.jsonl")):
        rows, _ = results.read(path)
        _print(path.parent.name, [row for row in rows if isinstance(row, Result) and row.status == "ok"])
        for tune in (row for row in rows if isinstance(row, TuneResult)):
            pace = tune.valid_trials / max(1e-9, tune.cost_s["total"] - tune.cost_s["verify"])
            print(
                f"{tune.model} {tune.scheme} batch {tune.batch}: tuned in {tune.cost_s['total']:.0f} s, "
                f"{tune.valid_trials} of {tune.trials} trials valid, {pace:.1f} a second outside decisions"
            )


def _run(name: str, step: Step, args: argparse.Namespace) -> None:
    start = time.monotonic()
    common = ["--target", "cuda", *step.common, "--work-dir", str(args.work_dir)]
    common += ["--name", f"cuda-{step.report}" if step.report else "cuda"]
    limits = ("--time-limit", args.time_limit, "--trials", args.trials)
    for words in (("tune", "--no-bench", *limits, *step.tune, *common), ("bench", *step.bench, *common)):
        if step.alone:
            subprocess.run([sys.executable, "-m", "tunebench", *words], check=True)
        else:
            app.app(list(words), standalone_mode=False)
        gc.collect()  # engines hold graphs that hold engines
    print(f"-- {name}: {time.monotonic() - start:.0f} s", flush=True)


def _print(report: str, cases: list[Result]) -> None:
    print(f"== {report}")
    tuned = [row for row in cases if row.schedule == "tuned"]
    for row in tuned:
        share = metrics.evaluate(row)["read_share" if row.n_gen else "matrix_share"] or float("nan")
        rate = stats.median(results.tokens_per_s(row))
        words = [f"{rate:.0f} tok/s, {share:.1%} of the probe"]
        for other in cases:
            same = all(getattr(other, name) == getattr(row, name) for name in ("run_id", "model", "scheme", "test"))
            if same and other.engine != EngineName.TVM:
                found = stats.ratio_interval(other.samples_ns, row.samples_ns)
                words.append(f"{found.ratio:.2f}x {other.engine} ({found.low:.2f} to {found.high:.2f})")
        for other in tuned:
            same = all(getattr(other, name) == getattr(row, name) for name in ("model", "scheme", "n_gen", "n_prompt"))
            if same and row.n_gen and (row.batch, row.n_depth) > (other.batch, other.n_depth) == (1, 0):
                words.append(f"{rate / stats.median(results.tokens_per_s(other)):.2f}x one sequence at depth 0")
        memory = row.memory.get("peak")
        words += [f"peak {memory.bytes / 2**30:.2f} GiB"] if memory and memory.bytes else []
        print(f"{row.model} {row.scheme} batch {row.batch} {row.test}: {', '.join(words)}")


if __name__ == "__main__":
    main()
