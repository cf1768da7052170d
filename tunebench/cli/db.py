"""`tunebench db`: what tuning databases hold, whether it is right, and how to put them together or pass them on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table
from rich.text import Text

from tunebench import installation, stopping
from tunebench.cli import inputs
from tunebench.cli.inputs import console
from tunebench.errors import TuneBenchError

if TYPE_CHECKING:
    from rich.status import Status

    from tunebench.tuning.content import Kernel
    from tunebench.tuning.entry import Provenance
    from tunebench.tuning.files import Glance
    from tunebench.tuning.merge import Measure
    from tunebench.tuning.prune import Prunable

db = typer.Typer(
    help="Tuning databases: list, show, verify, merge, prune, compare, pass on.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

NAMED = 12  # kernels whose schedules are shown in full at a time
WorkDir = Annotated[Path, typer.Option(help="Where databases are, in its folder tuning_logs.")]
Folder = Annotated[str, typer.Argument(help="A database: its folder, or its name in `db ls`.")]
HERE = Path("tunebench-work")


@db.command(name="ls", epilog="Example: tunebench db ls --work-dir tunebench-work")
def ls_command(work_dir: WorkDir = HERE) -> None:
    """List the databases of a work folder and those that come with TuneBench, and which this machine uses."""
    from tunebench.tuning import files

    own = {path.name for path in files.databases(work_dir / "tuning_logs")}
    for root, packed in ((work_dir / "tuning_logs", False), (installation.tuning_logs(), True)):
        found = [files.glance(folder) for folder in files.databases(root)]
        whose = " (these come with TuneBench)" if packed else ""
        console.print(f"{root}{whose}: {len(found)} databases", soft_wrap=True)
        if found:
            console.print(_listed(found, own if packed else set()))
        for each in found:
            for warning in each.warnings:
                inputs.warn(warning)


def _listed(found: Iterable[Glance], replaced: set[str]) -> Table:
    from tunebench.tuning import here

    table = _table(
        "database", "for", "TVM", "promoted", "decided", "weights", "chunks", "changed", "warnings", "used by"
    )
    for each in found:
        made = each.made
        decided = sum(count for decision, count in each.decisions.items() if decision)
        table.add_row(
            each.folder.name,
            _made_for(made) if made else "unknown",
            made.tvm if made else "",
            str(each.records),
            f"{decided} of {len(each.entries)}",
            ", ".join(each.weights) or "-",
            ", ".join(map(str, each.chunks)) or "-",
            f"{each.changed:%Y-%m-%d %H:%M}",
            str(len(each.warnings)),
            here.used_by(each, each.folder.name in replaced),
        )
    return table


@db.command(name="show", epilog="Example: tunebench db show llvm-amd-epyc-znver5-2t matmul")
def show_command(
    folder: Folder,
    kernel: Annotated[str, typer.Argument(help="Part of a kernel's name, or how its key begins: its schedule.")] = "",
    work_dir: WorkDir = HERE,
) -> None:
    """Show a database's kernels: decision, times, speed-up and its interval, source, reason; or one's schedule."""
    from tunebench.tuning import content

    found = content.read(_folder(folder, work_dir))
    made = found.made
    console.print(f"{found.folder}: {_made_for(made)}, TVM {made.tvm}", soft_wrap=True)
    kernels = found.pick(kernel)
    table = _table("kernel", "decision", "default us", "tuned us", "speed-up", "source", "space", "reason")
    for each in kernels:
        table.add_row(each.name, each.decision or "-", *_times(each), _source(each), each.space(), each.entry.reason)
    console.print(table)
    for each in kernels[:NAMED] if kernel else []:
        _print_schedule(each)
    if kernel and len(kernels) > NAMED:
        console.print(f"{len(kernels) - NAMED} more schedules: name fewer kernels.")
    _warn(found.problems)
    counts = Counter(each.decision or "undecided" for each in kernels)
    console.print(", ".join(f"{count} {decision}" for decision, count in counts.most_common()))


def _made_for(made: Provenance) -> str:
    threads = f", {made.threads} threads" if made.threads else ""
    return f"{made.target}, {made.device}{threads}"


def _times(kernel: Kernel | None) -> tuple[str, str, str]:
    """Times in microseconds and the speed-up, as words."""
    from tunebench import stats
    from tunebench.report import words

    if kernel is None:
        return "", "", ""
    default, tuned = (stats.median(samples) / 1e3 for samples in (kernel.entry.default_ns, kernel.entry.tuned_ns))
    interval = kernel.interval
    speedup = words.ratio(interval.ratio, *((interval.low, interval.high) if interval.known else ()))
    default_us, tuned_us = (f"{time:.2f}" if words.known(time) else words.MISSING for time in (default, tuned))
    return default_us, tuned_us, speedup


def _source(kernel: Kernel) -> str:
    return f"{kernel.source} ({kernel.template})" if kernel.template else kernel.source


def _print_schedule(kernel: Kernel) -> None:
    """The template with its decisions, and the trace, a line an instruction."""
    console.print(Text(f"\n{kernel.name}, key {kernel.key}", "bold"), soft_wrap=True)
    if not kernel.line:
        console.print("no record: it runs by default")
    if kernel.template:
        chosen = ", ".join(f"{name} {value}" for name, value in kernel.template_decisions.items())
        console.print(f"template {kernel.template}: {chosen or 'nothing to decide'}", soft_wrap=True)
    for line in kernel.trace_lines():
        console.print(f"  {line}", soft_wrap=True, highlight=False)


@db.command(name="verify", epilog="Example: tunebench db verify cuda-nvidia-h200 --kernels matmul")
def verify_command(
    folder: Folder,
    kernels: Annotated[str, typer.Option(help="How many, the slowest first, or part of their name; all without.")] = "",
    work_dir: WorkDir = HERE,
) -> None:
    """Read all of a database, replay every record, and check outputs against float64 where its device is.

    Exit code 1 if anything is wrong.
    """
    from tunebench.tuning import content, verify

    found = content.read(_folder(folder, work_dir))
    chosen = found.pick("" if kernels.isdigit() else kernels)
    with inputs.status(f"reading {found.folder}"):
        loaded, problems = verify.check_lines(found)
    console.print(f"{found.folder}: {len(loaded)} of {len(found.lines)} records read and applied", soft_wrap=True)
    held = [each for each in chosen if each.key in loaded][: int(kernels) if kernels.isdigit() else None]
    try:
        device = verify.open_device(found)
    except TuneBenchError as error:
        console.print(f"Outputs were not checked: {error}", soft_wrap=True)
    else:
        with inputs.status("checking") as status:
            problems += verify.check_outputs(held, loaded, device, lambda *said: _say(status, *said))
        console.print(f"outputs of {len(held)} kernels checked against float64 on {device.name}", soft_wrap=True)
    for problem in problems:
        console.print(Text("wrong: ", "red").append(str(problem), "default"), soft_wrap=True)
    console.print(f"{len(problems)} wrong" if problems else "Nothing is wrong.")
    if problems:
        raise typer.Exit(1)


def _say(status: Status, what: str, left_s: float | None) -> None:
    from tunebench.report import words

    line = what + (f", about {words.seconds(left_s)} left" if left_s else "")
    status.update(Text(line))
    if not console.is_terminal:
        console.print(line, soft_wrap=True)


@db.command(name="merge", epilog="Example: tunebench db merge work-a/tuning_logs/X work-b/tuning_logs/X --into X")
def merge_command(
    folders: Annotated[list[str], typer.Argument(help="Databases of the same device, threads and TVM.")],
    into: Annotated[Path, typer.Option(help="The folder that gets all, beside what it has.")],
    measure: Annotated[
        bool, typer.Option("--measure", help="Measure records in conflict again, on their device.")
    ] = False,
    wait: Annotated[bool, typer.Option("--wait", help="Wait where another run writes the same database.")] = False,
    work_dir: WorkDir = HERE,
) -> None:
    """Make databases of the same device one; of two records of a kernel the one shown to gain more is kept.

    Trials of their searches stay where they are.
    """
    from tunebench.tuning import merge

    paths = [_folder(folder, work_dir) for folder in folders]
    with stopping.keeping(f"{into} is as it was."), inputs.status(f"merging into {into}"):
        again, close = _measuring(paths[0]) if measure else (None, lambda: None)
        try:
            choices, warnings = merge.merge(paths, into, again, inputs.warn if wait else None)
        finally:
            close()
    table = _table("from", "kernels", "because")
    for (folder, why), count in merge.counts(choices).items():
        table.add_row(str(folder), str(count), why)
    console.print(table)
    _warn(warnings)
    console.print(f"Written: {into}, {len(choices)} kernels", soft_wrap=True)


def _measuring(folder: Path) -> tuple[Measure, Callable[[], None]]:
    """What measures a kernel's records again, and what ends it."""
    import functools

    from tunebench.tuning import content, merge, verify

    device = verify.open_device(content.read(folder))
    runner = device.runner()
    return functools.partial(merge.measure_again, device, runner), runner.close


@db.command(name="prune", epilog="Example: tunebench db prune llvm-my-cpu-8t --keep 8 --dry-run")
def prune_command(
    folder: Folder,
    keep: Annotated[
        int, typer.Option(min=1, max=1_000_000, help="Of each kernel's trials the best so many stay.")
    ] = 32,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and leave it.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
    work_dir: WorkDir = HERE,
) -> None:
    """Drop failed and slower trials, old versions, lines that were no good; never a promoted record.

    A later search may try again what failed before.
    """
    from tunebench.report import words
    from tunebench.tuning import prune

    path = _folder(folder, work_dir)
    if path.resolve().parent == installation.tuning_logs().resolve():
        raise TuneBenchError(f"{path} comes with TuneBench, and is only read.", "Name one of a work folder.")
    found = prune.find(path, keep)
    _print_prunable(found)
    if not (found.paths or found.dropped or found.entries):
        console.print(f"{path} has nothing to drop.", soft_wrap=True)
        return
    if dry_run:
        console.print(f"{words.size(found.freed_bytes)} would be freed; nothing was dropped.")
        return
    if not (yes or (console.is_terminal and typer.confirm("Drop all that?"))):
        raise TuneBenchError("nothing was dropped.", "Write --yes to drop it, or --dry-run to look only.")
    console.print(f"{words.size(prune.apply(path, keep).freed_bytes)} freed in {path}", soft_wrap=True)


def _print_prunable(found: Prunable) -> None:
    for path in found.paths:
        console.print(f"{path}", soft_wrap=True)
    if found.dropped:
        console.print(f"{found.dropped} trials, {len(found.trials)} stay")
    if found.entries:
        console.print(f"{len(found.entries)} entries without times or a decision")


@db.command(name="diff", epilog="Example: tunebench db diff cuda-nvidia-h200 cuda-nvidia-h100-80gb-hbm3")
def diff_command(
    a: Annotated[str, typer.Argument(help="A database: its folder, or its name in `db ls`.")],
    b: Annotated[str, typer.Argument(help="Another, which may be another device's.")],
    work_dir: WorkDir = HERE,
) -> None:
    """Compare two databases kernel by kernel: who has it, the same record or another, times and speed-ups."""
    from tunebench.tuning import content, diff

    both = [content.read(_folder(name, work_dir)) for name in (a, b)]
    for letter, each in zip("AB", both, strict=True):
        console.print(f"{letter}: {each.folder} ({each.made.target}, {each.made.device})", soft_wrap=True)
    differences = both[0].made.differences(both[1].made).replace("(here", "(B:")
    if differences:
        console.print(f"Made for different ones, whose times do not compare: {differences}", soft_wrap=True)
    pairs = diff.pairs(*both)
    columns = [f"{what} {letter}" for letter in "AB" for what in ("default us", "tuned us", "speed-up")]
    table = _table("kernel", "", *columns)
    for pair in pairs:
        table.add_row(pair.name, pair.state, *_times(pair.a), *_times(pair.b))
    console.print(table)
    for each in both:
        _warn(each.problems)
    counts = Counter(pair.state for pair in pairs)
    console.print(", ".join(f"{count} {state}" for state, count in counts.most_common()) or "no kernels")


@db.command(name="export", epilog="Example: tunebench db export llvm-my-cpu-8t my-cpu.tbdb")
def export_command(
    folder: Folder,
    file: Annotated[Path, typer.Argument(help="The archive, e.g. my-cpu.tbdb; a zip file.")],
    work_dir: WorkDir = HERE,
) -> None:
    """Write a database's promoted records and decisions as one file with checksums."""
    from tunebench.tuning import archive

    manifest = archive.write(_folder(folder, work_dir), file)
    console.print(f"Written: {file}, {len(manifest.members)} parts of {manifest.folder}", soft_wrap=True)


@db.command(name="import", epilog="Example: tunebench db import my-cpu.tbdb --work-dir tunebench-work")
def import_command(
    file: Annotated[Path, typer.Argument(help="What `tunebench db export` wrote.")], work_dir: WorkDir = HERE
) -> None:
    """Add a database from one file; all of it is checked before anything is written, and none is replaced."""
    from tunebench.tuning import archive, files, here

    with inputs.status(f"checking {file}"):
        folder, found = archive.unpack(file, work_dir / "tuning_logs")
    console.print(f"Imported: {folder}, {len(found.lines)} records of {found.made.device}", soft_wrap=True)
    console.print(f"Used by {here.used_by(files.glance(folder))}", soft_wrap=True)


def _folder(name: str, work_dir: Path) -> Path:
    """A database's folder, by its path or by its name among those that are listed; TuneBenchError for none."""
    from tunebench.tuning import files

    for path in (Path(name), work_dir / "tuning_logs" / name, installation.tuning_logs() / name):
        if files.is_begun(path):
            return path
    raise TuneBenchError(f"there is no database in {name[:200]}.", "`tunebench db ls` shows where there are some.")


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        inputs.warn(warning)
