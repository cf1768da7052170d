"""Normalisation as source text for GPU APIs: a block has a row, of which its threads read 8 halves at a time."""

from __future__ import annotations

from collections.abc import Sequence

from tunebench.kernels.operation import LayerNorm, RmsNorm
from tunebench.kernels.shader_dialect import Param, Shared, lane_sums
from tunebench.kernels.templates import Choices, Decisions, Gpu, Template, in_one_launch, shader_for
from tunebench.runtime.plan import Program

AT_ONCE = 8  # halves of a load


def _choices(op: RmsNorm | LayerNorm, gpu: Gpu) -> Choices:
    if gpu.language is None or op.dtype != "float16" or op.width % AT_ONCE:
        return {}
    return {"threads": [t for t in (32, 64, 128, 256, 512, 1024) if t <= min(gpu.threads, op.width // AT_ONCE)]}


def _text(op: RmsNorm | LayerNorm, decisions: Decisions, gpu: Gpu) -> Program:
    width, threads = op.width, decisions["threads"]
    centered, by_row = isinstance(op, LayerNorm), isinstance(op, RmsNorm) and op.residual
    loads = width // AT_ONCE
    pairs = [(c, f"x{c}", f"w{c}") for c in "xyzw"]
    less = " - vec2f(center, center)" if centered else ""
    added = {c: (f" + a{c}.x", f" + a{c}.y") if centered or by_row else ("", "") for c in "xyzw"}
    terms = (f"pack({x}.x * scale * {w}.x{added[c][0]}, {x}.y * scale * {w}.y{added[c][1]})" for c, x, w in pairs)
    unpacked = [f"    let {x} : vec2f = unpack(v.{c}){less};" for c, x, _ in pairs]
    more = [f"    let more : vec4u = added[{f'bid * {loads}u + i' if by_row else 'i'}];"]
    more += [f"    let a{c} : vec2f = unpack(more.{c});" for c in "xyzw"]

    def summed(name: str, unpacked: Sequence[str], terms: Sequence[str]) -> list[str]:
        return [
            f"  var {name} : f32 = 0.0f;",
            f"  for (var i : u32 = tid; i < {loads}u; i += {threads}u) {{",
            f"    let v : vec4u = x[bid * {loads}u + i];",
            *unpacked,
            *terms,
            "  }",
            *lane_sums([name], threads, threads, gpu.adds_lanes)[0],
            f"  if (tid == 0u) {{ mean[0] = {name}; }}",
            "  workgroupBarrier();",
        ]

    first = summed(
        "sum",
        [f"    let {x} : vec2f = unpack(v.{c});" for c, x, _ in pairs],
        [f"    sum += {x}.x + {x}.y;" for _, x, _ in pairs],
    )
    squares = [f"    total = fma({x}.x, {x}.x, fma({x}.y, {x}.y, total));" for _, x, _ in pairs]
    body = "\n".join(
        [
            "  let lane : u32 = tid;",
            *(
                [*first, f"  let center : f32 = mean[0] / {float(width)}f;", "  workgroupBarrier();"]
                if centered
                else []
            ),
            *summed("total", unpacked, squares),
            f"  let scale : f32 = 1.0f / sqrt(mean[0] / {float(width)}f + {op.epsilon:.9e}f);",
            f"  for (var i : u32 = tid; i < {loads}u; i += {threads}u) {{",
            f"    let v : vec4u = x[bid * {loads}u + i];",
            "    let g : vec4u = weight[i];",
            *unpacked,
            *(f"    let {w} : vec2f = unpack(g.{c});" for c, _, w in pairs),
            *(more if centered or by_row else []),
            f"    out[bid * {loads}u + i] = vec4u({', '.join(terms)});",
            "  }",
        ]
    )
    names = ["x", "weight", *(["added"] if centered or by_row else [])]
    params = [*(Param(name, "vec4u") for name in names), Param("out", "vec4u", True)]
    shared = lane_sums(["total"], threads, threads, gpu.adds_lanes)[1]
    made = shader_for(gpu, params, threads, body, [*shared, Shared("mean", "f32", 1)])
    return in_one_launch(made, (op.rows, 1, 1))


TEMPLATES = (
    Template("text-norm", RmsNorm, "for GPU APIs: a block a row", _choices, text=_text, takes=("residual",)),
    Template("text-layer-norm", LayerNorm, "for GPU APIs: a block a row", _choices, text=_text),
)
