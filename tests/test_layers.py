"""Who may import whom: downwards only, by folder. `docs/architecture.md` has the picture."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SHARED = "values that everyone shares"
ORDER = [{SHARED}, {"runtime"}, {"kernels"}, {"model"}, {"compile", "engines"}, {"runners"}, {"devices"}, {"tuning"},
         {"bench"}, {"cli"}]  # fmt: skip
BELOW = {room: set().union(*ORDER[:rank]) | {room} for rank, rooms in enumerate(ORDER) for room in rooms}
BELOW |= {"report": {SHARED, "report"}, "cli": BELOW["cli"] | {"report"}}
WITHOUT_TVM = {SHARED, "report", "cli"}
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (ROOT / "tunebench").rglob("*.py")
}


def room(module: str) -> str:
    """The folder directly below the package, or `SHARED` for a module that lies in none."""
    path = MODULES[module].relative_to(ROOT / "tunebench")
    return path.parts[0] if len(path.parts) > 1 else SHARED


def imports(text: str) -> Iterator[str]:
    """Every module that a source imports, at its top or later."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            yield from {name if (name := f"{base}.{alias.name}") in MODULES else base for alias in node.names}


def breaches(module: str, text: str) -> list[str]:
    """What a module's source imports and may not."""
    own, found = room(module), list(imports(text))
    upwards = [name for name in found if name in MODULES and name != "tunebench" and room(name) not in BELOW[own]]
    return upwards + [name for name in found if own in WITHOUT_TVM and name.split(".")[0] in ("tvm", "tvm_ffi")]


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"tunebench.__main__"}))
def test_imports_go_downwards(module: str) -> None:
    assert not breaches(module, MODULES[module].read_text())


def test_imports_have_no_circle() -> None:
    graph = {name: {i for i in imports(path.read_text()) if i in MODULES} - {name} for name, path in MODULES.items()}
    TopologicalSorter(graph).prepare()


@pytest.mark.parametrize(
    ("module", "text", "breach"),
    [
        ("tunebench.model.workload", "from tunebench.compile import passes", "tunebench.compile.passes"),
        ("tunebench.report.frame", "def f():\n    from tunebench.model import workload", "tunebench.model.workload"),
        ("tunebench.stats", "import tvm.runtime", "tvm.runtime"),
        ("tunebench.compile.build", "from tunebench.engines.tvm import load", "tunebench.engines.tvm"),
    ],
)
def test_a_breach_is_found(module: str, text: str, breach: str) -> None:
    assert breaches(module, text) == [breach]


@pytest.mark.parametrize("start", ["cli.app", "report", "results", "devices.targets", "model.quantization"])
def test_what_starts_fast_imports_no_tvm(start: str) -> None:
    code = f"import sys, tunebench.{start}; sys.exit('tvm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
