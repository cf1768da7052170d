"""Databases of the same device made one: of each kernel the decision that shows most, or a new one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import tvm
from msgspec.structs import replace
from tvm.s_tir import meta_schedule as ms

from tunebench import stats, stopping
from tunebench.compile import passes
from tunebench.compile.tasks import replay
from tunebench.devices.base import Device
from tunebench.errors import TuneBenchError
from tunebench.runners.base import CHOICE, FINAL, Candidate, Failed, MeasureInput, Runner, Timed
from tunebench.tuning import files, verify
from tunebench.tuning.database import Database
from tunebench.tuning.entry import LOST_RECORD, Entry
from tunebench.tuning.search import record_key

AGAIN = "again"  # the twin, which shows the noise

Record: TypeAlias = ms.database.TuningRecord


@dataclass(frozen=True)
class Kernel:
    """What one database has of a kernel."""

    folder: Path
    entry: Entry
    record: Record | None

    @property
    def rank(self) -> tuple[bool, float, bool]:
        """How much it shows: a promoted record, the lower end of its speed-up, any decision at all."""
        interval = stats.ratio_interval(self.entry.default_ns, self.entry.tuned_ns)
        return self.record is not None, interval.low if self.record else 0.0, bool(self.entry.decision)


@dataclass(frozen=True)
class Choice:
    """From which folder a kernel is, and why."""

    name: str
    folder: Path
    why: str


Measure = Callable[[str, Sequence[Kernel]], Kernel]


def merge(
    folders: Sequence[Path], into: Path, measure: Measure | None = None, wait: Callable[[str], None] | None = None
) -> tuple[list[Choice], list[str]]:
    """Write all folders' kernels to `into`, with what it holds already: where each is from, and what was no good.

    Of records in conflict `measure` takes one, or without it the one whose speed-up over the default is shown to be
    larger. TuneBenchError where two folders are not for the same, or `into` cannot be written: then nothing is.
    """
    each = list(dict.fromkeys(([into] if files.is_begun(into) else []) + [*folders]))
    made = files.read_provenance(each[0])
    for folder in each[1:]:
        differences = files.read_provenance(folder).differences(made)
        if differences:
            raise TuneBenchError(
                f"{folder} and {each[0]} are not for the same: {differences.replace('(here', '(there')}.",
                "Records hold on one device alone; `tunebench db diff` compares them.",
            )
    target = Database(into, made)
    target.open_for_writing(wait)
    try:
        sources = [target, *(Database(folder, made) for folder in each if folder != into)]  # empty where it was new
        chosen, choices = _choose(sources, measure)
        with stopping.held():
            target.commit(
                {key: kernel.record for key, kernel in chosen.items() if kernel.record},
                {key: kernel.entry for key, kernel in chosen.items()},
            )
    finally:
        target.close()
    return choices, [warning for source in sources for warning in source.warnings]


def _choose(sources: Sequence[Database], measure: Measure | None) -> tuple[dict[str, Kernel], list[Choice]]:
    found: dict[str, list[Kernel]] = {}
    for source in sources:
        promoted = source.promoted()
        for key in {**source.entries, **promoted}:
            found.setdefault(key, []).append(_kernel(source, key, promoted.get(key)))
    chosen, choices = {}, []
    for key, kernels in found.items():
        best, why = _best(key, kernels, measure)
        chosen[key] = best
        choices.append(Choice(best.entry.name or key, best.folder, why))
    return chosen, choices


def _kernel(source: Database, key: str, record: Record | None) -> Kernel:
    """A decision and its record, which go together."""
    entry = source.entries.get(key, Entry(f"kernel {key}"))
    if record is not None and entry.decision not in ("promoted", ""):  # empty: the decision was lost
        record = None
    if record is None and entry.decision == "promoted":
        entry = replace(entry, decision="", reason=LOST_RECORD, tuned_ns=[])
    return Kernel(source.folder, entry, record)


def _best(key: str, kernels: Sequence[Kernel], measure: Measure | None) -> tuple[Kernel, str]:
    if len(kernels) == 1:
        return kernels[0], "only there"
    best = max(kernels, key=lambda kernel: kernel.rank)
    distinct = {record_key(kernel.record): kernel for kernel in reversed(kernels) if kernel.record}
    if not distinct:
        return best, "no record"
    if len(distinct) == 1:
        return best, "same record" if all(kernel.record for kernel in kernels) else "the only record"
    if measure:
        return measure(key, list(distinct.values())), "measured again"
    return best, "larger speed-up"


def counts(choices: Sequence[Choice]) -> Mapping[tuple[Path, str], int]:
    """How many kernels are from where, and why."""
    return Counter((choice.folder, choice.why) for choice in choices)


def measure_again(device: Device, runner: Runner, key: str, kernels: Sequence[Kernel]) -> Kernel:
    """The fastest of several records of a kernel, with a decision of today. Without times, the one that showed most."""
    known = max(kernels, key=lambda kernel: kernel.rank)
    if known.record is None:
        return known
    mod = known.record.workload.mod
    default = str(tvm.ir.save_json(passes.default_schedule(mod, device.target)))
    given = MeasureInput(key, default, verify.depth(known.entry, mod), device.cold_bytes)
    arms = [Candidate(str(i), replay(mod, kernel.record)) for i, kernel in enumerate(kernels) if kernel.record]
    ranked = _medians(runner, given, arms)
    if not ranked:
        return known
    best = min(ranked, key=lambda name: ranked[name])
    arm = next(each for each in arms if each.name == best)
    outcomes = runner.compare(given, [arm, Candidate(AGAIN, arm.mod)], FINAL)
    samples = {name: list(outcome.samples_ns) for name, outcome in outcomes.items() if isinstance(outcome, Timed)}
    if any(isinstance(outcome, Failed) for outcome in outcomes.values()):
        return known
    noise = stats.noise_floor(samples[best], samples[AGAIN]) or 0.0
    decided = stats.decide(samples["default"], samples[best], noise)
    winner = kernels[int(best)]
    entry = replace(winner.entry, default_ns=samples["default"], tuned_ns=samples[best], by_source={})
    entry = replace(entry, decision=decided.decision, reason=decided.reason)
    return Kernel(winner.folder, entry, winner.record if decided.decision == "promoted" else None)


def _medians(runner: Runner, given: MeasureInput, arms: list[Candidate]) -> dict[str, float]:
    """The records that ran and were correct, on samples that the decision does not use."""
    outcomes = runner.compare(given, arms, CHOICE, with_default=False)
    return {name: stats.median(each.samples_ns) for name, each in outcomes.items() if isinstance(each, Timed)}
