"""Exact outputs of kernels as they were written: against NumPy in float64, and against what the kernels are."""

from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm.script import tirx as T

from tunebench.compile import in_float64, passes
from tunebench.runners.bench import distance, random_inputs, too_far, written
from tunebench.tuning.database import Database
from tunebench.tuning.files import read_provenance

LOGS = Path(__file__).parent.parent / "tuning_logs"


def test_sums_are_not_rounded_on_the_way() -> None:
    """In float16 each term vanishes beside the first."""

    @T.prim_func(s_tir=True)
    def total(x: T.Buffer((4096,), "float16"), out: T.Buffer((1,), "float16")):  # type: ignore[no-untyped-def,valid-type]
        for i in range(4096):
            with T.sblock("sum"):
                k = T.axis.reduce(4096, i)
                with T.init():
                    out[0] = T.float16(0)
                out[0] = out[0] + x[k]

    mod = tvm.IRModule({"main": total.with_attr("global_symbol", "main")})
    x = np.array([1024.0] + [0.25] * 4095, np.float16)
    found = in_float64.outputs(mod, [x, np.zeros(1, np.float16)])
    assert found[1].dtype == np.float64
    assert found[1][0] == 1024 + 0.25 * 4095
    assert x.dtype == np.float16


@pytest.mark.parametrize("folder", ["llvm-amd-epyc-znver5-2t", "cuda-nvidia-h200"])
def test_every_kind_of_kernel_has_exact_outputs(folder: str, target: tvm.target.Target) -> None:
    """Of each kind that a database holds, the smallest: within its type's tolerance of the kernel itself."""
    kinds: dict[str, tvm.IRModule] = {}
    for record in Database(LOGS / folder, read_provenance(LOGS / folder)).promoted().values():
        mod = record.workload.mod
        size = sum(int(np.prod([int(e) for e in param.shape])) for param in mod["main"].params)
        if size < 1 << 22:
            kinds.setdefault(",".join(param.name for param in mod["main"].params), mod)
    assert kinds
    for mod in kinds.values():
        arrays = random_inputs(mod, 40, np.random.default_rng(0))
        exact = in_float64.outputs(mod, arrays)
        kernel = tvm.compile(passes.default_schedule(mod, target), target=target)["main"]
        tensors = [tvm.runtime.tensor(array) for array in arrays]
        kernel(*tensors)
        half = any(array.dtype == np.float16 for array in arrays)
        for i in written(mod):
            dtype = "float16" if half and arrays[i].dtype == np.float32 else str(arrays[i].dtype)
            assert not too_far(*distance(tensors[i].numpy(), exact[i]), dtype)
