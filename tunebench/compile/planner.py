"""A lowered model -> a plan: TVM's memory planner decides on the buffers, `source` makes the kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import tvm
from tvm import relax

from tunebench.compile.fusion import Accept, Fuser, Invoked
from tunebench.compile.source import LANGUAGES, program
from tunebench.dtypes import numpy_dtype
from tunebench.kernels.templates import gpu_of
from tunebench.model.workload import Model, function_name, rope_cos_sin, rope_name
from tunebench.runtime.plan import Buffer, Facts, Kind, Launch, Plan, Program, Shader, Step

PASSES = (
    relax.transform.RewriteDataflowReshape,
    relax.transform.ToNonDataflow,
    relax.transform.RemovePurityChecking,
    relax.transform.CallTIRRewrite,
    relax.transform.StaticPlanBlockMemory,
    relax.transform.LowerAllocTensor,
)


def plan_model(
    mod: tvm.IRModule,
    model: Model,
    target: tvm.target.Target,
    kernels: Mapping[str, tvm.IRModule],
    accept: Accept | None = None,
) -> Plan:
    """The plan of a module after the prefix, with `kernels` scheduled, by the name that the module has for each.

    Neighbours are fused where that can be and `accept` agrees.
    """
    with target:
        lowered = tvm.ir.transform.Sequential([each() for each in PASSES])(mod)
    pool = _Pool()
    shared = _model_buffers(model, pool)
    programs = _renamed({name: program(kernel, target) for name, kernel in kernels.items()})
    builder = _Builder(pool, programs, Fuser(kernels, gpu_of(target), programs, accept))
    workload = model.workload
    steps = {
        m: builder.step(lowered[function_name(m)], [pool.input(workload.batch, m), *shared])
        for m in workload.chunk_sizes
    }
    facts = Facts(
        model.name, workload.scheme.name, workload.batch, workload.context, workload.chunks, model.config.vocab_size
    )
    return Plan(LANGUAGES[target.kind.name], facts, tuple(pool.buffers), builder.shaders, steps)


def _model_buffers(model: Model, pool: _Pool) -> list[_Value]:
    """What every step takes after its tokens: position, last token, rope_cos_sin, keys, values, weights."""
    keys, values = model.caches
    turns = rope_cos_sin(model)
    return [
        pool.add("position", "input", (1,), "int32"),
        pool.add("last_token", "input", (1,), "int32"),
        tuple(pool.add(rope_name(i), "constant", each.shape, "float32") for i, each in enumerate(turns)),
        tuple(pool.add(f"keys.{i}", "cache", *each) for i, each in enumerate(keys)),
        tuple(pool.add(f"values.{i}", "cache", *each) for i, each in enumerate(values)),
        tuple(pool.add(name, "weight", *known) for name, known in model.param_shapes.items()),
    ]


_Value = Any
"""What a variable of a function stands for: the place of a buffer, or a tuple of such."""


class _Pool:
    """The buffers of a plan as they come to be needed."""

    def __init__(self) -> None:
        self.buffers: list[Buffer] = []
        self._places: dict[str, int] = {}

    def add(self, name: str, kind: Kind, shape: Sequence[int], dtype: str) -> int:
        """The place of a new buffer."""
        size = math.prod(shape) * numpy_dtype(dtype).itemsize
        return self._set(Buffer(name, size, kind, tuple(shape), dtype))

    def input(self, batch: int, tokens: int) -> int:
        """The place of a step's tokens."""
        return self.add(f"tokens.{tokens}", "input", (batch, tokens), "int32")

    def scratch(self, name: str, size_bytes: int) -> int:
        """The place of scratch memory, which whoever asks by the same name shares."""
        known = self._places.get(name)
        if known is None or self.buffers[known].bytes < size_bytes:
            return self._set(Buffer(name, size_bytes, "scratch"))
        return known

    def _set(self, buffer: Buffer) -> int:
        place = self._places.setdefault(buffer.name, len(self.buffers))
        self.buffers[place : place + 1] = [buffer]
        return place


@dataclass
class _Builder:
    """Steps over one pool of buffers."""

    pool: _Pool
    programs: dict[str, Program]
    fuser: Fuser
    shaders: dict[str, Shader] = field(default_factory=dict)

    def step(self, func: relax.Function, given: Sequence[_Value]) -> Step:
        """The launches of one function, which has these buffers as parameters."""
        values: dict[Any, _Value] = dict(zip(func.params, given, strict=True))
        invoked: list[Invoked] = []
        storages = 0
        for block in func.body.blocks:
            for binding in block.bindings:
                value = binding.value
                if _is_call(value, "relax.memory.alloc_storage"):
                    (size,) = (int(extent) for extent in value.args[0].values)
                    values[binding.var] = self.pool.scratch(f"scratch.{storages}", size)
                    storages += 1
                elif isinstance(value, relax.Call) and isinstance(value.op, tvm.ir.GlobalVar):
                    invoked.append(Invoked(value.op.name_hint, tuple(values[arg] for arg in value.args)))
                else:
                    values[binding.var] = _value(value, values)
        logits = _value(func.body.body, values)[0]
        fused = self.fuser.fused(invoked, logits)
        self.programs.update(_renamed(self.fuser.programs))
        return Step(tuple(launch for each in fused for launch in self._launches(each)), logits)

    def _launches(self, invoked: Invoked) -> list[Launch]:
        """A kernel's launches, with its own scratch memory."""
        called = self.programs[invoked.kernel]
        self.shaders.update(called.shaders)
        own = [self.pool.scratch(f"kernel.{i}", size) for i, size in enumerate(called.scratch_bytes)]
        every = [*invoked.buffers, *own]
        return [Launch(each.shader, tuple(every[i] for i in each.buffers), each.blocks) for each in called.launches]


def _is_call(value: relax.Expr, operator: str) -> bool:
    return isinstance(value, relax.Call) and value.op == tvm.ir.Op.get(operator)


def _value(expr: relax.Expr, values: Mapping[Any, _Value]) -> _Value:
    """What an expression without effect stands for."""
    if isinstance(expr, relax.Tuple):
        return tuple(_value(field, values) for field in expr.fields)
    if isinstance(expr, relax.TupleGetItem):
        return _value(expr.tuple_value, values)[expr.index]
    if any(_is_call(expr, f"relax.{name}") for name in ("reshape", "memory.alloc_tensor")):
        return _value(expr.args[0], values)
    if expr in values:
        return values[expr]
    raise ValueError(f"a plan has no form for {expr}")


def _renamed(made: Mapping[str, Program]) -> dict[str, Program]:
    """Programs whose shaders have names of their own: the kernel's, and a number where it has several."""
    found = {}
    for kernel, each in made.items():
        names = {old: kernel if len(each.shaders) == 1 else f"{kernel}_{i}" for i, old in enumerate(each.shaders)}
        shaders = {names[old]: shader for old, shader in each.shaders.items()}
        launches = tuple(Launch(names[launch.shader], launch.buffers, launch.blocks) for launch in each.launches)
        found[kernel] = Program(shaders, launches, each.scratch_bytes)
    return found
