"""Many rows with a weight matrix, as WGSL with Dawn's subgroup matrices: 16 x 16 x 16 products on matrix units.

Rows of x and of weights go through shared memory, sixteen bytes at a time, the next ones being fetched into registers
meanwhile. The order of k within eight places is free, so it is the one in which a word of 4-bit weights unpacks, two at
a time.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from tunebench.kernels.operation import Matmul
from tunebench.kernels.shader_dialect import Param, Shared, product_params, store_pair
from tunebench.kernels.templates import Choices, Decisions, Gpu, Template, in_one_launch, shader_for
from tunebench.runtime.plan import Program

GROUP = 32  # places of k that are in use at once, or half of them
VECTORS = {2: "u32", 4: "vec2u", 8: "vec4u"}  # of so many halves
MOST_SCALES = 8
TILE = 16
ACROSS = TILE // 4  # vectors of four words across a tile of float32
BIAS = "0x64006400u"  # 1024 twice, whose mantissa's low bits take an integer


def _choices(op: Matmul, gpu: Gpu) -> Choices:
    m, n = op.m, op.n
    if "matrix16" not in gpu.features or m % TILE or op.dtype != "float16":
        return {}
    rows = [r for r in (16, 32, 64, 128) if m % r == 0][-2:]
    widths = [w for w in (64, 128, 256) if n % w == 0 and _bytes(rows[-1], w, 1) <= gpu.shared_bytes]
    if op.k % (2 * (op.weight.group or GROUP)) or not widths:
        return {}
    warps = [w for w in (4, 8) if w <= widths[0] // TILE * (1 if rows[0] == TILE else 2)]
    deep = _bytes(rows[-1], widths[-1], 2) <= gpu.shared_bytes
    return {"rows": rows, "width": widths, "warps": warps, "groups": [1, 2] if deep else [1]}


def _bytes(rows: int, width: int, groups: int) -> int:
    """Of shared memory."""
    return 16 * (4 * groups + 1) * (rows + width)


@dataclass(frozen=True)
class _Kernel:
    """What one kernel is made of. Shared memory is counted in vectors of four words: eight halves."""

    op: Matmul
    rows: int  # of a block
    width: int  # outputs of a block
    warps: int  # subgroups of a block
    groups: int  # of 32 places of k that are in use at once

    @property
    def down(self) -> int:
        """Subgroups below each other."""
        return 2 if self.rows >= 2 * TILE else 1

    @property
    def across(self) -> int:
        """Subgroups beside each other."""
        return self.warps // self.down

    @property
    def tiles(self) -> tuple[int, int]:
        """Of a subgroup: rows and columns of 16 x 16."""
        return self.rows // self.down // TILE, self.width // self.across // TILE

    @property
    def row(self) -> int:
        """From one row in shared memory to the next: one more than it has, so that they lie in different banks."""
        return 4 * self.groups + 1

    @property
    def out_row(self) -> int:
        """From one row of a subgroup's sums in shared memory to the next."""
        return ACROSS * self.tiles[1] + 1

    @property
    def scales(self) -> int:
        """Of consecutive groups, that are loaded at once."""
        return math.gcd(self.op.k // self.op.weight.group, MOST_SCALES)

    def params(self) -> list[Param]:
        """The buffers."""
        return product_params("vec4u", "vec4u", VECTORS[self.scales] if self.op.weight.group else "", self.op)

    def shared(self) -> list[Shared]:
        """Rows of x, then of weights, which sums take the place of."""
        return [Shared("tile", "vec4u", max(self.row * (self.rows + self.width), self.warps * TILE * self.out_row))]

    def body(self) -> str:
        """The whole kernel."""
        high, wide = self.tiles
        stages = self.op.k // (GROUP * self.groups)
        x, w = self._staged("x", self.rows, 0), self._staged("w", self.width, self.rows)
        lines = [
            "  let warp : u32 = tid / 32u;",
            "  let lane : u32 = tid % 32u;",
            f"  let m0 : u32 = bid * {self.rows}u;",
            f"  let n0 : u32 = bid_y * {self.width}u;",
            f"  let wm : u32 = (warp / {self.across}u) * {high * TILE}u;",
            f"  let wn : u32 = (warp % {self.across}u) * {wide * TILE}u;",
            *(f"  var acc{i}_{j} : subgroup_matrix_result<f32, 16, 16>;" for i in range(high) for j in range(wide)),
            *x[0],
            *w[0],
            f"  for (var g : u32 = 0u; g < {stages}u; g += 1u) {{",
            *x[2],
            *w[2],
            "    workgroupBarrier();",
            f"    if (g + 1u < {stages}u) {{",
            *x[1],
            *w[1],
            "    }",
        ]
        for step in range(2 * self.groups):
            lines += [self._load("a", "left", i, step) for i in range(high)]
            for j in range(wide):
                lines.append(self._load("b", "right", j, step))
                for i in range(high):
                    product = f"subgroupMatrixMultiplyAccumulate(a{i}_{step}, b{j}_{step}, acc{i}_{j})"
                    lines.append(f"    acc{i}_{j} = {product};")
        return "\n".join([*lines, "    workgroupBarrier();", "  }", *self._store()])

    def _load(self, name: str, side: str, i: int, step: int) -> str:
        kind = f"subgroup_matrix_{side}<f16, 16, 16>, {'row' if side == 'left' else 'col'}_major"
        first = f"wm + {i * TILE}u" if side == "left" else f"wn + {self.rows + i * TILE}u"
        at = f"({first}) * {self.row}u + {2 * step}u"
        return f"    let {name}{i}_{step} = subgroupMatrixLoad<{kind}>(&tile, {at}, {self.row}u);"

    def _staged(self, name: str, rows: int, before: int) -> tuple[list[str], list[str], list[str]]:
        """Sixteen bytes at a time: declare and fetch the first, fetch those of g + 1, put them into shared memory."""
        threads, packed = 32 * self.warps, bool(self.op.weight.group)
        words = packed and name == "w"  # that unpack to eight halves each
        across = self.groups * (1 if words else 4)  # of a row
        stride, total = self.op.k // (GROUP if words else 8), rows * across
        begin, fetch, put = [], [], []
        for u in range(-(-total // threads)):
            mine, index = f"{name}{u}", f"tid + {u * threads}u"
            whole = (u + 1) * threads <= total
            eights = [f"paired(p{mine})" if packed else f"p{mine}"]
            if words:
                eights = [self._unpacked(f"p{mine}.{c}", f"one{mine}", f"zero{mine}") for c in "xyzw"]
            begin += [
                f"  let i{mine} : u32 = {index if whole else f'min({index}, {total - 1}u)'};",
                f"  let r{mine} : u32 = {'m0' if name == 'x' else 'n0'} + i{mine} / {across}u;",
                f"  let c{mine} : u32 = i{mine} % {across}u;",
                f"  let t{mine} : u32 = (i{mine} / {across}u + {before}u) * {self.row}u + c{mine} * {len(eights)}u;",
            ]
            at = f"r{mine} * {stride}u + {{g}} * {across}u + c{mine}"
            begin.append(f"  var p{mine} = {name}[{at.format(g='0u')}];")
            fetch.append(f"      p{mine} = {name}[{at.format(g='(g + 1u)')}];")
            if words:
                held, each = self.scales * (self.op.weight.group // GROUP), self.op.weight.group // GROUP
                group = f"(g * {across}u + c{mine})" if each == 1 else f"((g * {across}u + c{mine}) / {each}u)"
                for short, buffer, _ in self._of_groups:
                    some = f"{buffer}[({at}) / {held}u]"
                    begin.append(f"  var {short}{mine} = {some.format(g='0u')};")
                    new = f"(g + 1u) * {across}u % {held}u == 0u"
                    fetch.append(f"      if ({new}) {{ {short}{mine} = {some.format(g='(g + 1u)')}; }}")
            stores = [f"tile[t{mine} + {i}u] = {eight};" for i, eight in enumerate(eights)]
            if words:
                given = [(name, self._scale(f"{short}{mine}", group)) for short, _, name in self._of_groups]
                stores = [*(f"let {name}{mine} : f16 = {value};" for name, value in given), *stores]
            guard = "" if whole else f"if ({index} < {total}u) "
            put += [f"    {guard}{{", *(f"      {each}" for each in stores), "    }"]
        return begin, fetch, put

    @property
    def _of_groups(self) -> list[tuple[str, str, str]]:
        """What a group has: a vector of it, the buffer, and one of the vector."""
        return [("s", "scale", "one"), ("z", "offset", "zero")][: 1 + (self.op.weight.zero != "symmetric")]

    def _unpacked(self, word: str, scale: str, offset: str) -> str:
        """Eight weights as four pairs of halves, of places 4 apart."""
        weight = self.op.weight
        minus = f"{1024 + (weight.zero_point if weight.zero == 'symmetric' else 0)}.0h"
        minus, last = {
            "symmetric": (minus, ""),
            "zero_point": (f"{minus} + {offset}", ""),
            "minimum": (minus, f" + {offset}"),
        }[weight.zero]
        pairs = (f"bitcast<vec2<f16>>((({word} >> {4 * i}u) & 0x000f000fu) | {BIAS})" for i in range(4))
        return f"vec4u({', '.join(f'bitcast<u32>(({pair} - vec2<f16>({minus})) * {scale}{last})' for pair in pairs)})"

    def _scale(self, held: str, group: str) -> str:
        """One of the scales that a thread has."""
        words = [f"{held}.{c}" for c in "xyzw"[: self.scales // 2]] if self.scales > 2 else [held]
        pairs = f"{group} / 2u"
        while len(words) > 1:
            words = [f"select({a}, {b}, ({pairs}) % 2u == 1u)" for a, b in zip(words[::2], words[1::2], strict=True)]
            pairs = f"{pairs} / 2u"
        both = f"bitcast<vec2<f16>>({words[0]})"
        return f"select({both}.x, {both}.y, {group} % 2u == 1u)"

    def _store(self) -> list[str]:
        """Sums of 16 rows at a time through shared memory, where their places are known."""
        n, (high, wide) = self.op.n, self.tiles
        across = ACROSS * wide
        lines = [f"  let mine : u32 = warp * {TILE * self.out_row}u;"]
        for i in range(high):
            for j in range(wide):
                at = f"mine + {j * ACROSS}u"
                lines.append(f"  subgroupMatrixStore<row_major>(&tile, {at}, acc{i}_{j}, {self.out_row}u);")
            lines.append("  workgroupBarrier();")
            for e in range(TILE * across // 32):
                name = f"e{i}_{e}"
                row, column = f"((lane + {32 * e}u) / {across}u)", f"((lane + {32 * e}u) % {across}u)"
                lines.append(f"  let {name} = bitcast<vec4f>(tile[mine + {row} * {self.out_row}u + {column}]);")
                word = f"((m0 + wm + {i * TILE}u + {row}) * {n}u + n0 + wn) / 2u + {column} * 2u"
                for p, pair in enumerate(("xy", "zw")):
                    values = (f"{name}.{pair[0]}", f"{name}.{pair[1]}")
                    lines += store_pair(f"{name}_{p}", f"{word} + {p}u", values, self.op)
            lines.append("  workgroupBarrier();")
        return lines


def _text(op: Matmul, decisions: Decisions, gpu: Gpu) -> Program:
    kernel = _Kernel(op, *(decisions[name] for name in ("rows", "width", "warps", "groups")))
    made = shader_for(gpu, kernel.params(), 32 * kernel.warps, kernel.body(), kernel.shared())
    return in_one_launch(made, (op.m // kernel.rows, op.n // kernel.width, 1))


TEMPLATES = (
    Template(
        "text-matrix",
        Matmul,
        "many rows, for Dawn: subgroup matrices on matrix units",
        _choices,
        text=_text,
        weights=(16, 4),
        takes=("bias",),
    ),
)
