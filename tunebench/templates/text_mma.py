"""Many rows with a weight matrix, as OpenCL C with NVIDIA's assembly: its tensor cores' 16 x 8 x 16 products.

The order of k within a group of 32 is free, so it is the one in which weights unpack: a thread's word of eight weights
becomes its operands of two products without going through shared memory, and rows of x are stored in the same order.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from tunebench.plan import Program
from tunebench.shaders import Param, Shared, product_params, store_pair
from tunebench.templates import Choices, Decisions, Gpu, Operation, Template, in_one_launch, shader_for

GROUP = 32
MOST_ACCUMULATORS = 32  # tiles of 16 x 8 of a warp, 4 registers each
BIAS = "0x64006400u"  # 1024 twice, whose mantissa's low bits take an integer
MINUS_BIAS = "0xe407e407u"  # -(1024 + 7) twice


def _choices(op: Operation, gpu: Gpu) -> Choices:
    m, n, bits = op["m"], op["n"], op["bits"]
    stored = bits == 16 or (bits == 4 and op["group"] == GROUP)
    if "ptx" not in gpu.features or m % 16 or not stored or op["layout"] != "NK" or op["dtype"] != "float16":
        return {}
    if op["k"] % GROUP:
        return {}
    rows = [r for r in (16, 32, 64, 128) if m % r == 0][-3:]
    widths = [w for w in (16, 32, 64) if rows[-1] // 16 * (w // 8) <= MOST_ACCUMULATORS and n % (w * 8) == 0]
    if not widths:
        return {}
    return {"rows": rows, "width": widths, "warps": [2, 4, 8]}


@dataclass(frozen=True)
class _Kernel:
    """What one kernel is made of."""

    op: Operation
    rows: int  # of a block, all of them in each warp
    width: int  # outputs of a warp
    warps: int

    def params(self) -> list[Param]:
        """The buffers."""
        four = self.op["bits"] == 4
        form = ("vec4u", "u32", "u32") if four else ("vec4u", "vec4u", "")
        return product_params(*form, bool(self.op["residual"]), self.op["out"] == "float16")

    def body(self) -> tuple[str, list[Shared]]:
        """The whole kernel, and its shared memory: two tiles of x, one in use and one on its way."""
        k, threads = self.op["k"], 32 * self.warps
        groups, tile = k // GROUP, self.rows * 4
        tiles, columns = range(self.rows // 16), range(self.width // 8)
        copies = -(-tile // threads)
        lines = [
            "  let warp : u32 = tid / 32u;",
            "  let lane : u32 = tid % 32u;",
            "  let place : u32 = lane / 4u;",
            "  let quad : u32 = lane % 4u;",
            f"  let m0 : u32 = bid_y * {self.rows}u;",
            f"  let n0 : u32 = (bid * {self.warps}u + warp) * {self.width}u;",
            *(f"  var acc{i}_{j} : vec4f = vec4f(0.0f, 0.0f, 0.0f, 0.0f);" for i in tiles for j in columns),
        ]
        for u in range(copies):
            lines += [f"  let from{u} : u32 = tid + {u * threads}u;"]
            lines += [f"  let row{u} : u32 = (m0 + from{u} / 4u) * {k // 8}u + from{u} % 4u;"]
        lines += self._copy(copies, tile, "0u", "0u")
        lines += self._weights("0u", "next", declare=True)
        lines += [
            "  workgroupBarrier();",
            f"  for (var g : u32 = 0u; g < {groups}u; g += 1u) {{",
            f"    let here : u32 = (g & 1u) * {tile}u;",
            *(f"    let {name} : {kind} = next_{name};" for name, kind in self._words()),
            f"    if (g + 1u < {groups}u) {{",
            *self._copy(copies, tile, "g + 1u", f"{tile}u - here"),
            *self._weights("(g + 1u)", "next", declare=False),
            "    }",
        ]
        for j in columns:
            lines += self._operands(j)
        for i in tiles:
            lines += [
                f"    let low{i} : vec4u = tile[here + {i * 64}u + place * 4u + quad];",
                f"    let high{i} : vec4u = tile[here + {i * 64 + 32}u + place * 4u + quad];",
            ]
            for half, (a, b) in enumerate((("x", "y"), ("z", "w"))):
                for j in columns:
                    given = f"low{i}.{a}, high{i}.{a}, low{i}.{b}, high{i}.{b}, b{j}_{2 * half}, b{j}_{2 * half + 1}"
                    lines.append(f"    acc{i}_{j} = mma(acc{i}_{j}, {given});")
        lines += ["    workgroupBarrier();", "  }", *self._store()]
        return "\n".join(lines), [Shared("tile", "vec4u", 2 * tile)]

    def _copy(self, copies: int, tile: int, group: str, to: str) -> list[str]:
        """Rows of x for a group to shared memory, in the order in which weights unpack."""
        lines = []
        for u in range(copies):
            guard = f"if (from{u} < {tile}u) " if (u + 1) * 32 * self.warps > tile else ""
            value = f"x[row{u} + ({group}) * 4u]"
            lines.append(f"    {guard}tile[{to} + from{u}] = {f'paired({value})' if self.op['bits'] == 4 else value};")
        return lines

    def _words(self) -> list[tuple[str, str]]:
        """A thread's weights and scales of a group: names and types."""
        columns = range(self.width // 8)
        if self.op["bits"] == 16:
            return [(f"w{j}", "vec4u") for j in columns]
        return [*((f"w{j}", "u32") for j in columns), *((f"s{j}", "u32") for j in columns)]

    def _weights(self, group: str, prefix: str, declare: bool) -> list[str]:
        """Load a thread's weights of a group."""
        groups = self.op["k"] // GROUP
        lines = []
        for name, kind in self._words():
            j = int(name[1:])
            at = f"(n0 + {8 * j}u + place) * {groups}u + {group}"
            value = f"w[({at}) * 4u + quad]" if name[0] == "w" else f"half_of(scale[({at}) >> 1u], ({at}) & 1u)"
            head = f"var {prefix}_{name} : {kind}" if declare else f"{prefix}_{name}"
            lines.append(f"    {head} = {value};")
        return lines

    def _operands(self, j: int) -> list[str]:
        """Four pairs of halves, of eight weights."""
        if self.op["bits"] == 16:
            return [f"    let b{j}_{i} : u32 = w{j}.{c};" for i, c in enumerate("xyzw")]
        lines = []
        for i in range(4):
            word = f"(w{j} >> {4 * i}u)" if i else f"w{j}"
            integer = f"fma2(({word} & 0x000f000fu) | {BIAS}, 0x3c003c00u, {MINUS_BIAS})"
            lines.append(f"    let b{j}_{i} : u32 = fma2({integer}, s{j}, 0x80008000u);")
        return lines

    def _store(self) -> list[str]:
        residual, half = bool(self.op["residual"]), self.op["out"] == "float16"
        lines = []
        for i, j in itertools.product(range(self.rows // 16), range(self.width // 8)):
            for low, pair in enumerate((("x", "y"), ("z", "w"))):
                row = f"(m0 + {16 * i + 8 * low}u + place)"
                word = f"({row} * {self.op['n']}u + n0 + {8 * j}u) / 2u + quad"
                a, b = (f"acc{i}_{j}.{c}" for c in pair)
                lines += store_pair(f"o{i}_{j}_{low}", word, (a, b), residual, half)
        return lines


def _text(op: Operation, decisions: Decisions, gpu: Gpu) -> Program:
    kernel = _Kernel(op, *(decisions[name] for name in ("rows", "width", "warps")))
    params = kernel.params()
    body, shared = kernel.body()
    made = shader_for(gpu, params, 32 * kernel.warps, body, shared)
    blocks = (op["n"] // (kernel.width * kernel.warps), op["m"] // kernel.rows, 1)
    return in_one_launch(made, blocks)


TEMPLATES = (
    Template(
        "text-mma", "matmul", "many rows, for OpenCL on NVIDIA: tensor cores by its assembly", _choices, text=_text
    ),
)
