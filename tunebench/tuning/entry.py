"""What a database keeps beside its records: what it was made with, and each task's decision."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

from tunebench.spec import Amount, Decision, Schedule, Size

NEVER = "never measured: run `tunebench tune`"
UNDECIDED = "not judged yet: the run was stopped"
NOT_BEGUN = "not searched before the run ended"
OUT_OF_TIME = "not searched before the time ran out"  # as older files have it
NO_SPACE = "no space is for it"
NO_CANDIDATE = "its space has no candidate"
UNHANDLED = "no schedule space"  # and what a space's rules raised
NO_DEFAULT = "its default schedule failed"  # and how
NONE_RAN = "no candidate ran and was correct"
LOST_RECORD = "its record was no good"


class Provenance(Struct, frozen=True, forbid_unknown_fields=True):
    """What a database was made for and with. A database of another kind is refused."""

    target: str
    device: str
    threads: Amount
    tvm: str
    protocol: str

    def differences(self, here: Provenance) -> str:
        """In what it is another than `here`, in words; empty where it is the same."""
        pairs = [(name, getattr(self, name), getattr(here, name)) for name in self.__struct_fields__]
        return ", ".join(f"{name} {there!r} (here {this!r})" for name, there, this in pairs if there != this)


class Entry(Struct, forbid_unknown_fields=True):
    """What is known of one task. A field of a newer writer is refused, as writing the file again would lose it."""

    name: str
    default_ns: list[Amount] = []
    tuned_ns: list[Amount] = []
    by_source: dict[Schedule, list[Amount]] = {}  # the fastest of each, beside `tuned_ns`
    decision: Decision | Literal[""] = ""  # empty: not judged yet
    reason: str = ""
    trial: str = ""  # key of the record that was judged
    depth: Amount = 256  # positions in the cache where it is measured, if it reads one
    chunks: list[Size] = []  # sizes of the chunks that it was tuned for; empty in databases of before
    space: str = ""  # signature of the space that was searched for the decision; empty in databases of before
    exhausted: str = ""  # revision of the spaces in which no candidate is left

    def __post_init__(self) -> None:
        """Older files say "kept default" of every kernel that was not promoted."""
        if self.decision == "kept default" and not self.tuned_ns:
            self.decision = unsearched(self.reason)


def unsearched(reason: str) -> Decision:
    """The decision on a kernel none of whose candidates was compared with the default, by why that is."""
    if reason.startswith((NO_SPACE, NO_CANDIDATE, UNHANDLED)):
        return "nothing to decide"
    return "not searched" if reason.startswith((NOT_BEGUN, OUT_OF_TIME, NO_DEFAULT)) else "kept default"
