"""Kernels for GPUs: their mathematics on the CPU, their CUDA compiled without a GPU, and all of it on one."""

from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tvm
from conftest import cpu_target, load_model, write_config
from template_cases import EXTRAS, HEADS, MATMUL
from tvm import s_tir

from tunebench.compile import check as compile_check
from tunebench.compile import nvrtc, passes, tasks
from tunebench.devices import targets
from tunebench.errors import TuneBenchError
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels import templates
from tunebench.kernels.operation import Append, Attention, Matmul, Operation, RmsNorm, SiluMul
from tunebench.kernels.templates import FLOAT16, INT8, Gpu, Param, Template
from tunebench.kernels.tvmscript import quick_parsing
from tunebench.model import workload as workloads
from tunebench.tuning import spaces
from tunebench.tuning.database import Database
from tunebench.tuning.files import read_provenance

pytest.importorskip("cuda.bindings.nvrtc")

OPERATIONS: dict[str, Operation] = {
    "one row": MATMUL,
    "one row in float": replace(MATMUL, weight=FLOAT16, out="float32", residual=False),
    "one row of bytes": replace(MATMUL, weight=INT8),
    "uneven": replace(MATMUL, k=1408),
    "four rows": replace(MATMUL, m=4),
    "sixteen rows": replace(MATMUL, m=16),
    "many rows": replace(MATMUL, m=128),
    "many rows in float": replace(MATMUL, m=64, k=1024, out="float32", residual=False),
    "one token": Attention(b=2, m=1, **HEADS),
    "a longer chunk": Attention(b=2, m=32, **HEADS),
    "append": Append(b=2, m=3, **HEADS),
    "norm": RmsNorm(rows=3, width=4096, epsilon=1e-5, dtype="float16"),
}

COMPILED = ("many rows, 4-bit symmetric 64", "many rows, 4-bit zero_point 128", "many rows, 4-bit minimum 32")
COMPILED += ("many rows, 4-bit full range", "one row, 4-bit zero_point 32", "few rows, 8-bit minimum 64")
COMPILED += ("chunk, all of them", "chunk, heads of 256", "one token, all of them", "one token, heads of 256")
COMPILED += ("append, norms", "layer norm", "rms norm, added")
OPERATIONS |= {name: EXTRAS[name] for name in COMPILED}
"""Of the extras, those that CUDA's compiler sees in every run."""
HOPPER = {name for name in OPERATIONS if name.startswith("many rows")}


@pytest.fixture(autouse=True)
def cubins(tmp_path: Path) -> Iterator[None]:
    with nvrtc.compiling(tmp_path):
        yield


def gpu_target(arch: str = "sm_90") -> tvm.target.Target:
    limits = {"max_threads_per_block": 1024, "max_shared_memory_per_block": 49152, "thread_warp_size": 32}
    return tvm.target.Target({"kind": "cuda", "arch": arch, **limits})


def has_gpu() -> bool:
    return bool(tvm.device("cuda", 0).exist)


gpu = [pytest.mark.gpu, pytest.mark.skipif(not has_gpu(), reason="there is no GPU here")]


def drawn(operation: Operation, arch: int, count: int = 4) -> list[tuple[Template[Any], dict[str, int]]]:
    """Templates for an operation with decisions: first and last choices and some in between."""
    rng = random.Random(0)
    found = []
    for template, choices in templates.serving(operation, Gpu("cuda", arch)).items():
        ends = [{name: values[end] for name, values in choices.items()} for end in (0, -1)]
        between = [{name: rng.choice(values) for name, values in choices.items()} for _ in range(count)]
        found += [(template, decisions) for decisions in ends + between]
    return found


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.parametrize("arch", [80, 90])
def test_templates_compile(name: str, arch: int, tmp_path: Path) -> None:
    ways = drawn(OPERATIONS[name], arch)
    assert bool(ways) == (arch >= 90 or name not in HOPPER)
    for template, decisions in ways:
        func = template.build(OPERATIONS[name], decisions)
        source = nvrtc.build(tvm.IRModule({"main": func}), gpu_target(f"sm_{arch}"))
        assert "tb::" in source
        assert bool(re.search(r"/\* \d+ at once \*/", source)) == bool(
            re.search(r"__launch_bounds__\(\d+, \d+\)", source)
        )
    assert not ways or len(list(tmp_path.glob("*.cubin"))) >= 2  # other decisions are other kernels


def test_what_was_compiled_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    template, decisions = drawn(OPERATIONS["norm"], 90)[0]
    mod = tvm.IRModule({"main": template.build(OPERATIONS["norm"], decisions)})
    nvrtc.build(mod, gpu_target())

    def again(code: str) -> bytes:
        raise AssertionError("compiled a second time")

    monkeypatch.setattr(nvrtc, "compile_cuda", again)
    nvrtc.build(mod, gpu_target())


def test_a_mistake_in_cuda_says_where() -> None:
    with pytest.raises(RuntimeError, match=r"kernels.cu\(2\).*no_such_name"):
        nvrtc.compile_cuda("// sm_90\n__global__ void f() { no_such_name(); }\n")


def test_templates_serve_only_what_they_can() -> None:
    assert not any(template.build for template in templates.serving(OPERATIONS["one row"], Gpu("webgpu", 0)))
    assert not any(template.text for template in templates.serving(OPERATIONS["one row"], Gpu("cuda", 90)))
    assert not templates.serving(OPERATIONS["one row"], Gpu("metal", 0))
    assert not templates.serving(OPERATIONS["one row"], Gpu("cuda", 70))
    assert "cuda-warpgroup" not in {t.name for t in templates.serving(OPERATIONS["sixteen rows"], Gpu("cuda", 90))}
    assert "cuda-warpgroup" not in {t.name for t in templates.serving(OPERATIONS["many rows"], Gpu("cuda", 100))}
    assert "cuda-row" not in {t.name for t in templates.serving(OPERATIONS["four rows"], Gpu("cuda", 90))}
    assert not templates.serving(None, Gpu("cuda", 90))


def test_only_hopper_gets_clusters_and_early_launches() -> None:
    for arch, splits in ((80, {1}), (90, {2, 4, 8, 16})):
        (choices,) = templates.serving(OPERATIONS["one token"], Gpu("cuda", arch)).values()
        assert set(choices["splits"]) == splits
        assert set(choices["overlap"]) == ({0, 1} if arch >= 90 else {0})


def run_on_cpu(func: tvm.tirx.PrimFunc, *arrays: np.ndarray) -> None:
    """Run a kernel's plain loops; the last arrays are outputs."""
    with quick_parsing():
        kernel = tvm.compile(passes.task_module(func), target=cpu_target())["main"]
    held = [tvm.runtime.tensor(array) for array in arrays]
    kernel(*held)
    for array, tensor in zip(arrays, held, strict=True):
        array[...] = tensor.numpy()


def rotated(x: np.ndarray, rope_cos_sin: np.ndarray, position: int) -> np.ndarray:
    """[b, m, h, d] turned as Hugging Face's llama turns it."""
    half = x.shape[-1] // 2
    cos, sin = (np.concatenate([a, a], -1)[position : position + x.shape[1], None, :] for a in rope_cos_sin)
    return x * cos + np.concatenate([-x[..., half:], x[..., :half]], -1) * sin


@pytest.mark.parametrize("m", [1, 5])
def test_attention_with_its_cache_is_right(m: int) -> None:
    b, heads, kv_heads, dim, context, position = 2, 4, 2, 16, 32, 7
    rng = np.random.default_rng(0)
    qkv = rng.standard_normal((b, m, heads + 2 * kv_heads, dim)).astype(np.float32)
    keys, values = (rng.standard_normal((b, kv_heads, context, dim)).astype(np.float32) for _ in range(2))
    rope_cos_sin = np.stack(
        [np.cos(rng.uniform(0, 6, (context, dim // 2))), np.sin(rng.uniform(0, 6, (context, dim // 2)))]
    )
    rope_cos_sin = rope_cos_sin.astype(np.float32)
    q, at, before = np.zeros((b, m, heads, dim), np.float32), np.array([position], np.int32), keys.copy()
    shape = (b, m, heads, kv_heads, dim, context, "float32")
    run_on_cpu(gpu_kernels.append(Append(*shape)), qkv, at, rope_cos_sin, keys, values, q)
    np.testing.assert_allclose(q, rotated(qkv[:, :, :heads], rope_cos_sin, position), rtol=1e-5, atol=1e-5)
    turned = rotated(qkv[:, :, heads : heads + kv_heads], rope_cos_sin, position)
    np.testing.assert_allclose(keys[:, :, position : position + m], turned.swapaxes(1, 2), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(values[:, :, position : position + m], qkv[:, :, -kv_heads:].swapaxes(1, 2))
    np.testing.assert_array_equal(keys[:, :, position + m :], before[:, :, position + m :])

    out = np.zeros((b, m, heads, dim), np.float32)
    run_on_cpu(gpu_kernels.attention(Attention(*shape)), q, keys, values, at, out)
    rep = heads // kv_heads
    scores = np.einsum("bmhd,bhtd->bhmt", q, keys.repeat(rep, 1)) / np.sqrt(dim)
    scores[:, :, np.arange(context)[None] > position + np.arange(m)[:, None]] = -np.inf
    weight = np.exp(scores - scores.max(-1, keepdims=True))
    weight /= weight.sum(-1, keepdims=True)
    np.testing.assert_allclose(out, np.einsum("bhmt,bhtd->bmhd", weight, values.repeat(rep, 1)), rtol=1e-4, atol=1e-5)


def test_norm_and_gate_are_right() -> None:
    rng = np.random.default_rng(0)
    x, weight = rng.standard_normal((3, 48)).astype(np.float32), rng.standard_normal(48).astype(np.float32)
    out = np.zeros_like(x)
    run_on_cpu(gpu_kernels.rms_norm(RmsNorm(3, 48, 1e-5, "float32")), x, weight, out)
    np.testing.assert_allclose(out, x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * weight, rtol=1e-5, atol=1e-5)
    gated = np.zeros((3, 24), np.float32)
    run_on_cpu(gpu_kernels.silu_mul(SiluMul(3, 24, "float32")), x, gated)
    np.testing.assert_allclose(gated, x[:, :24] / (1 + np.exp(-x[:, :24])) * x[:, 24:], rtol=1e-5, atol=1e-5)


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> workloads.Model:
    """A llama of two layers, wide enough for every template."""
    sizes = {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 2}
    sizes |= {"head_dim": 64, "vocab_size": 512}
    config = write_config(tmp_path_factory.mktemp("wide"), **sizes)
    return load_model(config, "q4f16_1", chunks=(16, 128), context=256, device_kind="gpu")


@pytest.fixture(scope="module")
def found(wide: workloads.Model) -> list[tasks.Task]:
    return tasks.extract(passes.prefix(workloads.build_module(wide), gpu_target()), wide)


def test_every_kernel_builds_without_a_gpu(found: list[tasks.Task]) -> None:
    built = list(compile_check.build_all(found, gpu_target()))
    assert [each for each in built if each.error] == []
    assert {
        "cuda-row",
        "cuda-matvec",
        "cuda-attend-one",
        "cuda-attend-piece",
        "cuda-append",
        "cuda-rms-norm",
        "cuda-warpgroup",
    } <= {each.how for each in built}


def test_the_default_is_dlight_with_tensor_cores(found: list[tasks.Task]) -> None:
    prompt = next(task for task in found if task.name.startswith("matmul_4bit_128x768"))
    source = nvrtc.build(passes.default_schedule(prompt.mod, gpu_target()), gpu_target())
    assert "wmma" in source


def test_every_kernel_has_a_space(found: list[tasks.Task]) -> None:
    for task in found:
        sch = s_tir.Schedule(task.mod)
        operation = gpu_kernels.operation(task.mod["main"])
        kernel = spaces.Kernel(
            tuple(passes.block_names(sch)), 4, 0, operation=operation, gpu=templates.gpu_of(gpu_target())
        )
        matching = [
            space.name for space in spaces.spaces().values() if space.device == "gpu" and space.matches(sch, kernel)
        ]
        assert len(matching) <= 1
        assert matching, task.name


def test_a_records_trace_makes_the_templates_kernel(found: list[tasks.Task]) -> None:
    task = next(task for task in found if isinstance(gpu_kernels.operation(task.mod["main"]), RmsNorm))
    sch = s_tir.Schedule(task.mod)
    kernel = spaces.Kernel((), 4, 0, operation=gpu_kernels.operation(task.mod["main"]), gpu=Gpu("cuda", 90))
    (drawn_sch,) = spaces.spaces()["gpu-template"].generate(sch, kernel)
    fresh = s_tir.Schedule(task.mod)
    drawn_sch.trace.apply_to_schedule(fresh, remove_postproc=False)
    choice = templates.chosen(fresh.mod["main"])
    assert choice is not None
    assert choice[0].name == "cuda-rms-norm"
    assert choice[1] == dict(templates.chosen(drawn_sch.mod["main"])[1])  # type: ignore[index]
    assert templates.source(drawn_sch.trace) == "tuned"
    assert "tb::rms_norm" in passes.realize(fresh.mod).script()
    assert passes.realize(task.mod) is task.mod


@pytest.mark.parametrize("kind", ["opencl", "webgpu", "metal"])
def test_other_gpus_get_what_does_not_assume_cuda(kind: str, wide: workloads.Model) -> None:
    target = tvm.target.Target(kind)
    described = templates.gpu_of(target)
    assert described.kind == kind
    assert described.arch == 0
    found = tasks.extract(passes.prefix(workloads.build_module(wide), target), wide)
    for task in found:
        operation = gpu_kernels.operation(task.mod["main"])
        serving = templates.serving(operation, described)
        assert not any(template.build for template in serving)  # which are CUDA's
        assert not serving or kind != "metal"
        sch = s_tir.Schedule(task.mod)
        kernel = spaces.Kernel(tuple(passes.block_names(sch)), 4, 0, operation=operation, gpu=described)
        if isinstance(operation, SiluMul):
            (scheduled,) = spaces.spaces()["gpu-rows"].generate(sch, kernel)
            threads = [choice for choice in _thread_choices(scheduled) if choice > 8]
            assert max(threads) <= described.threads
            assert tvm.compile(scheduled.mod, target=target) is not None


def _thread_choices(sch: s_tir.Schedule) -> list[int]:
    """Every number that a sampled decision of the schedule may become."""
    sampled = [inst for inst in sch.trace.insts if inst.kind.name == "SampleCategorical"]
    return [int(value) for inst in sampled for value in inst.attrs[0]]


def test_targets_that_are_not_here_are_named() -> None:
    preset = targets.find("nvidia/nvidia-h100")
    assert not preset.runs_here
    assert templates.gpu_of(passes.tvm_target(preset, 1)) == Gpu("cuda", 90, shared_bytes=48 << 10)
    with pytest.raises(TuneBenchError, match="nvidia/nvidia-h100"):
        targets.find("nvidia/nvidia-h101")


COMMITTED = sorted(path.parent for path in Path(__file__).parent.parent.glob("tuning_logs/cuda-*/provenance.json"))


@pytest.mark.parametrize("folder", COMMITTED, ids=lambda folder: folder.name)
def test_committed_records_make_kernels(folder: Path) -> None:
    records = Database(folder, read_provenance(folder)).promoted().values()
    assert len(records) > 20
    made = Counter()
    for record in records:
        func = record.workload.mod["main"]
        if operation := gpu_kernels.operation(func):
            assert operation.text() == str(func.attrs[gpu_kernels.OP])  # by which records are found
        scheduled = tasks.replay(record.workload.mod, record)
        made[passes.realize(scheduled) is scheduled] += 1
    assert made[False] > made[True]  # most are templates


@pytest.fixture(scope="class")
def runner() -> Iterator[Any]:
    from tunebench.runners.cuda import CudaPrimitives
    from tunebench.runners.gpu import GpuRunner

    made = GpuRunner(passes.tvm_target(targets.find("cuda"), 0), 8, CudaPrimitives)
    yield made
    made.close()


class TestOnAGpu:
    pytestmark = gpu

    @pytest.mark.parametrize("name", [*OPERATIONS, *(name for name in EXTRAS if name not in OPERATIONS)])
    def test_templates_agree_with_the_default(self, name: str, runner: Any) -> None:
        from tunebench.runners.base import Candidate, MeasureInput, Timed, Trial
        from tunebench.timing import Protocol

        operation = {**EXTRAS, **OPERATIONS}[name]
        target = passes.tvm_target(targets.find("cuda"), 0)
        mod = passes.task_module(plain_kernel(operation))
        given = MeasureInput(name, tvm.ir.save_json(passes.default_schedule(mod, target)), 40, 1)
        once = Protocol(warmups=0, samples=1, least_samples=1)
        ways = drawn(operation, templates.gpu_of(target).arch, 12)
        assert ways or name.startswith("many rows, 8-bit")  # which the library alone has
        trial = Trial(given, once, 10**9)
        assert isinstance(runner.prepare(given, once), Timed)
        built = [tvm.IRModule({"main": t.build(operation, d)}) for t, d in ways]
        runner.build(trial, [Candidate(str(i), mod) for i, mod in enumerate(built)])
        outcomes = {str(way): runner.time(trial, str(i)) for i, way in enumerate(ways)}
        assert {way: outcome for way, outcome in outcomes.items() if not isinstance(outcome, Timed)} == {}

    def test_an_unfinished_output_is_wrong(self, runner: Any) -> None:
        from tunebench.runners.base import Candidate, MeasureInput, Timed, Trial, Wrong
        from tunebench.timing import Protocol

        target = passes.tvm_target(targets.find("cuda"), 0)
        mod = passes.task_module(gpu_kernels.rms_norm(RmsNorm(3, 4096, 1e-5, "float16")))
        given = MeasureInput("unfinished", tvm.ir.save_json(passes.default_schedule(mod, target)), 40, 1)
        trial = Trial(given, Protocol(warmups=0, samples=1, least_samples=1), 10**9)
        matrix, weight = Param("x", (3, 4096), "float16"), Param("weight", (4096,), "float16")
        args = ["x", "weight", "out", tvm.tirx.const(1e-5, "float32")]
        for rows in (2, 3):
            params = [matrix, weight, Param("out", (3, 4096), "float16")]
            func = templates.extern_kernel(params, (rows,), 128, "tb::rms_norm<4096, 128>", args)
            runner.build(trial, [Candidate(str(rows), tvm.IRModule({"main": func}))])
        assert isinstance(runner.time(trial, "2"), Wrong)
        assert isinstance(runner.time(trial, "3"), Timed)

    def test_a_model_tuned_and_not_agrees_with_the_cpu(self, tmp_path: Path) -> None:
        from typer.testing import CliRunner

        from tunebench.bench import arms
        from tunebench.cli import app, benching, inputs

        sizes = {"hidden_size": 512, "intermediate_size": 768, "num_attention_heads": 8, "num_key_value_heads": 2}
        config = write_config(tmp_path, **sizes, head_dim=64, vocab_size=512)
        common = ["-m", str(config), "-q", "q4f16_1", "--prompt", "32", "--context", "128"]
        common += ["--work-dir", str(tmp_path / "work"), "--target", "cuda"]
        result = CliRunner().invoke(app.app, ["tune", *common, "--trials", "8", "--time-limit", "60s", "--no-bench"])
        assert result.exit_code == 0, result.output
        result = CliRunner().invoke(app.app, ["bench", *common, "-p", "32", "-n", "8", "-r", "5"])
        assert result.exit_code == 0, result.output
        assert "tuned" in result.output
        logits = {}
        for name in ("cuda", "llvm"):
            session = inputs.open_session(name, 2, tmp_path / "work", "x")
            lowered = benching.lowered(session, inputs.workloads([str(config)], ["q4f16_1"], 1, "32", 128)[0])
            schedules = ("default", "tuned") if name == "cuda" else ("default",)
            plan = arms.Plan((), schedules)
            compiled = arms.compile_arms([lowered], plan, print, print)
            for arm, made in arms.load_arms(compiled, plan, print).items():
                engine, tokens = made.loaded, np.arange(40, dtype=np.int32)[None] * 7 % 512
                assert engine is not None
                engine.prefill(tokens[:, :32], 0)
                rows = [engine.logits()]
                for i in range(32, 40):
                    engine.decode(tokens[:, i : i + 1], i)
                    rows.append(engine.logits())
                logits[f"{name} {arm}"] = np.concatenate(rows)
        expected = logits.pop("llvm default")
        for name, found in logits.items():
            assert np.abs(found - expected).max() < 0.03 * expected.std(), name


def plain_kernel(op: Operation) -> tvm.tirx.PrimFunc:
    """An operation's kernel, as a model's export makes it."""
    if isinstance(op, Matmul):
        return _matmul(op)
    return getattr(gpu_kernels, op.kind)(op)


def _matmul(op: Matmul) -> tvm.tirx.PrimFunc:
    from tvm.relax.frontend import nn
    from tvm.relax.frontend.nn import spec

    from tunebench.model import quantization

    kind = quantization.kind_of(op.weight)
    shapes = kind.shapes(op.weight, op.n, op.k)

    class Product(nn.Module):
        def forward(self, x: nn.Tensor, bias: nn.Tensor, residual: nn.Tensor, parts: list[nn.Tensor]) -> nn.Tensor:
            held = dict(zip(shapes, parts, strict=True))
            weights = lambda *given: kind.weights(op.weight, *given)  # noqa: E731
            added = (residual if op.residual else None, bias if op.bias else None)
            return gpu_kernels.matmul(x, held, weights, op.n, op.weight, op.out, *added)

    given = {"x": spec.Tensor([op.m, op.k], op.dtype), "bias": spec.Tensor([op.n], op.dtype)}
    given |= {"residual": spec.Tensor([op.m, op.n], op.dtype)}
    parts = [spec.Tensor(shape, dtype) for shape, dtype in shapes.values()]
    module = Product()
    mod, _ = module.export_tvm(spec={"forward": {**given, "parts": parts}})
    return next(func for func in mod.functions.values() if isinstance(func, tvm.tirx.PrimFunc))
