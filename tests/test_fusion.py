"""Products that take the normalisation before them and the gate after them, alone and in a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import tvm
from conftest import load_model, write_config
from template_cases import integers
from test_gpu_api import MATMUL, NVIDIA, device, emulated, engines, expected, plain, plain_kernel, run, target

from tunebench.compile import passes
from tunebench.compile.fusion import Accept, Fuser, Invoked, Pair
from tunebench.compile.planner import plan_model
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels import templates
from tunebench.kernels.operation import Matmul, RmsNorm, SiluMul
from tunebench.kernels.templates import FLOAT16, INT8, Gpu
from tunebench.model import workload as workloads
from tunebench.runners.bench import distance, random_inputs, too_far
from tunebench.runners.fusion import FusionJudge
from tunebench.runtime.apis import ApiDevice
from tunebench.runtime.plan import Launch, Program
from tunebench.tuning import spaces

__all__ = ["device", "emulated", "target"]  # fixtures

EPSILON = 1e-5
CASES: dict[str, dict[str, Any]] = {
    "norm": {"norm": EPSILON},
    "gate": {"gate": True, "residual": False},
    "norm and gate": {"norm": EPSILON, "gate": True, "residual": False},
    "norm of bytes": {"norm": EPSILON, "weight": INT8, "out": "float32", "residual": False},
    "norm and bias": {"norm": EPSILON, "bias": True},
    "norm of minima": {"norm": EPSILON, "weight": integers(4, "minimum", 64)},
    "norm and gate of floats": {"norm": EPSILON, "gate": True, "residual": False, "weight": FLOAT16},
}
NORM_ALONE = RmsNorm(rows=1, width=512, epsilon=EPSILON, dtype="float16")


def check_fused(device: ApiDevice, gpu: Gpu, case: dict[str, Any], pairs: int) -> None:
    """A fused kernel against the plain kernels one after the other, for inputs as large as they come."""
    op = replace(MATMUL, **case)
    alone = replace(op, norm=None, gate=False)
    x, *rest = random_inputs(plain(alone), 0, np.random.default_rng(0))
    gain = np.linspace(0.5, 2.0, op.k).astype(np.float16)
    x[0, 7] = 900.0 if op.norm else x[0, 7]
    given, wanted = [x], x
    if op.norm:
        given.append(gain)
        wanted = expected(plain(NORM_ALONE), [x, gain, np.zeros_like(x)])[-1]
    wanted = expected(plain(alone), [wanted, *rest])[-1]
    if op.gate:
        gate = passes.task_module(gpu_kernels.silu_mul(SiluMul(1, op.n // 2, "float16")))
        wanted = expected(gate, [wanted, np.zeros((1, op.n // 2), np.float16)])[-1]
    given += [*rest[:-1], np.full_like(wanted, np.nan)]
    ((template, _),) = templates.serving(alone, gpu).items()
    assert template.text
    for rows, lanes, unroll in ((2, 8, 1), (4, 16, 2)):
        decisions = {"rows": rows, "lanes": lanes, "threads": 64, "unroll": unroll, "pairs": pairs}
        found = run(device, template.text(op, decisions, gpu), given)[-1]
        assert not too_far(*distance(found, wanted), "float16")


@pytest.mark.parametrize("name", CASES)
def test_a_fused_kernel_computes_what_its_parts_do(device: ApiDevice, target: tvm.target.Target, name: str) -> None:
    check_fused(device, templates.gpu_of(target), CASES[name], 0)


@pytest.mark.parametrize("name", ["norm", "gate", "norm and gate"])
def test_fused_kernels_of_pairs_do_so_too(emulated: ApiDevice, name: str) -> None:
    check_fused(emulated, NVIDIA, CASES[name], 1)


def scheduled(mod: tvm.IRModule, gpu: Gpu, target: tvm.target.Target) -> dict[str, tvm.IRModule]:
    """Every kernel by name: products of one row by their template, the others by default."""
    kernels = {}
    for gv, func in mod.functions_items():
        if isinstance(func, tvm.tirx.PrimFunc):
            kernel = passes.task_module(func)
            kernels[gv.name_hint] = passes.default_schedule(kernel, target)
            operation = gpu_kernels.operation(func)
            if isinstance(operation, Matmul) and operation.m == 1:
                asked = spaces.Kernel((), 4, 0, operation=operation, gpu=gpu)
                space = spaces.spaces()["gpu-template"]
                (kernels[gv.name_hint],) = (
                    sch.mod
                    for sch in space.generate(tvm.s_tir.Schedule(kernel), asked)
                    if (chosen := templates.chosen(sch.mod["main"])) and chosen[0].takes
                )
    return kernels


def test_a_plan_of_fused_kernels_says_what_the_cpu_says(
    device: ApiDevice, target: tvm.target.Target, tmp_path: Path
) -> None:
    config = write_config(tmp_path, head_dim=64, hidden_size=256, intermediate_size=256)
    model = load_model(config, "q4f16_1", device_kind="gpu")
    mod = passes.prefix(workloads.build_module(model), target)
    kernels = scheduled(mod, templates.gpu_of(target), target)
    plan = plan_model(mod, model, target, kernels)
    fused = [launch.shader for launch in plan.steps[1].launches if launch.shader not in kernels]
    layers = model.config.num_hidden_layers
    assert sum("rms_norm" in name for name in fused) == 2 * layers + 1
    assert sum("silu_mul" in name for name in fused) == layers
    assert not any(launch.shader.startswith(("rms_norm", "silu")) and launch.shader in kernels for launch in one(plan))
    engine, ours = engines(device, plan, model, load_model(config, "q4f16_1", device_kind="cpu"))
    for i in range(6):
        wanted = ours.logits()
        assert np.abs(engine.logits() - wanted).max() < 0.05 * wanted.std()
        for each in (engine, ours):
            each.decode(np.array([[17 * i]], np.int32), 21 + i)


def one(plan: Any) -> tuple[Launch, ...]:
    """The launches of a generated token."""
    return tuple(plan.steps[1].launches)


def fuser(programs: Mapping[str, Program] = MappingProxyType({}), accept: Accept | None = None) -> Fuser:
    """Of a norm, a product of one row, a gate, and a product by default."""
    op = replace(MATMUL, residual=False)
    target = tvm.target.Target({"kind": "opencl", "keys": ["opencl", "gpu", "ptx"], "max_num_threads": 256})
    template = scheduled(tvm.IRModule({"product": plain_kernel(op)}), NVIDIA, target)["product"]
    gate = passes.task_module(gpu_kernels.silu_mul(SiluMul(1, 256, "float16")))
    return Fuser(
        {"norm": plain(NORM_ALONE), "product": template, "gate": gate, "default": plain(op)}, NVIDIA, programs, accept
    )


NORM, PRODUCT, GATE = Invoked("norm", (0, 1, 2)), Invoked("product", (2, 3, 4, 5)), Invoked("gate", (5, 6))


def test_what_is_refused_stays_apart() -> None:
    asked: list[str] = []

    def accept(pair: Pair) -> bool:
        asked.append(pair.name)
        return not pair.name.startswith("norm")

    programs = {name: Program({}, ()) for name in ("norm", "product", "gate")}
    made = fuser(programs, accept)
    for _ in range(2):  # and is not asked about again
        assert made.fused([NORM, PRODUCT, GATE], 6) == [NORM, Invoked("product_gate", (2, 3, 4, 6))]
    assert asked == ["norm_product", "product_gate", "norm_product_gate"]
    assert set(made.programs) == {"product_gate"}


def pairs_of(tmp_path: Path, target: tvm.target.Target) -> list[Pair]:
    """What is fused in a model."""
    config = write_config(tmp_path, head_dim=64, hidden_size=256, intermediate_size=256)
    model = load_model(config, "q4f16_1", device_kind="gpu")
    mod = passes.prefix(workloads.build_module(model), target)
    found: list[Pair] = []

    def note(pair: Pair) -> bool:
        found.append(pair)
        return True

    plan_model(mod, model, target, scheduled(mod, templates.gpu_of(target), target), note)
    return found


def test_a_fused_kernel_is_checked_and_timed_against_its_parts(
    device: ApiDevice, target: tvm.target.Target, tmp_path: Path
) -> None:
    judge = FusionJudge(device, 1)
    pairs = pairs_of(tmp_path, target)
    assert pairs
    for pair in pairs:
        used = judge(pair)
        assert "wrong" not in judge.decided[pair.name]
        assert used == judge.decided[pair.name].startswith("promoted: faster")
    wrong = replace(pairs[0], fused=(Program({}, ()), pairs[0].fused[1]))  # which writes nothing
    assert not judge(wrong)
    assert judge.decided[wrong.name].startswith("kept default: wrong output")


def test_a_chain_becomes_one() -> None:
    assert fuser().fused([NORM, PRODUCT, GATE], 6) == [Invoked("norm_product_gate", (0, 1, 3, 4, 6))]


@pytest.mark.parametrize(
    ("chain", "kept"),
    [
        ([NORM, PRODUCT, Invoked("default", (2, 3, 4, 7))], 7),  # somebody else reads the norm
        ([NORM, PRODUCT], 2),  # the norm is the result
        ([NORM, Invoked("default", (2, 3, 4, 5))], 5),  # a product that cannot
        ([NORM, Invoked("product", (2, 3, 4, 0))], 0),  # its outputs would overwrite what others still read
        ([NORM, Invoked("product", (8, 3, 4, 5))], 5),  # of something else
        ([PRODUCT, Invoked("gate", (5, 3))], 3),  # the same, of a gate
    ],
)
def test_what_others_need_is_not_fused(chain: list[Invoked], kept: int) -> None:
    assert fuser().fused(chain, kept) == chain


def test_a_buffer_that_is_written_again_may_be_read_later() -> None:
    chain = [NORM, PRODUCT, Invoked("norm", (5, 1, 2)), Invoked("default", (2, 3, 4, 7))]
    assert [each.kernel for each in fuser().fused(chain, 7)] == ["norm_product", "norm", "default"]
