"""Tasks -> search -> winners measured again -> decisions -> database.

The search decides which kernels look good; the decision is another measurement, on fresh samples, and only what
wins there is promoted. Everything measured is on disk before the next thing starts, so that a run can be
stopped anywhere, and a later one goes on without measuring anything twice.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any
from typing import Protocol as Interface

import tvm
from msgspec.structs import replace
from tvm.s_tir import meta_schedule as ms

from tunebench import stats
from tunebench.compile import passes
from tunebench.compile.tasks import Task, chunk_ns, phase, replay, shares
from tunebench.kernels import templates
from tunebench.runners.base import Candidate, Failed, Runner, Timed
from tunebench.spec import Kernel, Schedule
from tunebench.timing import Protocol
from tunebench.tuning import cost_model
from tunebench.tuning.database import Database, Entry
from tunebench.tuning.search import Costs, Round, TaskSearch, Trials, begin, measure, propose, record_key

FINALISTS = 3
JUDGE_S = 0.7  # what a decision takes beyond the calls of the default schedule
PRIORITY = {"decode": 0.5, "prefill": 0.5}  # of the phases; chunks of one phase share it evenly
DEFAULT = Protocol(warmups=0, samples=5, least_samples=1, budget_s=0.5, sample_s=0.0005)
CHOICE = Protocol(warmups=1, samples=9, least_samples=1, budget_s=0.3, sample_s=0.001)
FINAL = Protocol(warmups=1, samples=21, least_samples=stats.FEWEST, budget_s=1.0, sample_s=0.001)
AGAIN = "again"  # the candidate's twin, which shows the noise


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
) -> Progress:
    """Search every task, judge the winners, and promote those that won."""
    wanted = [task for task in tasks if any(phase(chunk) in options.phases for chunk in task.calls)]
    run = _Run(wanted, database, target, make_runner, options, watch)
    try:
        run.measure_defaults()
        run.search()
        run.judge()
    finally:
        run.close()
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
            entry = entries.get(task.key, Entry(task.name, reason="never measured: run `tunebench tune`"))
            rows.append(
                Kernel(
                    task=task.name,
                    phase=phase(chunk),
                    chunk=chunk,
                    calls=task.calls[chunk],
                    share=share[task.key],
                    schedule=tuned.get(task.key, "default"),
                    decision=entry.decision,
                    reason=entry.reason or "not judged yet: the run was stopped",
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
        target: tvm.target.Target,
        make_runner: Callable[[], Runner],
        options: Options,
        watch: Watcher,
    ) -> None:
        self.tasks, self.database, self.target = tasks, database, target
        self.options, self.watch = options, watch
        self.trials = Trials(database.open_search())
        self.model = cost_model.load(database.cost_model_path, of_decisions=not passes.is_cpu(target))
        self.progress = Progress([self._begin(task) for task in tasks], options.time_limit_s, phases=options.phases)
        self.progress.costs.seconds.update(dict.fromkeys(("search", "build", "run", "model", "verify"), 0.0))
        self.runner = make_runner()
        self.progress.costs.queued_s = lambda: self.runner.queued_s

    def _begin(self, task: Task) -> TaskSearch:
        entry = self.database.entries.setdefault(task.key, Entry(task.name))
        entry.chunks = sorted({*entry.chunks, *task.calls})
        options = self.options
        if not entry.default_ns:
            entry.depth = options.depth  # what is measured later must be at the same
        return begin(task, entry, self.target, options.threads, entry.depth, options.cold_bytes, options.seed)

    def close(self) -> None:
        """Keep what was learned and end the workers."""
        self.progress.ran_on = self.runner.facts()
        self.runner.close()
        cost_model.save(self.model, self.database.cost_model_path)
        self.database.save_entries()

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
                    search.reason = f"its default schedule failed: {outcome.reason}"
                else:
                    search.entry.default_ns = list(outcome.samples_ns)
                search.doing = ""
                self.database.save_entries()
            if search.entry.default_ns:
                trials = [float(record.run_secs[0]) * 1e9 for record in self.trials.best(search.task, 1)]
                search.best_ns = min([stats.median(search.entry.default_ns), *trials])
        self._mark()

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
            elif not proposed:
                break  # nothing is left, or no time for what is ready

    def _propose(self, busy: TaskSearch | None) -> Round | None:
        """A round for the task that promises most; not for one whose last round is not measured yet."""
        while self._time_is_left():
            candidates = [s for s in self.progress.searches if s is not busy and self._may_go_on(s)]
            if not candidates:
                break
            search = max(candidates, key=lambda s: (not s.begun, self._promise(s)))
            most = self.options.trials - self.trials.count(search.task)
            proposed = propose(search, self.trials, self.model, self.runner, self.progress.costs, most)
            if proposed:
                return proposed
        return None

    def _time_is_left(self) -> bool:
        return self.progress.elapsed_s < self.options.time_limit_s - self._judging_s()

    def _judging_s(self) -> float:
        """What the decisions on the tasks searched so far will take, at most half the time."""
        calls = FINAL.warmups + FINAL.least_samples
        searched = [search.entry.default_ns for search in self.progress.searches if search.begun]
        seconds = sum(JUDGE_S + calls * stats.median(samples) / 1e9 for samples in searched if samples)
        return min(self.options.time_limit_s / 2, seconds)

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

    def judge(self) -> None:
        """Measure each task's best trials against the default on fresh samples; promote what wins."""
        self.progress.stage = "decision"
        winners = self.database.promoted()
        for search in sorted(self.progress.searches, key=lambda s: -self.progress.share[s.task.key]):
            key, won = search.task.key, winners.get(search.task.key)
            finalists = self.trials.best(search.task, FINALISTS)
            judged = search.entry.trial == (record_key(finalists[0]) if finalists else "")
            if search.entry.decision and judged and (search.entry.decision == "promoted") == bool(won):
                continue  # judged by an earlier run, and nothing better was found since
            if not finalists and not won and search.entry.decision and not search.trials:
                continue  # decided by a run whose trials are not here
            if won and record_key(won) not in [record_key(record) for record in finalists]:
                finalists.append(won)
            search.doing = "decision"
            self.watch(self.progress)
            with self.progress.costs.of("verify"):
                entry, winner = self._judge(search, finalists)
            search.doing = ""
            entry.trial = record_key(finalists[0]) if finalists else ""
            if won and not winner and entry.decision != "kept default":
                search.entry.trial = entry.trial  # nothing was shown against the winner so far
            else:
                search.entry = self.database.entries[key] = entry
                winners.pop(key, None)
                winners.update({key: winner} if winner else {})
                self.database.promote(winners)
            self.database.save_entries()
            self.watch(self.progress)
        self.database.promote(winners)

    def _judge(
        self, search: TaskSearch, finalists: list[ms.database.TuningRecord]
    ) -> tuple[Entry, ms.database.TuningRecord | None]:
        """The decision, and the record where it is `promoted`."""
        entry = replace(search.entry, tuned_ns=[])
        if not finalists:
            tried = self.trials.count(search.task) > 0
            unsearched = "no candidate ran and was correct" if tried else "not searched before the time ran out"
            return replace(entry, decision="kept default", reason=search.reason or unsearched), None
        replayed = [Candidate(str(i), replay(search.task.mod, record)) for i, record in enumerate(finalists)]
        ranked = self._ranked(search, replayed)
        champions: dict[Schedule, str] = {}  # source -> its fastest
        for name in ranked:
            champions.setdefault(templates.source(finalists[int(name)].trace), name)
        best, name = next(iter(champions.items()))
        arms = [Candidate(source, replayed[int(each)].mod) for source, each in champions.items()]
        arms.append(Candidate(AGAIN, replayed[int(name)].mod))
        outcomes = self.runner.compare(search.given, arms, FINAL)
        timed = {each: list(outcome.samples_ns) for each, outcome in outcomes.items() if isinstance(outcome, Timed)}
        failed = next((outcome.reason for outcome in outcomes.values() if isinstance(outcome, Failed)), "")
        if failed:
            return replace(entry, decision="inconclusive", reason=f"measured again, it failed: {failed}"), None
        default_ns, tuned_ns = timed["default"], timed[best]
        entry.by_source = {source: timed[source] for source in champions} if len(champions) > 1 else {}
        noise = stats.noise_floor(tuned_ns, timed[AGAIN]) or 0.0
        self.progress.noise = max(self.progress.noise, noise)
        decided = stats.decide(default_ns, tuned_ns, noise)
        entry = replace(
            entry, decision=decided.decision, reason=decided.reason, default_ns=default_ns, tuned_ns=tuned_ns
        )
        return entry, finalists[int(name)] if decided.decision == "promoted" else None

    def _ranked(self, search: TaskSearch, finalists: list[Candidate]) -> list[str]:
        """The finalists, fastest first, on samples that the decision does not use."""
        if len(finalists) == 1:
            return [finalists[0].name]
        outcomes = self.runner.compare(search.given, finalists, CHOICE, with_default=False)

        def median(candidate: Candidate) -> float:
            outcome = outcomes.get(candidate.name)
            return stats.median(outcome.samples_ns) if isinstance(outcome, Timed) else float("inf")

        return [candidate.name for candidate in sorted(finalists, key=median)]
