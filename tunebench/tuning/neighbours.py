"""Where a search begins: winners of other devices and of other models, which are tried before anything is searched.

A record is a trace on one kernel; on another kernel of the same make, of other extents or for another device, it often
applies as well. What comes of it is checked and timed as any candidate is.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import tvm
from tvm import s_tir
from tvm.s_tir import meta_schedule as ms

from tunebench.compile import passes
from tunebench.compile.tasks import Task
from tunebench.errors import TuneBenchError
from tunebench.kernels import int8_dot
from tunebench.tuning.database import Database
from tunebench.tuning.entry import Provenance
from tunebench.tuning.files import read_provenance

MOST = 3  # records of other kernels that are tried on one
NONE = "none"  # what `--from` says to begin from nothing


@dataclass(frozen=True)
class Neighbour:
    """A database that was made elsewhere."""

    folder: Path
    made: Provenance

    def winners(self) -> dict[str, ms.database.TuningRecord]:
        """Its promoted records by task key."""
        return Database(self.folder, self.made).promoted()


def choose(asked: str, made: Provenance, target_name: str, roots: Iterable[Path], own: str) -> list[Neighbour]:
    """The database to begin from: the one in a folder that was asked for, or else the most like `made` in `roots`.

    None where `asked` is `none`, or where there is none but `own`, the name of the folder that is written.
    TuneBenchError where what was asked for is no database of this kind of target.
    """
    if asked == NONE:
        return []
    if asked:
        found = Neighbour(Path(asked), read_provenance(Path(asked)))
        if _kind(found.made) != _kind(made):
            raise TuneBenchError(
                f"the database in {asked} is for {found.made.target}, and this is {made.target}.",
                "Name one of the same kind of target, or --from none.",
            )
        return [found]
    folders = [path for root in roots for path in sorted(root.glob(f"{target_name}-*")) if path.name != own]
    near = [each for each in map(_known, folders) if each and _kind(each.made) == _kind(made)]
    return sorted(near, key=lambda each: _distance(each.made, made))[:1]


def _known(folder: Path) -> Neighbour | None:
    try:
        return Neighbour(folder, read_provenance(folder))
    except TuneBenchError:
        return None


def _kind(made: Provenance) -> str:
    return made.target.partition(" ")[0]


def _distance(there: Provenance, here: Provenance) -> tuple[bool, float, int, str]:
    """How unlike two devices are: another architecture, other threads, fewer words of the name in common."""
    words = [set(re.findall(r"[a-z0-9]+", made.device.lower())) for made in (there, here)]
    threads = abs(math.log((there.threads or 1) / (here.threads or 1)))
    return there.target != here.target, threads, -len(words[0] & words[1]), there.device


class Hints:
    """Winners, by the kernels that they may be tried on."""

    def __init__(self, sources: Iterable[Mapping[str, ms.database.TuningRecord]]) -> None:
        self._by_key: dict[str, ms.database.TuningRecord] = {}
        self._by_make: dict[tuple[object, ...], list[ms.database.TuningRecord]] = defaultdict(list)
        for records in sources:
            for key, record in records.items():
                if key not in self._by_key:
                    self._by_key[key] = record
                    self._by_make[_make(record.workload.mod)].append(record)

    def of(self, task: Task) -> list[ms.database.TuningRecord]:
        """Those for one kernel: another device's winner for the very same, or else those of the most similar ones."""
        same = self._by_key.get(task.key)
        if same is not None:
            return [same]
        extents = _extents(task.mod)

        def distance(record: ms.database.TuningRecord) -> float:
            pairs = zip(_extents(record.workload.mod), extents, strict=True)
            return sum(abs(math.log(there / here)) for there, here in pairs)

        return sorted(self._by_make.get(_make(task.mod), []), key=distance)[:MOST]


def candidates(task: Task, records: Iterable[ms.database.TuningRecord]) -> list[ms.MeasureCandidate]:
    """The schedules of those records that apply to a kernel."""
    int8_dot.register()
    found = []
    for record in records:
        sch = s_tir.Schedule(task.mod)
        try:
            record.trace.apply_to_schedule(sch, remove_postproc=False)
            passes.realize(sch.mod)
        except Exception:  # whatever TVM raises where a trace does not fit, or a template where it cannot serve
            continue
        found.append(ms.MeasureCandidate(sch, ms.arg_info.ArgInfo.from_prim_func(task.mod["main"])))
    return found


def _make(mod: tvm.IRModule) -> tuple[object, ...]:
    """What kernels have in common whose extents alone differ: blocks, and the arguments' types and dimensions."""
    params = mod["main"].params
    blocks = passes.block_names(s_tir.Schedule(mod))
    return (tuple(blocks), tuple((str(param.dtype), len(param.shape)) for param in params))


def _extents(mod: tvm.IRModule) -> list[int]:
    return [int(extent) for param in mod["main"].params for extent in param.shape]
