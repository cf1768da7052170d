"""Who may import whom: downwards only. The table below is the architecture; a new module gets a line in it."""

import ast
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

LAYERS: list[tuple[str, ...]] = [  # bottom to top
    ("spec", "errors"),
    ("registry", "environment", "options", "plan", "pieces", "webgpu"),
    ("apis", "shaders"),
    ("abilities",),
    ("plan_engine", "export", "page_server"),
    ("browser_engine",),
    ("tvmscript",),
    ("ops", "gpu_ops"),
    ("dot", "cuda_runtime"),
    ("cublas", "arena"),
    ("templates",),
    ("cuda_compiler",),
    ("models", "quantization", "targets", "spaces", "measure", "results", "stats"),
    ("workload", "lowering", "half", "cost_model", "database", "probe", "cuda_probe", "llama_bench"),
    ("programs", "trials", "tracker", "merging"),
    ("tasks", "planning", "gpu_runner", "rpc_library"),
    ("rpc_device",),
    ("source_bench",),
    ("runners",),
    ("search", "weights", "compile_check"),
    ("tune", "compile", "engines", "tvm_engine", "charts", "metrics"),
    ("cuda_engine", "api_probe"),
    ("backends",),
    ("rpc_backend",),
    ("session",),
    ("arms",),
    ("bench", "report"),
    ("progress", "catalogue", "plan_commands", "asked"),
    ("cli",),
    ("__main__",),
]

COMPILE_HALF = {
    *(
        "ops",
        "gpu_ops",
        "dot",
        "templates",
        "cublas",
        "cuda_runtime",
        "arena",
        "cuda_compiler",
        "cuda_probe",
        "cuda_engine",
        "compile_check",
        "tvmscript",
        "models",
        "quantization",
        "targets",
        "spaces",
        "workload",
        "lowering",
        "cost_model",
        "database",
        "half",
        "programs",
        "planning",
        "merging",
        "trials",
        "gpu_runner",
        "source_bench",
        "api_probe",
        "backends",
        "rpc_backend",
        "rpc_device",
        "rpc_library",
        "tracker",
        "session",
        "arms",
    ),
    *(
        "runners",
        "probe",
        "tasks",
        "search",
        "weights",
        "tune",
        "compile",
        "engines",
        "tvm_engine",
        "bench",
        "progress",
    ),
}
REPORT_HALF = {"charts", "metrics", "report"}
TOP = {"cli", "__main__", "catalogue", "plan_commands", "asked"}  # call both halves; the others belong to neither

PLUGINS = {
    "models",
    "quantization",
    "targets",
    "spaces",
    "templates",
    "runners",
    "engines",
    "apis",
    "metrics",
    "charts",
}
"""Folders whose modules know their package's `__init__` and never each other."""

ONLY_IN = {"tvm": COMPILE_HALF, "tvm_ffi": COMPILE_HALF, "pandas": REPORT_HALF, "matplotlib": REPORT_HALF}
PLAIN: dict[str, set[str]] = {"spec": set(), "errors": set(), "registry": set(), "environment": {"psutil"}}
"""Modules of the standard library, and what else they may import."""

CLI_AT_TOP = {
    "tunebench.options",
    "tunebench.plan_commands",
    "tunebench.asked",
    "typer",
    "rich",
    "tunebench",
    "tunebench.errors",
    "tunebench.spec",
    "tunebench.registry",
}

PACKAGE = Path(__file__).parent.parent / "tunebench"
RANK = {entry: rank for rank, layer in enumerate(LAYERS) for entry in layer}
Sources = dict[str, str]  # dotted module name -> its text
Rule = Callable[[Sources], list[str]]  # -> one line for each breach


@dataclass(frozen=True)
class Import:
    module: str  # dotted name of the importing module
    target: str  # dotted name of the imported one
    line: int
    at_top: bool  # runs when the module is imported

    def __str__(self) -> str:
        return f"{self.module}:{self.line} imports {self.target}"


def read_sources() -> Sources:
    return {_dotted(path): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}


def _dotted(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def entry_of(module: str) -> str:
    """The table's word for a module: `tunebench.spaces.gemv` -> `spaces`; the bare package has none."""
    return module.split(".")[1] if "." in module else ""


def imports_of(sources: Sources) -> list[Import]:
    return [found for module, text in sources.items() for found in _imports(module, ast.parse(text), sources)]


def _is_for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def _imports(module: str, tree: ast.Module, sources: Sources) -> Iterator[Import]:
    deferred = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) or _is_for_types_only(node)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        for target in _targets(module, node, sources):
            yield Import(module, target, node.lineno, id(node) not in deferred)  # type: ignore[attr-defined]


def _targets(module: str, node: ast.AST, sources: Sources) -> list[str]:
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    if not isinstance(node, ast.ImportFrom):
        return []
    base = _absolute(module, node, sources)
    submodules = [f"{base}.{alias.name}" for alias in node.names]
    known = [name if name in sources or _in_table(name) else base for name in submodules]
    return list(dict.fromkeys(known))


def _in_table(name: str) -> bool:
    return name.count(".") == 1 and name.startswith("tunebench.") and entry_of(name) in RANK


def _absolute(module: str, node: ast.ImportFrom, sources: Sources) -> str:
    if not node.level:
        return node.module or ""
    is_package = any(name.startswith(f"{module}.") for name in sources)
    parts = module.split(".")
    kept = parts[: len(parts) - node.level + is_package]
    return ".".join([*kept, *([node.module] if node.module else [])])


def not_in_table(sources: Sources) -> list[str]:
    entries = {entry_of(module) for module in sources} - {""}
    return [f"tunebench.{entry} is in no layer: add it to LAYERS" for entry in sorted(entries - set(RANK))]


def wrong_layer(sources: Sources) -> list[str]:
    return [f"{found}, which is not below it" for found in _inner(sources) if not _may_import(found)]


def _inner(sources: Sources) -> list[Import]:
    """Imports between the table's modules. The bare package holds the version only, and anybody may read it."""
    return [found for found in imports_of(sources) if found.target.startswith("tunebench.")]


def _may_import(found: Import) -> bool:
    source, target = entry_of(found.module), entry_of(found.target)
    if source == target:
        return source not in PLUGINS or (found.target == f"tunebench.{source}" and found.module != found.target)
    return RANK.get(target, len(LAYERS)) < RANK.get(source, -1)


def wrong_half(sources: Sources) -> list[str]:
    return [f"{found}, of another half" for found in _inner(sources) if not _half(found.target) <= _reach(found.module)]


def _half(module: str) -> set[str]:
    entry = entry_of(module)
    return {name for name, half in (("compile", COMPILE_HALF), ("report", REPORT_HALF)) if entry in half}


def _reach(module: str) -> set[str]:
    return {"compile", "report"} if entry_of(module) in TOP else _half(module)


def wrong_library(sources: Sources) -> list[str]:
    return [str(found) for found in imports_of(sources) if not _may_use(found)]


def _may_use(found: Import) -> bool:
    entry, library = entry_of(found.module), found.target.partition(".")[0]
    if library in ("tunebench", *sys.stdlib_module_names):
        return True
    if entry in PLAIN:
        return library in PLAIN[entry]
    return library not in ONLY_IN or entry in ONLY_IN[library]


def slow_start(sources: Sources) -> list[str]:
    """What `cli` imports before a command is known, beyond what makes `--help` work without TVM."""
    found = [item for item in imports_of(sources) if entry_of(item.module) == "cli" and item.at_top]
    return [str(item) for item in found if not _starts_fast(item.target)]


def _starts_fast(target: str) -> bool:
    library = target.partition(".")[0]
    return target in CLI_AT_TOP or library in {"typer", "rich", *sys.stdlib_module_names}


def circles(sources: Sources) -> list[str]:
    graph: dict[str, set[str]] = {}
    for found in _inner(sources):
        graph.setdefault(found.module, set()).add(found.target)
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return [" -> ".join(reversed(error.args[1]))]
    return []


RULES: list[Rule] = [not_in_table, wrong_layer, wrong_half, wrong_library, slow_start, circles]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule: Rule) -> None:
    broken = rule(read_sources())
    assert not broken, "\n".join(broken)


def test_the_table_names_each_module_once() -> None:
    entries = [entry for layer in LAYERS for entry in layer]
    assert len(entries) == len(set(entries))
    assert set(entries) >= COMPILE_HALF | REPORT_HALF | TOP | PLUGINS | set(PLAIN)


@pytest.mark.parametrize(
    ("rule", "module", "text"),
    [
        (not_in_table, "utils", ""),
        (wrong_layer, "stats", "from tunebench import bench"),
        (wrong_layer, "stats", "def f():\n    import tunebench.results"),
        (wrong_layer, "tune", "from tunebench.compile import build"),
        (wrong_layer, "spaces.gemv", "from tunebench.spaces import gemm"),
        (wrong_layer, "spaces.gemv", "from . import gemm"),
        (wrong_layer, "spaces.gemv", "from .gemm import tile"),
        (wrong_layer, "spaces", "from tunebench.spaces import gemm"),
        (wrong_half, "report", "from tunebench import workload"),
        (wrong_half, "bench", "from tunebench.metrics import METRICS"),
        (wrong_half, "measure", "from tunebench import ops"),
        (wrong_library, "measure", "import tvm.runtime"),
        (wrong_library, "report", "def f():\n    from tvm import relax"),
        (wrong_library, "cli", "def f():\n    import tvm"),
        (wrong_library, "bench", "import pandas"),
        (wrong_library, "spec", "import numpy"),
        (slow_start, "cli", "from tunebench import bench"),
        (slow_start, "cli", "try:\n    import numpy\nexcept ImportError:\n    pass"),
        (circles, "report.frame", "from tunebench.report import words"),
    ],
)
def test_a_breach_is_found(rule: Rule, module: str, text: str) -> None:
    others = {"tunebench.spaces.gemm": "", "tunebench.report.words": "from tunebench.report import frame"}
    assert rule({**others, f"tunebench.{module}": text})


@pytest.mark.parametrize(
    ("module", "text"),
    [
        ("bench", "from tunebench import __version__, tune, spec\nimport tvm"),
        ("spaces.gemv", "from tunebench.spaces import Space\nfrom tunebench import ops"),
        ("report.frame", "from tunebench.report import words\nfrom tunebench import charts\nimport pandas as pd"),
        ("cli", "import typer\nfrom tunebench.errors import TuneBenchError\ndef f():\n    from tunebench import bench"),
        ("environment", "import psutil\nfrom tunebench.spec import Count"),
    ],
)
def test_what_is_allowed_passes(module: str, text: str) -> None:
    sources = {"tunebench.spaces": "", "tunebench.report.words": "", f"tunebench.{module}": text}
    assert [message for rule in RULES for message in rule(sources)] == []
