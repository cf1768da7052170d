"""Products on a CPU with weights of every scheme, against numpy: plain loops, default and random schedules."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from conftest import cpu_target, draw_records
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, spec

from tunebench.compile import passes
from tunebench.compile.build import compile_model
from tunebench.compile.tasks import Task, task_key
from tunebench.kernels.tvmscript import quick_parsing
from tunebench.model import quantization
from tunebench.model.quantization import Arrays, kind_of
from tunebench.spec import WHOLE_ROW, Scheme, WeightFormat

N, K = 48, 512
SCHEMES = quantization.schemes()
FP8 = {"dtype": "float32", "code": "float8_e4m3fn"}
MORE = {
    "fp8 blocks": WeightFormat("codes", 8, group=128, rows=128, **FP8),
    "int8 with a zero point": WeightFormat("integer", 8, "float16", 64, "zero_point"),
    "act-order": WeightFormat("integer", 4, "float16", 128, "zero_point", ordered=True),
    "rows of 4 bits": WeightFormat("integer", 4, "float16", WHOLE_ROW, full_range=True),
}
"""Formats that checkpoints have and no scheme."""
BYTES = {
    "4 bits with a zero point": WeightFormat("integer", 4, "float16", 128, "zero_point", "N16", "by_byte"),
    "8 bits with a minimum": WeightFormat("integer", 8, "float16", 32, "minimum", "N16", "by_byte"),
}
ALL = (
    SCHEMES
    | {name: Scheme(name, form, "float16") for name, form in MORE.items()}
    | {name: Scheme(name, form, "float16", "int8") for name, form in BYTES.items()}
)


class Product(nn.Module):
    """x [M, K] -> [M, N], with weights of a scheme."""

    def __init__(self, scheme: Scheme, n: int, k: int) -> None:
        self.scheme, self.kind = scheme, kind_of(scheme.weight)
        self.shapes = self.kind.shapes(scheme.weight, n, k)
        for name, (shape, dtype) in self.shapes.items():
            setattr(self, name, nn.Parameter(shape, dtype))

    def forward(self, x: Tensor) -> Tensor:
        return self.kind.matmul(self.scheme, x, {name: getattr(self, name) for name in self.shapes}, "float32")


def lowered(scheme: Scheme, m: int, n: int, k: int, target: tvm.target.Target) -> tuple[tvm.IRModule, list[Task]]:
    """The product, and its kernels as tasks."""
    given = {"x": spec.Tensor([m, k], scheme.dtype), "$": {"param_mode": "plain", "effect_mode": "none"}}
    with quick_parsing():
        mod, _ = Product(scheme, n, k).export_tvm(spec={"forward": given})
    mod = passes.prefix(mod, target)
    kernels = {
        gv.name_hint: passes.task_module(func)
        for gv, func in mod.functions_items()
        if isinstance(func, tvm.tirx.PrimFunc)
    }
    return mod, [Task(task_key(kernel), name, kernel, {m: 1}) for name, kernel in kernels.items()]


def example(scheme: Scheme, m: int, n: int = N, k: int = K) -> tuple[np.ndarray, Arrays, np.ndarray]:
    """x, the parts, and their product in numpy."""
    rng = np.random.default_rng(len(scheme.name) + m)
    form, kind = scheme.weight, kind_of(scheme.weight)
    importance = rng.uniform(0.5, 2, k) if form.ordered else None
    parts = kind.quantize(form, rng.standard_normal((n, k)).astype(np.float32) * 0.02 + 0.01, importance)
    x = rng.standard_normal((m, k)).astype(scheme.dtype)
    return x, parts, multiplied(scheme, x.astype(np.float32)) @ kind.dequantize(form, parts)[:n, :k].T


def multiplied(scheme: Scheme, x: np.ndarray) -> np.ndarray:
    """Activations as the scheme multiplies them."""
    if scheme.activations == "float":
        return x
    groups = x.reshape(len(x), -1, x.shape[1] if scheme.activations == "int8_token" else scheme.weight.byte_group)
    scale = np.abs(groups).max(-1, keepdims=True) / np.float32(127)
    return np.asarray(np.floor(groups / scale + np.float32(0.5)) * scale).reshape(x.shape)


@pytest.fixture(scope="module")
def target() -> tvm.target.Target:
    return cpu_target()


@pytest.mark.parametrize("seed", [None, 1], ids=["default", "random"])
@pytest.mark.parametrize("m", [1, 4])
@pytest.mark.parametrize("name", ALL)
def test_a_product_is_that_of_the_weights_it_holds(
    name: str, m: int, seed: int | None, target: tvm.target.Target
) -> None:
    scheme = ALL[name]
    x, parts, wanted = example(scheme, m)
    mod, found = lowered(scheme, m, N, K, target)
    records = {} if seed is None else draw_records(found, target, seed)
    machine = relax.VirtualMachine(compile_model(mod, target, records).executable, tvm.cpu())
    y = machine["forward"](tvm.runtime.tensor(x), *map(tvm.runtime.tensor, parts.values())).numpy()
    np.testing.assert_allclose(y, wanted, atol=(2e-3 if scheme.activations != "float" else 1e-5) * np.abs(wanted).max())
