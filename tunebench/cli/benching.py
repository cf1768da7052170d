"""What tune, bench and demo share: a workload lowered, and benches with a line for each row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer
from rich.text import Text

from tunebench import stopping
from tunebench.cli import inputs
from tunebench.cli.inputs import console

if TYPE_CHECKING:
    from rich.status import Status

    from tunebench.bench.arms import Plan
    from tunebench.bench.quality import Judge
    from tunebench.results import Result
    from tunebench.spec import Workload
    from tunebench.tuning.session import Lowered, Session


def lowered(session: Session, workload: Workload, held: bool = False) -> Lowered:
    """A workload lowered; one without chunks has the device's, or with `held` first those of the database."""
    from tunebench.tuning.lookup import with_chunks
    from tunebench.tuning.session import lower

    with inputs.status(f"building {workload.model} {workload.scheme.name}"):
        return lower(session, with_chunks(session, workload, held))


def bench_all(models: list[list[Lowered]], plan: Plan, say_missing: bool = True, judge: Judge | None = None) -> None:
    """Bench each model, on one target or several, and say first which kernels have no record.

    With a judge each has its quality in its rows.
    """
    from dataclasses import replace

    from tunebench.bench.arms import label
    from tunebench.bench.runner import run_bench
    from tunebench.spec import EngineName

    statuses = []
    path = models[0][0].session.results_path
    for lowered in models:
        model = lowered[0].model
        title = f"{model.name} {model.workload.scheme.name}"
        with (
            stopping.keeping(f"Rows so far are in {path}: `tunebench report` shows them."),
            inputs.status(title) as status,
        ):

            def say(words: str, status: Status = status, title: str = title) -> None:
                status.update(Text(f"{title}: {words}"))

            judged = {label(each): judge.quality(each, say) for each in lowered} if judge else {}
            for row in run_bench(lowered, replace(plan, quality=judged), say, inputs.warn if say_missing else say):
                statuses.append(row.status)
                shown = row.engine if row.schedule == "library" else row.schedule
                where = f"{row.target} browser" if row.engine == EngineName.BROWSER else row.target
                shown = f"{where} {shown}" if len(lowered) > 1 else shown
                line = f"{row.model} {row.scheme} {row.test} {shown}"
                console.print(f"{line:44s} {_figure(row)}", soft_wrap=True, highlight=False)
    console.print(f"Rows are in {path}; `tunebench report` shows them.", soft_wrap=True)
    if "failed" in statuses:
        raise typer.Exit(1)


def _figure(row: Result) -> str:
    from tunebench.results import tokens_per_s
    from tunebench.stats import median, spread

    rates = tokens_per_s(row)
    if not rates:
        return f"{row.status}: {row.reason}"
    around = f" ± {spread(rates):.2f}" if len(rates) > 1 else ""
    return f"{median(rates):10.2f}{around} tokens/s"
