"""What a command line asks for, opened: sessions on targets, workloads, folders. TVM is imported when it is needed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console
from rich.text import Text

from tunebench.cli import options
from tunebench.errors import TuneBenchError

if TYPE_CHECKING:
    from rich.status import Status

    from tunebench.spec import Workload
    from tunebench.tuning.session import Session

console = Console(markup=False)  # what is printed may hold brackets


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


def warn(words: str) -> None:
    """Print a warning."""
    console.print(Text("warning: ", "yellow").append(words, "default"), soft_wrap=True)


def status(words: str) -> Status:
    """What is being done, while it goes on; for a `with`."""
    return console.status(Text(words))


def say_packed(session: Session) -> None:
    """Say it where a session's tuned kernels are those that TuneBench comes with."""
    database = session.database()
    if database.source != database.folder:
        console.print(f"Tuned kernels: those that come with TuneBench, in {database.source}", soft_wrap=True)


def make_folder(folder: Path) -> None:
    """Make a folder for results; TuneBenchError where it cannot be written to."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise TuneBenchError(
            f"cannot write to {folder} ({error.strerror}).", "Name a folder with --work-dir."
        ) from None


def workloads(models: list[str], schemes: list[str], batch: int, chunks: str, context: int) -> list[Workload]:
    """Every model in every scheme. Without `chunks` each workload has none yet: its target decides."""
    from tunebench import registry
    from tunebench.model import quantization
    from tunebench.spec import Workload

    known = quantization.schemes()
    chosen = [registry.pick(known, scheme, "scheme") for scheme in dict.fromkeys(schemes)]
    sizes = options.chunk_sizes(chunks)
    each = [(model, scheme) for model in dict.fromkeys(models) for scheme in chosen]
    return [Workload(model, scheme, batch, sizes, context) for model, scheme in each]
