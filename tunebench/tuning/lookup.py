"""What a database holds for a model: its kernels' records, also those of another context, and its prefill chunks.

A kernel over the cache is compiled for one longest context, and its schedule depends little on it: where it has no
record of its own, the record of the same operation at the nearest other context is replayed on it. Every kernel and
template is correct for any context that it takes, and `checked` has the device confirm it on random inputs.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

import tvm
from msgspec.structs import replace as changed
from tvm.s_tir import meta_schedule as ms

from tunebench import stats
from tunebench.compile import passes
from tunebench.compile.tasks import Task, extract, family_key, over_cache, replay
from tunebench.errors import brief
from tunebench.kernels import int8_dot
from tunebench.model import workload as workloads
from tunebench.model.description import one_of_each
from tunebench.runners.base import Candidate, Failed, MeasureInput, Runner, Timed
from tunebench.spec import EngineName, Schedule, Workload
from tunebench.timing import Protocol
from tunebench.tuning.database import Database
from tunebench.tuning.entry import Entry
from tunebench.tuning.search import signature
from tunebench.tuning.session import Lowered, Session

CANDIDATES = (16, 32, 64, 128, 256, 512, 1024, 2048)
"""Chunk sizes that a database whose entries do not name any is asked for."""
CHECK = Protocol(warmups=1, samples=5, least_samples=3, budget_s=0.5, sample_s=0.0005)
NAMED = 3  # kernels without a record that a line names
UNTRIED = ("", "not searched")
NEVER = Entry("", reason="never measured")


@dataclass(frozen=True)
class Found:
    """What a database holds for the kernels of one model, by task key."""

    records: Mapping[str, ms.database.TuningRecord]
    entries: Mapping[str, Entry]
    moved: Mapping[str, int]  # records of another context, and which

    def time_ns(self, task: Task, schedule: Schedule) -> float | None:
        """A kernel's time under the schedule that it has in an engine of that schedule; None: never measured."""
        entry = self.entries.get(task.key, Entry(task.name))
        samples = entry.tuned_ns if schedule == "tuned" and task.key in self.records else entry.default_ns
        return stats.median(samples) if samples else None

    def chunk_ns(self, tasks: list[Task], schedule: Schedule) -> dict[int, float]:
        """Kernel time of one chunk of each size, without the sizes that have a kernel whose time is not known."""
        times: dict[int, float] = {}
        for size in sorted({size for task in tasks for size in task.calls}):
            each = [(self.time_ns(task, schedule), task.calls[size]) for task in tasks if size in task.calls]
            known = [one_ns * calls for one_ns, calls in each if one_ns is not None]
            if len(known) == len(each):
                times[size] = sum(known)
        return times

    def missing(self, tasks: list[Task]) -> list[Task]:
        """Kernels that run by default because nobody searched for anything better."""
        return [
            task
            for task in tasks
            if task.key not in self.records and self.entries.get(task.key, Entry(task.name)).decision in UNTRIED
        ]


def look_up(tasks: list[Task], database: Database) -> Found:
    """The records of a model's kernels: each one's own, else that of its family at the nearest context."""
    int8_dot.register()  # records may name its intrinsics
    promoted, entries = database.promoted(), dict(database.entries)
    records = {task.key: promoted[task.key] for task in tasks if task.key in promoted}
    moved: dict[str, int] = {}
    for task in Found(records, entries, moved).missing(tasks):
        near = _nearest(task, promoted)
        if near is None:
            continue
        context, key = near
        entry = entries.get(key, Entry(task.name))
        where = f"tuned at context {context}"
        try:
            replay(task.mod, promoted[key])
        except Exception as error:  # whatever TVM raises where a trace does not fit
            entries[task.key] = Entry(task.name, reason=f"{where}, and that schedule does not apply: {brief(error)}")
        else:
            records[task.key], moved[task.key] = promoted[key], context
            entries[task.key] = changed(entry, name=task.name, reason=f"{where}: {entry.reason}")
    return Found(records, entries, moved)


def _nearest(task: Task, promoted: Mapping[str, ms.database.TuningRecord]) -> tuple[int, str] | None:
    """Of the same operation at other contexts: the context, and the key of its record."""
    operation = over_cache(task.mod)
    if operation is None:
        return None
    family, context = family_key(task.mod), operation.context
    found = {key: over_cache(record.workload.mod) for key, record in promoted.items()}
    same = [
        (each.context, key) for key, each in found.items() if each and family_key(promoted[key].workload.mod) == family
    ]
    return min(same, key=lambda each: abs(math.log(each[0] / context)), default=None)


def checked(lowered: Lowered, found: Found) -> Found:
    """What is left of the records of another context when each is run here: those that are right, and no slower.

    Where the device measures no kernels, as a web browser does not, all are left.
    """
    device = lowered.session.device
    if not found.moved or device.absent or device.engine == EngineName.BROWSER:
        return found
    moved = [task for task in lowered.tasks if task.key in found.moved]
    runner = device.runner()
    try:
        entries = {task.key: _run_here(lowered, task, found, runner) for task in moved}
    finally:
        runner.close()
    left = {key: record for key, record in found.records.items() if key not in entries or entries[key].tuned_ns}
    return Found(left, {**found.entries, **entries}, {key: at for key, at in found.moved.items() if key in left})


def _run_here(lowered: Lowered, task: Task, found: Found, runner: Runner) -> Entry:
    """A moved record's entry with times of this context; without `tuned_ns` where it is not to be used."""
    device, entry = lowered.session.device, found.entries[task.key]
    where = f"tuned at context {found.moved[task.key]}"
    workload = lowered.model.workload
    depth = min(entry.depth, workload.context - max(workload.chunk_sizes))
    default = passes.default_schedule(task.mod, device.target)
    given = MeasureInput(task.key, str(tvm.ir.save_json(default)), depth, device.cold_bytes)
    candidate = Candidate("moved", replay(task.mod, found.records[task.key]))
    outcomes = runner.compare(given, [candidate], CHECK)
    here, before = outcomes["moved"], outcomes.get("default")
    if isinstance(here, Failed):
        return Entry(task.name, reason=f"{where}, and not right here: {here.reason}")
    default_ns = list(before.samples_ns) if isinstance(before, Timed) else []
    if default_ns and stats.median(here.samples_ns) > stats.median(default_ns):
        return Entry(task.name, default_ns=default_ns, reason=f"{where}, and slower than the default here")
    return changed(entry, default_ns=default_ns, tuned_ns=list(here.samples_ns), by_source={})


def missing_line(lowered: Lowered, found: Found) -> str:
    """Which kernels nobody searched for, why, and the command that does it; empty where there are none."""
    missing = found.missing(lowered.tasks)
    if not missing:
        return ""
    model, device = lowered.model, lowered.session.device
    workload = model.workload
    named = ", ".join(task.name for task in missing[:NAMED])
    more = f" and {len(missing) - NAMED} more" if len(missing) > NAMED else ""
    reasons = Counter(found.entries.get(task.key, NEVER).reason or NEVER.reason for task in missing)
    prompt = ",".join(map(str, workload.chunks))
    batch = f" --batch {workload.batch}" if workload.batch > 1 else ""
    layers = f" --layers {workload.layers}" if workload.layers else ""
    return (
        f"{len(missing)} of {len(lowered.tasks)} kernels of {model.name} {workload.scheme.name} on "
        f"{device.target_name} run untuned: {named}{more} ({reasons.most_common(1)[0][0]}). Tune them: "
        f"`tunebench tune -m {workload.model} -q {workload.scheme.name} --target {device.target_name} "
        f"--prompt {prompt} --context {workload.context}{batch}{layers}`"
    )


def older_line(lowered: Lowered, entries: Mapping[str, Entry]) -> str:
    """Which kernels were decided when there was less to choose from, or something else; empty where none was."""
    target, threads = lowered.session.target, lowered.session.threads
    decided = [task for task in lowered.tasks if task.key in entries and entries[task.key].decision not in UNTRIED]
    older = [
        task
        for task in decided
        if entries[task.key].decision != "nothing to decide"
        and not (entries[task.key].space and entries[task.key].space == signature(task.mod, target, threads))
    ]
    if not older:
        return ""
    named = ", ".join(task.name for task in older[:NAMED])
    more = f" and {len(older) - NAMED} more" if len(older) > NAMED else ""
    model = f"{lowered.model.name} {lowered.model.workload.scheme.name}"
    return (
        f"{len(older)} of {len(lowered.tasks)} kernels of {model} were decided on in other spaces than today's: "
        f"{named}{more}. `tunebench tune` searches them anew."
    )


def with_chunks(session: Session, workload: Workload, held: bool) -> Workload:
    """The workload, and where it names no chunks, those that the database holds for it, or else the device's own.

    The database is not asked unless `held`.
    """
    if workload.chunks:
        return workload
    own = tuple(size for size in session.device.default_chunks if size <= workload.context)
    return replace(workload, chunks=(held and _held_chunks(session, workload)) or own)


def _held_chunks(session: Session, workload: Workload) -> tuple[int, ...]:
    """Chunks all of whose kernels the database has tried. Those over the cache do not count: any context will do."""
    entries = session.database().entries
    if not entries:
        return ()
    named = {size for entry in entries.values() for size in entry.chunks}
    sizes = tuple(size for size in sorted({*CANDIDATES, *named} - {1}) if size <= workload.context)
    tasks = [
        task for task in _one_of_each_layer(session, replace(workload, chunks=sizes)) if over_cache(task.mod) is None
    ]
    return tuple(size for size in sizes if all(_tried(entries, task) for task in tasks if size in task.calls))


def _tried(entries: Mapping[str, Entry], task: Task) -> bool:
    return task.key in entries and bool(entries[task.key].default_ns or entries[task.key].decision)


def _one_of_each_layer(session: Session, workload: Workload) -> Iterable[Task]:
    """The kernels of a model, which are those of one layer of each kind: lowered in a moment."""
    model = workloads.load_model(replace(workload, device_kind=session.device.kind))
    few = replace(model.decoder, layers=one_of_each(model.decoder.layers))
    model = replace(model, architecture=replace(model.architecture, describe=lambda config: few))
    return extract(passes.prefix(workloads.build_module(model), session.target), model)
