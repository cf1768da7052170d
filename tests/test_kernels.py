"""Each kernel that is no matrix product, in each of its forms, against numpy: on a CPU as it is and under schedules
drawn at random, and as what any GPU can run, compiled for the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import get_args

import numpy as np
import pytest
import tvm
from conftest import cpu_target, draw_designs

from tunebench.compile import passes
from tunebench.compile.tasks import Task, task_key
from tunebench.kernels import cpu as cpu_kernels
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels.operation import Activate, Activation, LayerNorm, Operation, RmsNorm, SiluMul
from tunebench.kernels.tvmscript import quick_parsing

EPSILON = 1e-3  # large enough to show
FORMS = ("cpu", "cpu, drawn", "gpu")
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
Arrays = Sequence[np.ndarray]


def kernels(operation: Operation, form: str) -> Iterator[tvm.IRModule]:
    """The operation's kernel in one form; drawn, in each design of its space."""
    written = gpu_kernels if form == "gpu" else cpu_kernels
    with quick_parsing():
        mod = passes.task_module(getattr(written, operation.kind)(operation))
    if form != "cpu, drawn":
        yield mod
        return
    designs = draw_designs(Task(task_key(mod), operation.kind, mod, {1: 1}), cpu_target(), seed=0)
    assert designs
    yield from (design.mod for design in designs)


def run(mod: tvm.IRModule, arrays: Arrays) -> list[np.ndarray]:
    """All arguments after a run on this CPU."""
    held = [tvm.runtime.tensor(array) for array in arrays]
    tvm.compile(mod, target=cpu_target())["main"](*held)
    return [each.numpy() for each in held]


def check(operation: Operation, form: str, given: Arrays, wanted: np.ndarray) -> None:
    """That a kernel of one output makes of `given` what is wanted, in float64."""
    dtype = given[0].dtype
    for mod in kernels(operation, form):
        found = run(mod, [*given, np.full(wanted.shape, np.nan, dtype)])[-1]
        bound = TOLERANCE[str(dtype)] * np.abs(wanted).max()
        np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=0, atol=bound)


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> np.ndarray:
    """Noise that the type has exactly."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def activation(name: Activation, x: np.ndarray) -> np.ndarray:
    """An activation in float64."""
    if name == "gelu":
        share = 0.5 + 0.5 * np.vectorize(math.erf)(x / math.sqrt(2))
    elif name == "gelu_tanh":
        share = 0.5 + 0.5 * np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))
    else:
        share = 1 / (1 + np.exp(-x))
    return np.asarray(x * share)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", get_args(Activation))
@pytest.mark.parametrize(("width", "dtype"), [(96, "float32"), (37, "float32"), (48, "float16")])
def test_gates(name: Activation, width: int, dtype: str, form: str) -> None:
    x = 5 * normal(3, 2 * width, dtype=dtype)  # beyond the clamps, and where the activations are flat
    gate, up = np.split(x.astype(np.float64), 2, axis=1)
    if name == "clamped_swiglu":
        gate, up = np.minimum(gate, 7), np.clip(up, -7, 7)
        wanted = (up + 1) * gate / (1 + np.exp(-1.702 * gate))
    else:
        wanted = activation(name, gate) * up
    check(SiluMul(3, width, dtype, name), form, [x], wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", ["silu", "gelu", "gelu_tanh"])
@pytest.mark.parametrize(("width", "dtype"), [(96, "float32"), (37, "float32"), (48, "float16")])
def test_activations(name: Activation, width: int, dtype: str, form: str) -> None:
    x = 4 * normal(3, width, dtype=dtype)
    x[0, :4] = -100, 100, 0, -20
    check(Activate(3, width, dtype, name), form, [x], activation(name, x.astype(np.float64)))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("residual", [False, True])
@pytest.mark.parametrize(("width", "dtype"), [(64, "float32"), (100, "float32"), (127, "float32"), (80, "float16")])
def test_rms_norm(width: int, dtype: str, residual: bool, form: str) -> None:
    x, weight, added = (
        normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(3, width), (width,), (3, width)])
    )
    wide = x.astype(np.float64)
    wanted = wide / np.sqrt((wide**2).mean(-1, keepdims=True) + EPSILON) * weight
    given = [x, weight, added] if residual else [x, weight]
    check(RmsNorm(3, width, EPSILON, dtype, residual), form, given, wanted + added if residual else wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("width", "dtype"), [(64, "float32"), (100, "float32"), (127, "float32"), (80, "float16")])
def test_layer_norm(width: int, dtype: str, form: str) -> None:
    x, weight, bias = (normal(*shape, dtype=dtype, seed=i) for i, shape in enumerate([(3, width), (width,), (width,)]))
    x += np.array(2, dtype)
    wide = x.astype(np.float64)
    less = wide - wide.mean(-1, keepdims=True)
    wanted = less / np.sqrt((less**2).mean(-1, keepdims=True) + EPSILON) * weight + bias
    check(LayerNorm(3, width, EPSILON, dtype), form, [x, weight, bias], wanted)
