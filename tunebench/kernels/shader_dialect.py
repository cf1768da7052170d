"""Kernels written once for every language of GPU source: a common subset of WGSL and C, and what each adds around it.

In a body, every declaration has its type (`let a : f32 = ...;`, `var i : u32 = 0u;`), constructors are WGSL's
(`vec4f(...)`, `u32(...)`), loops and operators are what both have, and there are no private arrays: whoever writes a
kernel unrolls it. `tid` is the thread in its block, `bid` and `bid_y` the block. float16 is packed in pairs in u32.
Beyond WGSL's own functions: `unpack(u32) -> vec2f` and `pack(f32, f32) -> u32` of two halves, `as_f32`, `as_u32`,
`sum32(f32)` over the 32 lanes of a subgroup, `fma2(u32, u32, u32)` on two halves, and `paired`, eight halves as four
pairs of places 4 apart. Not every compiler takes f16 from the bits of a u32, as `fma2` does in WGSL: wgpu's does not.
Kernels of one language may use all of it: OpenCL C on NVIDIA has `mma` and copies to shared memory, WGSL has f16.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tunebench.dtypes import DTYPES
from tunebench.kernels.operation import Matmul
from tunebench.runtime.plan import Shader

ENTRY = "kernel_main"
LANGUAGES = {"webgpu": "wgsl", "opencl": "opencl"}
"""What kernels can be written in here, by TVM's target kind."""
C_TYPES = {
    "bool": "bool",
    **{each.short: each.opencl for each in DTYPES.values() if each.opencl},
    **{f"vec{n}{name[0]}": f"{DTYPES[name + '32'].opencl}{n}" for n in (2, 4) for name in ("float", "uint")},
}
"""OpenCL C's names of WGSL's types."""
WGSL = """\
fn unpack(v : u32) -> vec2f { return unpack2x16float(v); }
fn pack(a : f32, b : f32) -> u32 { return pack2x16float(vec2f(a, b)); }
fn as_f32(v : u32) -> f32 { return bitcast<f32>(v); }
fn as_u32(v : f32) -> u32 { return bitcast<u32>(v); }
"""
WGSL_PAIRS = """\
fn fma2(a : u32, b : u32, c : u32) -> u32 {
  return bitcast<u32>(fma(bitcast<vec2<f16>>(a), bitcast<vec2<f16>>(b), bitcast<vec2<f16>>(c)));
}
fn paired(v : vec4u) -> vec4u {
  return vec4u((v.x & 0xffff) | (v.z << 16), (v.x >> 16) | (v.z & 0xffff0000),
               (v.y & 0xffff) | (v.w << 16), (v.y >> 16) | (v.w & 0xffff0000));
}
"""
WGSL_MATRICES = [
    "enable chromium_experimental_subgroup_matrix;",
    "diagnostic(off, chromium.subgroup_matrix_uniformity);",  # which does not see that threads of a subgroup agree
]
WGSL_SUM = "fn sum32(v : f32) -> f32 { return subgroupAdd(v); }\n"
OPENCL = """\
#define workgroupBarrier() barrier(CLK_LOCAL_MEM_FENCE)
#define select(f, t, c) ((c) ? (t) : (f))
#define as_f32(v) as_float(v)
#define as_u32(v) as_uint(v)
#define f32(v) ((float)(v))
#define u32(v) ((uint)(v))
#define i32(v) ((int)(v))
#define vec2f (float2)
#define vec4f (float4)
#define vec2u (uint2)
#define vec4u (uint4)
inline uint word_of(__local const uint4 *from, uint place) { return ((__local const uint *)from)[place]; }
inline uint half_of(uint pair, uint which) { return (which ? pair >> 16 : pair & 0xffff) * 0x10001; }
inline uint4 paired(uint4 v) {
  return (uint4)((v.x & 0xffff) | (v.z << 16), (v.x >> 16) | (v.z & 0xffff0000),
                 (v.y & 0xffff) | (v.w << 16), (v.y >> 16) | (v.w & 0xffff0000));
}
"""
OPENCL_PLAIN = """\
inline float2 unpack(uint v) { return vload_half2(0, (const half *)&v); }
inline uint pack(float a, float b) { uint v; vstore_half2((float2)(a, b), 0, (half *)&v); return v; }
inline uint fma2(uint a, uint b, uint c) {
  const float2 v = fma(unpack(a), unpack(b), unpack(c));
  return pack(v.x, v.y);
}
"""
OPENCL_PTX = """\
inline float2 unpack(uint v) {
  float2 r;
  __asm__("{ .reg .f16 a, b; mov.b32 {a, b}, %2; cvt.f32.f16 %0, a; cvt.f32.f16 %1, b; }"
          : "=f"(r.x), "=f"(r.y) : "r"(v));
  return r;
}
inline uint pack(float a, float b) {
  uint r;
  __asm__("{ .reg .f16 a, b; cvt.rn.f16.f32 a, %1; cvt.rn.f16.f32 b, %2; mov.b32 %0, {a, b}; }"
          : "=r"(r) : "f"(a), "f"(b));
  return r;
}
inline uint fma2(uint a, uint b, uint c) {
  uint r;
  __asm__("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(r) : "r"(a), "r"(b), "r"(c));
  return r;
}
inline float4 mma(float4 c, uint a0, uint a1, uint a2, uint a3, uint b0, uint b1) {
  __asm__("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+f"(c.x), "+f"(c.y), "+f"(c.z), "+f"(c.w) : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
  return c;
}
#define COPY(bytes, how) \
  inline void copy##bytes(__local uint4 *to, uint place, __global const void *from) { \
    const uint at = (uint)(size_t)to + 4 * place; \
    __asm__ volatile("cp.async." how ".shared.global [%0], [%1], " #bytes ";" : : "r"(at), "l"(from) : "memory"); \
  }
COPY(4, "ca")
COPY(8, "ca")
COPY(16, "cg")
#define copies_end() __asm__ volatile("cp.async.commit_group;" : : : "memory")
#define copies_wait(left) __asm__ volatile("cp.async.wait_group %0;" : : "n"(left) : "memory")
inline float sum32(float v) {
  for (int step = 16; step > 0; step /= 2) {
    float other;
    __asm__ volatile("shfl.sync.bfly.b32 %0, %1, %2, 31, 0xffffffff;" : "=f"(other) : "f"(v), "r"(step));
    v += other;
  }
  return v;
}
"""
DECLARATION = re.compile(r"\b(let|var) (\w+) : (\w+)")


@dataclass(frozen=True)
class Language:
    """What a kernel is written for."""

    name: str  # wgsl or opencl
    ptx: bool = False  # NVIDIA's assembly within OpenCL C


@dataclass(frozen=True)
class Param:
    """A buffer argument: its name in the body, and the type of an element."""

    name: str
    element: str
    writes: bool = False


@dataclass(frozen=True)
class Shared:
    """An array that the threads of a block share."""

    name: str
    element: str
    count: int


def shader(
    language: Language, params: Sequence[Param], threads: int, body: str, shared: Sequence[Shared] = ()
) -> Shader:
    """A kernel in one language."""
    source = (
        _wgsl(params, threads, body, shared)
        if language.name == "wgsl"
        else _opencl(language, params, threads, body, shared)
    )
    return Shader(ENTRY, source, (threads, 1, 1), tuple(param.writes for param in params))


def _wgsl(params: Sequence[Param], threads: int, body: str, shared: Sequence[Shared]) -> str:
    elements = [*(each.element for each in params), *(each.element for each in shared)]
    sums, pairs = "sum32(" in body, "fma2(" in body or "paired(" in body
    half = pairs or any("f16" in text for text in (body, *elements))
    lines = ["enable f16;"] * half
    matrices = "subgroup_matrix" in body
    lines += ["enable subgroups;"] * (sums or matrices) + WGSL_MATRICES * matrices
    for i, param in enumerate(params):
        access = "read_write" if param.writes else "read"
        lines.append(f"@group(0) @binding({i}) var<storage, {access}> {param.name} : array<{param.element}>;")
    lines += [f"var<workgroup> {each.name} : array<{each.element}, {each.count}>;" for each in shared]
    head = "\n".join(lines)
    return f"""{head}
{WGSL}{WGSL_SUM * sums}{WGSL_PAIRS * pairs}
@compute @workgroup_size({threads}, 1, 1)
fn {ENTRY}(@builtin(workgroup_id) block_id : vec3u, @builtin(local_invocation_id) thread_id : vec3u) {{
  let tid : u32 = thread_id.x;
  let bid : u32 = block_id.x;
  let bid_y : u32 = block_id.y;
{body}
}}
"""


def _opencl(language: Language, params: Sequence[Param], threads: int, body: str, shared: Sequence[Shared]) -> str:
    arguments = ", ".join(
        f"__global {'' if param.writes else 'const '}{C_TYPES[param.element]} *restrict {param.name}"
        for param in params
    )
    arrays = "\n".join(f"  __local {C_TYPES[each.element]} {each.name}[{each.count}];" for each in shared)

    def declared(found: re.Match[str]) -> str:
        kind, name, element = found.groups()
        return f"{'const ' * (kind == 'let')}{C_TYPES[element]} {name}"

    return f"""{OPENCL}{OPENCL_PTX if language.ptx else OPENCL_PLAIN}
__kernel __attribute__((reqd_work_group_size({threads}, 1, 1))) void {ENTRY}({arguments}) {{
{arrays}
  const uint tid = get_local_id(0), bid = get_group_id(0), bid_y = get_group_id(1);
{DECLARATION.sub(declared, body)}
}}
"""


def nibble(word: str, place: int, bits: int) -> str:
    """The integer of so many bits at a place of a word, as the float 1 + integer / 2^bits."""
    low, top = place * bits, 23 - bits
    moved = f"({word} << {top - low}u)" if low <= top else f"({word} >> {low - top}u)"
    return f"as_f32(({moved} & {(2**bits - 1) << top:#x}u) | 0x3f800000u)"


def both_halves(value: float) -> str:
    """A float16 twice, as a word."""
    return f"{int(np.float16(value).view(np.uint16)) * 0x10001:#010x}u"


def lane_sums(names: Sequence[str], lanes: int, threads: int, adds_lanes: bool) -> tuple[list[str], list[Shared]]:
    """Add variables up over groups of `lanes` threads, of which `lane == 0u` has the sums; with its shared memory."""
    if lanes % 32 == 0 and adds_lanes:
        lines, parts, across = [f"  {name} = sum32({name});" for name in names], lanes // 32, threads // 32
        if parts == 1:
            return lines, []
        kept = " ".join(f"sums[{i * across}u + tid / 32u] = {name};" for i, name in enumerate(names))
        lines += [f"  if (tid % 32u == 0u) {{ {kept} }}", "  workgroupBarrier();"]
        for i, name in enumerate(names):
            first = f"{i * across}u + tid / {lanes}u * {parts}u"
            lines.append(f"  {name} = {' + '.join(f'sums[{first} + {part}u]' for part in range(parts))};")
        return lines, [Shared("sums", "f32", len(names) * across)]
    lines = [f"  sums[{i * threads}u + tid] = {name};" for i, name in enumerate(names)] + ["  workgroupBarrier();"]
    step = lanes // 2
    while step:
        at = [f"sums[{i * threads}u + tid" for i in range(len(names))]
        lines += [f"  if (lane < {step}u) {{"]
        lines += [f"    {each}] = {each}] + {each} + {step}u];" for each in at]
        lines += ["  }", "  workgroupBarrier();"]
        step //= 2
    lines += [f"  {name} = sums[{i * threads}u + tid];" for i, name in enumerate(names)]
    return lines, [Shared("sums", "f32", len(names) * threads)]


def product_params(x: str, w: str, group: str, op: Matmul) -> list[Param]:
    """A product's buffers, in the order of its arguments: elements of x, w and of what groups have, scales first."""
    of_groups = ["scale"] * bool(op.weight.group) + ["offset"] * (op.weight.zero != "symmetric")
    params = [Param("x", x), Param("w", w), *(Param(name, group) for name in of_groups)]
    params += [Param(name, "u32") for name, there in (("bias", op.bias), ("residual", op.residual)) if there]
    return [*params, Param("y", "u32" if op.out == "float16" else "f32", True)]


def store_pair(name: str, word: str, pair: tuple[str, str], op: Matmul) -> list[str]:
    """Two outputs of a matrix product that are neighbours, the word-th pair of y, with what is added to them."""
    a, b = pair
    lines = [f"  let {name} : u32 = {word};"]
    if op.bias:
        lines.append(f"  let b{name} : vec2f = unpack(bias[{name} % {op.n // 2}u]);")
        a, b = f"{a} + b{name}.x", f"{b} + b{name}.y"
    if op.residual:
        lines.append(f"  let r{name} : vec2f = unpack(residual[{name}]);")
        a, b = f"{a} + r{name}.x", f"{b} + r{name}.y"
    if op.out == "float16":
        return [*lines, f"  y[{name}] = pack({a}, {b});"]
    return [*lines, f"  y[2u * {name}] = {a};", f"  y[2u * {name} + 1u] = {b};"]
