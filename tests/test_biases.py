"""Matrix products with a bias and a residual, of sizes that no tile divides: by default and under random schedules."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import tvm
from conftest import cpu_target, draw_designs
from tvm import tirx
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, spec

from tunebench.compile import passes
from tunebench.compile.tasks import Task, task_key
from tunebench.model import quantization
from tunebench.model.description import Matrix
from tunebench.model.stored_matrix import StoredMatrix
from tunebench.spec import Scheme

FLOATS = [("q0f32", 33, 100), ("q0f16", 37, 127), ("q0f32", 32001, 36)]
QUANTIZED = [("q4f16_1", 37, 96), ("q4f16_0", 37, 96), ("q8f16_1", 37, 96)]
INT8 = [("q4i8f16_0", 48, 96), ("q8i8f16_0", 48, 96)]
TOLERANCE = {"q0f32": 1e-6, "q4i8f16_0": 2e-2, "q8i8f16_0": 2e-2}  # elsewhere float16's


class Product(nn.Module):
    """A matrix times x, plus its bias and a residual, as a decoder's module computes it."""

    def __init__(self, scheme: Scheme, n: int, k: int) -> None:
        self.stored = StoredMatrix(Matrix("w", n, k, ()), scheme, "cpu")
        self.bias = nn.Parameter((n,), scheme.dtype)

    def step(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.stored.matmul(x, x.dtype, residual, self.bias)


def lowered(scheme: Scheme, m: int, n: int, k: int) -> tvm.IRModule:
    """The product's module after the prefix."""
    specs = {"x": spec.Tensor([m, k], scheme.dtype), "residual": spec.Tensor([m, n], scheme.dtype)}
    product = Product(scheme, n, k)
    mod, _ = product.export_tvm(spec={"step": {**specs, "$": {"param_mode": "plain", "effect_mode": "none"}}})
    return passes.prefix(mod, cpu_target())


def scheduled(mod: tvm.IRModule, drawn: bool) -> Iterator[tvm.IRModule]:
    """The module with its kernels by default, or in each design of the product's space; it has one."""
    kernels = {gv: passes.task_module(func) for gv, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)}
    ways = {gv: list(schedules(kernel, drawn)) for gv, kernel in kernels.items()}
    for i in range(max(map(len, ways.values()))):
        made = tvm.IRModule(dict(mod.functions_items()))
        for gv, each in ways.items():
            func = each[min(i, len(each) - 1)]["main"].with_attr("global_symbol", gv.name_hint)
            made.update_func(made.get_global_var(gv.name_hint), func)
        yield made


def schedules(kernel: tvm.IRModule, drawn: bool) -> list[tvm.IRModule]:
    if not drawn:
        return [passes.default_schedule(kernel, cpu_target())]
    task = Task(task_key(kernel), "product", kernel, {1: 1})
    return [design.mod for seed in (0, 1) for design in draw_designs(task, cpu_target(), seed)]


@pytest.mark.parametrize("drawn", [False, True], ids=["default", "drawn"])
@pytest.mark.parametrize("m", [1, 5])
@pytest.mark.parametrize(("name", "n", "k"), FLOATS + QUANTIZED + INT8)
def test_a_product_with_bias_and_residual(name: str, n: int, k: int, m: int, drawn: bool) -> None:
    scheme = quantization.schemes()[name]
    kind, rng = quantization.kind_of(scheme.weight), np.random.default_rng(0)
    parts = kind.quantize(scheme.weight, rng.uniform(-1, 1, (n, k)).astype(np.float32))
    x, residual, bias = (rng.uniform(-1, 1, shape).astype(scheme.dtype) for shape in ((m, k), (m, n), (n,)))
    wanted = x.astype(np.float64) @ kind.dequantize(scheme.weight, parts).T.astype(np.float64) + bias + residual
    for mod in scheduled(lowered(scheme, m, n, k), drawn):
        executable = tvm.compile(passes.tail(mod, cpu_target()), target=cpu_target(), relax_pipeline=None)
        machine = tvm.relax.VirtualMachine(executable, tvm.cpu())
        given = [tvm.runtime.tensor(array) for array in (x, residual, *parts.values(), bias)]
        found = machine["step"](*given).numpy().astype(np.float64)
        bound = TOLERANCE.get(name, 4e-3) * np.abs(wanted).max()
        np.testing.assert_allclose(found, wanted, rtol=0, atol=bound)
