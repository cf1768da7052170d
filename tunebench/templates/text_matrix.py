"""Many rows with a weight matrix, as WGSL with Dawn's subgroup matrices: 16 x 16 x 16 products on matrix units.

Rows of x and of weights go through shared memory, the next ones being fetched into registers meanwhile. The order of k
within a group is free, so it is one in which a word of 4-bit weights unpacks, two at a time, and in which threads that
put their halves one by one do not wait for each other.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass

from tunebench.plan import Program
from tunebench.shaders import Shared, store_pair
from tunebench.templates import Choices, Decisions, Gpu, Operation, Template, half_params, in_one_launch, shader_for

GROUP = 32
SPARE = 8  # halves from the end of a row in shared memory to the next one, so that rows lie in different banks
TILE = 16
BIAS = "0x64006400u"  # 1024 twice, whose mantissa's low bits take an integer
MINUS = "1031.0h"  # 1024 and the zero point 7

Staged = tuple[list[tuple[str, str, str]], list[str]]
"""What a thread fetches, as variables with their types and values, and the lines that put it into shared memory."""


def _choices(op: Operation, gpu: Gpu) -> Choices:
    m, n, bits = op["m"], op["n"], op["bits"]
    stored = bits == 16 or (bits == 4 and op["group"] == GROUP)
    if "matrix16" not in gpu.features or m % TILE or not stored or op["layout"] != "NK" or op["dtype"] != "float16":
        return {}
    rows = [r for r in (16, 32, 64, 128) if m % r == 0][-2:]
    widths = [w for w in (64, 128) if n % w == 0 and _bytes(rows[-1], w, 4, 1) <= gpu.shared_bytes]
    if op["k"] % GROUP or not widths:
        return {}
    across = widths[0] // TILE * (1 if rows[0] == TILE else 2)  # subgroups that have a tile each
    warps = [w for w in (4, 8) if w <= across and _bytes(rows[-1], widths[-1], w, 1) <= gpu.shared_bytes]
    deep = op["k"] % (2 * GROUP) == 0 and _bytes(rows[-1], widths[-1], warps[-1], 2) <= gpu.shared_bytes
    return {"rows": rows, "width": widths, "warps": warps, "groups": [1, 2] if deep else [1]}


def _bytes(rows: int, width: int, warps: int, groups: int) -> int:
    """Of shared memory."""
    return 2 * (GROUP * groups + SPARE) * (rows + width) + 4 * TILE * TILE * warps


@dataclass(frozen=True)
class _Kernel:
    """What one kernel is made of."""

    op: Operation
    rows: int  # of a block
    width: int  # outputs of a block
    warps: int  # subgroups of a block
    groups: int  # of 32 places of k that are in shared memory at once

    @property
    def down(self) -> int:
        """Subgroups below each other."""
        return 2 if self.rows >= 2 * TILE else 1

    @property
    def tiles(self) -> tuple[int, int]:
        """Of a subgroup: rows and columns of 16 x 16."""
        return self.rows // self.down // TILE, self.width // (self.warps // self.down) // TILE

    @property
    def row(self) -> int:
        """Halves from one row in shared memory to the next."""
        return GROUP * self.groups + SPARE

    def shared(self) -> list[Shared]:
        """A tile of x, one of weights, and a product of each subgroup."""
        sums = Shared("product", "f32", TILE * TILE * self.warps)
        return [Shared("xs", "f16", self.row * self.rows), Shared("ws", "f16", self.row * self.width), sums]

    def body(self) -> str:
        """The whole kernel."""
        (high, wide), across = self.tiles, self.warps // self.down
        stages = self.op["k"] // (GROUP * self.groups)
        four = self.op["bits"] == 4
        x = self._staged("x", self.rows, "m0", self._eight)
        w = self._staged("w", self.width, "n0", self._word if four else self._eight)
        lines = [
            "  let warp : u32 = tid / 32u;",
            "  let lane : u32 = tid % 32u;",
            f"  let m0 : u32 = bid_y * {self.rows}u;",
            f"  let n0 : u32 = bid * {self.width}u;",
            f"  let wm : u32 = (warp / {across}u) * {high * TILE}u;",
            f"  let wn : u32 = (warp % {across}u) * {wide * TILE}u;",
            *(f"  var acc{i}_{j} : subgroup_matrix_result<f32, 16, 16>;" for i in range(high) for j in range(wide)),
            *x[0],
            *w[0],
            f"  for (var g : u32 = 0u; g < {stages}u; g += 1u) {{",
            "    workgroupBarrier();",
            *x[2],
            *w[2],
            "    workgroupBarrier();",
            f"    if (g + 1u < {stages}u) {{",
            *(f"      {line}" for line in (*x[1], *w[1])),
            "    }",
        ]
        for step in range(0, GROUP * self.groups, TILE):
            lines += [self._load("a", "left", "xs", f"wm + {i * TILE}u", i, step, False) for i in range(high)]
            for j in range(wide):
                lines.append(self._load("b", "right", "ws", f"wn + {j * TILE}u", j, step, True))
                for i in range(high):
                    product = f"subgroupMatrixMultiplyAccumulate(a{i}_{step}, b{j}_{step}, acc{i}_{j})"
                    lines.append(f"    acc{i}_{j} = {product};")
        return "\n".join([*lines, "  }", *self._store()])

    def _load(self, name: str, side: str, held: str, first: str, i: int, step: int, by_column: bool) -> str:
        kind, at = f"subgroup_matrix_{side}<f16, 16, 16>", f"({first}) * {self.row}u + {step}u"
        given = f"&{held}, {at}, {str(by_column).lower()}, {self.row}u"
        return f"    let {name}{i}_{step} = subgroupMatrixLoad<{kind}>({given});"

    def _staged(
        self, name: str, rows: int, first: str, parts: Callable[[str, str], Staged]
    ) -> tuple[list[str], list[str], list[str]]:
        """Eight places of k at a time: declare and fetch the first, fetch those of g + 1, put them where they go."""
        threads, across = 32 * self.warps, 4 * self.groups
        total = rows * across
        begin, fetch, put = [], [], []
        for u in range(-(-total // threads)):
            mine = f"{name}{u}"
            whole = (u + 1) * threads <= total
            index = f"tid + {u * threads}u"
            begin.append(f"  let i{mine} : u32 = {index if whole else f'min({index}, {total - 1}u)'};")
            begin.append(f"  let r{mine} : u32 = {first} + i{mine} / {across}u;")
            begin.append(f"  let c{mine} : u32 = i{mine} % {across}u;")
            loads, stores = parts(name, mine)
            begin += [f"  var {var} : {kind} = {value.format(g='0u')};" for var, kind, value in loads]
            fetch += [f"{var} = {value.format(g='(g + 1u)')};" for var, _, value in loads]
            place = f"c{mine} / 4u * {GROUP}u + c{mine} % 4u"
            begin.append(f"  let t{mine} : u32 = i{mine} / {across}u * {self.row}u + {place};")
            put += ["    {" if whole else f"    if ({index} < {total}u) {{", *stores, "    }"]
        return begin, fetch, put

    def _eight(self, name: str, mine: str) -> Staged:
        """Eight halves, as two vectors."""
        k = self.op["k"]
        at = f"r{mine} * {k // 4}u + {{g}} * {8 * self.groups}u + c{mine} * 2u"
        loads = [(f"p{mine}", "vec4<f16>", f"{name}[{at}]"), (f"q{mine}", "vec4<f16>", f"{name}[{at} + 1u]")]
        if self.op["bits"] == 4:  # the order of weights that unpack two at a time
            values = [f"{part}{mine}.{c}" for c in "xyzw" for part in "pq"]
        else:
            values = [f"{part}{mine}.{c}" for part in "pq" for c in "xyzw"]
        return loads, [f"      {name}s[t{mine} + {4 * i}u] = {value};" for i, value in enumerate(values)]

    def _word(self, name: str, mine: str) -> Staged:
        """Eight 4-bit weights and their scale."""
        k = self.op["k"]
        word = f"w[r{mine} * {k // 8}u + {{g}} * {4 * self.groups}u + c{mine}]"
        scale = f"scale[r{mine} * {k // GROUP}u + {{g}} * {self.groups}u + c{mine} / 4u]"
        stores = []
        for i in range(4):
            pair = f"bitcast<vec2<f16>>(((p{mine} >> {4 * i}u) & 0x000f000fu) | {BIAS})"
            stores.append(f"      let v{i} : vec2<f16> = ({pair} - vec2<f16>({MINUS})) * s{mine};")
            stores += [f"      ws[t{mine} + {4 * (2 * i + j)}u] = v{i}.{'xy'[j]};" for j in range(2)]
        return [(f"p{mine}", "u32", word), (f"s{mine}", "f16", scale)], stores

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
            lines.append(f"  subgroupMatrixStore(&product, warp * {TILE * TILE}u, acc{i}_{j}, false, {TILE}u);")
            lines.append("  workgroupBarrier();")
            for c in range(0, 8, 2):
                a, b = f"product[from_row + {c}u]", f"product[from_row + {c + 1}u]"
                lines += store_pair(f"o{i}_{j}_{c}", f"({at}) / 2u + {c // 2}u", (a, b), residual, half)
            lines.append("  workgroupBarrier();")
        return lines


def _text(op: Operation, decisions: Decisions, gpu: Gpu) -> Program:
    kernel = _Kernel(op, *(decisions[name] for name in ("rows", "width", "warps", "groups")))
    made = shader_for(gpu, half_params(op), 32 * kernel.warps, kernel.body(), kernel.shared())
    return in_one_launch(made, (op["n"] // kernel.width, op["m"] // kernel.rows, 1))


TEMPLATES = (
    Template("text-matrix", "matmul", "many rows, for Dawn: subgroup matrices on matrix units", _choices, text=_text),
)
