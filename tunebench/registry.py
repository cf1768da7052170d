"""Find what a folder of plug-in modules defines.

Every module of a plug-in package exposes one module-level tuple (`SCHEMES`, `TARGETS`, ...) of entries
with a `name`. `load` imports the modules and merges the tuples. A failed import or a duplicate name raises.
"""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Protocol, TypeVar

from tunebench.errors import TuneBenchError

LONGEST = 80  # letters of a name that are shown


class Named(Protocol):
    @property
    def name(self) -> str: ...


Entry = TypeVar("Entry", bound=Named)
Value = TypeVar("Value")


def load(package: str, tuple_name: str, kind: type[Entry]) -> dict[str, Entry]:
    """All entries of the given `kind` that the modules of `package` list in `tuple_name`, by name."""
    entries: dict[str, Entry] = {}
    folder = importlib.import_module(package)
    for info in sorted(pkgutil.iter_modules(folder.__path__), key=lambda module: module.name):
        module = importlib.import_module(f"{package}.{info.name}")
        for entry in getattr(module, tuple_name):
            if not isinstance(entry, kind):
                raise TypeError(f"{module.__name__}.{tuple_name} holds {entry!r}, not a {kind.__name__}")
            if entry.name in entries:
                raise ValueError(f"{module.__name__} defines {entry.name!r} a second time")
            entries[entry.name] = entry
    return entries


def pick(entries: Mapping[str, Value], name: str, what: str) -> Value:
    """`entries[name]`, or a TuneBenchError that names the nearest match and the choices."""
    if name in entries:
        return entries[name]
    raise unknown(name, entries, what)


def unknown(name: str, choices: Iterable[str], what: str) -> TuneBenchError:
    """The error for a name that is none of `choices`."""
    ordered = sorted(map(str, choices))
    shown = name if len(name) <= LONGEST else f"{name[:LONGEST]}…"
    near = difflib.get_close_matches(shown, ordered, n=1)
    guess = f"Did you mean {near[0]!r}? " if near else ""
    return TuneBenchError(f"unknown {what} {shown!r}.", f"{guess}Choose from: {', '.join(ordered)}.")
