"""Normalisation as source text for GPU APIs: a block has a row, of which its threads read 8 halves at a time."""

from __future__ import annotations

from tunebench.kernels.operation import RmsNorm
from tunebench.kernels.shader_dialect import Param, Shared, lane_sums
from tunebench.kernels.templates import Choices, Decisions, Gpu, Template, in_one_launch, shader_for
from tunebench.runtime.plan import Program

AT_ONCE = 8  # halves of a load


def _choices(op: RmsNorm, gpu: Gpu) -> Choices:
    if gpu.language is None or op.dtype != "float16" or op.width % AT_ONCE:
        return {}
    return {"threads": [t for t in (32, 64, 128, 256, 512, 1024) if t <= min(gpu.threads, op.width // AT_ONCE)]}


def _text(op: RmsNorm, decisions: Decisions, gpu: Gpu) -> Program:
    width, threads = op.width, decisions["threads"]
    loads = width // AT_ONCE
    pairs = [(c, f"x{c}", f"w{c}") for c in "xyzw"]
    sums, shared = lane_sums(["total"], threads, threads, gpu.adds_lanes)
    outs = ", ".join(f"pack({x}.x * scale * {w}.x, {x}.y * scale * {w}.y)" for _, x, w in pairs)
    unpacked = [f"    let {x} : vec2f = unpack(v.{c});" for c, x, _ in pairs]
    body = "\n".join(
        [
            "  let lane : u32 = tid;",
            "  var total : f32 = 0.0f;",
            f"  for (var i : u32 = tid; i < {loads}u; i += {threads}u) {{",
            f"    let v : vec4u = x[bid * {loads}u + i];",
            *unpacked,
            *(f"    total = fma({x}.x, {x}.x, fma({x}.y, {x}.y, total));" for _, x, _ in pairs),
            "  }",
            *sums,
            "  if (tid == 0u) { mean[0] = total; }",
            "  workgroupBarrier();",
            f"  let scale : f32 = 1.0f / sqrt(mean[0] / {float(width)}f + {op.epsilon:.9e}f);",
            f"  for (var i : u32 = tid; i < {loads}u; i += {threads}u) {{",
            f"    let v : vec4u = x[bid * {loads}u + i];",
            "    let g : vec4u = weight[i];",
            *unpacked,
            *(f"    let {w} : vec2f = unpack(g.{c});" for c, _, w in pairs),
            f"    out[bid * {loads}u + i] = vec4u({outs});",
            "  }",
        ]
    )
    params = [Param("x", "vec4u"), Param("weight", "vec4u"), Param("out", "vec4u", True)]
    made = shader_for(gpu, params, threads, body, [*shared, Shared("mean", "f32", 1)])
    return in_one_launch(made, (op.rows, 1, 1))


TEMPLATES = (Template("text-norm", RmsNorm, "for GPU APIs: a block a row", _choices, text=_text),)
