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
    from tunebench.tuning.session import Lowered


def export_command(
    folder: Annotated[Path, typer.Argument(help="Where to: plan.json, shaders/ and model.safetensors.")],
    model: Annotated[str, typer.Option("--model", "-m", help="A model of `list models`, or a path to a config.")],
    scheme: Annotated[str, typer.Option("--scheme", "-q", help="Quantization scheme.")] = "q4f16_1",
    target: Annotated[str, typer.Option(help="webgpu, opencl, or another target whose kernels are source.")] = "webgpu",
    browser: Annotated[bool, typer.Option("--browser", help="For the adapter of this machine's browser.")] = False,
    schedule: Annotated[str, typer.Option(help="default or tuned.")] = "default",
    form: Annotated[str, typer.Option("--format", help="plan: kernels, buffers and launches as data.")] = "plan",
    prompt: Annotated[str, typer.Option("--prompt", "--chunks", help="Lengths that prompts are cut into.")] = "128",
    batch: Annotated[int, typer.Option(min=1, max=1024, help="Sequences at a time.")] = 1,
    context: Annotated[int, typer.Option(min=16, max=1 << 20, help="Positions of the KV cache.")] = 2048,
    weights: Annotated[Path | None, typer.Option(help="Folder of Hugging Face safetensors; random without.")] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31 - 2, help="Of random weights.")] = 0,
    work_dir: Annotated[Path, typer.Option(help="Where databases are.")] = Path("tunebench-work"),
) -> None:
    """Write a model as a folder that runs without TVM, e.g. in a web browser."""
    from tunebench import registry
    from tunebench.cli import options
    from tunebench.devices import opening, targets
    from tunebench.engines.browser import export as browser_export
    from tunebench.model import quantization
    from tunebench.model import workload as workloads
    from tunebench.model.weights import read
    from tunebench.spec import EngineName, Workload
    from tunebench.tuning.session import Session, lower

    for value, known, kind in ((form, ("plan",), "format"), (schedule, ("default", "tuned"), "schedule")):
        if value not in known:
            raise registry.unknown(value, known, kind)
    if browser and schedule == "tuned":
        raise TuneBenchError("kernels are not tuned in a browser.", "Leave out --browser: a target's records are used.")
    chosen = registry.pick(quantization.schemes(), scheme, "scheme")
    sizes = tuple(sorted({options.SMALLEST_CHUNK, *options.numbers(prompt, "--prompt")}))
    preset = targets.find("webgpu" if browser else target)
    session = Session(opening.open_device(preset, engine=EngineName.BROWSER if browser else None), work_dir, work_dir)
    with inputs.status(f"compiling {model} {scheme}"):
        lowered = lower(session, Workload(model, chosen, batch, sizes, context))
        records = _records(lowered) if schedule == "tuned" else {}
        plan = session.device.compile(lowered.mod, lowered.model, records, work_dir).plan
    if plan is None:
        raise TuneBenchError(f"target {target} makes no plan.", "Choose webgpu or opencl.")
    arrays = read(lowered.model, weights) if weights else workloads.random_weights(lowered.model, seed)
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


def _records(lowered: Lowered) -> dict[str, object]:
    """The promoted ones; TuneBenchError where no kernel of the model has one."""
    inputs.say_packed(lowered.session)
    database = lowered.session.database()
    records = database.promoted()
    if not any(task.key in records for task in lowered.tasks):
        raise TuneBenchError(
            f"nothing tuned for {lowered.model.workload.model} in {database.folder}.",
            "Run `tunebench tune` first, or leave out --schedule.",
        )
    return dict(records)
