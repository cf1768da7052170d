"""Stock MetaSchedule beside TuneBench: the same kernels, machine and wall-clock; trials per second and what they found.

    python benchmarks/tuning_speed.py --model tinyllama-1.1b --scheme q4i8f16_0 --trials 16

Stock is `meta_schedule.tune_tasks` as it comes: its builder, its runner, its rules for the target, XGBoost. It runs
until each kernel has had `--trials` trials (it keeps results only when a task is done, so it cannot be cut off), and
TuneBench then gets as long; each starts with an empty database in a process of its own. Afterwards the best kernel of
each side is checked and timed with cold caches, interleaved, beside the default schedule.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from tunebench import environment, stats
from tunebench.model import quantization
from tunebench.spec import Workload


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default="tinyllama-1.1b")
    parser.add_argument("--scheme", default="q4i8f16_0")
    parser.add_argument("--trials", type=int, default=16, help="of stock, for each kernel")
    parser.add_argument("--threads", type=int, default=environment.usable_cores())
    args = parser.parse_args()
    environment.set_threads(args.threads)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        stock_s = _run(_stock, args, folder / "stock", args.trials)
        _compare(args, folder, {"stock": stock_s, "ours": _run(_ours, args, folder / "ours", stock_s)})


def _run(side: Callable[..., None], args: argparse.Namespace, folder: Path, amount: float) -> float:
    """One side in a process of its own; the seconds it took, start-up included."""
    print(f"{side.__name__[1:]} ...", file=sys.stderr, flush=True)
    process = multiprocessing.get_context("spawn").Process(target=side, args=(args, folder, amount))
    start = time.monotonic()
    process.start()
    process.join()
    return time.monotonic() - start


def _session(args: argparse.Namespace, folder: Path):
    from tunebench.devices.opening import open_device
    from tunebench.devices.targets import presets
    from tunebench.tuning.session import Session

    return Session(open_device(presets()["llvm"], args.threads), folder, folder / "results.jsonl")


def _tasks(args: argparse.Namespace, session):
    """The matrix products: what stock's rules are for, and where the time goes."""
    from tunebench.tuning.session import lower

    workload = Workload(args.model, quantization.schemes()[args.scheme])
    return [task for task in lower(session, workload).tasks if "matmul" in task.name and 16 not in task.calls]


def _stock(args: argparse.Namespace, folder: Path, trials: int) -> None:
    from tvm.s_tir import meta_schedule as ms

    from tunebench.kernels.tvmscript import import_intrinsics

    session = _session(args, folder)
    tasks = _tasks(args, session)
    (folder / "work").mkdir(parents=True)
    import_intrinsics()
    extracted = [ms.ExtractedTask(t.name, t.mod, session.target, [t.mod], sum(t.calls.values())) for t in tasks]
    contexts, weights = ms.relax_integration.extracted_tasks_to_tune_contexts(extracted, str(folder / "work"))
    ms.tune.tune_tasks(
        tasks=contexts,
        task_weights=weights,
        work_dir=str(folder / "work"),
        max_trials_global=trials * len(tasks),
        max_trials_per_task=trials,
        num_trials_per_iter=min(64, trials),
    )


def _ours(args: argparse.Namespace, folder: Path, budget_s: float) -> None:
    from tunebench.tuning.tuner import Options, tune

    session = _session(args, folder)
    tasks = _tasks(args, session)
    device = session.device
    options = Options(trials=10**6, time_limit_s=budget_s, threads=args.threads, cold_bytes=device.cold_bytes)
    tune(tasks, session.database(), session.target, device.runner, options, lambda progress: None)


def _compare(args: argparse.Namespace, folder: Path, took_s: dict[str, float]) -> None:
    from tunebench.compile import passes
    from tunebench.compile.tasks import replay
    from tunebench.runners.base import Candidate, MeasureInput, Timed
    from tunebench.runners.local import LocalRunner
    from tunebench.tuning.tuner import FINAL

    session = _session(args, folder / "ours")
    tasks = _tasks(args, session)
    found = {"stock": _records(folder / "stock" / "work"), "ours": _records(session.database().search_folder)}
    rates = {}
    for side, records in found.items():
        every = [seconds for runs in records.values() for seconds, _ in runs]
        valid = sum(seconds < 1e9 for seconds in every)
        rates[side] = valid / took_s[side]
        counts = f"{len(every):5d} trials, {valid:5d} valid, in {took_s[side]:4.0f} s"
        print(f"{side:6s} {counts}: {rates[side]:.2f} valid trials/s")
    if rates["stock"]:
        print(f"valid trials per second, ours / stock: {rates['ours'] / rates['stock']:.1f}")
    runner = LocalRunner(session.target, args.threads, workers=1)
    cold = 2 * environment.last_level_cache_bytes()
    print(f"\n{'kernel':40s} {'default us':>12s} {'stock us':>12s} {'ours us':>12s}  ours over stock")
    for task in tasks:
        best = {side: min(found[side].get(task.key, []), key=lambda run: run[0], default=None) for side in found}
        arms = [Candidate(side, replay(task.mod, run[1])) for side, run in best.items() if run and run[0] < 1e9]
        default = Candidate("default", passes.default_schedule(task.mod, session.target))
        outcomes = runner.compare(MeasureInput(task.key, default.json, 256, cold), arms, FINAL)
        medians = {
            side: stats.median(outcome.samples_ns) / 1e3
            for side, outcome in outcomes.items()
            if isinstance(outcome, Timed)
        }
        cells = " ".join(f"{medians[s]:12.1f}" if s in medians else f"{'-':>12s}" for s in ("default", "stock", "ours"))
        reference = medians.get("stock", medians["default"])
        why = "" if "stock" in medians else " (over default: stock has no correct kernel)"
        print(f"{task.name:40s} {cells}  {reference / medians['ours']:.2f}x{why}", flush=True)
    runner.close()


def _records(folder: Path):
    """Task key -> (seconds, record) of every trial in a database."""
    from tvm.s_tir import meta_schedule as ms

    from tunebench.compile.tasks import task_key

    database = ms.database.JSONDatabase(work_dir=str(folder), module_equality="structural")
    found: dict[str, list] = {}
    for record in database.get_all_tuning_records():
        seconds = stats.median([float(s) for s in record.run_secs]) if record.run_secs else 1e10
        found.setdefault(task_key(record.workload.mod), []).append((seconds, record))
    return found


if __name__ == "__main__":
    main()
