"""Peak memory of each arm: a short run in a process of its own, before anything is measured.

The process loads the arm as the bench does and runs one prompt chunk and one token. What TVM compiled here reaches it
as a shared library, which this process then runs, too, so that its code is generated once. Where there is no linker,
the process compiles the arm again, and begins to count when that is done.
"""

from __future__ import annotations

import gc
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from subprocess import DEVNULL

import psutil
import tvm
from tvm import relax
from tvm.s_tir import meta_schedule as ms
from tvm.support import cc

from tunebench.bench.arms import Arm, Plan, Say, load_own, load_peer, run_test
from tunebench.compile import passes
from tunebench.compile.build import Compiled, Records
from tunebench.devices import targets
from tunebench.devices.base import Device
from tunebench.devices.opening import open_device
from tunebench.engines.baselines import peers
from tunebench.environment import PeakRss
from tunebench.errors import brief
from tunebench.kernels import int8_dot
from tunebench.model import workload as workloads
from tunebench.model.workload import Model
from tunebench.runners.worker import Worker
from tunebench.spec import Count, EngineName, Test, Workload
from tunebench.tuning import records as lines

START_S = 180.0  # to import TVM and to load the model, beyond a sample


@dataclass(frozen=True)
class Job:
    """An arm, as the process that loads it gets it."""

    target: str
    engine: str
    threads: int
    workload: Workload
    folder: Path  # for what a peer writes while it loads
    plan: Plan
    test: Test
    chunk_ns: Mapping[int, float]
    compiled: Compiled | None  # without its executable; None for a peer
    library: Path | None = None
    records: tuple[tuple[str, str, bytes], ...] = ()  # where there is none: task key, workload and record as JSON


def peaks(arms: Mapping[str, Arm], plan: Plan, say: Say) -> tuple[dict[str, Arm], dict[str, Count]]:
    """The arms, and of each one that can run the most memory it took, by name."""
    found, taken = dict(arms), {}
    for name, arm in arms.items():
        if not arm.reason:
            say(f"peak memory of {name}")
            with tempfile.TemporaryDirectory(prefix="tunebench-", ignore_cleanup_errors=True) as folder:
                found[name], job = _sent(arm, plan, Path(folder))
                taken[name] = _ask(job)
    return found, taken


def _sent(arm: Arm, plan: Plan, folder: Path) -> tuple[Arm, Job]:
    """The arm, whose library may have been made, and what its process is told."""
    session, workload, compiled = arm.lowered.session, arm.lowered.model.workload, arm.compiled
    prompts = [min(test.n_prompt, max(workload.chunks)) for test in plan.tests]
    test = Test(n_prompt=max(prompts, default=0), n_gen=1)
    target = session.device.target_name
    job = Job(target, arm.engine, session.threads, workload, session.work_dir, plan, test, arm.chunk_ns, compiled)
    if compiled is None or compiled.executable is None:
        return arm, job
    job = replace(job, compiled=replace(compiled, executable=None))
    library = _exported(compiled.executable, folder / "model.so")
    if library is None:
        records = arm.found.records if arm.found and arm.schedule == "tuned" else {}
        return arm, replace(job, records=tuple((key, *_written(record)) for key, record in records.items()))
    job = replace(job, library=library)
    if session.device.kind == "gpu":  # its kernels are built already, and what runs on the host is small
        return arm, job
    return replace(arm, compiled=replace(compiled, executable=tvm.runtime.load_module(str(library)))), job


def _exported(executable: relax.VMExecutable, path: Path) -> Path | None:
    """The library that was written; None where there is no linker, or one that does not work."""
    if cc.get_cc() is None:
        return None
    try:
        executable.export_library(str(path))
    except RuntimeError:  # what the linker says
        return None
    return path


def _written(record: ms.database.TuningRecord) -> tuple[str, bytes]:
    return str(tvm.ir.save_json(record.workload.mod)), lines.record_line(record, 0)


def _read(records: tuple[tuple[str, str, bytes], ...]) -> Records:
    found = {}
    int8_dot.register()
    for key, mod, line in records:
        workload = ms.database.Workload(tvm.ir.load_json(mod))
        found[key] = lines.parse_record(line, workload)
    return found


def _ask(job: Job) -> Count:
    """What a process of its own says; without bytes, and with the reason, where it does not get that far."""
    worker = Worker(stdout=DEVNULL, stderr=DEVNULL)
    try:
        worker.send(peak, (job,), timeout=START_S + job.plan.sample_limit_s)
        return worker.recv()  # type: ignore[no-any-return]
    except TimeoutError:
        return Count(None, "a short run in a process of its own did not end in time")
    except Exception as error:  # whatever ended it
        return Count(None, f"a short run in a process of its own failed: {brief(error)}")
    finally:
        worker.kill()


# -- in the process of its own ----------------------------------------------------------------------------


def peak(job: Job) -> Count:
    """Load an arm, run a chunk and a token, and say what this process, or it on its device, took at most."""
    engine = EngineName.BROWSER if job.engine == EngineName.BROWSER else None
    device = open_device(targets.find(job.target), job.threads, engine)
    model = workloads.load_model(replace(job.workload, device_kind=device.kind))
    compiled = _compiled(job, device, model)
    gc.collect()
    counter = device.memory() or Resident()
    if compiled:
        loaded = load_own(device, model, {"it": compiled}, {"it": job.chunk_ns}, job.plan)["it"]
    else:
        loaded = load_peer(peers()[job.engine], model, job.threads, job.folder, job.plan)
    run_test(loaded, model, job.test, job.plan.seed)
    return counter.taken()


def _compiled(job: Job, device: Device, model: Model) -> Compiled | None:
    if job.compiled is None or job.compiled.plan:
        return job.compiled
    if job.library:
        return replace(job.compiled, executable=tvm.runtime.load_module(str(job.library)))
    mod = passes.prefix(workloads.build_module(model), device.target)
    return device.compile(mod, model, _read(job.records), job.folder)


class Resident:
    """Main memory that this process and its children take from now on."""

    def __init__(self) -> None:
        self._own = psutil.Process().memory_info().rss
        self._peak = PeakRss()

    def taken(self) -> Count:
        """The peak, with what was there before named."""
        most = self._peak.read()
        others = sum(child.memory_info().rss for child in psutil.Process().children(recursive=True))
        total = None if most.bytes is None else most.bytes + others
        words = f"{most.counter} of a process of its own, of which {self._own >> 20} MiB are Python and TVM themselves"
        return Count(total, words + (f"; its children hold {others >> 20} MiB" if others else ""))
