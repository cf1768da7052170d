"""A model's kernels as data: sources, buffers and launches, which any GPU API can run without TVM.

A plan is a folder: `plan.json`, one source file a shader, and the weights as safetensors. Chunks have static lengths,
so every launch size is a number; the position in the cache is read from a buffer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from tunebench import stored
from tunebench.errors import TuneBenchError
from tunebench.spec import Amount, Size

FORMAT, VERSION = "tunebench-plan", 2
PLAN_BYTES, SOURCE_BYTES = 64 << 20, 4 << 20
Language = Literal["wgsl", "opencl", "metal"]
SUFFIXES: Mapping[Language, str] = {"wgsl": "wgsl", "opencl": "cl", "metal": "metal"}
"""Of source files, by language."""

Triple = tuple[Size, Size, Size]
Kind = Literal["weight", "cache", "constant", "input", "scratch", "output"]


class Shader(Struct, frozen=True):
    """One device kernel as source text."""

    entry: str  # the function's name in the source
    source: str
    threads: Triple  # of a block
    writes: tuple[bool, ...]  # by argument


class Launch(Struct, frozen=True):
    """One launch of a shader over buffers, which are meant by their place in a list."""

    shader: str
    buffers: tuple[Amount, ...]
    blocks: Triple


@dataclass(frozen=True)
class Program:
    """One kernel of a model: launches over its parameters, in order, and then its scratch buffers."""

    shaders: Mapping[str, Shader]
    launches: tuple[Launch, ...]
    scratch_bytes: tuple[int, ...] = ()


class Buffer(Struct, frozen=True):
    """Device memory of a plan."""

    name: str
    bytes: Amount
    kind: Kind
    shape: tuple[Amount, ...] = ()
    dtype: str = ""


class Step(Struct, frozen=True):
    """What runs a chunk of one length."""

    launches: tuple[Launch, ...]
    logits: Amount  # the buffer that they end in, float32 [batch, vocab]


class Facts(Struct, frozen=True):
    """What a plan's model is."""

    model: str
    scheme: str
    batch: Size
    context: Size
    chunks: tuple[Size, ...]
    vocab_size: Size
    all_logits: bool = False  # a step ends in those of all its tokens, [batch * chunk, vocab]
    chunk_ns: Mapping[int, float] = {}  # expected time of a chunk of each size and of one token; empty: not known


class Plan(Struct, frozen=True):
    """A model for one GPU API."""

    language: Language
    facts: Facts
    buffers: tuple[Buffer, ...]
    shaders: Mapping[str, Shader]
    steps: Mapping[int, Step]  # by chunk size
    format: str = FORMAT
    version: int = VERSION

    def __post_init__(self) -> None:
        for step in self.steps.values():
            for launch in step.launches:
                if launch.shader not in self.shaders or max(launch.buffers, default=-1) >= len(self.buffers):
                    raise ValueError(f"a launch of {launch.shader} has no such shader, or no such buffer")

    @property
    def scratch_bytes(self) -> int:
        """Memory between kernels."""
        return sum(buffer.bytes for buffer in self.buffers if buffer.kind in ("scratch", "output"))

    def place(self, name: str) -> int:
        """Where a buffer stands."""
        return next(i for i, buffer in enumerate(self.buffers) if buffer.name == name)


class _Format(Struct):
    """What is read of a plan before anything else."""

    format: str = "something else"
    version: int = 0


def write(plan: Plan, folder: Path) -> None:
    """Write `plan.json` and the sources, which the file names by their places."""
    (folder / "shaders").mkdir(parents=True, exist_ok=True)
    places = {name: f"shaders/{name}.{SUFFIXES[plan.language]}" for name in plan.shaders}
    for name, shader in plan.shaders.items():
        (folder / places[name]).write_text(shader.source)
    shaders = {name: replace(shader, source=places[name]) for name, shader in plan.shaders.items()}
    (folder / "plan.json").write_bytes(stored.encode(replace(plan, shaders=shaders)))


def read(folder: Path) -> Plan:
    """The plan in a folder; a TuneBenchError where there is none, or one of another version."""
    try:
        data = stored.read_bytes(folder / "plan.json", PLAN_BYTES)
        found = msgspec.json.decode(data, type=_Format)
        if (found.format, found.version) != (FORMAT, VERSION):
            raise TuneBenchError(
                f"{folder} holds version {found.version} of {found.format}, not {VERSION} of {FORMAT}.",
                "Export it again with this TuneBench.",
            )
        plan = msgspec.json.decode(data, type=Plan)
        sources = {name: _source(folder, shader.source) for name, shader in plan.shaders.items()}
    except (OSError, ValueError, RecursionError) as error:
        raise TuneBenchError(
            f"no plan in {folder} (plan.json: {error}).", "Make one: tunebench export --format plan."
        ) from None
    shaders = {name: replace(shader, source=sources[name]) for name, shader in plan.shaders.items()}
    return replace(plan, shaders=shaders)


def _source(folder: Path, place: str) -> str:
    """A source; a ValueError for a place that is none in the folder."""
    path = (folder / place).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ValueError(f"{place!r} is outside the folder")
    return stored.read_bytes(path, SOURCE_BYTES).decode()
