"""Many rows with a weight matrix, as WGSL with wgpu's cooperative matrices: 16 x 16 x 16 products of a subgroup."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tunebench.plan import Program
from tunebench.shaders import Shared, nibble, store_pair
from tunebench.templates import Choices, Decisions, Gpu, Operation, Template, half_params, in_one_launch, shader_for

GROUP = 32
ROW = GROUP + 8  # halves from one row of a tile to the next: the spare ones keep rows in different banks
TILE = 16
MOST_TILES = 16  # accumulators of a subgroup, 8 registers each
ZERO_POINT = 7  # of 4-bit weights


def _choices(op: Operation, gpu: Gpu) -> Choices:
    m, n, bits = op["m"], op["n"], op["bits"]
    stored = bits == 16 or (bits == 4 and op["group"] == GROUP)
    if "matrix16" not in gpu.features or m % TILE or not stored or op["layout"] != "NK" or op["dtype"] != "float16":
        return {}
    rows = [r for r in (16, 32, 64, 128) if m % r == 0][-2:]
    widths = [w for w in (64, 128) if n % w == 0 and _shared_bytes(rows[-1], w, 8) <= gpu.shared_bytes]
    if op["k"] % GROUP or not widths:
        return {}
    return {"rows": rows, "width": widths, "warps": [4, 8]}


def _shared_bytes(rows: int, width: int, warps: int) -> int:
    return 2 * ROW * (rows + width) + 4 * TILE * TILE * warps


@dataclass(frozen=True)
class _Kernel:
    """What one kernel is made of."""

    op: Operation
    rows: int  # of a block
    width: int  # outputs of a block
    warps: int  # subgroups of a block

    @property
    def down(self) -> int:
        """Subgroups below each other."""
        return 2 if self.rows >= 2 * TILE and self.rows // 2 * (self.width // (self.warps // 2)) >= TILE * TILE else 1

    @property
    def tiles(self) -> tuple[int, int]:
        """Of a subgroup: rows and columns of 16 x 16."""
        return self.rows // self.down // TILE, self.width // (self.warps // self.down) // TILE

    def shared(self) -> list[Shared]:
        """A tile of x, one of weights, and a product of each subgroup."""
        sums = Shared("product", "f32", TILE * TILE * self.warps)
        return [Shared("xs", "f16", ROW * self.rows), Shared("ws", "f16", ROW * self.width), sums]

    def body(self) -> str:
        """The whole kernel."""
        k, (high, wide) = self.op["k"], self.tiles
        groups, across = k // GROUP, self.warps // self.down
        lines = [
            "  let warp : u32 = tid / 32u;",
            "  let lane : u32 = tid % 32u;",
            f"  let m0 : u32 = bid_y * {self.rows}u;",
            f"  let n0 : u32 = bid * {self.width}u;",
            f"  let wm : u32 = (warp / {across}u) * {high * TILE}u;",
            f"  let wn : u32 = (warp % {across}u) * {wide * TILE}u;",
            *(f"  var acc{i}_{j} = coop_mat16x16<f32, C>();" for i in range(high) for j in range(wide)),
            f"  for (var g : u32 = 0u; g < {groups}u; g += 1u) {{",
            *self._stage(),
            "    workgroupBarrier();",
        ]
        for step in (0, TILE):
            for i in range(high):
                at = f"(wm + {i * TILE}u) * {ROW}u + {step}u"
                lines.append(f"    let a{i}_{step} = coopLoadT<coop_mat16x16<f16, A>>(&xs[{at}], {ROW}u);")
            for j in range(wide):
                at = f"(wn + {j * TILE}u) * {ROW}u + {step}u"
                lines.append(f"    let b{j}_{step} = coopLoad<coop_mat16x16<f16, B>>(&ws[{at}], {ROW}u);")
                for i in range(high):
                    lines.append(f"    acc{i}_{j} = coopMultiplyAdd(a{i}_{step}, b{j}_{step}, acc{i}_{j});")
        return "\n".join([*lines, "    workgroupBarrier();", "  }", *self._store()])

    def _stage(self) -> list[str]:
        """A group's rows of x and of weights to shared memory."""
        threads, k = 32 * self.warps, self.op["k"]

        def copied(name: str, count: int, first: str) -> list[str]:
            return [
                f"    for (var i : u32 = tid; i < {count * 8}u; i += {threads}u) {{",
                f"      let v : vec4<f16> = {name}[({first} + i / 8u) * {k // 4}u + g * 8u + i % 8u];",
                f"      let to : u32 = i / 8u * {ROW}u + (i % 8u) * 4u;",
                *(f"      {name}s[to + {c}u] = v.{'xyzw'[c]};" for c in range(4)),
                "    }",
            ]

        lines = copied("x", self.rows, "m0")
        if self.op["bits"] == 16:
            return lines + copied("w", self.width, "n0")
        lines += [
            f"    for (var i : u32 = tid; i < {self.width * 4}u; i += {threads}u) {{",
            f"      let at : u32 = (n0 + i / 4u) * {k // GROUP}u + g;",
            "      let word : u32 = w[at * 4u + i % 4u];",
            "      let s : f32 = f32(scale[at]);",
            f"      let to : u32 = i / 4u * {ROW}u + (i % 4u) * 8u;",
        ]
        for c in range(8):
            value = f"fma({nibble('word', c, 4)}, 16.0f * s, -{16.0 + ZERO_POINT}f * s)"
            lines.append(f"      ws[to + {c}u] = f16({value});")
        return [*lines, "    }"]

    def _store(self) -> list[str]:
        """Each product through shared memory, where its place of elements is known."""
        n, (high, wide) = self.op["n"], self.tiles
        lines = [
            f"  let from_row : u32 = warp * {TILE * TILE}u + (lane / 2u) * {TILE}u + (lane % 2u) * 8u;",
            f"  let to_row : u32 = (m0 + wm + lane / 2u) * {n}u + n0 + wn + (lane % 2u) * 8u;",
        ]
        residual, half = bool(self.op["residual"]), self.op["out"] == "float16"
        for i, j in itertools.product(range(high), range(wide)):
            at = f"to_row + {i * TILE * n + j * TILE}u"
            lines.append(f"  coopStoreT(acc{i}_{j}, &product[warp * {TILE * TILE}u], {TILE}u);")
            lines.append("  workgroupBarrier();")
            for c in range(0, 8, 2):
                a, b = f"product[from_row + {c}u]", f"product[from_row + {c + 1}u]"
                lines += store_pair(f"o{i}_{j}_{c}", f"({at}) / 2u + {c // 2}u", (a, b), residual, half)
            lines.append("  workgroupBarrier();")
        return lines


def _text(op: Operation, decisions: Decisions, gpu: Gpu) -> Program:
    kernel = _Kernel(op, *(decisions[name] for name in ("rows", "width", "warps")))
    params = half_params(op)
    made = shader_for(gpu, params, 32 * kernel.warps, kernel.body(), kernel.shared())
    blocks = (op["n"] // kernel.width, op["m"] // kernel.rows, 1)
    return in_one_launch(made, blocks)


TEMPLATES = (
    Template("text-matrix", "matmul", "many rows, for WebGPU: cooperative matrices of wgpu", _choices, text=_text),
)
