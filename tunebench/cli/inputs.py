"""What a command line asks for, opened: sessions on targets, workloads, folders. TVM is imported when it is needed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.text import Text

from tunebench import durable
from tunebench.cli import options
from tunebench.errors import NOT_TEXT, TuneBenchError

if TYPE_CHECKING:
    from rich.status import Status

    from tunebench.spec import Scheme, Workload
    from tunebench.tuning.session import Session


class PlainConsole(Console):
    """A console that prints what a terminal would obey in a name or a reason as nothing, and brackets as they are."""

    def __init__(self, stderr: bool = False) -> None:
        super().__init__(markup=False, stderr=stderr)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Rich's own, whose colours are no part of the text yet."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else segment._replace(text=NOT_TEXT.sub("", segment.text))


console = PlainConsole()


def check_engines(names: list[str]) -> None:
    """Raise a TuneBenchError for an engine that there is not, or whose packages are missing."""
    from tunebench import registry
    from tunebench.engines import baselines
    from tunebench.engines.base import OWN

    known = baselines.peers()
    for name in names:
        if name not in (*OWN, *known):
            raise registry.unknown(name, (*OWN, *known), "engine")
        if name in known:
            baselines.check_installed(known[name])


def open_session(
    target: str,
    threads: int,
    work_dir: Path,
    name: str,
    rpc: tuple[str, str, str, str] = ("", "", "", ""),
    run_name: str = "",
) -> Session:
    """A run on a target; `rpc` is the runner, the tracker, the key and the linker."""
    from tunebench.devices import opening, targets
    from tunebench.tuning.session import Session

    device = opening.choose_device(targets.find(target), threads, *rpc, warn)
    return Session(device, work_dir, work_dir / "reports" / name / "results.jsonl", run_name)


def open_sessions(
    names: list[str], engines: list[str], threads: int, work_dir: Path, name: str, run_name: str
) -> list[Session]:
    """A session for each target, and one more for a target that is to run in a browser."""
    from tunebench.devices import opening, targets
    from tunebench.spec import EngineName
    from tunebench.tuning.session import Session

    found = []
    for each in dict.fromkeys(names):
        if any(engine != EngineName.BROWSER for engine in engines):
            found.append(open_session(each, threads, work_dir, name, run_name=run_name))
        preset = targets.find(each)
        if EngineName.BROWSER in engines and preset.api == "webgpu":
            path = work_dir / "reports" / name / "results.jsonl"
            found.append(Session(opening.open_device(preset, engine=EngineName.BROWSER), work_dir, path, run_name))
    if not found:
        raise TuneBenchError("engine browser runs target webgpu.", "Add --target webgpu.")
    return found


def probed(target: str, threads: int) -> list[tuple[str, str]]:
    """What the device of a target does at most, measured now, and its state right after; TuneBenchError without one."""
    from tunebench.devices import opening, probe, targets

    device = opening.open_device(targets.find(target), threads)
    if device.absent:
        raise TuneBenchError(f"{target}: {device.absent}.", device.hint)
    rows = [("probed", f"{device.name}, {device.threads} threads" if device.threads else device.name)]
    rates, state = device.probe()(), device.conditions().state()
    for rate, per_s in sorted(rates.items()):
        words, size, unit = probe.WORDS[rate]
        rows.append((words, f"{per_s / size:,.1f} {unit}"))
    return [*rows, *(probe.state_words(name, value) for name, value in state.items())]


def warn(words: str) -> None:
    """Print a warning."""
    console.print(Text("warning: ", "yellow").append(words, "default"), soft_wrap=True)


def status(words: str) -> Status:
    """What is being done, while it goes on; for a `with`."""
    return console.status(Text(words))


def say_packed(session: Session) -> None:
    """Say it where a session's tuned kernels are those that TuneBench comes with, and what of a database is no good."""
    database = session.database()
    database.promoted()
    for warning in database.warnings:
        warn(warning)
    if database.source != database.folder:
        console.print(f"Tuned kernels: those that come with TuneBench, in {database.source}", soft_wrap=True)


def say_others(session: Session) -> None:
    """Name the databases of this target that are for other devices, where there is none for this one."""
    from tunebench import installation
    from tunebench.tuning import here

    database, device = session.database(), session.device
    if database.entries or database.promoted():
        return
    found = here.others(session.work_dir, installation.tuning_logs(), database.folder.name, device.target_name)
    if found:
        named = ", ".join(map(str, found))
        console.print(
            f"There is no database for {device.name}. Those of another device are not used in a bench: {named}. "
            "`tunebench tune` makes one.",
            soft_wrap=True,
        )


def make_folder(folder: Path) -> None:
    """Make a folder for results; TuneBenchError where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise durable.refusal(folder, error) from None


def workloads(
    models: list[str], names: list[str], batch: int, chunks: str, context: int, layers: int = 0, kv: str = ""
) -> list[Workload]:
    """Every model in every scheme named. Without `chunks` each workload has none yet: its target decides."""
    from tunebench.spec import Workload

    sizes = options.chunk_sizes(chunks)
    each = [(model, scheme) for model in dict.fromkeys(models) for scheme in schemes(model, names)]
    return [Workload(model, scheme, batch, sizes, context, layers=layers, kv=kv) for model, scheme in each]


def schemes(model: str, names: list[str]) -> list[Scheme]:
    """The schemes of a model; without names, that of its weights where they are quantized.

    A warning says where quantized weights are rounded a second time.
    """
    from tunebench import registry
    from tunebench.model import native, quantization, sources

    source, checkpoint = sources.find(model), None
    as_stored = not names or any(map(native.is_native, names))
    with contextlib.nullcontext() if as_stored else contextlib.suppress(TuneBenchError):  # random weights may be meant
        checkpoint = source.open()
    quantized = checkpoint is not None and bool(checkpoint.scheme)
    found = []
    for name in dict.fromkeys(names or ["native" if quantized else "q4f16_1"]):
        if native.is_native(name):
            found.append(native.scheme(name, checkpoint))
            continue
        found.append(registry.pick(quantization.schemes(), name, "scheme"))
        if checkpoint and quantized and found[-1].weight.kind != "float":
            warn(f"the weights of {model} are in {checkpoint.scheme}: {name} rounds them again. -q native keeps them.")
    return found
