"""Decisions: a kernel's best trials measured again beside the default, and promoted where they win.

A decision is kept as soon as it is taken, so that a run may be stopped anywhere, and what it found until then is used.
"""

from __future__ import annotations

import math
import time

from msgspec.structs import replace
from tvm.s_tir import meta_schedule as ms

from tunebench import stats, stopping
from tunebench.compile.tasks import replay
from tunebench.kernels import templates
from tunebench.runners.base import CHOICE, FINAL, Candidate, Failed, Runner, Timed
from tunebench.spec import Schedule
from tunebench.tuning import spaces
from tunebench.tuning.database import Database
from tunebench.tuning.entry import NO_CANDIDATE, NONE_RAN, NOT_BEGUN, Entry, unsearched
from tunebench.tuning.search import FAILED_S, Costs, TaskSearch, Trials, record_key

FINALISTS = 3
EXPECTED_S = 1.0  # what a decision takes beyond the calls of the default schedule
AGAIN_AFTER_S = 10.0  # since the last decision on the same kernel, unless the run ends
ANY = 1.01  # times as fast, by trials: worth a decision when the search has ended
CLEAR = 1.03  # and while it goes on
BETTER = 1.10  # times as fast as what was last decided on, by its trials: decided again before its search ends
EARLY_SHARE = 0.05  # of the run's time, for decisions before a search has ended
STALE = 2  # rounds without a gain, after which a search counts as ended for now
AGAIN = "again"  # the candidate's twin, which shows the noise


class Judge:
    """Decides on the kernels of one run. `noise` is the largest that a decision met."""

    def __init__(self, database: Database, trials: Trials, runner: Runner, costs: Costs) -> None:
        self._database, self._trials, self._runner, self._costs = database, trials, runner, costs
        self._winners = database.promoted()
        self._started_s = time.monotonic()
        self._decided_s: dict[str, float] = {}  # when, by task key
        self.noise = 0.0

    def expected_s(self, search: TaskSearch) -> float:
        """What a decision may take."""
        calls = FINAL.warmups + FINAL.least_samples
        return EXPECTED_S + calls * stats.median(search.entry.default_ns) / 1e9 if search.entry.default_ns else 0.0

    def is_open(self, search: TaskSearch) -> bool:
        """Whether there is something that no decision has seen."""
        entry, won = search.entry, search.task.key in self._winners
        best_s = self._best_s(search)
        if not entry.decision:
            return True
        if best_s >= FAILED_S:  # nothing ran here: another run's decision stands
            return entry.decision in ("not searched", "nothing to decide") and search.trials > 0
        if (entry.decision == "promoted") != won:
            return True
        return not entry.trial or best_s * ANY < self._trials.measured.get(entry.trial, math.inf)

    def is_due(self, search: TaskSearch, ended: bool) -> bool:
        """Whether to decide now: the search has ended, or what it found is clearly better."""
        now_s = time.monotonic()
        if now_s - self._decided_s.get(search.task.key, -math.inf) < AGAIN_AFTER_S:
            return False
        early = self._costs.seconds["verify"] <= EARLY_SHARE * (now_s - self._started_s)
        return self.is_open(search) if ended else early and self.is_clear(search)

    def is_clear(self, search: TaskSearch) -> bool:
        """Whether its trials promise clearly more than what was last decided on, or than the default."""
        seen_s, best_s = self._trials.measured.get(search.entry.trial), self._best_s(search)
        if seen_s is not None:
            return best_s * BETTER < seen_s
        return bool(search.entry.default_ns) and best_s * CLEAR < stats.median(search.entry.default_ns) / 1e9

    def _best_s(self, search: TaskSearch) -> float:
        found = (seconds for key, seconds in self._trials.measured.items() if key.startswith(f"{search.task.key} "))
        return min(found, default=FAILED_S)

    def settle(self, search: TaskSearch) -> bool:
        """Take the decision that needs no measurement, where none ran; whether it was that."""
        if not self.is_open(search) or search.task.key in self._winners or self._best_s(search) < FAILED_S:
            return False
        reason = search.reason or (NONE_RAN if self._trials.count(search.task) else "")
        reason = reason or (NO_CANDIDATE if search.entry.exhausted else NOT_BEGUN)
        self._keep(search, replace(search.entry, decision=unsearched(reason), reason=reason), None)
        return True

    def decide(self, search: TaskSearch) -> None:
        """Measure the best trials against the default on fresh samples; promote what wins."""
        won = self._winners.get(search.task.key)
        finalists = self._trials.best(search.task, FINALISTS)
        best = record_key(finalists[0]) if finalists else ""
        if won and record_key(won) not in [record_key(record) for record in finalists]:
            finalists.append(won)
        with self._costs.of("verify"):
            entry, winner = self._judged(search, finalists)
        self._decided_s[search.task.key] = time.monotonic()
        if won and not winner and entry.decision != "kept default":
            entry, winner = search.entry, won  # nothing was shown against the winner so far
        self._keep(search, replace(entry, trial=best), winner)

    def _keep(self, search: TaskSearch, entry: Entry, winner: ms.database.TuningRecord | None) -> None:
        """A decision, and its record, on disk before anything else; a signal waits for both."""
        key = search.task.key
        with stopping.held():
            search.entry = self._database.entries[key] = self._drawn(search, entry)
            self._winners.pop(key, None)
            self._winners.update({key: winner} if winner else {})
            self.save()

    def _drawn(self, search: TaskSearch, entry: Entry) -> Entry:
        """The entry with the space that it was decided in, where that was searched in this run."""
        searched = search.trials or search.entry.exhausted == spaces.revision()
        return replace(entry, space=search.signature) if searched else entry

    def keep_standing(self, search: TaskSearch) -> None:
        """What an earlier run decided stands in today's space, if this run searched that and found nothing better."""
        if search.entry.decision and not self.is_open(search):
            search.entry = self._database.entries[search.task.key] = self._drawn(search, search.entry)

    def save(self) -> None:
        """Keep the winners and all entries."""
        self._database.commit(self._winners, self._database.entries)

    def _judged(
        self, search: TaskSearch, finalists: list[ms.database.TuningRecord]
    ) -> tuple[Entry, ms.database.TuningRecord | None]:
        """The decision, and the record where it is `promoted`."""
        entry = replace(search.entry, tuned_ns=[])
        replayed = [Candidate(str(i), replay(search.task.mod, record)) for i, record in enumerate(finalists)]
        ranked = self._ranked(search, replayed)
        champions: dict[Schedule, str] = {}  # source -> its fastest
        for name in ranked:
            champions.setdefault(templates.source(finalists[int(name)].trace), name)
        best, name = next(iter(champions.items()))
        arms = [Candidate(source, replayed[int(each)].mod) for source, each in champions.items()]
        arms.append(Candidate(AGAIN, replayed[int(name)].mod))
        outcomes = self._runner.compare(search.given, arms, FINAL)
        timed = {each: list(outcome.samples_ns) for each, outcome in outcomes.items() if isinstance(outcome, Timed)}
        failed = next((outcome.reason for outcome in outcomes.values() if isinstance(outcome, Failed)), "")
        if failed:
            return replace(entry, decision="inconclusive", reason=f"measured again, it failed: {failed}"), None
        default_ns, tuned_ns = timed["default"], timed[best]
        entry.by_source = {source: timed[source] for source in champions} if len(champions) > 1 else {}
        noise = stats.noise_floor(tuned_ns, timed[AGAIN]) or 0.0
        self.noise = max(self.noise, noise)
        decided = stats.decide(default_ns, tuned_ns, noise)
        entry = replace(
            entry, decision=decided.decision, reason=decided.reason, default_ns=default_ns, tuned_ns=tuned_ns
        )
        return entry, finalists[int(name)] if decided.decision == "promoted" else None

    def _ranked(self, search: TaskSearch, finalists: list[Candidate]) -> list[str]:
        """The finalists, fastest first, on samples that the decision does not use."""
        if len(finalists) == 1:
            return [finalists[0].name]
        outcomes = self._runner.compare(search.given, finalists, CHOICE, with_default=False)

        def median(candidate: Candidate) -> float:
            outcome = outcomes.get(candidate.name)
            return stats.median(outcome.samples_ns) if isinstance(outcome, Timed) else float("inf")

        return [candidate.name for candidate in sorted(finalists, key=median)]
