"""What a database holds, kernel by kernel, as the lines of its files: nothing is parsed by TVM."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from tunebench import stats, stored
from tunebench.errors import TuneBenchError
from tunebench.kernels import templates
from tunebench.kernels.templates import DECISION, TEMPLATE
from tunebench.spec import Decision
from tunebench.tuning import files, records, versions
from tunebench.tuning.entry import Entry, Provenance
from tunebench.tuning.files import OURS, VERDICTS
from tunebench.tuning.records import FILES, Lines

Line = tuple[bytes, bytes]  # of a kernel, and of its record


@dataclass(frozen=True)
class Kernel:
    """One kernel: the decision on it, and the record where one was promoted."""

    key: str
    entry: Entry
    line: Line | None = None

    @property
    def name(self) -> str:
        """The kernel's; its key where no entry tells it."""
        return self.entry.name or f"kernel {self.key}"

    @property
    def source(self) -> str:
        """Where its schedule is from: tuned or library; default where it has no record."""
        if not self.line:
            return "default"
        found = templates.templates().get(self.template)
        return found.source if found else "tuned"

    def space(self, signature: str | None = None) -> str:
        """Whether it was searched in the space of that signature, which is that of today; None: nobody tells."""
        if not self.entry.space:
            return "before signatures were kept" if self.entry.decision else "-"
        if signature is None:
            return self.entry.space[:8]
        return "current" if self.entry.space == signature else "older: it would be searched anew"

    @property
    def decision(self) -> Decision | str:
        """As its entry says; empty where nothing was decided."""
        return self.entry.decision

    @property
    def interval(self) -> stats.Interval:
        """The speed-up of the candidate that was judged over the default."""
        return stats.ratio_interval(self.entry.default_ns, self.entry.tuned_ns)

    @property
    def trace(self) -> tuple[list[list[Any]], dict[int, Any]]:
        """Instructions (kind, inputs, attributes, outputs), and what was decided, by place; empty without record."""
        if not self.line:
            return [], {}
        instructions, decisions = msgspec.json.decode(self.line[1])[1][0]
        return instructions, dict(decisions)

    def trace_lines(self) -> Iterator[str]:
        """The schedule's instructions as text, each with what was decided at it."""
        instructions, decisions = self.trace
        for place, (kind, inputs, attributes, outputs) in enumerate(instructions):
            given = ", ".join(map(str, [*inputs, *attributes]))
            made = f"{', '.join(outputs)} = " if outputs else ""
            decided = f"  -> {decisions[place]}" if place in decisions else ""
            yield f"{made}{kind}({given}){decided}"

    @property
    def template(self) -> str:
        """The template of its schedule; empty where it has none."""
        return str(self._annotations().get(TEMPLATE, ""))

    @property
    def template_decisions(self) -> dict[str, Any]:
        """What was chosen for the template, by name."""
        notes = self._annotations().items()
        return {name.removeprefix(DECISION): value for name, value in notes if name.startswith(DECISION)}

    def _annotations(self) -> dict[str, Any]:
        """Values by annotation; a value that was sampled is the candidate that was decided on."""
        instructions, decisions = self.trace
        values: dict[str, Any] = {}
        found = {}
        for place, (kind, inputs, attributes, outputs) in enumerate(instructions):
            if kind == "SampleCategorical" and place in decisions:
                values[outputs[0]] = attributes[0][decisions[place]]
            elif kind == "Annotate":
                given = inputs[1]
                found[attributes[0]] = values.get(given, given.strip('"')) if isinstance(given, str) else given
        return found


@dataclass(frozen=True)
class Content:
    """A folder's kernels by key, and what of it was no good."""

    folder: Path
    made: Provenance
    kernels: dict[str, Kernel]
    parts: list[Lines]
    verdicts: files.Verdicts

    @property
    def problems(self) -> list[str]:
        """Why each line is left out, if any is; what `parts` refused meanwhile is among it."""
        return [
            reason for part in self.parts for each in part.reasons.values() for reason in each
        ] + self.verdicts.warnings

    @property
    def entries(self) -> dict[str, Entry]:
        """The decisions by key."""
        return {key: kernel.entry for key, kernel in self.kernels.items() if kernel.entry.name}

    @property
    def lines(self) -> dict[str, Line]:
        """The records by key."""
        return {key: kernel.line for key, kernel in self.kernels.items() if kernel.line}

    def pick(self, words: str) -> list[Kernel]:
        """Those whose name holds the words or whose key begins with them, most time first; TuneBenchError for none."""
        found = [each for each in self.kernels.values() if words in each.entry.name or each.key.startswith(words)]
        if words and not found:
            raise TuneBenchError(f"{self.folder} has no kernel {words[:80]!r}.", "`tunebench db show` lists them.")
        return sorted(found, key=lambda each: (-_slowest_ns(each), each.entry.name, each.key))


def read(folder: Path) -> Content:
    """All of a folder's kernels; TuneBenchError where there is no database, or nothing tells what it is for."""
    if not files.is_begun(folder):
        raise TuneBenchError(f"there is no database in {folder}.", "`tunebench db ls` shows where there are some.")
    made = files.read_provenance(folder)
    while True:
        version = versions.current(folder)
        parts = [records.read(version), records.read(version / OURS)]
        verdicts = files.Verdicts(version / VERDICTS)
        if versions.current(folder) == version:
            break  # else a writer may have removed it meanwhile
    lines = {key: line for part in parts for key, line in lines_of(part).items()}
    keys = [*verdicts.entries, *(key for key in lines if key not in verdicts.entries)]
    kernels = {key: Kernel(key, verdicts.entries.get(key, Entry("")), lines.get(key)) for key in keys}
    return Content(folder, made, kernels, parts, verdicts)


def lines_of(part: Lines) -> dict[str, Line]:
    """Records by the key that their kernel's line says, which is not computed anew; of several the last."""
    found = {}
    for number, record in sorted(part.records.items()):
        workload = part.workloads[part.workload_of[number]]
        found[msgspec.json.decode(workload)[0]] = (workload, record)
    return found


def as_files(lines: Mapping[str, Line], entries: Mapping[str, Entry]) -> dict[str, bytes]:
    """A version's files, by their paths in it: the same bytes for the same content."""
    theirs = {key: line for key, line in sorted(lines.items()) if records.needs_tunebench(line[1])}
    made = _two_files(line for key, line in sorted(lines.items()) if key not in theirs)
    if theirs:
        made |= {f"{OURS}/{name}": data for name, data in _two_files(theirs.values()).items()}
    return {**made, VERDICTS: as_json(dict(sorted(entries.items())))}


def as_json(data: Any) -> bytes:
    """A file that people may read."""
    return msgspec.json.format(stored.encode(data), indent=1) + b"\n"


def _two_files(lines: Iterable[Line]) -> dict[str, bytes]:
    """MetaSchedule's files of these records, each with a kernel of its own."""
    given = list(lines)
    moved = [msgspec.json.encode([i, msgspec.json.decode(record)[1]]) for i, (_, record) in enumerate(given)]
    return dict(zip(FILES, (records.text(kernel for kernel, _ in given), records.text(moved)), strict=True))


def _slowest_ns(kernel: Kernel) -> float:
    return stats.median(kernel.entry.default_ns) if kernel.entry.default_ns else 0.0
