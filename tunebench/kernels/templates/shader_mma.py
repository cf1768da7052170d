"""Many rows with a weight matrix, as OpenCL C with NVIDIA's assembly: its tensor cores' 16 x 8 x 16 products.

Rows of x and of weights are copied to shared memory by themselves, some stages ahead of the one in use. The order of k
within a group of 32 is free, so it is the one in which weights unpack: a thread's word of eight weights becomes its
operands of two products, and pairs of x are taken in the same order.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass

from tunebench.kernels.operation import Matmul
from tunebench.kernels.shader_dialect import Param, Shared, both_halves, product_params, store_pair
from tunebench.kernels.templates import Choices, Decisions, Gpu, Template, in_one_launch, shader_for
from tunebench.runtime.plan import Program

GROUP = 32  # places of k of a stage
MOST_SCALES = 8
MOST_STAGES = 4
SPARE_BYTES = 64  # of shared memory, for the compiler
BIAS = "0x64006400u"  # 1024 twice, whose mantissa's low bits take an integer


def _choices(op: Matmul, gpu: Gpu) -> Choices:
    m, n, k = op.m, op.n, op.k
    if "ptx" not in gpu.features or m % 16 or op.dtype != "float16" or k % (2 * (op.weight.group or GROUP)):
        return {}
    rows = [r for r in (16, 32, 64) if m % r == 0]  # 64 x 64 outputs of a warp are 128 registers of a thread
    down = [d for d in (1, 2) if m % (rows[-1] * d) == 0]
    widths = [w for w in (16, 32, 64) if n % (w * 8) == 0]
    largest = [_Kernel(op, rows[-1], widths[-1], w, d) for w in (2, 4, 8) for d in down] if widths else []
    warps = sorted({k.warps for k in largest} - {k.warps for k in largest if _stages(k, gpu) < 2})
    return {"rows": rows, "width": widths, "warps": warps, "down": down} if warps else {}


@dataclass(frozen=True)
class _Kernel:
    """What one kernel is made of. Shared memory is counted in vectors of four words."""

    op: Matmul
    rows: int  # of a warp
    width: int  # outputs of a warp
    warps: int
    down: int  # warps below each other, with other rows of x

    @property
    def across(self) -> int:
        """Warps beside each other, with other weights."""
        return self.warps // self.down

    @property
    def columns(self) -> int:
        """Outputs of a row of a block."""
        return self.width * self.across

    @property
    def high(self) -> int:
        """Rows of a block."""
        return self.rows * self.down

    @property
    def packed(self) -> bool:
        """Whether weights are integers in words."""
        return bool(self.op.weight.group)

    @property
    def scales(self) -> int:
        """Of consecutive groups, that are copied at once."""
        return math.gcd(self.op.k // self.op.weight.group, MOST_SCALES)

    @property
    def turn(self) -> int:
        """Stages that they serve."""
        return self.scales * self.op.weight.group // GROUP

    @property
    def of_groups(self) -> tuple[str, ...]:
        """The buffers of what a group has."""
        return ("scale",) if self.op.weight.zero == "symmetric" else ("scale", "offset")

    @property
    def places(self) -> tuple[int, int]:
        """Where weights begin, behind the x of a stage of 32 places of k, and where it ends."""
        weights = self.high * 4
        return weights, weights + self.columns * (1 if self.packed else 4)

    @property
    def scale_size(self) -> int:
        """Of what is copied at once of one of `of_groups`."""
        return -(-self.columns * self.scales // 8) if self.packed else 0

    @property
    def group_size(self) -> int:
        """Of all of them, for this turn and the next."""
        return 2 * len(self.of_groups) * self.scale_size

    def params(self) -> list[Param]:
        """The buffers."""
        return product_params("vec4u", "vec4u", "u32", self.op)

    def body(self, stages: int) -> tuple[str, list[Shared]]:
        """The whole kernel, and its shared memory."""
        size, steps = self.places[1], self.op.k // GROUP
        tiles = list(itertools.product(range(self.rows // 16), range(self.width // 8)))
        last = (stages - 1) * size
        lines = [
            "  let warp : u32 = tid / 32u;",
            "  let lane : u32 = tid % 32u;",
            "  let place : u32 = lane / 4u;",
            "  let quad : u32 = lane % 4u;",
            f"  let m0 : u32 = bid * {self.high}u;",
            f"  let n0 : u32 = bid_y * {self.columns}u;",
            f"  let wm : u32 = warp / {self.across}u * {self.rows}u + place;",
            f"  let wn : u32 = warp % {self.across}u * {self.width}u + place;",
            *(f"  var acc{i}_{j} : vec4f = vec4f(0.0f, 0.0f, 0.0f, 0.0f);" for i, j in tiles),
        ]
        lines += self._copy_scales(stages * size, "0u")
        for stage in range(stages - 1):
            lines += [*self._copy(f"{stage * size}u", f"{stage}u"), "  copies_end();"]
        lines += [
            "  var here : u32 = 0u;",
            f"  var there : u32 = {last}u;",
            f"  for (var g : u32 = 0u; g < {steps}u; g += 1u) {{",
            f"    copies_wait({stages - 2});",
            "    workgroupBarrier();",
            f"    if (g + {stages - 1}u < {steps}u) {{",
            *self._copy("there", f"(g + {stages - 1}u)"),
            "    }",
            *self._next_scales(stages * size),
            "    copies_end();",
        ]
        lines += self._products(stages * size)
        lines += [f"    {name} = select({name} + {size}u, 0u, {name} == {last}u);" for name in ("here", "there")]
        lines.append("  }")
        return "\n".join([*lines, *self._store()]), [Shared("tile", "vec4u", stages * size + self.group_size)]

    def _copy(self, to: str, step: str) -> list[str]:
        """A thread's part of a stage."""
        k, weights = self.op.k, self.places[0]
        parts = 1 if self.packed else 4  # of a row
        x = ("x", "m0", self.high, 4, k // 8, 0)
        w = ("w", "n0", self.columns, parts, k // GROUP * parts, weights)
        lines = []
        for name, first, rows, across, stride, begin in (x, w):
            for index, guard in self._shares(rows * across):
                row = f"({first} + ({index}) / {across}u)"
                source = f"&{name}[{row} * {stride}u + {step} * {across}u + ({index}) % {across}u]"
                lines.append(f"    {guard}copy16(&tile[{to} + {begin}u], ({index}) * 4u, {source});")
        return lines

    def _copy_scales(self, to: int, turn: str) -> list[str]:
        """Every column's scales of the groups of a turn."""
        if not self.packed:
            return []
        lines, count, turns = [], self.scales, self.op.k // GROUP // self.turn
        for i, name in enumerate(self.of_groups):
            for index, guard in self._shares(self.columns):
                at = f"(n0 + {index}) * {turns * count // 2}u + {turn} * {count // 2}u"
                place = f"({index}) * {count // 2}u"
                start = f"&tile[{to + 2 * i * self.scale_size}u + ({turn} & 1u) * {self.scale_size}u]"
                lines.append(f"    {guard}copy{2 * count}({start}, {place}, &{name}[{at}]);")
        return lines

    def _next_scales(self, to: int) -> list[str]:
        """Those of the next turn, when one begins."""
        if not self.packed:
            return []
        turns = self.op.k // GROUP // self.turn
        lines = self._copy_scales(to, f"(g / {self.turn}u + 1u)")
        begins = f"g % {self.turn}u == 0u && g / {self.turn}u + 1u < {turns}u"
        return [f"    if ({begins}) {{", *lines, "    }"]

    def _shares(self, total: int) -> list[tuple[str, str]]:
        """What a thread does of something: indices, and what to ask before."""
        threads = 32 * self.warps
        found = []
        for first in range(0, total, threads):
            index = f"tid + {first}u"
            found.append((index, "" if first + threads <= total else f"if ({index} < {total}u) "))
        return found

    def _products(self, scales: int) -> list[str]:
        """What a warp does with a stage."""
        columns = range(self.width // 8)
        lines = [line for j in columns for line in self._operands(j, scales)]
        for i in range(self.rows // 16):
            for name, low in (("low", 0), ("high", 8)):
                eight = f"tile[here + ({16 * i + low}u + wm) * 4u + quad]"
                lines.append(f"    let {name}{i} : vec4u = {f'paired({eight})' if self.packed else eight};")
            for half, pair in enumerate(("xy", "zw")):
                for j in columns:
                    x = ", ".join(f"{name}{i}.{c}" for c in pair for name in ("low", "high"))
                    lines.append(f"    acc{i}_{j} = mma(acc{i}_{j}, {x}, b{j}_{2 * half}, b{j}_{2 * half + 1});")
        return lines

    def _operands(self, j: int, scales: int) -> list[str]:
        """Four pairs of halves, of a thread's eight weights of 8 columns."""
        weights, weight = self.places[0], self.op.weight
        at = f"(wn + {8 * j}u)"
        if not self.packed:
            lines = [f"    let w{j} : vec4u = tile[here + {weights}u + {at} * 4u + quad];"]
            return [*lines, *(f"    let b{j}_{i} : u32 = w{j}.{c};" for i, c in enumerate("xyzw"))]
        lines = [f"    let w{j} : u32 = word_of(&tile[here + {weights}u], {at} * 4u + quad);"]
        lines += [f"    let {'sz'[i]}{j} : u32 = {self._of_group(scales, i, at)};" for i in range(len(self.of_groups))]
        minus = both_halves(-1024 - (weight.zero_point if weight.zero == "symmetric" else 0))
        if weight.zero == "zero_point":
            lines.append(f"    let m{j} : u32 = fma2(z{j}, {both_halves(-1)}, {minus});")
            minus = f"m{j}"
        last = f"z{j}" if weight.zero == "minimum" else "0x80008000u"
        for i in range(4):
            word = f"(w{j} >> {4 * i}u)" if i else f"w{j}"
            integer = f"fma2(({word} & 0x000f000fu) | {BIAS}, 0x3c003c00u, {minus})"
            lines.append(f"    let b{j}_{i} : u32 = fma2({integer}, s{j}, {last});")
        return lines

    def _of_group(self, start: int, i: int, column: str) -> str:
        """The i-th of what a column's group has, twice."""
        count, each = self.scales, self.op.weight.group // GROUP
        group = "g" if each == 1 else f"(g / {each}u)"
        turn = f"&tile[{start + 2 * i * self.scale_size}u + (g / {self.turn}u & 1u) * {self.scale_size}u]"
        return f"half_of(word_of({turn}, {column} * {count // 2}u + {group} % {count}u / 2u), {group} & 1u)"

    def _store(self) -> list[str]:
        lines = []
        for i, j in itertools.product(range(self.rows // 16), range(self.width // 8)):
            for low, pair in enumerate(("xy", "zw")):
                row, column = f"(m0 + wm + {16 * i + 8 * low}u)", f"n0 + wn - place + {8 * j}u"
                word = f"({row} * {self.op.n}u + {column}) / 2u + quad"
                values = (f"acc{i}_{j}.{pair[0]}", f"acc{i}_{j}.{pair[1]}")
                lines += store_pair(f"o{i}_{j}_{low}", word, values, self.op)
        return lines


def _stages(kernel: _Kernel, gpu: Gpu) -> int:
    """That there is room for, and use: all but one are copied before the first is used."""
    room = gpu.shared_bytes - SPARE_BYTES - 16 * kernel.group_size
    return min(MOST_STAGES, kernel.op.k // GROUP + 1, room // (16 * kernel.places[1]))


def _text(op: Matmul, decisions: Decisions, gpu: Gpu) -> Program:
    kernel = _Kernel(op, *(decisions[name] for name in ("rows", "width", "warps", "down")))
    body, shared = kernel.body(_stages(kernel, gpu))
    made = shader_for(gpu, kernel.params(), 32 * kernel.warps, body, shared)
    return in_one_launch(made, (op.m // kernel.high, op.n // kernel.columns, 1))


TEMPLATES = (
    Template(
        "text-mma",
        Matmul,
        "many rows, for OpenCL on NVIDIA: tensor cores by its assembly",
        _choices,
        text=_text,
        weights=(16, 4),
        takes=("bias",),
    ),
)
