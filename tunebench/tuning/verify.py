"""Whether a database is what it says: its lines, its kernels' hashes, its schedules, and what they compute."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import tvm
from tvm.s_tir import meta_schedule as ms

from tunebench.compile import passes
from tunebench.compile.tasks import over_cache, replay, task_key
from tunebench.devices import opening, targets
from tunebench.devices.base import Device
from tunebench.errors import TuneBenchError, brief
from tunebench.runners.base import REFERENCE_ONLY, Candidate, Failed, MeasureInput, Runner
from tunebench.tuning import records, vetting
from tunebench.tuning.content import Content, Kernel
from tunebench.tuning.database import provenance
from tunebench.tuning.entry import Entry
from tunebench.tuning.files import glance

Say = Callable[[str, float | None], None]  # what is done now, and seconds until the end where they can be told


@dataclass(frozen=True)
class Problem:
    """What is wrong, of which kernel; of none where it is a line that could not be read."""

    kernel: str
    reason: str

    def __str__(self) -> str:
        return f"{self.kernel}: {self.reason}" if self.kernel else self.reason


def check_lines(content: Content) -> tuple[dict[str, ms.database.TuningRecord], list[Problem]]:
    """Every record that is read and applies, by key, and what is wrong.

    Lines are first parsed and applied in another process, which they may crash.
    """
    loaded: dict[str, ms.database.TuningRecord] = {}
    for part in content.parts:
        if part.records:
            vetting.check(part)
        for record in records.load(part).values():
            loaded[task_key(record.workload.mod)] = record
    found = [Problem("", reason) for reason in content.problems]
    found += [problem for kernel in content.kernels.values() for problem in _mismatches(kernel, loaded)]
    return {key: record for key, record in loaded.items() if key in content.lines}, found


def _mismatches(kernel: Kernel, loaded: Mapping[str, object]) -> Iterator[Problem]:
    name = kernel.name
    if kernel.line and kernel.key not in loaded:
        yield Problem(name, "its record does not apply, or its kernel is another than its hash says")
    if kernel.line and kernel.decision != "promoted":
        yield Problem(name, f"it has a record, and the decision {kernel.decision or 'none'!r}")
    if kernel.decision == "promoted" and not kernel.line:
        yield Problem(name, "it is said to be promoted, and has no record")
    if kernel.decision == "promoted" and not (kernel.entry.default_ns and kernel.entry.tuned_ns):
        yield Problem(name, "it is said to be promoted, and nothing was measured")


def open_device(content: Content) -> Device:
    """The device that a database was made for; a TuneBenchError says what is here instead."""
    made, name = content.made, glance(content.folder).target_name
    presets = targets.presets()
    kind = [each for each in presets.values() if each.kind == made.target.partition(" ")[0] and not each.blocked]
    said = f"no target of TuneBench's is {made.target}"
    for preset in [presets[name]] if name in presets else kind:
        try:
            device = opening.open_device(preset, made.threads)
        except TuneBenchError as error:
            said = error.message
            continue
        said = device.absent or made.differences(provenance(device.target, device.name, device.threads))
        if not said:
            return device
    raise TuneBenchError(f"{made.device} is not here: {said}", "Its outputs are checked where the device is.")


def check_outputs(
    kernels: list[Kernel], loaded: Mapping[str, ms.database.TuningRecord], device: Device, say: Say
) -> list[Problem]:
    """Kernels that do not build, run or compute what they are to in float64, each under its record on the device."""
    runner, begun_s, found = device.runner(), time.monotonic(), []
    try:
        for done, kernel in enumerate(kernels):
            left_s = (time.monotonic() - begun_s) / done * (len(kernels) - done) if done else None
            say(f"{done + 1} of {len(kernels)}: {kernel.name}", left_s)
            outcome = _outcome(kernel, loaded[kernel.key], device, runner)
            found += [Problem(kernel.name, outcome)] if outcome else []
    finally:
        runner.close()
    return found


def _outcome(kernel: Kernel, record: ms.database.TuningRecord, device: Device, runner: Runner) -> str:
    """Why a record is no good on the device, or an empty string."""
    mod = record.workload.mod
    try:
        default = str(tvm.ir.save_json(passes.default_schedule(mod, device.target)))
        candidate = Candidate("promoted", replay(mod, record))
    except Exception as error:  # whatever TVM raises
        return f"its schedule does not apply: {brief(error)}"
    given = MeasureInput(kernel.key, default, depth(kernel.entry, mod), 0, exact=str(tvm.ir.save_json(mod)))
    found = runner.compare(given, [candidate], REFERENCE_ONLY, with_default=False)[candidate.name]
    return found.reason if isinstance(found, Failed) else ""


def depth(entry: Entry, mod: tvm.IRModule) -> int:
    """Where in the cache a kernel is measured, as its entry says, if the cache is so long."""
    operation = over_cache(mod)
    return min(entry.depth, operation.context - operation.m) if operation else entry.depth
