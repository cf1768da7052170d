"""Kernel templates: whole kernels for an operation, written by hand but for what the search decides.

A template builds the operation that a kernel's attribute names (`kernels.gpu.operation`) from a few decisions. In a
schedule's trace it is an annotation of the root block: `TEMPLATE` with its name, and each decision under its
own. So a tuning record stays an ordinary trace on the ordinary workload, and `realize` makes the kernel of it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import tvm
from tvm import s_tir
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from tunebench import registry
from tunebench.dtypes import DTYPES
from tunebench.kernels import shader_dialect
from tunebench.kernels.operation import Matmul, Operation
from tunebench.kernels.shader_dialect import Language
from tunebench.runtime.plan import Launch, Program, Shader, Triple
from tunebench.spec import Schedule, WeightFormat

TEMPLATE = "tunebench.template"
DECISION = "tunebench.decision."
THREAD_LIMITS = ("max_threads_per_block", "max_num_threads")  # TVM's targets have one or both
AT_ONCE = "/* {} at once */"  # before a call: how many blocks a multiprocessor must have room for
HOPPER = 90  # its compute capability, times ten
CUDA_SOURCES = Path(__file__).parent.parent / "cuda"

FLOAT16 = WeightFormat("float", 16, "float16")
INT4 = WeightFormat("integer", 4, "float16", 32)
INT8 = WeightFormat("integer", 8, "float16", 32)
PLAIN = (FLOAT16, INT4, INT8)
"""What device functions take a weight for unless told otherwise: as it is, or of symmetric integers."""
GROUPS = (32, 64, 128)
"""Weights of a group that products read."""
ZEROS = {"zero_point": -1, "minimum": -2}
"""How `cuda/` names what a group has beside its scale."""

Computed = TypeVar("Computed", bound=Operation)
Decisions = Mapping[str, int]
Choices = Mapping[str, Sequence[int]]
"""What there is to decide, and between which values."""


@dataclass(frozen=True)
class Gpu:
    """What a template may ask about its target."""

    kind: str  # TVM's target kind
    arch: int  # compute capability times ten; 0 where it is not CUDA
    threads: int = 1024  # of a block, at most
    shared_bytes: int = 16 << 10  # of a block, at most
    features: frozenset[str] = frozenset()  # of an API's device: what its target's keys say beyond the kind

    @property
    def language(self) -> Language | None:
        """What kernels are written in; None where they are CUDA's."""
        name = shader_dialect.LANGUAGES.get(self.kind)
        return Language(name, "ptx" in self.features) if name else None

    @property
    def multiplies_pairs(self) -> bool:
        """Whether `fma2` of two halves is one instruction."""
        return bool(self.features & {"pairs", "ptx"})

    @property
    def adds_lanes(self) -> bool:
        """Whether 32 lanes can add up without shared memory."""
        return bool(self.features & {"lanes32", "ptx"})


@dataclass(frozen=True)
class Template(Generic[Computed]):
    """One way to compute one kind of operation."""

    name: str
    operation: type[Computed]
    summary: str
    choices: Callable[[Computed, Gpu], Choices]  # empty where it cannot serve
    build: Callable[[Computed, Decisions], tvm.tirx.PrimFunc] | None = None  # a kernel for TVM to compile
    text: Callable[[Computed, Decisions, Gpu], Program] | None = None  # or its source, for a GPU API
    weights: tuple[int, ...] = ()  # bits of the weights that a product's kernel reads, each as in `arithmetic`
    source: Schedule = "tuned"  # or library: somebody else's kernel
    takes: tuple[str, ...] = ()  # what it can do beyond the plain operation, by its fields' names: norm, gate, bias

    def covers(self, operation: Operation) -> bool:
        """Whether its kernels are for such an operation, and for weights as they are stored."""
        if isinstance(operation, Matmul) and arithmetic(operation.weight) not in self.weights:
            return False
        return isinstance(operation, self.operation) and operation.extras() <= set(self.takes)


def arithmetic(weight: WeightFormat) -> int:
    """The bits of a weight that products read: 16 as it is, 4 or 8 with a scale and a zero or minimum; of others 0.

    Integers lie in words in order, in groups of `GROUPS` whose scales and zeros or minima are of float16.
    """
    integers = WeightFormat("integer", weight.bits, "float16", weight.group, weight.zero, full_range=weight.full_range)
    known = weight == FLOAT16 or (weight == integers and weight.bits in (4, 8) and weight.group in GROUPS)
    return weight.bits if known else 0


@dataclass(frozen=True)
class Param:
    """A buffer argument of a kernel."""

    name: str
    shape: tuple[int, ...]
    dtype: str


def templates() -> dict[str, Template[Any]]:
    """Every template by name."""
    return registry.load(__name__, "TEMPLATES", Template)


def gpu_of(target: tvm.target.Target) -> Gpu:
    """What templates may ask about a target."""
    arch = str(target.attrs.get("arch", "")).removeprefix("sm_").rstrip("af")
    threads = min(int(target.attrs[name]) for name in THREAD_LIMITS if name in target.attrs)
    shared = int(target.attrs.get("max_shared_memory_per_block", Gpu.shared_bytes))
    kind = str(target.kind.name)
    features = frozenset(map(str, target.keys)) - {kind, "gpu"}
    return Gpu(kind, int(arch) if arch.isdigit() else 0, threads, shared, features)


def serving(operation: Operation | None, gpu: Gpu) -> dict[Template[Any], Choices]:
    """The templates that can build an operation on a GPU, each with what there is to decide."""
    if operation is None:
        return {}
    covering = [template for template in templates().values() if template.covers(operation)]
    choices = {template: template.choices(operation, gpu) for template in covering}
    return {template: given for template, given in choices.items() if given}


def chosen(func: tvm.tirx.PrimFunc) -> tuple[Template[Any], Decisions] | None:
    """The template that a schedule chose and its decisions; None where it chose none."""
    notes = func.body.block.annotations if isinstance(func.body, s_tir.SBlockRealize) else {}
    if TEMPLATE not in notes:
        return None
    decisions = {key.removeprefix(DECISION): int(notes[key]) for key in notes if key.startswith(DECISION)}
    return registry.pick(templates(), str(notes[TEMPLATE]), "template"), decisions


def source(trace: s_tir.schedule.Trace) -> Schedule:
    """Where the kernel of a schedule's trace comes from: `library` or `tuned`."""
    notes = [inst.inputs[1] for inst in trace.insts if inst.kind.name == "Annotate" and inst.attrs[0] == TEMPLATE]
    return registry.pick(templates(), str(notes[-1]), "template").source if notes else "tuned"


def realize(mod: tvm.IRModule, operation: Operation | None) -> tvm.IRModule:
    """A scheduled kernel as TVM compiles it: the chosen template's, or as it was."""
    choice = chosen(mod["main"])
    build = choice[0].build if choice else None
    return tvm.IRModule({"main": build(operation, choice[1])}) if choice and build else mod


def written(mod: tvm.IRModule, operation: Operation | None, gpu: Gpu) -> Program | None:
    """A scheduled kernel as source, where it chose a template that writes it."""
    choice = chosen(mod["main"])
    text = choice[0].text if choice else None
    return text(operation, choice[1], gpu) if choice and text else None


def arguments(params: Sequence[Param]) -> dict[str, tvm.tirx.Buffer]:
    """The buffers of a kernel that is being built, by name."""
    T.func_name("main")
    T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
    return {p.name: T.arg(p.name, T.buffer(p.shape, p.dtype)) for p in params}


def extern_kernel(
    params: Sequence[Param],
    grid: Sequence[int],
    threads: int,
    function: str,
    args: Sequence[str | tvm.tirx.Expr],
    cluster: int = 1,
    early: bool = False,
    shared_bytes: int = 0,
) -> tvm.tirx.PrimFunc:
    """A kernel whose threads all call one function of `cuda/`.

    `args` are names of `params`, passed as pointers, or values. `early`: see `launched_early`; the rest: see `launch`.
    """
    with IRBuilder() as builder, T.prim_func(s_tir=True):
        buffers = arguments(params)
        with T.sblock("root"):
            T.reads([])
            T.writes([])
            given = [buffers[arg].data if isinstance(arg, str) else arg for arg in args]
            launch(grid, threads, function, given, cluster, shared_bytes)
    return launched_early(builder.get()) if early else builder.get()


def launch(
    grid: Sequence[int],
    threads: int,
    function: str,
    args: Sequence[tvm.tirx.Expr],
    cluster: int = 1,
    shared_bytes: int = 0,
    blocks: int = 1,
    more: Sequence[tvm.tirx.Expr] = (),
) -> None:
    """Add a launch of a function of `cuda/` to the kernel that is being built.

    `cluster` blocks that are neighbours along the grid's first axis share a cluster. The function gets a pointer to
    `shared_bytes` of shared memory behind its arguments, and then `more`. Registers are dealt out so that a
    multiprocessor has room for `blocks` at once.
    """
    with ExitStack() as frames:
        if cluster > 1:
            frames.enter_context(T.thread_binding(0, cluster, "clusterCtaIdx.x"))
        for axis, extent in zip("xyz", grid, strict=False):
            frames.enter_context(T.launch_thread(f"blockIdx.{axis}", extent))
        frames.enter_context(T.launch_thread("threadIdx.x", threads))
        shared = [T.alloc_buffer((shared_bytes,), "uint8", scope="shared.dyn").data] if shared_bytes else []
        T.evaluate(T.call_extern("int32", AT_ONCE.format(blocks) * (blocks > 1) + function, *args, *shared, *more))


def launched_early(func: tvm.tirx.PrimFunc) -> tvm.tirx.PrimFunc:
    """The kernel, which may be launched before the one ahead of it has ended."""
    return func.with_attr("tirx.kernel_launch_params", ["tirx.use_programtic_dependent_launch"])


def overlap(gpu: Gpu) -> Choices:
    """Whether a kernel is launched early: a decision where the GPU can do it."""
    return {"overlap": [0, 1] if gpu.arch >= HOPPER else [0]}


@functools.cache
def cuda_source() -> str:
    """Every device function that templates call."""
    files = [CUDA_SOURCES / "common.cuh", *sorted(CUDA_SOURCES.glob("*.cuh"))]
    return "\n".join(path.read_text() for path in dict.fromkeys(files))


def weight_params(op: Matmul) -> list[Param]:
    """A matrix product's stored weights, as the operation takes them."""
    n, k, weight = op.n, op.k, op.weight
    if not weight.group:
        return [Param("w", (n, k), weight.dtype)]
    of_groups = ["scale", "offset"] if weight.zero in ZEROS else ["scale"]
    groups = [Param(name, (n, k // weight.group), weight.dtype) for name in of_groups]
    return [Param("w", (n, k // weight.per_word), "uint32"), *groups]


def product_params(op: Matmul) -> list[Param]:
    """All arguments of a matrix product."""
    bias = [Param("bias", (op.n,), op.dtype)] if op.bias else []
    residual = [Param("residual", (op.m, op.n), op.dtype)] if op.residual else []
    added = [*bias, *residual]
    return [Param("x", (op.m, op.k), op.dtype), *weight_params(op), *added, Param("y", (op.m, op.n), op.out)]


def product_call(function: str, numbers: Sequence[int], op: Matmul, last: Sequence[int] = ()) -> tuple[str, list[str]]:
    """The call of a matrix product's device function, and the buffers that it takes; "x" where it takes none.

    The plain product of symmetric weights has five, others two more: `offset` and `bias`. `last` are numbers behind
    what the function must know of such others, left out where it need not know.
    """
    weight = op.weight
    given = [*map(str, numbers), str(op.residual).lower(), str(DTYPES[op.out].cuda)]
    names = ["x", "w", "scale" if weight.group else "x", "residual" if op.residual else "x", "y"]
    if op.bias or weight not in PLAIN:
        given += [str(zero_of(weight)), str(op.bias).lower(), *map(str, last)]
        names += ["offset" if weight.zero in ZEROS else "x", "bias" if op.bias else "x"]
    return f"tb::{function}<{', '.join(given)}>", names


def zero_of(weight: WeightFormat) -> int:
    """What stands for 0, as `cuda/` takes it: an integer, or one of ZEROS."""
    return ZEROS.get(weight.zero, weight.zero_point)


def has_tensor_cores(op: Matmul, gpu: Gpu) -> bool:
    """Whether a GPU has the tensor cores, and the activations the type, that products for CUDA are written for."""
    return gpu.kind == "cuda" and gpu.arch >= 80 and op.dtype == "float16"


def shader_for(
    gpu: Gpu,
    params: Sequence[shader_dialect.Param],
    threads: int,
    body: str,
    shared: Sequence[shader_dialect.Shared] = (),
) -> Shader:
    """A kernel in the language of a GPU API; ValueError for a GPU that takes no source."""
    if gpu.language is None:
        raise ValueError("this template writes source for GPU APIs")
    return shader_dialect.shader(gpu.language, params, threads, body, shared)


def in_one_launch(made: Shader, blocks: Triple) -> Program:
    """A program of one kernel, over all of its buffers in order."""
    return Program({made.entry: made}, (Launch(made.entry, tuple(range(len(made.writes))), blocks),))
