"""Tasks -> search -> winners measured again -> decisions -> database.

The search decides which kernels look good; the decision is another measurement, on fresh samples, and only what
wins there is promoted: as soon as a kernel's search ends, or has found something clearly better. Everything measured
or decided is on disk before the next thing starts, so that a run can be stopped anywhere, and a later one goes on
without measuring anything twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from typing import Protocol as Interface

import tvm
from tvm.s_tir import meta_schedule as ms

from tunebench import stats, stopping
from tunebench.compile import passes
from tunebench.compile.tasks import Task, chunk_ns, phase, shares
from tunebench.errors import TuneBenchError
from tunebench.kernels import templates
from tunebench.runners.base import Candidate, Failed, Runner
from tunebench.spec import Kernel, Schedule
from tunebench.timing import Protocol
from tunebench.tuning import cost_model
from tunebench.tuning.database import Database
from tunebench.tuning.decision import STALE, Judge
from tunebench.tuning.entry import NEVER, NO_DEFAULT, UNDECIDED, Entry
from tunebench.tuning.neighbours import Hints, candidates
from tunebench.tuning.search import Costs, Round, TaskSearch, Trials, begin, measure, propose, try_others
from tunebench.tuning.search_log import SearchLog

GRACE_S = 10.0  # for decisions after a run was asked to end
RELEARNED = 256  # trials of a kernel that a new cost model learns from
PRIORITY = {"decode": 0.5, "prefill": 0.5}  # of the phases; chunks of one phase share it evenly
DEFAULT = Protocol(warmups=0, samples=5, least_samples=1, budget_s=0.5, sample_s=0.0005)


@dataclass(frozen=True)
class Options:
    """How long to search: trials of one task, and seconds of the whole run."""

    trials: int = 64
    time_limit_s: float = 600.0
    threads: int = 1  # of a CPU's kernels; 0 on a GPU
    seed: int = 0
    depth: int = 256  # positions in the cache when attention is measured
    cold_bytes: int = 64 << 20  # inputs of a kernel are rotated until they add up to this
    phases: tuple[str, ...] = ("decode", "prefill")  # kernels that run in neither are left as they are
    wait: bool = False  # while another run writes the same database
    warn: Callable[[str], None] = lambda words: None  # where to say what is amiss


@dataclass
class Progress:
    """What a watcher sees, and what is left when the run is done."""

    searches: list[TaskSearch]
    limit_s: float
    started_s: float = field(default_factory=time.monotonic)
    stage: str = "default"
    share: dict[str, float] = field(default_factory=dict)  # of the time, by task key
    costs: Costs = field(default_factory=Costs)
    curve: list[dict[str, float]] = field(default_factory=list)
    noise: float = 0.0
    phases: tuple[str, ...] = Options.phases
    ran_on: dict[str, Any] = field(default_factory=dict)  # what the runner says of it, in the end

    @property
    def elapsed_s(self) -> float:
        """Since the run started."""
        return time.monotonic() - self.started_s

    @property
    def trials(self) -> int:
        """Measured by this run."""
        return sum(search.trials for search in self.searches)

    @property
    def valid(self) -> int:
        """Of those, built, correct and timed."""
        return sum(search.valid for search in self.searches)


class Watcher(Interface):
    """Shows progress; called whenever there is something new to show."""

    def __call__(self, progress: Progress) -> None: ...


def tune(
    tasks: list[Task],
    database: Database,
    target: tvm.target.Target,
    make_runner: Callable[[], Runner],
    options: Options,
    watch: Watcher,
    hints: Hints | None = None,
) -> Progress:
    """Try what won elsewhere, search every task, judge the winners, and promote those that won.

    Meanwhile the database is this process's.
    """
    wanted = [task for task in tasks if any(phase(chunk) in options.phases for chunk in task.calls)]
    log = database.open_for_writing(options.warn if options.wait else None)
    try:
        for warning in log.warnings:
            options.warn(warning)
        run = _Run(wanted, database, log, target, make_runner, options, watch)
        try:
            run.measure_defaults()
            run.decide_due(run.progress.searches)  # what an earlier run was kept from
            if hints:
                run.try_hints(hints)
            run.search()
            run.decide_rest()
        except BaseException as error:
            stop = stopping.asked_by(error)
            if stop is None:
                raise
            run.decide_within(GRACE_S)
            raise stop from None
        finally:
            run.close()
    finally:
        database.close()
    return run.progress


def sources(records: Mapping[str, ms.database.TuningRecord]) -> dict[str, Schedule]:
    """Where each promoted kernel comes from: `tuned` or `library`."""
    return {key: templates.source(record.trace) for key, record in records.items()}


def kernels(tasks: list[Task], entries: Mapping[str, Entry], tuned: Mapping[str, Schedule]) -> list[Kernel]:
    """Each kernel of each chunk with its share of the time under the schedules in use, and its decision."""

    def time_ns(task: Task) -> float:
        entry = entries.get(task.key, Entry(task.name))
        samples = entry.tuned_ns if task.key in tuned else entry.default_ns
        return stats.median(samples) if samples else 0.0

    rows = []
    for chunk in sorted({chunk for task in tasks for chunk in task.calls}):
        share = shares(tasks, chunk, time_ns)
        for task in sorted((t for t in tasks if chunk in t.calls), key=lambda t: -share[t.key]):
            entry = entries.get(task.key, Entry(task.name, decision="not searched", reason=NEVER))
            rows.append(
                Kernel(
                    task=task.name,
                    phase=phase(chunk),
                    chunk=chunk,
                    calls=task.calls[chunk],
                    share=share[task.key],
                    schedule=tuned.get(task.key, "default"),
                    decision=entry.decision,
                    reason="; ".join(words for words in (entry.reason or UNDECIDED, task.lacks) if words),
                    default_ns=entry.default_ns,
                    tuned_ns=entry.tuned_ns,
                    by_source=entry.by_source,
                )
            )
    return rows


class _Run:
    """One tuning run."""

    def __init__(
        self,
        tasks: list[Task],
        database: Database,
        log: SearchLog,
        target: tvm.target.Target,
        make_runner: Callable[[], Runner],
        options: Options,
        watch: Watcher,
    ) -> None:
        self.tasks, self.database, self.target = tasks, database, target
        self.options, self.watch = options, watch
        self.trials = Trials(log)
        self.progress = Progress([self._begin(task) for task in tasks], options.time_limit_s, phases=options.phases)
        self.progress.costs.seconds.update(dict.fromkeys(("search", "build", "run", "model", "verify"), 0.0))
        self.model = self._load_model()
        self.runner = make_runner()
        self.progress.costs.queued_s = lambda: self.runner.queued_s
        self.judge = Judge(database, self.trials, self.runner, self.progress.costs)

    def _begin(self, task: Task) -> TaskSearch:
        entry = self.database.entries.setdefault(task.key, Entry(task.name))
        entry.chunks = sorted({*entry.chunks, *task.calls})
        options = self.options
        if not entry.default_ns:
            entry.depth = options.depth  # what is measured later must be at the same
        return begin(task, entry, self.target, options.threads, entry.depth, options.cold_bytes, options.seed)

    def _load_model(self) -> ms.cost_model.XGBModel:
        """The cost model that earlier runs left; made anew from their trials where it is missing or no good."""
        of_decisions = not passes.is_cpu(self.target)
        try:
            model = cost_model.load(self.database.cost_model_path, of_decisions)
        except TuneBenchError as error:
            self.options.warn(str(error))
            model = cost_model.new(of_decisions)
        if not model.data_size:
            for search in self.progress.searches:
                cost_model.learn(model, search.context, self.trials.some(search.task, RELEARNED))
        return model

    def close(self) -> None:
        """Keep what was learned and end the workers; a signal waits for that."""
        with stopping.held():
            try:
                for search in self.progress.searches:
                    self.judge.settle(search)
                    self.judge.keep_standing(search)
                self.judge.save()
                cost_model.save(self.model, self.database.cost_model_path)
            finally:
                self.progress.noise = self.judge.noise
                self.progress.ran_on = self.runner.facts()
                self.runner.close()

    def measure_defaults(self) -> None:
        """Time every default schedule that no earlier run timed."""
        if self.runner.builds_ahead:
            unknown = [search for search in self.progress.searches if not search.entry.default_ns]
            for search in unknown:
                self.runner.build(search.trial, [Candidate(search.task.key, search.default_mod)])
        for search in self.progress.searches:
            if not search.entry.default_ns:
                search.doing = "default"
                self.watch(self.progress)
                with self.progress.costs.of("run"):
                    outcome = self.runner.prepare(search.given, DEFAULT)
                if isinstance(outcome, Failed):
                    search.reason = f"{NO_DEFAULT}: {outcome.reason}"
                else:
                    search.entry.default_ns = list(outcome.samples_ns)
                search.doing = ""
                self.judge.save()
            if search.entry.default_ns:
                trials = [float(record.run_secs[0]) * 1e9 for record in self.trials.best(search.task, 1)]
                search.best_ns = min([stats.median(search.entry.default_ns), *trials])
        self._mark()

    def try_hints(self, hints: Hints) -> None:
        """Measure what won elsewhere, and decide at once where it is clearly faster than the default."""
        self.progress.stage = "hints"
        rounds = (self._hinted(search, hints) for search in self._by_share() if self._wants_hints(search))
        for each in list(rounds) if self.runner.builds_ahead else rounds:
            if each is None or not self._time_is_left():
                continue
            each.search.doing = "hint"
            measure(each, self.trials, self.model, self.runner, self.progress.costs)
            each.search.doing = ""
            each.search.hinted = self.judge.is_clear(each.search)
            self._mark()
            if each.search.hinted:
                self._decide(each.search)

    def _wants_hints(self, search: TaskSearch) -> bool:
        untried = search.entry.decision != "promoted" and not self.trials.count(search.task)
        return untried and bool(search.entry.default_ns) and not search.reason

    def _hinted(self, search: TaskSearch, hints: Hints) -> Round | None:
        with self.progress.costs.of("search"):
            found = candidates(search.task, hints.of(search.task)) if self._time_is_left() else []
        return try_others(search, found, self.trials, self.runner, self.progress.costs) if found else None

    def search(self) -> None:
        """Rounds of candidates until time or candidates run out; one may be built while another is measured."""
        self.progress.stage = "search"
        waiting: Round | None = None
        while True:
            proposed = self._propose(waiting.search if waiting else None)
            ready, waiting = (waiting, proposed) if self.runner.builds_ahead else (proposed, None)
            if ready and self._time_is_left():
                ready.search.doing = "search"
                self.watch(self.progress)
                measure(ready, self.trials, self.model, self.runner, self.progress.costs)
                ready.search.doing = ""
                self._mark()
                self.decide_due([ready.search, *self._ended()])
            elif not proposed:
                break  # nothing is left, or no time for what is ready

    def _propose(self, busy: TaskSearch | None) -> Round | None:
        """A round for the task that promises most; not for one whose last round is not measured yet."""
        while self._time_is_left():
            open_ones = [s for s in self.progress.searches if s is not busy and self._may_go_on(s)]
            if not open_ones:
                break
            search = max(open_ones, key=lambda s: (not s.begun and not s.hinted, self._promise(s)))
            most = self.options.trials - self.trials.count(search.task)
            proposed = propose(search, self.trials, self.model, self.runner, self.progress.costs, most)
            if proposed:
                return proposed
        return None

    def _time_is_left(self) -> bool:
        return self.progress.elapsed_s < self.options.time_limit_s - self._judging_s()

    def _judging_s(self) -> float:
        """What the decisions that are left will take, at most half the time."""
        left = (search for search in self.progress.searches if search.begun and self.judge.is_open(search))
        return min(self.options.time_limit_s / 2, sum(map(self.judge.expected_s, left)))

    def _may_go_on(self, search: TaskSearch) -> bool:
        return search.is_open and self.trials.count(search.task) < self.options.trials

    def _promise(self, search: TaskSearch) -> float:
        """How much a round may save: the task's share of the time, less with each round that gained nothing."""
        return self.progress.share[search.task.key] / (1 + search.stale) ** 2

    def _mark(self) -> None:
        """Bring the shares and the course of the run up to date."""
        best = {search.task.key: search.best_ns for search in self.progress.searches}
        chunk_sizes = sorted({chunk for task in self.tasks for chunk in task.calls})
        phases = [phase(chunk) for chunk in chunk_sizes]
        share = dict.fromkeys(best, 0.0)
        for chunk in chunk_sizes:
            weight = PRIORITY[phase(chunk)] / phases.count(phase(chunk))
            for key, part in shares(self.tasks, chunk, lambda task: best[task.key]).items():
                share[key] += part * weight
        self.progress.share = share
        point = {"wall_s": self.progress.elapsed_s, "trials": float(self.progress.trials)}
        for name, chunk in (("decode", 1), ("prefill", chunk_sizes[-1])):
            tuned = name in self.options.phases
            point[f"{name}_ns"] = chunk_ns(self.tasks, chunk, lambda task: best[task.key]) if tuned else 0.0
        self.progress.curve.append(point)
        self.watch(self.progress)

    def _ended(self) -> list[TaskSearch]:
        """Those that will not be searched on, for now."""
        return [s for s in self.progress.searches if s.begun and (s.stale >= STALE or not self._may_go_on(s))]

    def decide_due(self, searches: Sequence[TaskSearch]) -> None:
        """Decide on those whose search has ended, or has found something clearly better."""
        ended = self._ended()
        for search in searches:
            if self.judge.is_due(search, search in ended):
                self._decide(search)

    def decide_rest(self) -> None:
        """Decide on all that no decision has seen."""
        self.progress.stage = "decision"
        for search in self._by_share():
            if self.judge.is_open(search):
                self._decide(search)

    def decide_within(self, seconds: float) -> None:
        """Decide on what looks clearly better, as far as that takes no longer."""
        end_s = time.monotonic() + seconds
        for search in self._by_share():
            if time.monotonic() + self.judge.expected_s(search) > end_s:
                break
            if self.judge.is_clear(search):
                self._decide(search)

    def _by_share(self) -> list[TaskSearch]:
        return sorted(self.progress.searches, key=lambda search: -self.progress.share.get(search.task.key, 0.0))

    def _decide(self, search: TaskSearch) -> None:
        if self.judge.settle(search):
            return
        search.doing = "decision"
        self.watch(self.progress)
        self.judge.decide(search)
        search.doing = ""
        self.watch(self.progress)
