"""Search strategies compared without a device, on stored times of every program of a model's kernels.

    python benchmarks/replay_search.py                                  the tables, from benchmarks/trials/*.json
    python benchmarks/replay_search.py --collect FILE --target cuda -m llama-7b -q q4f16_1 --prompt 512
                                                                        measure every program where the device is

For each kernel: how close the best program found comes to the best there is, by number of trials, with this project's
search, with a random order, and with MetaSchedule's own evolutionary search and features in the same spaces.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import tvm
from tvm import s_tir
from tvm.s_tir import meta_schedule as ms

from tunebench import stats
from tunebench.compile import passes
from tunebench.compile.tasks import Task, extract
from tunebench.model import quantization, workload
from tunebench.runners.base import Candidate, Failed, MeasureInput, NotBuilt, Outcome, Runner, Timed, Trial
from tunebench.runners.replay import DEFAULT, ReplayRunner, program_key
from tunebench.spec import Workload
from tunebench.tuning import cost_model, search
from tunebench.tuning.entry import Entry
from tunebench.tuning.search_log import SearchLog
from tunebench.tuning.tuner import DEFAULT as DEFAULT_PROTOCOL

TRIALS = Path(__file__).parent / "trials"
STEPS = (4, 8, 16, 32, 48, 64)
CLOSE = 0.98  # of the best program's speed
DEPTH, COLD_BYTES = 256, 128 << 20
FEWEST = 8  # programs; below, there is nothing to search
AT_ONCE = 96  # programs being built
MOST_OF_A_DESIGN = 512  # programs that are measured, drawn at random where a design has more


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--collect", type=Path, help="measure here, and write the times to this file")
    parser.add_argument("--target", default="cuda")
    parser.add_argument("-m", "--model", default="llama-7b")
    parser.add_argument("-q", "--scheme", default="q4f16_1")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--time-limit", type=float, default=480.0, help="seconds of measuring")
    parser.add_argument("--seeds", type=int, default=3)
    args = parser.parse_args()
    if args.collect:
        collect(args)
        return
    for path in sorted(TRIALS.glob("*.json")):
        compare(path, args.seeds)


# -- measuring every program -------------------------------------------------------------------------------


def collect(args: argparse.Namespace) -> None:
    """Times of every program of every kernel, the heaviest kernels first, until time runs out."""
    from tunebench.devices import targets
    from tunebench.devices.opening import open_device

    device = open_device(targets.find(args.target))
    shape = {"model": args.model, "scheme": args.scheme, "chunks": [16, args.prompt], "context": 2048}
    shape["device_kind"] = device.kind
    tasks = tasks_of(shape, device.target)
    found: dict[str, dict] = {}
    about = {"device": device.name, "target": dict(json.loads(str(device.target))), "threads": device.threads}
    runner = device.runner()
    end = time.monotonic() + args.time_limit
    try:
        for task in tasks:
            programs = list(every_program(task, device.target, device.threads))
            if len(programs) >= FEWEST and time.monotonic() < end:
                found[task.key] = measure(runner, task, device.target, programs, device.cold_bytes, end)
                print(f"{task.name}: {len(found[task.key]['programs'])} programs", flush=True)
    finally:
        runner.close()
        args.collect.parent.mkdir(parents=True, exist_ok=True)
        args.collect.write_text(json.dumps({**about, "workload": shape, "tasks": found}, indent=0) + "\n")


def tasks_of(shape: dict, target: tvm.target.Target) -> list[Task]:
    """The kernels of a workload."""
    scheme = quantization.schemes()[shape["scheme"]]
    chunks = tuple(shape["chunks"])
    model = workload.load_model(
        Workload(shape["model"], scheme, 1, chunks, shape["context"], device_kind=shape["device_kind"])
    )
    tasks = extract(passes.prefix(workload.build_module(model), target), model)
    return sorted(tasks, key=lambda task: "matmul" not in task.name)


def every_program(task: Task, target: tvm.target.Target, threads: int) -> Iterator[Candidate]:
    """Each design of the task's space under every combination of its decisions, each program once."""
    seen = set()
    for design in begun(task, target, threads, 0).context.generate_design_space():
        sampled = [inst for inst in design.trace.insts if inst.kind.name == "SampleCategorical"]
        choices = [range(len(inst.attrs[0])) for inst in sampled]
        decided = list(itertools.product(*choices))
        random.Random(0).shuffle(decided)
        for decisions in decided[:MOST_OF_A_DESIGN]:
            trace = design.trace
            for inst, decision in zip(sampled, decisions, strict=True):
                trace = trace.with_decision(inst, decision, False)
            sch = s_tir.Schedule(task.mod)
            trace.apply_to_schedule(sch, remove_postproc=True)
            key = program_key(sch.mod)
            if key not in seen:
                seen.add(key)
                yield Candidate(key, sch.mod)


def measure(
    runner: Runner, task: Task, target: tvm.target.Target, programs: Sequence[Candidate], cold_bytes: int, end: float
) -> dict:
    """Nanoseconds of the default and of each program; null for one that failed."""
    default = Candidate("", passes.default_schedule(task.mod, target))
    given = MeasureInput(task.key, default.json, DEPTH, cold_bytes)
    trial = Trial(given, search.TRIAL, 10**10)
    reference = runner.prepare(given, DEFAULT_PROTOCOL)
    if isinstance(reference, Failed):
        raise SystemExit(f"{task.name}: {reference.reason}")
    times: dict[str, int | None] = {}
    for start in range(0, len(programs), AT_ONCE):
        part = programs[start : start + AT_ONCE]
        failed = runner.build(trial, part)
        for candidate in part:
            outcome = failed.get(candidate.name) or runner.time(trial, candidate.name)
            times[candidate.name] = ns_of(outcome)
        if time.monotonic() > end:
            break
    return {"name": task.name, "default_ns": ns_of(reference), "programs": times}


def ns_of(outcome: Outcome) -> int | None:
    """The median, or None of what failed."""
    return round(stats.median(outcome.samples_ns)) if isinstance(outcome, Timed) else None


# -- comparing strategies ----------------------------------------------------------------------------------


class Stored(ReplayRunner):
    """Answers from a file, and keeps the order in which programs were asked for."""

    def __init__(self, times: dict) -> None:
        super().__init__(self.answer)
        self.times = times
        self.order: list[int] = []

    def answer(self, task: str, program: str) -> Outcome:
        """A stored time."""
        ns = self.times["default_ns"] if program == DEFAULT else self.times["programs"].get(program)
        return Timed((ns,)) if ns else NotBuilt("it failed, or was not measured")

    def time(self, trial: Trial, name: str) -> Outcome:
        """As ever, and written down."""
        outcome = super().time(trial, name)
        self.order.append(outcome.samples_ns[0] if isinstance(outcome, Timed) else 10**15)
        return outcome


def compare(path: Path, seeds: int) -> None:
    """Print a table for one device."""
    data = json.loads(path.read_text())
    target = tvm.target.Target(data["target"])
    shape = data["workload"]
    stored = data["tasks"]
    tasks = [task for task in tasks_of(shape, target) if task.key in stored]
    curves: dict[str, list[list[float]]] = {"ours": [], "random": [], "MetaSchedule": []}
    for task in tasks:
        times = stored[task.key]
        measured = [ns for ns in times["programs"].values() if ns]
        for seed in range(seeds):
            curves["ours"].append(quality(ours(task, target, data["threads"], times, seed), measured))
            curves["MetaSchedule"].append(quality(stock(task, target, data["threads"], times, seed), measured))
            order = [ns or 10**15 for ns in times["programs"].values()]
            random.Random(seed).shuffle(order)
            curves["random"].append(quality(order, measured))
    programs = sum(len(stored[task.key]["programs"]) for task in tasks)
    who = f"{data['device']}, {shape['model']} {shape['scheme']}"
    print(f"\n{who}: {len(tasks)} kernels, {programs} programs, {seeds} seeds\n")
    print("Speed of the best program found, as a share of the best there is: mean (worst) over kernels")
    print(f"| trials | {' | '.join(curves)} |\n|---|{'---|' * len(curves)}")
    for step in STEPS:
        cells = [[curve[min(step, len(curve)) - 1] for curve in each] for each in curves.values()]
        print(f"| {step} | {' | '.join(f'{np.mean(c):.1%} ({min(c):.0%})' for c in cells)} |")
    needed = [[trials_to(curve) for curve in each] for each in curves.values()]
    print(f"| trials to {CLOSE:.0%}: median (90th percentile) | ", end="")
    print(" | ".join(f"{np.median(n):.0f} ({np.percentile(n, 90):.0f})" for n in needed), "|")


def quality(order: Sequence[int], measured: Sequence[int]) -> list[float]:
    """After each trial, the best so far over the best of all."""
    best = min(measured)
    return [best / least for least in itertools.accumulate(order, min)] or [0.0]


def trials_to(curve: Sequence[float]) -> float:
    """How many trials came close to the best; all and as many again where none did."""
    return next((i for i, share in enumerate(curve, 1) if share >= CLOSE), 2 * len(curve))


def begun(task: Task, target: tvm.target.Target, threads: int, seed: int) -> search.TaskSearch:
    """A task with its space."""
    return search.begin(task, Entry(task.name), target, threads, DEPTH, COLD_BYTES, seed)


def ours(task: Task, target: tvm.target.Target, threads: int, times: dict, seed: int) -> list[int]:
    """The order in which this project's search asks for programs."""
    found = begun(task, target, threads, seed)
    found.best_ns = float(times["default_ns"])
    runner, costs = Stored(times), search.Costs()
    with tempfile.TemporaryDirectory() as folder:
        trials, model = search.Trials(SearchLog(Path(folder))), cost_model.new(not passes.is_cpu(target))
        while len(runner.order) < STEPS[-1]:
            proposed = search.propose(found, trials, model, runner, costs, STEPS[-1] - len(runner.order))
            if not proposed:
                break
            search.measure(proposed, trials, model, runner, costs)
    return runner.order


def stock(task: Task, target: tvm.target.Target, threads: int, times: dict, seed: int) -> list[int]:
    """The same with MetaSchedule's own parameters, batches, cost model and features."""
    context = begun(task, target, threads, seed).context
    context = ms.TuneContext(
        task.mod, target=target, space_generator=context.space_generator, search_strategy="evolutionary",
        task_name=task.name, num_threads=1, rand_state=seed + 1,
    )  # fmt: skip
    model = ms.cost_model.XGBModel(verbose_eval=10**9)
    order: list[int] = []
    known = {**times["programs"]}
    with tempfile.TemporaryDirectory() as folder:
        records = ms.database.JSONDatabase(work_dir=folder, module_equality="structural")
        context.pre_tuning(10**6, 64, context.generate_design_space(), records, model)
        workload_of = records.commit_workload(task.mod)
        asked: set[str] = set()
        while len(order) < STEPS[-1] and (candidates := context.generate_measure_candidates()):
            taken = [known.get(program_key(each.sch.mod)) or 10**15 for each in candidates]
            results = [ms.runner.RunnerResult([ns / 1e9], None) for ns in taken]
            for each, ns in zip(candidates, taken, strict=True):
                key = program_key(each.sch.mod)
                order += [] if key in asked else [ns]
                asked.add(key)
            for each, ns in zip(candidates, taken, strict=True):
                record = ms.database.TuningRecord(each.sch.trace, workload_of, [ns / 1e9], target, each.args_info)
                records.commit_tuning_record(record)
            context.notify_runner_results(candidates, results)
            model.update(context, candidates, results)
    return order


if __name__ == "__main__":
    main()
