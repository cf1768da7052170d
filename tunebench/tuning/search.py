"""The search of one task: MetaSchedule proposes candidates, a runner measures those that are new."""

from __future__ import annotations

import functools
import hashlib
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import tvm
import tvm_ffi
from tvm import s_tir
from tvm.s_tir import meta_schedule as ms
from tvm.target import codegen

from tunebench import environment, stats, stopping
from tunebench.compile import passes
from tunebench.compile.tasks import Task, task_key
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels import int8_dot, templates
from tunebench.kernels.operation import Matmul
from tunebench.kernels.tvmscript import import_intrinsics
from tunebench.runners.base import Candidate, Failed, MeasureInput, Outcome, Runner, Timed, Trial
from tunebench.timing import Protocol
from tunebench.tuning import cost_model, spaces
from tunebench.tuning.entry import NO_SPACE, UNHANDLED, Entry
from tunebench.tuning.search_log import SearchLog

BATCH = 16  # candidates of one round on a CPU, which builds or measures
GPU_BATCH = 48  # and on a GPU, which measures while the CPU builds
FAILED_S = 1e10  # MetaSchedule's run time of a candidate that did not run
MANY = 1 << 20  # more trials than any task has
GIVE_UP = 4.0  # a candidate this much slower than the best is timed once
TRIAL = Protocol(warmups=1, samples=5, least_samples=2, budget_s=0.2, sample_s=0.0005)
GAIN = 0.99  # of the best time; less is no progress


class Costs:
    """Wall-clock seconds by what they were spent on."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self.queued_s: Callable[[], float] = lambda: 0.0  # so far

    @contextmanager
    def of(self, what: str) -> Iterator[None]:
        """Add the time of a `with` block to `what`, but what it waited for a device to `queue`."""
        start, queued_s = time.monotonic(), self.queued_s()
        try:
            yield
        finally:
            waited_s = self.queued_s() - queued_s
            self.seconds[what] += time.monotonic() - start - waited_s
            if waited_s:
                self.seconds["queue"] += waited_s


@dataclass
class Trials:
    """Every trial ever made, of any task, and where new ones are kept."""

    log: SearchLog
    measured: dict[str, float] = field(default_factory=dict)  # record key -> seconds

    @property
    def records(self) -> ms.database.Database:
        """As MetaSchedule asks them."""
        return self.log.memory

    def __post_init__(self) -> None:
        for record in self.records.get_all_tuning_records():
            self.measured[record_key(record)] = _seconds(record.run_secs)

    def count(self, task: Task) -> int:
        """How many trials the task has had."""
        return sum(1 for key in self.measured if key.startswith(task.key + " "))

    def best(self, task: Task, most: int) -> list[ms.database.TuningRecord]:
        """The fastest trials that ran, so many of each source, fastest first."""
        found: Counter[str] = Counter()
        top = []
        for record in self.some(task, MANY):
            source = templates.source(record.trace)
            if _seconds(record.run_secs) < FAILED_S and found[source] < most:
                found[source] += 1
                top.append(record)
        return top

    def some(self, task: Task, most: int) -> list[ms.database.TuningRecord]:
        """The fastest trials, those that did not run at the end."""
        if not self.records.has_workload(task.mod):
            return []
        return list(self.records.get_top_k(self.records.commit_workload(task.mod), most))

    def add(self, task: Task, candidate: ms.MeasureCandidate, seconds: float, target: tvm.target.Target) -> None:
        """Write a trial down."""
        workload = ms.database.Workload(task.mod)
        self.log.add(ms.database.TuningRecord(candidate.sch.trace, workload, [seconds], target, candidate.args_info))
        self.measured[candidate_key(task, candidate)] = seconds


@dataclass
class TaskSearch:
    """One task's state in a run."""

    task: Task
    entry: Entry
    space: str
    context: ms.TuneContext
    default_mod: tvm.IRModule
    depth: int
    cold_bytes: int
    trials: int = 0
    valid: int = 0
    best_ns: float = 0.0  # of the default and every trial
    stale: int = 0  # rounds without a gain
    doing: str = ""
    reason: str = ""  # why it cannot be tuned
    begun: bool = False
    hinted: bool = False  # another's winner was tried, and is faster than the default
    ranks: list[float] = field(default_factory=list)  # of the cost model, a round each
    programs: dict[int, float] = field(default_factory=dict)  # structural hash -> seconds

    @property
    def is_open(self) -> bool:
        """Whether the search may go on."""
        return not self.reason and self.entry.exhausted != spaces.revision()

    @functools.cached_property
    def given(self) -> MeasureInput:
        """The kernel as a runner wants it, made once for all its candidates."""
        return MeasureInput(self.task.key, tvm.ir.save_json(self.default_mod), self.depth, self.cold_bytes)

    @functools.cached_property
    def signature(self) -> str:
        """Of the space that its candidates are drawn from."""
        return signature(self.task.mod, self.context.target, self.context.num_threads)

    @property
    def trial(self) -> Trial:
        """How its candidates are timed now."""
        return Trial(self.given, TRIAL, round(GIVE_UP * self.best_ns))


def begin(
    task: Task, entry: Entry, target: tvm.target.Target, threads: int, depth: int, cold_bytes: int, seed: int
) -> TaskSearch:
    """Choose the task's space: the first that matches, else MetaSchedule's own rules."""
    space, kernel = _space_of(s_tir.Schedule(task.mod), target, threads)
    generator: object = "post-order-apply"
    if space or kernel.gpu:  # MetaSchedule's own rules lose to DLight by far, and most do not build
        generate = space.generate if space else _nothing
        generator = ms.space_generator.ScheduleFn(
            lambda schedule: generate(schedule, kernel), sch_rules=[], postprocs=[], mutator_probs={}
        )
    import_intrinsics()  # as the context will, slowly
    context = ms.TuneContext(
        task.mod,
        target=target,
        space_generator=generator,
        search_strategy=ms.search_strategy.EvolutionarySearch(
            population_size=64, init_min_unmeasured=32, genetic_num_iters=3
        ),
        task_name=task.name,
        num_threads=threads or environment.usable_cores(),
        rand_state=seed + 1,
    )
    name = space.name if space else "metaschedule"
    if kernel.gpu and not space:
        name = ""
    default_mod = passes.default_schedule(task.mod, target)
    found = TaskSearch(task, entry, name, context, default_mod, depth, cold_bytes)
    found.reason = "" if name else _no_space(kernel)
    return found


def _no_space(kernel: spaces.Kernel) -> str:
    """Why there is nothing to choose from, and for a product with weights, which kernel there is not."""
    if not isinstance(kernel.operation, Matmul):
        return NO_SPACE
    return f"{NO_SPACE}: no template is for this product with {kernel.operation.weight.words}"


def _space_of(
    sch: s_tir.Schedule, target: tvm.target.Target, threads: int
) -> tuple[spaces.Space | None, spaces.Kernel]:
    """The first space that is for a kernel, and the kernel as that space sees it."""
    kernel = _described(sch, target, threads)
    device = "gpu" if kernel.gpu else "cpu"
    return next((s for s in spaces.spaces().values() if s.device == device and s.matches(sch, kernel)), None), kernel


def signature(mod: tvm.IRModule, target: tvm.target.Target, threads: int) -> str:
    """What changes when there is more, less or something else to choose from for a kernel than before."""
    sch = s_tir.Schedule(mod)
    space, kernel = _space_of(sch, target, threads)
    designs = space.generate(sch, kernel) if space else []
    steps = [_step(each) for design in designs for each in design.trace.insts]
    return hashlib.sha1("\n".join([space.name if space else "", *steps]).encode()).hexdigest()[:12]


def _step(instruction: s_tir.schedule.Instruction) -> str:
    """What an instruction does, without what it does it to and what was sampled."""
    values = [value for value in (*instruction.attrs, *instruction.inputs) if not isinstance(value, tvm.runtime.Object)]
    lists = [list(value) for value in instruction.attrs if isinstance(value, tvm.ir.Array)]
    return f"{instruction.kind.name} {values} {lists}"


def _nothing(sch: s_tir.Schedule, kernel: spaces.Kernel) -> list[s_tir.Schedule]:
    """No designs, for kernels that no space is for."""
    return []


def _described(sch: s_tir.Schedule, target: tvm.target.Target, threads: int) -> spaces.Kernel:
    """The kernel being scheduled, as spaces ask about it."""
    blocks = tuple(passes.block_names(sch))
    if passes.is_cpu(target):
        lanes = int(codegen.llvm_get_vector_width(target)) // 32
        dots = {bits: int8_dot.instruction(target, bits) for bits in int8_dot.MASKS}
        return spaces.Kernel(blocks, lanes, threads, dots, int8_dot.matrix_instruction(target))
    operation = gpu_kernels.operation(sch.mod["main"])
    return spaces.Kernel(blocks, lanes=4, cores=0, operation=operation, gpu=templates.gpu_of(target))


@dataclass(frozen=True)
class Round:
    """Candidates of one task, proposed and being built, until they are measured."""

    search: TaskSearch
    candidates: list[ms.MeasureCandidate]
    predicted: list[float] | None  # scores of the cost model
    programs: list[int]  # structural hash of each candidate's kernel
    fresh: dict[int, ms.MeasureCandidate]  # by program, those that were never measured
    failed: dict[str, Failed]  # those that the build knows of, by program
    asked: bool = True  # whether MetaSchedule's strategy proposed them


def propose(
    search: TaskSearch, trials: Trials, model: ms.cost_model.XGBModel, runner: Runner, costs: Costs, most: int
) -> Round | None:
    """Propose at most `most` candidates and begin to build those that are new; None where none is left."""
    with costs.of("search"):
        candidates = _propose(search, trials, model)[:most]
    if not candidates:
        search.entry.exhausted = "" if search.reason else spaces.revision()
        return None
    with costs.of("model"):
        predicted = cost_model.scores(model, search.context, candidates)
    return _built(search, candidates, predicted, trials, runner, costs)


def try_others(
    search: TaskSearch, candidates: list[ms.MeasureCandidate], trials: Trials, runner: Runner, costs: Costs
) -> Round:
    """Begin to build schedules that won elsewhere."""
    return replace(_built(search, candidates, None, trials, runner, costs), asked=False)


def _built(
    search: TaskSearch,
    candidates: list[ms.MeasureCandidate],
    predicted: list[float] | None,
    trials: Trials,
    runner: Runner,
    costs: Costs,
) -> Round:
    """A round, of which those candidates are being built that are new."""
    programs = [tvm_ffi.structural_hash(candidate.sch.mod) for candidate in candidates]
    for candidate, program in zip(candidates, programs, strict=True):
        known = trials.measured.get(candidate_key(search.task, candidate))
        if known is not None:
            search.programs.setdefault(program, known)
    fresh = {program: c for c, program in zip(candidates, programs, strict=True) if program not in search.programs}
    with costs.of("build"):
        named = [Candidate(str(program), candidate.sch.mod) for program, candidate in fresh.items()]
        failed = runner.build(search.trial, named)
    return Round(search, candidates, predicted, programs, fresh, failed)


def measure(proposed: Round, trials: Trials, model: ms.cost_model.XGBModel, runner: Runner, costs: Costs) -> None:
    """Time a round's new candidates and learn from all of them."""
    search, before = proposed.search, proposed.search.best_ns
    for program, candidate in proposed.fresh.items():
        with costs.of("run"):
            outcome = proposed.failed.get(str(program)) or runner.time(search.trial, str(program))
            seconds = _seconds_of(outcome)
            search.best_ns = min(search.best_ns, seconds * 1e9)
        search.programs[program] = seconds
        search.trials += 1
        search.valid += seconds < FAILED_S
        trials.add(search.task, candidate, seconds, search.context.target)
    taken = [search.programs[program] for program in proposed.programs]
    search.stale = 0 if search.best_ns < GAIN * before else search.stale + 1
    with costs.of("model"):
        results = [ms.runner.RunnerResult([value], None) for value in taken]
        if proposed.asked:
            search.context.notify_runner_results(proposed.candidates, results)
        model.update(search.context, proposed.candidates, results)
    _note(search, proposed.predicted, taken)


def _propose(search: TaskSearch, trials: Trials, model: ms.cost_model.XGBModel) -> list[ms.MeasureCandidate]:
    context = search.context
    try:
        if not search.begun:
            search.begun = True
            batch = BATCH if passes.is_cpu(context.target) else GPU_BATCH
            context.pre_tuning(10**6, batch, context.generate_design_space(), trials.records, model)
        return list(context.generate_measure_candidates() or [])
    except Exception as error:  # a rule that cannot handle this kernel, in whatever way it says so
        stopping.check()
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        search.reason = f"{UNHANDLED}: {lines[-1][:160] if lines else type(error).__name__}"
        return []


def _seconds_of(outcome: Outcome) -> float:
    return stats.median(outcome.samples_ns) / 1e9 if isinstance(outcome, Timed) else FAILED_S


def _note(search: TaskSearch, predicted: list[float] | None, seconds: list[float]) -> None:
    valid = [i for i, value in enumerate(seconds) if value < FAILED_S]
    rank = (
        cost_model.rank_correlation([predicted[i] for i in valid], [seconds[i] for i in valid]) if predicted else None
    )
    if rank is not None:
        search.ranks.append(rank)


def candidate_key(task: Task, candidate: ms.MeasureCandidate) -> str:
    """What makes a trial the same trial: its task and its schedule with every decision."""
    return f"{task.key} {_digest(candidate.sch.trace)}"


def record_key(record: ms.database.TuningRecord) -> str:
    """The `candidate_key` of a record."""
    return f"{task_key(record.workload.mod)} {_digest(record.trace)}"


def _digest(trace: s_tir.schedule.Trace) -> str:
    return hashlib.sha1(str(trace).encode()).hexdigest()


def _seconds(run_secs: object) -> float:
    values = [float(value) for value in run_secs] if run_secs else []  # type: ignore[attr-defined]
    return stats.median(values) if values else FAILED_S
