"""A quantized KV cache in a whole model: beside the float cache on the same weights and tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from conftest import cpu_target, draw_records, load_model, lower, relative_error, write_config

from tunebench.compile.build import compile_model
from tunebench.compile.planner import plan_model
from tunebench.engines.chunked import random_cache
from tunebench.engines.tvm import TvmEngine, load
from tunebench.errors import TuneBenchError
from tunebench.model.workload import random_weights

CHUNKS = (16,)
CLOSE = {"int8": 0.02, "fp8": 0.1}  # of the largest logit


def logits(config: Path, kv: str, drawn: bool = False) -> list[np.ndarray]:
    """Of a prompt of one chunk and three tokens, and of a chunk at depth, batch 2, weights five times the usual."""
    model = load_model(config, "q0f32", 2, chunks=CHUNKS, kv=kv)
    mod, found = lower(model, cpu_target())
    records = draw_records(found, cpu_target(), seed=1) if drawn else {}
    compiled = compile_model(mod, cpu_target(), records)
    weights = [(name, array if "norm" in name else 5 * array) for name, array in random_weights(model, seed=0)]
    engine = TvmEngine(model, compiled.executable, load(model, weights, tvm.cpu()), tvm.cpu())
    tokens = np.random.default_rng(0).integers(0, 128, (2, 35), np.int32)
    made = []
    for at, end in ((0, 16), (16, 17), (17, 18), (18, 19), (19, 35)):
        engine.prefill(tokens[:, at:end], at)
        made.append(engine.logits())
    return made


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[np.ndarray]]:
    config = write_config(tmp_path_factory.mktemp("kv"))
    return config, logits(config, "")


@pytest.mark.parametrize("drawn", [False, True], ids=["default", "drawn"])
@pytest.mark.parametrize("kv", CLOSE)
def test_logits_stay_close(kv: str, drawn: bool, floats: tuple[Path, list[np.ndarray]]) -> None:
    config, exact = floats
    errors = [relative_error(found, wanted) for found, wanted in zip(logits(config, kv, drawn), exact, strict=True)]
    assert max(errors) > 1e-5  # or the cache is the float one
    assert max(errors) < CLOSE[kv]


@pytest.mark.parametrize("device", ["cpu", "gpu"])
def test_it_takes_a_byte_an_element_and_a_scale_a_head(device: str, tmp_path: Path) -> None:
    config = write_config(tmp_path)
    half, eighth = (load_model(config, "q0f16", kv=kv, device_kind=device) for kv in ("", "int8"))
    elements, heads = half.cache_bytes // 2, half.cache_bytes // 2 // 16
    assert eighth.cache_bytes == elements + 4 * heads
    assert eighth.cache_read_bytes(eighth.workload.context) == eighth.cache_bytes


def test_a_plan_has_the_scales_beside_the_cache(tmp_path: Path) -> None:
    from tunebench.compile import passes
    from tunebench.devices.targets import presets

    target = passes.tvm_target(presets()["opencl"], 1)
    model = load_model(write_config(tmp_path), "q0f16", chunks=CHUNKS, kv="fp8", device_kind="gpu")
    mod, tasks = lower(model, target)
    kernels = {task.name: passes.default_schedule(task.mod, target) for task in tasks}
    plan = plan_model(mod, model, target, kernels)
    held = [buffer for buffer in plan.buffers if buffer.kind == "cache"]
    assert sum(buffer.bytes for buffer in held) == model.cache_bytes
    assert len(held) == 2 * 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"kv": "int4"}, "int4"), ({"kv": "int8", "device_kind": "gpu"}, "head_dim 18")],
)
def test_what_there_is_no_cache_for_is_one_line(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TuneBenchError, match=message):
        load_model(write_config(tmp_path, head_dim=18), "q0f32", **changes)


@pytest.mark.parametrize("dtype", ["int8", "uint8", "uint32"])
def test_made_up_bytes_are_ordinary_numbers(dtype: str) -> None:
    import ml_dtypes

    codes = random_cache((2, 3, 8), np.dtype(dtype)).view(np.uint8)
    assert len(np.unique(codes)) > 4
    floats = codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32)
    assert ((floats > 0.01) & (floats < 2)).all()
