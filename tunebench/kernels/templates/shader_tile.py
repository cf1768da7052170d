"""Many rows with a weight matrix, as WGSL for GPUs without matrix units: pairs of halves, added up in single precision.

A thread has a tile of outputs, for each a pair of half sums over even and odd places of k, which go to float32 before
they get long. Rows of the tiles in shared memory are spaced so that neighbouring threads read from different banks.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tunebench.kernels.operation import Matmul
from tunebench.kernels.shader_dialect import Shared, nibble, product_params, store_pair
from tunebench.kernels.templates import Choices, Decisions, Gpu, Template, in_one_launch, shader_for
from tunebench.runtime.plan import Program

GROUP = 32  # places of k that are in shared memory at once
ROW = 9  # vectors of 4 halves from one row to the next: 8, and one to spare
FLUSH = 2  # groups that are added up in half precision
ACROSS = 100  # "tile": this many times the rows of a thread, and its columns


def _choices(op: Matmul, gpu: Gpu) -> Choices:
    m, n = op.m, op.n
    if gpu.kind != "webgpu" or "half" not in gpu.features or op.dtype != "float16":
        return {}
    rows = [r for r in (16, 32, 64, 128) if m % r == 0][-2:]
    widths = [w for w in (32, 64, 128) if n % w == 0 and rows and 8 * ROW * (rows[-1] + w) <= gpu.shared_bytes]
    tiles = [ACROSS * a + b for a, b in ((4, 4), (8, 4), (8, 8)) if rows and rows[-1] // a * (128 // b) <= gpu.threads]
    if m == 1 or op.k % GROUP or not rows or not widths or not tiles:
        return {}
    return {"rows": rows, "width": widths, "tile": tiles}


@dataclass(frozen=True)
class _Kernel:
    """What one kernel is made of."""

    op: Matmul
    rows: int  # of a block
    width: int  # outputs of a block
    high: int  # rows of a thread
    wide: int  # outputs of a thread

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.rows // self.high * (self.width // self.wide)

    def body(self) -> str:
        """The whole kernel."""
        k, columns = self.op.k, self.width // self.wide
        every = [(i, j) for i in range(self.high) for j in range(self.wide)]
        flush = [f"      f{i}_{j} += f32(h{i}_{j}.x) + f32(h{i}_{j}.y); h{i}_{j} = vec2<f16>();" for i, j in every]
        last = k // GROUP - 1
        return "\n".join(
            [
                f"  let across : u32 = tid % {columns}u;",
                f"  let down : u32 = tid / {columns}u;",
                f"  let m0 : u32 = bid_y * {self.rows}u;",
                f"  let n0 : u32 = bid * {self.width}u;",
                *(f"  var f{i}_{j} : f32 = 0.0f;" for i, j in every),
                *(f"  var h{i}_{j} : vec2<f16> = vec2<f16>();" for i, j in every),
                f"  for (var g : u32 = 0u; g <= {last}u; g += 1u) {{",
                *self._stage(),
                "    workgroupBarrier();",
                "    for (var c : u32 = 0u; c < 8u; c += 1u) {",
                *(f"      let x{i} : vec4<f16> = xs[({self._row(i)}) * {ROW}u + c];" for i in range(self.high)),
                *(f"      let w{j} : vec4<f16> = ws[({self._column(j)}) * {ROW}u + c];" for j in range(self.wide)),
                *(f"      h{i}_{j} = fma(x{i}.{c}, w{j}.{c}, h{i}_{j});" for c in ("xy", "zw") for i, j in every),
                "    }",
                f"    if (g % {FLUSH}u == {FLUSH - 1}u || g == {last}u) {{",
                *flush,
                "    }",
                "    workgroupBarrier();",
                "  }",
                *self._store(),
            ]
        )

    def _row(self, i: int) -> str:
        return f"down + {i * (self.rows // self.high)}u"

    def _column(self, j: int) -> str:
        """Outputs that are neighbours, two by two, so that one word takes both."""
        return f"2u * across + {j // 2 * 2 * (self.width // self.wide) + j % 2}u"

    def _stage(self) -> list[str]:
        """A group's rows of x and of weights to shared memory."""
        k, threads, weight = self.op.k, self.threads, self.op.weight
        lines = [
            f"    for (var i : u32 = tid; i < {self.rows * 8}u; i += {threads}u) {{",
            f"      xs[i / 8u * {ROW}u + i % 8u] = x[(m0 + i / 8u) * {k // 4}u + g * 8u + i % 8u];",
            "    }",
        ]
        if not weight.group:
            return [
                *lines,
                f"    for (var i : u32 = tid; i < {self.width * 8}u; i += {threads}u) {{",
                f"      ws[i / 8u * {ROW}u + i % 8u] = w[(n0 + i / 8u) * {k // 4}u + g * 8u + i % 8u];",
                "    }",
            ]
        lines += [
            f"    for (var i : u32 = tid; i < {self.width * 4}u; i += {threads}u) {{",
            f"      let at : u32 = (n0 + i / 4u) * {k // GROUP}u + g;",
            "      let word : u32 = w[at * 4u + i % 4u];",
            f"      let s : f32 = f32(scale[{self._group()}]);",
        ]
        one = float(1 << weight.bits)
        zero = f"{one + (weight.zero_point if weight.zero == 'symmetric' else 0)}f * s"
        if weight.zero != "symmetric":
            lines.append(f"      let z : f32 = f32(offset[{self._group()}]);")
            zero = f"({one}f + z) * s" if weight.zero == "zero_point" else f"{one}f * s - z"
        for j in range(2):
            four = ", ".join(nibble("word", 4 * j + c, weight.bits) for c in range(4))
            lines.append(f"      let v{j} : vec4f = vec4f({four}) * ({one}f * s) - vec4f({zero});")
            lines.append(f"      ws[i / 4u * {ROW}u + 2u * (i % 4u) + {j}u] = vec4<f16>(v{j});")
        return [*lines, "    }"]

    def _group(self) -> str:
        each = self.op.weight.group // GROUP
        return f"at / {each}u" if each > 1 else "at"

    def _store(self) -> list[str]:
        lines = []
        for i, j in itertools.product(range(self.high), range(0, self.wide, 2)):
            word = f"((m0 + {self._row(i)}) * {self.op.n}u + n0 + {self._column(j)}) / 2u"
            lines += store_pair(f"o{i}_{j}", word, (f"f{i}_{j}", f"f{i}_{j + 1}"), self.op)
        return lines


def _text(op: Matmul, decisions: Decisions, gpu: Gpu) -> Program:
    kernel = _Kernel(op, decisions["rows"], decisions["width"], *divmod(decisions["tile"], ACROSS))
    params = product_params("vec4<f16>", "u32" if op.weight.group else "vec4<f16>", "f16", op)
    shared = [Shared("xs", "vec4<f16>", ROW * kernel.rows), Shared("ws", "vec4<f16>", ROW * kernel.width)]
    made = shader_for(gpu, params, kernel.threads, kernel.body(), shared)
    blocks = (op.n // kernel.width, op.m // kernel.rows, 1)
    return in_one_launch(made, blocks)


TEMPLATES = (
    Template(
        "text-tile",
        Matmul,
        "many rows, for WebGPU: tiles of pairs of halves",
        _choices,
        text=_text,
        weights=(16, 4),
        takes=("bias",),
    ),
)
