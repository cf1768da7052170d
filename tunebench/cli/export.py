"""The commands that hand a model on as a plan: `export` writes one, `browse` shows it in a web browser."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunebench import stopping
from tunebench.cli import inputs
from tunebench.cli.inputs import console
from tunebench.errors import TuneBenchError

if TYPE_CHECKING:
    from tunebench.spec import Schedule
    from tunebench.tuning.lookup import Found
    from tunebench.tuning.session import Lowered


def export_command(
    folder: Annotated[Path, typer.Argument(help="Where to: plan.json, shaders/ and model.safetensors.")],
    model: Annotated[str, typer.Option("--model", "-m", help="As for tune.")],
    scheme: Annotated[str, typer.Option("--scheme", "-q", help="As for tune.")] = "",
    target: Annotated[str, typer.Option(help="webgpu, opencl, or another target whose kernels are source.")] = "webgpu",
    browser: Annotated[bool, typer.Option("--browser", help="For the adapter of this machine's browser.")] = False,
    schedule: Annotated[str, typer.Option(help="default or tuned.")] = "default",
    form: Annotated[str, typer.Option("--format", help="plan: kernels, buffers and launches as data.")] = "plan",
    prompt: Annotated[
        str, typer.Option("--prompt", "--chunks", help="Lengths that prompts are cut into; the database's without.")
    ] = "",
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Sequences at a time.")] = 1,
    context: Annotated[int, typer.Option(min=16, max=1 << 20, help="Positions of the KV cache.")] = 2048,
    weights: Annotated[str, typer.Option(help="As for bench.")] = "",
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 2, help="Of random weights.")] = 0,
    work_dir: Annotated[Path, typer.Option(help="Where databases are.")] = Path("tunebench-work"),
) -> None:
    """Write a model as a folder that runs without TVM, e.g. in a web browser."""
    from msgspec.structs import replace

    from tunebench import registry
    from tunebench.cli import options
    from tunebench.devices import opening, targets
    from tunebench.engines.browser import export as browser_export
    from tunebench.model import workload as workloads
    from tunebench.model.weights import load
    from tunebench.spec import EngineName, Workload
    from tunebench.tuning.lookup import with_chunks
    from tunebench.tuning.session import Session, lower

    if form != "plan":
        raise registry.unknown(form, ("plan",), "format")
    (under,) = options.schedules([schedule])
    if browser and under == "tuned":
        raise TuneBenchError("kernels are not tuned in a browser.", "Leave out --browser: a target's records are used.")
    (chosen,) = inputs.schemes(model, [scheme] if scheme else [])
    preset = targets.find("webgpu" if browser else target)
    session = Session(opening.open_device(preset, engine=EngineName.BROWSER if browser else None), work_dir, work_dir)
    with inputs.status(f"compiling {model} {chosen.name}"):
        workload = Workload(model, chosen, batch, options.chunk_sizes(prompt), context)
        lowered = lower(session, with_chunks(session, workload, held=under == "tuned"))
        found = _found(lowered, under)
        records = found.records if under == "tuned" else {}
        plan = session.device.compile(lowered.mod, lowered.model, records, work_dir).plan
    if plan is None:
        raise TuneBenchError(f"target {target} makes no plan.", "Choose webgpu or opencl.")
    plan = replace(plan, facts=replace(plan.facts, chunk_ns=found.chunk_ns(lowered.tasks, under)))
    arrays = load(lowered.model, weights, seed)
    with stopping.keeping(f"{folder} is not complete: run the same command again."), inputs.status(f"writing {folder}"):
        browser_export.export_plan(plan, workloads.with_rope(lowered.model, arrays), folder)
    console.print(f"Written: {folder}. `tunebench browse {folder}` runs it in a web browser.", soft_wrap=True)


def browse_command(
    folder: Annotated[Path, typer.Argument(help="What `tunebench export` wrote.")],
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 0,
    show: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in this machine's browser.")] = True,
) -> None:
    """Serve an exported model to a web browser of this machine, which runs and times it on WebGPU."""
    import webbrowser

    from tunebench.engines.browser import export as browser_export
    from tunebench.engines.browser.server import PageServer

    browser_export.check(folder)
    server = PageServer(folder, port)
    console.print(f"{folder} is at {server.url} until Ctrl-C.", soft_wrap=True)
    if show:
        webbrowser.open(server.url)
    server.serve()


def _found(lowered: Lowered, schedule: Schedule) -> Found:
    """What the database holds; TuneBenchError where the schedule is `tuned` and no kernel of the model has a record."""
    from tunebench.tuning.lookup import look_up

    database = lowered.session.database()
    found = look_up(lowered.tasks, database)
    if schedule == "tuned":
        inputs.say_packed(lowered.session)
        if not found.records:
            raise TuneBenchError(
                f"nothing tuned for {lowered.model.name} in {database.folder}.",
                "Run `tunebench tune` first, or leave out --schedule.",
            )
    return found
