"""Every trial of a search: in memory for MetaSchedule, and on disk a line each, written when it is made."""

from __future__ import annotations

from pathlib import Path

from tvm.s_tir import meta_schedule as ms

from tunebench import durable
from tunebench.compile.tasks import task_key
from tunebench.tuning import records, vetting
from tunebench.tuning.records import RECORDS, WORKLOADS


class SearchLog:
    """The trials that a folder holds. To add some, its database must be open for writing."""

    def __init__(self, folder: Path) -> None:
        """Read the folder, which need not be there; what is no good is left out and in `warnings`."""
        self.folder = folder
        self.found = records.read(folder)
        if self.found.records and not vetting.is_known(self.found, folder):
            vetting.check(self.found)
        self.memory = ms.database.MemoryDatabase(module_equality="structural")
        self._line_of: dict[str, int] = {}  # of a kernel, by its key
        for number, record in records.load(self.found).items():
            self._line_of[task_key(record.workload.mod)] = self.found.workload_of[number]
            self._remember(record)
        self._lines = max(self.found.workloads, default=-1) + 1  # of kernels

    @property
    def warnings(self) -> list[str]:
        """What was left out, and why."""
        return self.found.warnings

    def add(self, record: ms.database.TuningRecord) -> None:
        """Keep a trial. TuneBenchError where it could not be written: then the files are as they were."""
        key = task_key(record.workload.mod)
        try:
            if key not in self._line_of:
                durable.append(self.folder / WORKLOADS, records.text([records.workload_line(record.workload)]))
                self._line_of[key] = self._lines
                self._lines += 1
            durable.append(self.folder / RECORDS, records.text([records.record_line(record, self._line_of[key])]))
        except OSError as error:
            raise durable.refusal(self.folder, error) from None
        self._remember(record)

    def close(self) -> None:
        """Remember the files as written here, so that the next run need not try them first."""
        vetting.remember(records.read(self.folder), self.folder)

    def _remember(self, record: ms.database.TuningRecord) -> None:
        workload = self.memory.commit_workload(record.workload.mod)
        same = ms.database.TuningRecord(record.trace, workload, record.run_secs, record.target, record.args_info)
        self.memory.commit_tuning_record(same)
