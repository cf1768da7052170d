"""Each kernel that is no matrix product, in each of its forms, against numpy: on a CPU as it is and under schedules
drawn at random, and as what any GPU can run, compiled for the CPU."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, get_args

import ml_dtypes
import numpy as np
import pytest
import tvm
from conftest import cpu_target, draw_designs

from tunebench.compile import passes
from tunebench.compile.tasks import Task, family_key, over_cache, task_key
from tunebench.kernels import cpu as cpu_kernels
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels.arithmetic import KV_MOST
from tunebench.kernels.operation import (
    Activate,
    Activation,
    Append,
    Attention,
    LayerNorm,
    Operation,
    OverCache,
    RmsNorm,
    SiluMul,
)
from tunebench.kernels.tvmscript import quick_parsing

EPSILON = 1e-3  # large enough to show
FORMS = ("cpu", "cpu, drawn", "gpu")
TOLERANCE = {"float32": 2e-6, "float16": 2e-3, "bfloat16": 2e-2}
Array = np.ndarray
Arrays = Sequence[Array]
ROUNDED = {"int8": 0.51 / 127, "fp8": 1.01 / 16}  # of a head's largest, by half a step


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


def run(mod: tvm.IRModule, arrays: Arrays) -> list[Array]:
    """All arguments after a run on this CPU."""
    held = [tvm.runtime.tensor(array) for array in arrays]
    tvm.compile(mod, target=cpu_target())["main"](*held)
    return [each.numpy() for each in held]


def check(operation: Operation, form: str, given: Arrays, wanted: Array) -> None:
    """That a kernel of one output makes of `given` what is wanted, in float64."""
    dtype = given[0].dtype
    for mod in kernels(operation, form):
        found = run(mod, [*given, np.full(wanted.shape, np.nan, dtype)])[-1]
        bound = TOLERANCE[str(dtype)] * np.abs(wanted).max()
        np.testing.assert_allclose(found.astype(np.float64), wanted, rtol=0, atol=bound)


def normal(*shape: int, dtype: str = "float32", seed: int = 0) -> Array:
    """Noise that the type has exactly."""
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def activation(name: Activation, x: Array) -> Array:
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


def in_blocks(keys: Array) -> Array:
    """Keys [b, G, C, D] as a CPU's cache has them."""
    b, heads, context, dim = keys.shape
    blocks = keys.reshape(b, heads, context // cpu_kernels.LANES, cpu_kernels.LANES, dim)
    return np.ascontiguousarray(blocks.swapaxes(3, 4))


def quantized(x: Array, kv: str) -> tuple[Array, Array]:
    """Bytes of a quantized cache, and float32 scales, one for the last axis."""
    scales = (np.abs(x.astype(np.float32)).max(-1) / KV_MOST[kv]).astype(np.float32)
    steps = x.astype(np.float32) / scales[..., None]
    codes = np.rint(steps).astype(np.int8) if kv == "int8" else steps.astype(ml_dtypes.float8_e4m3fn)
    return codes.view(np.uint8), scales


def dequantized(codes: Array, scales: Array, kv: str) -> Array:
    """In float64."""
    return np.asarray(
        codes.view(np.int8 if kv == "int8" else ml_dtypes.float8_e4m3fn).astype(np.float64) * scales[..., None]
    )


def stored(keys: Array, values: Array, kv: str, form: str) -> list[Array]:
    """A cache [b, G, C, D], of bytes where it is quantized, as a form of the kernels has it."""
    if form == "gpu":
        return [each.view(np.uint32) if kv else each for each in (keys, values)]
    return [each.view(np.int8) if kv == "int8" else each for each in (in_blocks(keys), values)]


def attended(op: Attention, q: Array, keys: Array, values: Array, position: int, sinks: Array) -> Array:
    """Attention in float64."""
    share = op.heads // op.kv_heads
    q, keys, values = (each.astype(np.float64) for each in (q, keys, values))
    scores = np.einsum("bmhd,bhtd->bhmt", q, keys.repeat(share, 1)) * (op.scale or op.dim**-0.5)
    if op.softcap:
        scores = op.softcap * np.tanh(scores / op.softcap)
    at, other = position + np.arange(op.m)[:, None], np.arange(op.context)[None]
    scores[:, :, (other > at) | ((other <= at - op.window) & (op.window > 0))] = -np.inf
    weight = np.exp(scores)
    total = weight.sum(-1, keepdims=True) + op.sinks * np.exp(sinks.astype(np.float64))[None, :, None, None]
    return np.asarray(np.einsum("bhmt,bhtd->bmhd", weight / total, values.repeat(share, 1)))


EXTRAS: dict[str, dict[str, Any]] = {
    "plain": {},
    "scale": {"scale": 0.5},
    "softcap": {"softcap": 3.0},
    "a window within a block": {"window": 5},
    "a window of one": {"window": 1},
    "a window of blocks": {"window": 33},
    "sinks": {"sinks": True},
    "all": {"scale": 0.3, "softcap": 5.0, "window": 40, "sinks": True},
    "int8": {"kv": "int8"},
    "fp8 with all": {"scale": 0.3, "softcap": 5.0, "window": 40, "sinks": True, "kv": "fp8"},
}
HEADS: dict[str, Any] = {"heads": 6, "kv_heads": 2, "dim": 16, "context": 96, "dtype": "float32"}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "position"), [(1, 70), (5, 0), (32, 41)])
@pytest.mark.parametrize("extra", EXTRAS)
def test_attention(extra: str, m: int, position: int, form: str) -> None:
    attend(Attention(b=2, m=m, **HEADS, **EXTRAS[extra]), position, form)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "changed",
    [
        *({"dim": dim, "heads": 2, "kv_heads": 1} for dim in (80, 96, 100, 256)),
        {"heads": 3, "kv_heads": 3, "dtype": "float16"},
        {"heads": 7, "kv_heads": 1},
    ],
    ids=str,
)
def test_attention_of_any_heads(changed: dict[str, Any], form: str) -> None:
    attend(Attention(b=1, m=4, **{**HEADS, **changed}, **EXTRAS["all"]), 50, form)


def attend(op: Attention, position: int, form: str) -> None:
    """Check attention over a cache of noise."""
    q = normal(op.b, op.m, op.heads, op.dim, dtype=op.dtype)
    keys, values = (normal(op.b, op.kv_heads, op.context, op.dim, dtype=op.dtype, seed=seed) for seed in (1, 2))
    sinks = normal(op.heads, seed=3)
    scales = []
    if op.kv:
        (keys, of_keys), (values, of_values) = (quantized(each, op.kv) for each in (keys, values))
        scales = [np.stack([of_keys, of_values])]
    given = [q, *stored(keys, values, op.kv, form), np.array([position], np.int32), *[sinks] * op.sinks, *scales]
    if op.kv:
        keys, values = dequantized(keys, of_keys, op.kv), dequantized(values, of_values, op.kv)
    check(op, form, given, attended(op, q, keys, values, position, sinks))


def test_tokens_before_a_window_are_not_read_on_a_cpu() -> None:
    op = Attention(b=1, m=1, **HEADS, window=16)
    q, keys, values = normal(1, 1, 6, 16), normal(1, 2, 96, 16), normal(1, 2, 96, 16)
    wanted = attended(op, q, keys, values, 79, normal(6))
    keys[:, :, :64], values[:, :, :64] = np.nan, np.nan
    check(op, "cpu", [q, in_blocks(keys), values, np.array([79], np.int32)], wanted)


APPENDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "partial": {"rotary": 6},
    "normed": {"norm": EPSILON},
    "both": {"rotary": 6, "norm": EPSILON, "dim": 18},
    "both in halves": {"rotary": 8, "norm": EPSILON, "dtype": "float16"},
    "int8": {"kv": "int8"},
    "fp8 with both": {"rotary": 6, "norm": EPSILON, "dim": 20, "kv": "fp8"},
}


def turned(op: Append, x: Array, weight: Array, rope_cos_sin: Array, position: int) -> Array:
    """Heads [b, m, h, D], normed where they are to be and rotated, in float64."""
    x = x.astype(np.float64)
    if op.norm:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + op.norm) * weight
    cos, sin = (np.concatenate([each, each], -1)[position : position + op.m, None] for each in rope_cos_sin)
    part, rest = x[..., : op.rotated], x[..., op.rotated :]
    low, high = np.split(part, 2, axis=-1)
    return np.concatenate([part * cos + np.concatenate([-high, low], -1) * sin, rest], -1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("m", "position"), [(1, 70), (5, 14)])
@pytest.mark.parametrize("extra", APPENDS)
def test_append(extra: str, m: int, position: int, form: str) -> None:
    op = Append(b=2, m=m, **{**HEADS, **APPENDS[extra]})
    qkv = normal(op.b, m, op.heads + 2 * op.kv_heads, op.dim, dtype=op.dtype)
    turns = np.random.default_rng(1).uniform(0, 6, (op.context, op.rotated // 2))
    rope_cos_sin = np.stack([np.cos(turns), np.sin(turns)]).astype(np.float32)
    weights = [normal(op.dim, dtype=op.dtype, seed=seed) for seed in (2, 3)]
    keys, values = (normal(op.b, op.kv_heads, op.context, op.dim, dtype=op.dtype, seed=seed) for seed in (4, 5))
    q, k, v = np.split(qkv, [op.heads, op.heads + op.kv_heads], axis=2)
    new = slice(position, position + m)
    keys_after, values_after = keys.astype(np.float64), values.astype(np.float64)
    keys_after[:, :, new] = turned(op, k, weights[1], rope_cos_sin, position).swapaxes(1, 2)
    values_after[:, :, new] = v.swapaxes(1, 2)
    wanted = [keys_after, values_after, turned(op, q, weights[0], rope_cos_sin, position)]
    scales = np.zeros((2, *keys.shape[:-1]), np.float32)
    if op.kv:
        (keys, scales[0]), (values, scales[1]) = (quantized(each, op.kv) for each in (keys, values))
        keys_after, values_after = dequantized(keys, scales[0], op.kv), dequantized(values, scales[1], op.kv)
        keys_after[:, :, new], values_after[:, :, new] = wanted[0][:, :, new], wanted[1][:, :, new]
        wanted[:2] = keys_after, values_after
    norms = weights if op.norm else []
    held = [*stored(keys, values, op.kv, form), *[scales] * bool(op.kv)]
    given = [qkv, np.array([position], np.int32), rope_cos_sin, *norms, *held, np.full_like(q, np.nan)]
    bound = ROUNDED.get(op.kv, 4 * TOLERANCE[op.dtype])
    for mod in kernels(op, form):
        *_, found_q = found = run(mod, given)
        np.testing.assert_allclose(found_q.astype(np.float64), wanted[2], rtol=0, atol=4 * TOLERANCE[op.dtype])
        for which, exact in enumerate(wanted[:2]):
            after = read_back(found[len(given) - len(held) - 1 + which], which, op, form)
            if op.kv:
                after = dequantized(after, found[-2][which], op.kv)
            np.testing.assert_allclose(after.astype(np.float64), exact, rtol=0, atol=bound * np.abs(exact).max())


def read_back(held: Array, which: int, op: Append, form: str) -> Array:
    """Keys or values as [b, G, C, D], of bytes where the cache is quantized."""
    if form != "gpu" and which == 0:
        held = np.ascontiguousarray(held.swapaxes(3, 4)).reshape(op.b, op.kv_heads, op.context, op.dim)
    return held.view(np.uint8) if op.kv else held


SAYING = [
    *(Attention(b=1, m=4, **HEADS, **extras) for extras in EXTRAS.values()),
    *(Append(b=1, m=4, **{**HEADS, **extras}) for extras in APPENDS.values()),
]


@pytest.mark.parametrize("form", ["cpu", "gpu"])
@pytest.mark.parametrize("op", SAYING, ids=lambda op: op.text())
def test_a_kernel_over_the_cache_says_what_it_computes(op: OverCache, form: str) -> None:
    (mod,), (shorter,), (longer) = (kernels(each, form) for each in (op, replace(op, context=32), replace(op, m=8)))
    assert over_cache(mod) == op
    assert family_key(shorter) == family_key(mod)
    assert family_key(next(longer)) != family_key(mod)
