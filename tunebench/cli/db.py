"""`tunebench db`: what tuning databases hold, whether it is right, and how to put them together or pass them on."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from tunebench import installation, stopping
from tunebench.cli import db_tables, inputs
from tunebench.cli.inputs import console
from tunebench.errors import TuneBenchError

if TYPE_CHECKING:
    from rich.status import Status

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
            console.print(db_tables.databases(found, own if packed else set()))
        for each in found:
            for warning in each.warnings:
                inputs.warn(warning)


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
    console.print(f"{found.folder}: {db_tables.made_for(made)}, TVM {made.tvm}", soft_wrap=True)
    kernels = found.pick(kernel)
    console.print(db_tables.kernels(kernels))
    for each in kernels[:NAMED] if kernel else []:
        for line in db_tables.schedule(each):
            console.print(line, soft_wrap=True, highlight=False)
    if kernel and len(kernels) > NAMED:
        console.print(f"{len(kernels) - NAMED} more schedules: name fewer kernels.")
    _warn(found.problems)
    counts = Counter(each.decision or "undecided" for each in kernels)
    console.print(", ".join(f"{count} {decision}" for decision, count in counts.most_common()))


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
    most = int(kernels) if re.fullmatch("[0-9]{1,9}", kernels) else None
    chosen = found.pick(kernels if most is None else "")
    with inputs.status(f"reading {found.folder}"):
        loaded, problems = verify.check_lines(found)
    console.print(f"{found.folder}: {len(loaded)} of {len(found.lines)} records read and applied", soft_wrap=True)
    held = [each for each in chosen if each.key in loaded][:most]
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
    rows = ((str(folder), str(count), why) for (folder, why), count in merge.counts(choices).items())
    console.print(db_tables.table(("from", "kernels", "because"), rows))
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
    console.print(db_tables.side_by_side(pairs))
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


def _warn(warnings: Iterable[str]) -> None:
    for warning in warnings:
        inputs.warn(warning)
