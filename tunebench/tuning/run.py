"""Tune one model's kernels: a row with what it took and brought."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tunebench import installation, results, stopping
from tunebench.errors import TuneBenchError
from tunebench.results import TuneResult
from tunebench.tuning.database import Database
from tunebench.tuning.neighbours import NONE, Hints, Neighbour, choose
from tunebench.tuning.session import Lowered, Session
from tunebench.tuning.tuner import Options, Progress, Watcher, kernels, sources, tune


def run_tune(lowered: Lowered, options: Options, watch: Watcher, begin_from: str = "") -> TuneResult:
    """Tune one model's kernels and write what it took and brought.

    `begin_from`: the folder of a database whose winners are tried first; without, that of the device most like this one
    if there is any; `none` for neither.
    """
    session, workload = lowered.session, lowered.model.workload
    database, device = session.database(), session.device
    depth = min(options.depth, workload.context - max(workload.chunk_sizes))
    seen: list[Progress] = []

    def remember(progress: Progress) -> None:
        seen[:] = [progress]
        watch(progress)

    begun = {} if begin_from == NONE else {database.folder.name: database.promoted()}
    for near in neighbours(session, begin_from):
        try:
            begun[near.folder.name] = near.winners()
        except TuneBenchError as error:  # it is not this run's; what was asked for must be good
            if begin_from:
                raise
            options.warn(str(error))
    hints = Hints(begun.values())
    try:
        options = replace(options, depth=depth, threads=device.threads, cold_bytes=device.cold_bytes)
        tune(lowered.tasks, database, session.target, device.runner, options, remember, hints)
    finally:  # a run that was stopped has its cost too
        with stopping.held():
            rows = [
                _tune_row(lowered, progress, database, [name for name, won in begun.items() if won])
                for progress in seen
            ]
            for row in rows:
                results.append(session.results_path, row)
    return rows[0]


def neighbours(session: Session, begin_from: str) -> list[Neighbour]:
    """The databases that a run begins from, beside its own."""
    made, own = session.database().made, session.database().folder
    roots = (own.parent, installation.tuning_logs())
    return choose(begin_from, made, session.device.target_name, roots, own.name)


def _tune_row(lowered: Lowered, progress: Progress, database: Database, began_from: Sequence[str]) -> TuneResult:
    session, workload = lowered.session, lowered.model.workload
    found = kernels(lowered.tasks, database.entries, sources(database.promoted()))
    ranks = {search.task.name: search.ranks for search in progress.searches if search.ranks}
    return TuneResult(
        model=lowered.model.name,
        scheme=workload.scheme.name,
        target=session.device.target_name,
        device=session.device.name,
        batch=workload.batch,
        n_threads=session.threads,
        run_id=session.run_id,
        run_name=session.run_name,
        model_id=lowered.model.model_id,
        test_time=results.now(),
        began_from=", ".join(began_from),
        trials=progress.trials,
        valid_trials=progress.valid,
        cost_s={**progress.costs.seconds, "total": progress.elapsed_s},
        curve=progress.curve,
        kernels=[kernel for kernel in found if kernel.phase in progress.phases],
        noise=progress.noise,
        ranking={name: float(np.mean(values)) for name, values in ranks.items()},
        environment=_described(session, progress),
    )


def _described(session: Session, progress: Progress) -> dict[str, object]:
    """The machine and the device, with what the runner learned of it."""
    found = session.described()
    of_device = found.get("rpc")
    return {**found, "rpc": {**of_device, **progress.ran_on}} if isinstance(of_device, dict) else found
