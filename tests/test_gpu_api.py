"""GPU APIs on this machine, most of them on its CPU: kernels as source, a whole model as a plan, trials and a bench."""

from __future__ import annotations

import functools
import itertools
import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import tvm
from conftest import ASYMMETRIC, cpu_target, load_model, lower, need, write_config
from template_cases import EXTRAS, HEADS, OTHERS, integers
from test_cuda import plain_kernel

from tunebench.compile import passes, source, tasks
from tunebench.compile.build import compile_model, compile_plan
from tunebench.devices import opening, targets
from tunebench.engines.plan import Memory, PlanEngine
from tunebench.engines.tvm import TvmEngine, load
from tunebench.errors import TuneBenchError
from tunebench.kernels import shader_dialect, templates
from tunebench.kernels.operation import Append, Attention, Matmul, Operation, RmsNorm
from tunebench.kernels.templates import FLOAT16, INT4, INT8, Gpu
from tunebench.model import workload as workloads
from tunebench.model.workload import Model, random_weights, with_rope
from tunebench.runners.base import Candidate, MeasureInput, Timed, Trial, Wrong
from tunebench.runners.bench import distance, random_inputs, too_far, written
from tunebench.runners.gpu import GpuRunner
from tunebench.runners.shader import ShaderPrimitives
from tunebench.runtime import apis, plan
from tunebench.runtime.apis import ApiDevice, Call
from tunebench.runtime.plan import Program
from tunebench.spec import Scheme
from tunebench.timing import Protocol

SERVED = ("one row, 4-bit zero_point 64", "one row, 4-bit minimum 32", "one row, 8-bit minimum 128", *OTHERS)
SERVED += ("one token, all of them", "one token, heads of 80", "chunk, all of them")
"""Of the extras, those that devices see in every run."""
MATMUL = Matmul(m=1, n=512, k=512, out="float16", residual=True, dtype="float16", weight=INT4)
OPERATIONS: dict[str, Operation] = {
    "one row": MATMUL,
    "one row in float": replace(MATMUL, weight=FLOAT16, out="float32", residual=False),
    "one row of bytes": replace(MATMUL, weight=INT8),
    "one uneven row": replace(MATMUL, k=1376, residual=False),
    "one token": Attention(b=2, m=1, **HEADS),
    "one token of many heads": Attention(b=1, m=1, **{**HEADS, "kv_heads": 8}),
    "a chunk": Attention(b=2, m=16, **HEADS),
    "append": Append(b=2, m=3, **HEADS),
    "norm": RmsNorm(rows=3, width=1024, epsilon=1e-5, dtype="float16"),
}
PRODUCTS = {
    "sixteen rows": replace(MATMUL, m=16, k=256),
    "many rows": replace(MATMUL, m=64, k=256, out="float32", residual=False),
    "many rows in float": replace(MATMUL, m=32, k=256, weight=FLOAT16),
}
PRODUCTS |= {
    f"with {zero} and bias": replace(PRODUCTS["sixteen rows"], weight=integers(4, zero, group), bias=True)
    for zero, group in (("zero_point", 64), ("minimum", 32), ("minimum", 128))
}
OPERATIONS |= {name: EXTRAS[name] for name in SERVED}
MATRIX_GPU = Gpu("webgpu", 0, 256, 16 << 10, frozenset({"lanes32", "half", "pairs", "matrix16"}))
NVIDIA = Gpu("opencl", 0, 256, 32 << 10, frozenset({"ptx"}))
ONCE = Protocol(warmups=0, samples=1, least_samples=1)
EMULATED = (
    shader_dialect.OPENCL_PLAIN
    + r"""
inline float4 emulated(float4 c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1, __local uint *held) {
  const uint lane = get_local_id(0) % 32, base = get_local_id(0) / 32 * 192;
  const uint given[6] = {a0, a1, a2, a3, b0, b1};
  barrier(CLK_LOCAL_MEM_FENCE);
  for (int i = 0; i < 6; ++i) held[base + lane * 6 + i] = given[i];
  barrier(CLK_LOCAL_MEM_FENCE);
  float out[4] = {c.x, c.y, c.z, c.w};
  for (int i = 0; i < 4; ++i)
    for (uint q = 0; q < 4; ++q)
      for (uint h = 0; h < 2; ++h) {
        const float2 a = unpack(held[base + (lane / 4 * 4 + q) * 6 + i / 2 + 2 * h]);
        const float2 b = unpack(held[base + ((lane % 4 * 2 + i % 2) * 4 + q) * 6 + 4 + h]);
        out[i] += a.x * b.x + a.y * b.y;
      }
  return (float4)(out[0], out[1], out[2], out[3]);
}
inline float summed(float v, __local uint *held) {
  barrier(CLK_LOCAL_MEM_FENCE);
  held[get_local_id(0)] = as_uint(v);
  barrier(CLK_LOCAL_MEM_FENCE);
  float total = 0.0f;
  for (uint i = 0; i < 32; ++i) total += as_float(held[get_local_id(0) / 32 * 32 + i]);
  return total;
}
inline void copied(__local uint4 *to, uint place, __global const void *from, uint words) {
  for (uint i = 0; i < words; ++i) ((__local uint *)to)[place + i] = ((__global const uint *)from)[i];
}
#define copy4(to, place, from) copied(to, place, from, 1)
#define copy8(to, place, from) copied(to, place, from, 2)
#define copy16(to, place, from) copied(to, place, from, 4)
#define copies_end()
#define copies_wait(left)
#define sum32(v) summed(v, held_by_lanes)
#define mma(c, a0, a1, a2, a3, b0, b1) emulated(c, a0, a1, a2, a3, b0, b1, held_by_lanes)
"""
)
"""NVIDIA's 16 x 8 x 16 product, whose operands lie in 32 lanes as its manual says, by way of shared memory; copies to
shared memory that are there at once."""


@pytest.fixture(scope="module", params=["webgpu", "opencl"])
def device(request: pytest.FixtureRequest) -> ApiDevice:
    """The first device of an API."""
    return need(apis.open_device, request.param)


@pytest.fixture(scope="module")
def target(device: ApiDevice) -> tvm.target.Target:
    """TVM's target for it."""
    return tvm.target.Target(device.target())


def plain(op: Operation) -> tvm.IRModule:
    """An operation's kernel, as a model's export makes it."""
    return passes.task_module(plain_kernel(op))


def run(device: ApiDevice, program: Program, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The arguments after a program ran over them."""
    buffers = [device.allocate(array.nbytes) for array in arrays]
    for buffer, array in zip(buffers, arrays, strict=True):
        device.write(buffer, array)
    scratch = [device.allocate(size) for size in program.scratch_bytes]
    compiled = {name: device.compile(shader) for name, shader in program.shaders.items()}
    every = [*buffers, *scratch]
    calls = [Call(compiled[it.shader], [every[i] for i in it.buffers], it.blocks) for it in program.launches]
    device.record(calls).run()
    found = [device.read(buffer, array.nbytes) for buffer, array in zip(buffers, arrays, strict=True)]
    return [now.view(then.dtype).reshape(then.shape) for now, then in zip(found, arrays, strict=True)]


def expected(mod: tvm.IRModule, arrays: list[np.ndarray]) -> list[np.ndarray]:
    """The same on the CPU, without any schedule."""
    tensors = [tvm.runtime.tensor(array) for array in arrays]
    tvm.compile(mod, target="llvm")["main"](*tensors)
    return [tensor.numpy() for tensor in tensors]


def check(device: ApiDevice, mod: tvm.IRModule, made: list[Program], depth: int = 90) -> None:
    """Programs compute what the plain kernel does."""
    arrays = random_inputs(mod, depth, np.random.default_rng(0))
    wanted = expected(mod, arrays)
    arrays[-1] = np.full_like(arrays[-1], np.nan) if arrays[-1].dtype != np.int32 else arrays[-1]
    for program in made:
        found = run(device, program, arrays)
        for i in written(mod):
            assert not too_far(*distance(found[i], wanted[i]), "float16"), i


def draws(op: Operation, gpu: Gpu, count: int) -> list[Program]:
    """Programs of random decisions of each template that serves an operation."""
    made = []
    for template, choices in templates.serving(op, gpu).items():
        every = list(itertools.product(*choices.values()))
        random.Random(0).shuffle(every)
        assert template.text is not None
        made += [template.text(op, dict(zip(choices, values, strict=True)), gpu) for values in every[:count]]
    return made


@pytest.mark.parametrize("name", OPERATIONS)
def test_a_template_computes_what_the_plain_kernel_does(
    device: ApiDevice, target: tvm.target.Target, name: str
) -> None:
    op = OPERATIONS[name]
    made = draws(op, templates.gpu_of(target), 4)
    assert made
    check(device, plain(op), made)


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> ApiDevice:
    """OpenCL on a device that is not NVIDIA's, with NVIDIA's product emulated."""
    device = need(apis.open_device, "opencl")
    write = shader_dialect._opencl

    def opencl(*given: Any) -> str:
        held = "  __local uint held_by_lanes[192 * 8];\n  const uint tid ="
        return write(*given).replace(shader_dialect.OPENCL_PTX, EMULATED).replace("  const uint tid =", held)

    monkeypatch.setattr(shader_dialect, "_opencl", opencl)
    return device


@pytest.mark.parametrize("name", PRODUCTS)
def test_tiles_of_halves_compute_what_the_plain_kernel_does(name: str) -> None:
    device = need(apis.open_device, "webgpu")
    made = draws(PRODUCTS[name], templates.gpu_of(tvm.target.Target(device.target())), 3)
    assert made
    check(device, plain(PRODUCTS[name]), made)


@pytest.mark.parametrize("name", PRODUCTS)
def test_tensor_cores_get_their_operands_in_order(emulated: ApiDevice, name: str) -> None:
    op = PRODUCTS[name]
    made = draws(op, NVIDIA, 3)
    assert made
    check(emulated, plain(op), made)


def test_no_stage_is_copied_from_behind_the_end() -> None:
    op = replace(PRODUCTS["sixteen rows"], k=64)
    for program in draws(op, NVIDIA, 4):
        for shader in program.shaders.values():
            before, _, _ = shader.source.partition("for (uint g")
            assert 0 < before.count("  copies_end();") <= 2


MATRICES = """
fn halves(v : u32) -> vec2<f16> { return vec2<f16>(unpack2x16float(v)); }
fn word(v : vec2<f16>) -> u32 { return pack2x16float(vec2<f32>(v)); }
fn element(m : vec3u, row : u32, column : u32) -> f32 {
  let place = vec2u(select(row, column, m.y > 0u) * m.z, select(column, row, m.y > 0u));
  return unpack2x16float(tile[m.x + place.x + place.y / 8u][place.y / 2u % 4u])[place.y % 2u];
}
fn multiplied(lane : u32, a : vec3u, b : vec3u, c : array<f32, 8>) -> array<f32, 8> {
  var m = c;
  for (var i : u32 = 0u; i < 8u; i += 1u) { for (var k : u32 = 0u; k < 16u; k += 1u) {
    m[i] += element(a, lane / 2u, k) * element(b, k, lane % 2u * 8u + i); } }
  return m;
}
fn kept(lane : u32, at : u32, c : array<f32, 8>, stride : u32) {
  var m = c;
  for (var i : u32 = 0u; i < 8u; i += 1u) {
    let column = lane % 2u * 8u + i;
    tile[at + lane / 2u * stride + column / 4u][column % 4u] = bitcast<u32>(m[i]); }
}
@compute"""
"""Subgroup matrices for devices without them: operands as their place in shared memory, results in 8 for each lane."""


def without_matrices(source: str) -> str:
    """A shader of subgroup matrices for any device, as naga takes it."""
    source = re.sub(r"enable (subgroups|chromium\w+);\n|diagnostic.*\n", "", source)
    load = r"subgroupMatrixLoad<subgroup_matrix_\w+<f16, 16, 16>, (row|col)_major>\(&tile, (.*), (\d+u)\)"
    source = re.sub(load, lambda found: f"vec3u({found[2]}, {int(found[1] == 'col')}u, {found[3]})", source)
    source = source.replace("subgroup_matrix_result<f32, 16, 16>", "array<f32, 8>")
    source = re.sub(r"bitcast<u32>(?=\(\(|\(fma\()", "word", source)
    source = source.replace("bitcast<vec2<f16>>(", "halves(")
    source = source.replace("subgroupMatrixStore<row_major>(&tile, ", "kept(lane, ")
    return source.replace("subgroupMatrixMultiplyAccumulate(", "multiplied(lane, ").replace("@compute", MATRICES, 1)


@pytest.mark.parametrize("k", [64, 128, 256])
@pytest.mark.parametrize("name", PRODUCTS)
def test_subgroup_matrices_get_their_operands_in_order(name: str, k: int) -> None:
    device = need(apis.open_device, "webgpu")
    op = replace(PRODUCTS[name], n=64, k=max(k, 2 * PRODUCTS[name].weight.group))
    ((template, _),) = ((t, c) for t, c in templates.serving(op, MATRIX_GPU).items() if t.name == "text-matrix")
    assert template.text
    made = []
    for groups, warps in ((1, 4), (2, 4 if op.m == 16 else 8)):
        decisions = {"rows": min(op.m, 32), "width": 64, "warps": warps, "groups": groups}
        program = template.text(op, decisions, MATRIX_GPU)
        ((key, shader),) = program.shaders.items()
        changed = msgspec.structs.replace(shader, source=without_matrices(shader.source))
        made.append(replace(program, shaders={key: changed}))
    check(device, plain(op), made)


@pytest.mark.parametrize("name", OPERATIONS)
def test_sums_over_lanes_compute_what_the_plain_kernel_does(emulated: ApiDevice, name: str) -> None:
    made = draws(OPERATIONS[name], NVIDIA, 6)
    assert made
    check(emulated, plain(OPERATIONS[name]), made)


def test_pairs_of_halves_compute_what_the_plain_kernel_does(emulated: ApiDevice) -> None:
    op = OPERATIONS["one row"]
    ((template, choices),) = templates.serving(op, NVIDIA).items()
    assert template.text
    assert choices["pairs"] == [0, 1]
    made = []
    for rows, lanes, unroll in ((2, 8, 1), (4, 16, 2), (2, 64, 1), (2, 32, 1)):
        decisions = {"rows": rows, "lanes": lanes, "threads": 128, "unroll": unroll, "pairs": 1}
        made.append(template.text(op, decisions, NVIDIA))
    check(emulated, plain(op), made)


def test_subgroup_matrices_are_only_for_devices_that_have_them() -> None:
    without = replace(MATRIX_GPU, features=frozenset({"lanes32"}))
    assert not templates.serving(PRODUCTS["many rows"], without)


def tiny(tmp_path: Path, scheme: str | Scheme, device: str) -> Model:
    return load_model(write_config(tmp_path, head_dim=32, hidden_size=128), scheme, device_kind=device)


@pytest.mark.parametrize("scheme", ["q4f16_1", *ASYMMETRIC.values()], ids=["symmetric", *ASYMMETRIC])
def test_default_kernels_are_right_as_source(
    device: ApiDevice, target: tvm.target.Target, tmp_path: Path, scheme: str | Scheme
) -> None:
    model = tiny(tmp_path, scheme, "gpu")
    mod = passes.prefix(workloads.build_module(model), target)
    for task in tasks.extract(mod, model):
        check(device, task.mod, [source.program(passes.default_schedule(task.mod, target), target)], depth=20)


@pytest.mark.parametrize("scheme", ["q4f16_1", "q0f16"])
def test_a_plan_says_the_tokens_that_the_cpu_says(
    device: ApiDevice, target: tvm.target.Target, tmp_path: Path, scheme: str
) -> None:
    compare_tokens(device, target, tmp_path, scheme)


def compare_tokens(device: ApiDevice, target: tvm.target.Target, tmp_path: Path, scheme: str) -> None:
    """A plan, through its files, against the CPU's engine, token by token."""
    model = tiny(tmp_path, scheme, "gpu")
    compiled = compile_plan(passes.prefix(workloads.build_module(model), target), model, target, {})
    assert compiled.plan
    plan.write(compiled.plan, tmp_path / "plan")
    read = plan.read(tmp_path / "plan")
    assert read == compiled.plan
    assert read.scratch_bytes == compiled.planned_bytes > 0
    said = []
    for each in (found := engines(device, read, model, tiny(tmp_path, scheme, "cpu"))):
        tokens = []
        for i in range(12):
            tokens.append(int(each.logits().argmax()))
            each.decode(np.array([[tokens[-1]]], np.int32), 21 + i)
        said.append(tokens)
    assert said[0] == said[1]
    assert len(set(said[1])) > 1
    assert found[0].weight_bytes == model.weight_bytes


def engines(device: ApiDevice, made: plan.Plan, model: Model, cpu: Model) -> tuple[PlanEngine, TvmEngine]:
    """A plan and the CPU's engine on the same weights, after the same prompt of 21 tokens."""
    memory = Memory(device, made, with_rope(model, random_weights(model, 0)))
    mod, _ = lower(cpu, cpu_target())
    loaded = load(cpu, random_weights(cpu, 0), tvm.cpu())
    ours = TvmEngine(cpu, compile_model(mod, cpu_target(), {}).executable, loaded, tvm.cpu())
    engine = PlanEngine(made, memory)
    prompt = np.random.default_rng(1).integers(0, 128, (1, 21), np.int32)
    engine.prefill(prompt, 0)
    ours.prefill(prompt, 0)
    return engine, ours


def test_a_plan_without_its_weights_says_which(device: ApiDevice, target: tvm.target.Target, tmp_path: Path) -> None:
    model = tiny(tmp_path, "q4f16_1", "gpu")
    made = compile_plan(passes.prefix(workloads.build_module(model), target), model, target, {}).plan
    assert made
    some = [pair for pair in random_weights(model, 0) if "lm_head" not in pair[0]]
    with pytest.raises(TuneBenchError, match="weights are missing: rope_cos_sin, lm_head"):
        Memory(device, made, some)


def test_a_runner_times_right_kernels_and_refuses_wrong_ones(device: ApiDevice, target: tvm.target.Target) -> None:
    api, op = {"wgsl": "webgpu", "opencl": "opencl"}[source.LANGUAGES[target.kind.name]], MATMUL
    time_right_and_wrong(api, target, plain(op), plain(replace(op, n=256)))  # half of the outputs


def time_right_and_wrong(api: str, target: tvm.target.Target, mod: tvm.IRModule, wrong: tvm.IRModule) -> None:
    """An API's runner, given a right kernel and a wrong one."""
    right = passes.default_schedule(mod, target)
    trial = Trial(MeasureInput("it", tvm.ir.save_json(right), 8, 1 << 20), ONCE, 10**9)
    runner = GpuRunner(target, 1, functools.partial(ShaderPrimitives, api))
    try:
        default = runner.prepare(trial.given, ONCE)
        assert isinstance(default, Timed), default
        other = passes.default_schedule(wrong, target)
        runner.build(trial, [Candidate("right", right), Candidate("wrong", other)])
        assert isinstance(runner.time(trial, "right"), Timed)
        assert isinstance(runner.time(trial, "wrong"), Wrong)
        outcomes = runner.compare(trial.given, [Candidate("tuned", right)], ONCE)
        assert {name: type(each) for name, each in outcomes.items()} == {"default": Timed, "tuned": Timed}
    finally:
        runner.close()


def test_source_that_does_not_compile_says_where(device: ApiDevice, target: tvm.target.Target) -> None:
    language = shader_dialect.Language(source.LANGUAGES[target.kind.name])
    broken = shader_dialect.shader(
        language, [shader_dialect.Param("x", "u32", True)], 32, "  x[tid] = nothing_of_that_name;"
    )
    with pytest.raises(RuntimeError, match="nothing_of_that_name"):
        device.compile(broken)


@pytest.mark.parametrize("name", ["webgpu", "opencl"])
def test_tune_and_bench_on_several_targets(name: str, tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from tunebench import results
    from tunebench.cli import app
    from tunebench.results import Result

    need(opening.open_device, targets.find(name))
    config = write_config(tmp_path, head_dim=32, hidden_size=128)
    common = ["-m", str(config), "--prompt", "16", "--context", "64", "--work-dir", str(tmp_path / "work")]
    limits = ["--trials", "1", "--time-limit", "10s", "--phase", "decode", "--no-bench"]
    result = CliRunner().invoke(app.app, ["tune", "--target", name, *common, *limits])
    assert result.exit_code == 0, result.output
    both = ["--target", name, "--target", "metal", "--schedule", "default", "-p", "16", "-n", "4", "-r", "2"]
    result = CliRunner().invoke(app.app, ["bench", *common, *both])
    assert result.exit_code == 0, result.output
    rows, _ = results.read(tmp_path / "work/reports/local/results.jsonl")
    benched = [row for row in rows if isinstance(row, Result)]
    assert {(row.target, row.engine, row.status) for row in benched} == {
        (name, name, "ok"),
        ("metal", "tvm", "not_run"),
    }
    assert {row.reason for row in benched if row.target == "metal"} == {"no Metal device"}
    assert all(max(row.probe.values()) > 0 for row in benched if row.target == name)
    assert len({row.run_id for row in benched}) == 1


def test_kernels_that_add_up_over_lanes_compile_on_webgpu() -> None:
    device = need(apis.open_device, "webgpu")
    lanes = Gpu("webgpu", 0, 256, 16 << 10, frozenset({"lanes32"}))
    template, _ = next(iter(templates.serving(OPERATIONS["one row"], lanes).items()))
    assert template.text
    decisions = {"rows": 4, "lanes": 32, "threads": 128, "unroll": 1}
    with_lanes = template.text(OPERATIONS["one row"], decisions, lanes)
    subgroups = tvm.target.Target({**device.target(), "supports_subgroups": True})
    default = source.program(passes.default_schedule(plain(OPERATIONS["one row"]), subgroups), subgroups)
    for name, program in (("subgroupAdd", with_lanes), ("subgroupShuffleDown", default)):
        for shader in program.shaders.values():
            assert name in shader.source
            assert "enable subgroups;" in shader.source  # browsers want it, wgpu does not know it
            device.compile(shader)
