"""A model's kernels as data: sources, buffers and launches, which any GPU API can run without TVM.

A plan is a folder: `plan.json`, one source file a shader, and the weights as safetensors. Chunks have static lengths,
so every launch size is a number; the position in the cache is read from a buffer.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from tunebench.errors import TuneBenchError

FORMAT, VERSION = "tunebench-plan", 2
SUFFIXES = {"wgsl": "wgsl", "opencl": "cl", "metal": "metal"}
"""Of source files, by language."""

Triple = tuple[int, int, int]
Kind = Literal["weight", "cache", "constant", "input", "scratch", "output"]


@dataclass(frozen=True)
class Shader:
    """One device kernel as source text."""

    entry: str  # the function's name in the source
    source: str
    threads: Triple  # of a block
    writes: tuple[bool, ...]  # by argument


@dataclass(frozen=True)
class Launch:
    """One launch of a shader over buffers, which are meant by their place in a list."""

    shader: str
    buffers: tuple[int, ...]
    blocks: Triple


@dataclass(frozen=True)
class Program:
    """One kernel of a model: launches over its parameters, in order, and then its scratch buffers."""

    shaders: Mapping[str, Shader]
    launches: tuple[Launch, ...]
    scratch_bytes: tuple[int, ...] = ()


@dataclass(frozen=True)
class Buffer:
    """Device memory of a plan."""

    name: str
    bytes: int
    kind: Kind
    shape: tuple[int, ...] = ()
    dtype: str = ""


@dataclass(frozen=True)
class Step:
    """What runs a chunk of one length."""

    launches: tuple[Launch, ...]
    logits: int  # the buffer that they end in, float32 [batch, vocab]


@dataclass(frozen=True)
class Plan:
    """A model for one GPU API."""

    language: str
    facts: Mapping[str, Any]  # of the model: batch, context, chunks, vocab_size, scheme ...
    buffers: tuple[Buffer, ...]
    shaders: Mapping[str, Shader]
    steps: Mapping[int, Step]  # by chunk size

    @property
    def scratch_bytes(self) -> int:
        """Memory between kernels."""
        return sum(buffer.bytes for buffer in self.buffers if buffer.kind in ("scratch", "output"))

    def place(self, name: str) -> int:
        """Where a buffer stands."""
        return next(i for i, buffer in enumerate(self.buffers) if buffer.name == name)


def write(plan: Plan, folder: Path) -> None:
    """Write `plan.json` and the sources."""
    sources = folder / "shaders"
    sources.mkdir(parents=True, exist_ok=True)
    shaders = {}
    for name, shader in plan.shaders.items():
        path = sources / f"{name}.{SUFFIXES[plan.language]}"
        path.write_text(shader.source)
        shaders[name] = {**asdict(shader), "source": f"shaders/{path.name}"}
    data = {
        "format": FORMAT,
        "version": VERSION,
        "language": plan.language,
        "facts": dict(plan.facts),
        "buffers": [asdict(buffer) for buffer in plan.buffers],
        "shaders": shaders,
        "steps": {str(length): asdict(step) for length, step in plan.steps.items()},
    }
    (folder / "plan.json").write_text(json.dumps(data))


def read(folder: Path) -> Plan:
    """The plan in a folder; a TuneBenchError where there is none, or one of another version."""
    try:
        data = json.loads((folder / "plan.json").read_text())
    except (OSError, json.JSONDecodeError) as error:
        raise TuneBenchError(f"no plan in {folder} ({error}).", "Make one: tunebench export --format plan.") from None
    if data.get("format") != FORMAT or data.get("version") != VERSION:
        raise TuneBenchError(
            f"{folder} holds version {data.get('version')} of {data.get('format')}, not {VERSION} of {FORMAT}.",
            "Export it again with this TuneBench.",
        )
    shaders = {
        name: Shader(
            each["entry"], (folder / each["source"]).read_text(), _triple(each["threads"]), tuple(each["writes"])
        )
        for name, each in data["shaders"].items()
    }
    steps = {int(length): Step(_launches(each["launches"]), each["logits"]) for length, each in data["steps"].items()}
    buffers = tuple(Buffer(**{**each, "shape": tuple(each["shape"])}) for each in data["buffers"])
    return Plan(data["language"], data["facts"], buffers, shaders, steps)


def _launches(data: Iterable[Mapping[str, Any]]) -> tuple[Launch, ...]:
    return tuple(Launch(each["shader"], tuple(each["buffers"]), _triple(each["blocks"])) for each in data)


def _triple(values: Iterable[int]) -> Triple:
    x, y, z = values
    return x, y, z
