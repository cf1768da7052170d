"""One row with a weight matrix, as source text for GPU APIs: in float32, or in pairs of halves where they multiply.

An integer of few bits is put into the mantissa of a float between 1 and 2, which takes a shift and one logical
operation; a group's sum of activations takes the 1 and the zero point out again. Two 4-bit integers go into the
mantissas of two halves at once; their products go to float32 word by word, so that large activations do not overflow.

An operation may say that its input is still to be normalised (`norm`: epsilon; the norm's weights come behind x), and
that its outputs are gated (`gate`): those of the first half go through silu and multiply those of the second.
`compile.fusion` makes such operations of neighbours in a plan.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunebench.kernels.arithmetic import LOG2_E
from tunebench.kernels.operation import Matmul
from tunebench.kernels.shader_dialect import Param, Shared, both_halves, lane_sums, nibble, product_params, store_pair
from tunebench.kernels.templates import (
    Choices,
    Decisions,
    Gpu,
    Template,
    in_one_launch,
    shader_for,
)
from tunebench.runtime.plan import Program

GROUP = 32  # places of k that a thread takes at a time
BIAS = "0x64006400u"  # 1024 twice, whose mantissa's low bits take an integer
LOW = ("0x000f000fu", "0x3c003c00u")  # the lowest 4-bit integers of both halves: times 1
MOST = "126.0f"  # of an exponent of 2: compilers may take it that nothing is infinite
SHRINK = ("0x24002400u", 64.0)  # 1 / 64 twice: what is not normalised yet may be large
HIGH = ("0x00f000f0u", "0x2c002c00u")  # the next ones, 16 times as large: times 1 / 16


def _choices(op: Matmul, gpu: Gpu) -> Choices:
    n, k = op.n, op.k
    if gpu.language is None or op.m != 1 or op.dtype != "float16":
        return {}
    threads = [t for t in (64, 128, 256) if t <= gpu.threads]
    lanes = [lanes for lanes in (8, 16, 32, 64) if lanes <= k // GROUP]
    rows = [r for r in (2, 4, 8) if n % (r * threads[-1] // lanes[0]) == 0] if threads and lanes else []
    if not rows or k % GROUP:
        return {}
    pairs = {"pairs": [0, 1]} if gpu.multiplies_pairs and op.weight.bits == 4 else {}
    return {"rows": rows, "lanes": lanes, "threads": threads, "unroll": [1, 2, 4], **pairs}


@dataclass(frozen=True)
class _Kernel:
    """What one kernel is made of."""

    op: Matmul
    rows: int  # outputs of a thread
    lanes: int  # threads that share the outputs, each with other groups of weights
    threads: int
    unroll: int
    pairs: bool

    @property
    def groups(self) -> int:
        """Of weights, along k."""
        return self.op.k // GROUP

    @property
    def columns(self) -> int:
        """Of the output that a thread writes."""
        return self.rows // 2 if self.op.gate else self.rows

    def params(self) -> list[Param]:
        """The buffers."""
        x, *rest = product_params("vec4u", "vec4u", "u32", self.op)
        return [x, *([Param("gain", "vec4u")] if self.op.norm is not None else []), *rest]

    def _row(self, r: int) -> str:
        """Of the weights."""
        second = r >= self.columns
        return f"row + {r - self.columns + self.op.n // 2 if second else r}u"

    def body(self, adds_lanes: bool) -> tuple[str, list[Shared]]:
        """The whole kernel, and its shared memory."""
        lines = [
            f"  let lane : u32 = tid % {self.lanes}u;",
            f"  let row : u32 = (bid * {self.threads // self.lanes}u + tid / {self.lanes}u) * {self.columns}u;",
            *(f"  var acc{r} : f32 = 0.0f;" for r in range(self.rows)),
        ]
        whole = self.groups // self.lanes // self.unroll * self.unroll
        if whole:
            places = [f"lane + (step + {u}u) * {self.lanes}u" for u in range(self.unroll)]
            lines += [f"  for (var step : u32 = 0u; step < {whole}u; step += {self.unroll}u) {{"]
            lines += [*self._groups(places), "  }"]
        for step in range(whole, -(-self.groups // self.lanes)):
            lines += [f"  if (lane + {step * self.lanes}u < {self.groups}u) {{"]
            lines += [*self._groups([f"lane + {step * self.lanes}u"]), "  }"]
        added = [f"acc{r}" for r in range(self.rows)]
        if self.op.norm is not None:
            lines.insert(0, "  var square : f32 = 0.0f;")
            added.append("square")
        sums, shared = lane_sums(added, self.lanes, self.threads, adds_lanes)
        lines += [*sums, "  if (lane == 0u) {", *self._finish(), *self._store(), "  }"]
        return "\n".join(lines), shared

    def _finish(self) -> list[str]:
        """What is left to do with sums over all of k."""
        lines = []
        if self.op.norm is not None:
            mean = f"square / {float(self.op.k)}f + {self.op.norm:.9e}f"
            lines.append(f"    let factor : f32 = {SHRINK[1] if self.pairs else 1.0}f / sqrt({mean});")
            lines += [f"    acc{r} = acc{r} * factor;" for r in range(self.rows)]
        if self.op.gate:
            for r in range(self.columns):
                gate = f"acc{r} / (1.0f + exp2(min(acc{r} * {-LOG2_E:.9e}f, {MOST})))"
                lines.append(f"    acc{r} = {gate} * acc{r + self.columns};")
        return lines

    def _groups(self, places: list[str]) -> list[str]:
        """Products of several groups: first all loads, then what is made of them."""
        loads, products = [], []
        multiply = self._multiply_pairs if self.pairs else self._multiply
        for u, place in enumerate(places):
            loads += [f"    let g{u} : u32 = {place};", *self._load(u)]
            products += multiply(u)
        return [*loads, *products]

    def _load(self, u: int) -> list[str]:
        bits = self.op.weight.bits
        lines = []
        for r in range(self.rows):
            at = f"(({self._row(r)}) * {self.groups}u + g{u})"
            lines += [f"    let w{u}_{r}_{j} : vec4u = w[{at} * {bits // 4}u + {j}u];" for j in range(bits // 4)]
            if self.op.weight.group:
                each = self.op.weight.group // GROUP
                lines.append(f"    let i{u}_{r} : u32 = {at}{f' / {each}u' if each > 1 else ''};")
                lines.append(f"    let p{u}_{r} : vec2f = unpack(scale[i{u}_{r} >> 1u]);")
            if self.op.weight.zero != "symmetric":
                lines.append(f"    let z{u}_{r} : vec2f = unpack(offset[i{u}_{r} >> 1u]);")
        return lines

    def _multiply(self, u: int) -> list[str]:
        weight = self.op.weight
        lines = [f"    let x{u}_{j} : vec4u = x[g{u} * 4u + {j}u];" for j in range(4)]
        if self.op.norm is None:
            lines += [f"    let a{u}_{i} : vec2f = unpack({word});" for i, word in enumerate(self._words("x", u))]
        else:
            lines += self._squares(u)
            lines += [f"    let n{u}_{j} : vec4u = gain[g{u} * 4u + {j}u];" for j in range(4)]
            lines += [
                f"    let a{u}_{i} : vec2f = s{u}_{i} * unpack({word});" for i, word in enumerate(self._words("n", u))
            ]
        values = [f"a{u}_{i // 2}.{'xy'[i % 2]}" for i in range(GROUP)]
        if weight.group:
            lines.append(f"    let sum{u} : f32 = {' + '.join(values)};")
        for r in range(self.rows):
            name = f"q{u}_{r}"
            lines.append(f"    var {name} : f32 = 0.0f;")
            if not weight.group:
                for i in range(16):
                    word = f"w{u}_{r}_{i // 4}.{'xyzw'[i % 4]}"
                    lines.append(f"    let {name}_{i} : vec2f = unpack({word});")
                    lines += [f"    {name} = fma({name}_{i}.{c}, a{u}_{i}.{c}, {name});" for c in "xy"]
                lines.append(f"    acc{r} += {name};")
                continue
            for i, value in enumerate(values):
                at, place = divmod(i, weight.per_word)
                integer = nibble(f"w{u}_{r}_{at // 4}.{'xyzw'[at % 4]}", place, weight.bits)
                lines.append(f"    {name} = fma({integer}, {value}, {name});")
            one = float(1 << weight.bits)
            zero = f"{one + (weight.zero_point if weight.zero == 'symmetric' else 0)}f"
            if weight.zero == "zero_point":
                zero = f"({zero} + {self._of_group('z', u, r)})"
            lines.append(f"    acc{r} = fma({self._of_group('p', u, r)}, {one}f * {name} - {zero} * sum{u}, acc{r});")
            lines += self._minimum(u, r)
        return lines

    def _words(self, name: str, u: int) -> list[str]:
        """Sixteen pairs of halves of four vectors."""
        return [f"{name}{u}_{i // 4}.{'xyzw'[i % 4]}" for i in range(16)]

    def _squares(self, u: int) -> list[str]:
        """What a group of x adds to the sum of squares."""
        lines = []
        for i, word in enumerate(self._words("x", u)):
            lines.append(f"    let s{u}_{i} : vec2f = unpack({word});")
            lines.append(f"    square = fma(s{u}_{i}.x, s{u}_{i}.x, fma(s{u}_{i}.y, s{u}_{i}.y, square));")
        return lines

    def _of_group(self, name: str, u: int, r: int) -> str:
        return f"select({name}{u}_{r}.x, {name}{u}_{r}.y, (i{u}_{r} & 1u) == 1u)"

    def _minimum(self, u: int, r: int) -> list[str]:
        if self.op.weight.zero != "minimum":
            return []
        return [f"    acc{r} = fma({self._of_group('z', u, r)}, sum{u}, acc{r});"]

    def _multiply_pairs(self, u: int) -> list[str]:
        lines = [f"    let x{u}_{j} : vec4u = paired(x[g{u} * 4u + {j}u]);" for j in range(4)]
        given = self._words("x", u)
        if self.op.norm is not None:
            lines += self._squares(u)
            lines += [f"    let n{u}_{j} : vec4u = paired(gain[g{u} * 4u + {j}u]);" for j in range(4)]
            for i, (x, n) in enumerate(zip(given, self._words("n", u), strict=True)):
                lines.append(f"    let m{u}_{i} : u32 = fma2(fma2({x}, {SHRINK[0]}, 0u), {n}, 0u);")
            given = [f"m{u}_{i}" for i in range(16)]
        if self.op.weight.zero == "minimum":
            lines += [f"    let t{u}_{i} : vec2f = unpack({word});" for i, word in enumerate(given)]
            lines.append(f"    let sum{u} : f32 = {' + '.join(f't{u}_{i}.{c}' for i in range(16) for c in 'xy')};")
        for r in range(self.rows):
            lines.append(f"    var q{u}_{r} : f32 = 0.0f;")
            zeros = [self._minus(one, u, r) for one in (1024, 64)]
            if self.op.weight.zero == "zero_point":
                lines += [
                    f"    let {name}{u}_{r} : u32 = {zero};" for name, zero in zip(("lo", "hi"), zeros, strict=True)
                ]
                zeros = [f"{name}{u}_{r}" for name in ("lo", "hi")]
            for j in range(4):
                name = f"w{u}_{r}_0.{'xyzw'[j]}"
                part = f"h{u}_{r}_{j}"
                for i in range(4):
                    word = f"({name} >> 8u)" if i > 1 else name
                    mask, factor = HIGH if i % 2 else LOW
                    weights = f"fma2(({word} & {mask}) | {BIAS}, {factor}, {zeros[i % 2]})"
                    sums = f"{part}_{i - 1}" if i else "0u"
                    lines.append(f"    let {part}_{i} : u32 = fma2({weights}, {given[4 * j + i]}, {sums});")
                lines.append(f"    let {part} : vec2f = unpack({part}_3);")
                lines.append(f"    q{u}_{r} += {part}.x + {part}.y;")
            lines.append(f"    acc{r} = fma({self._of_group('p', u, r)}, q{u}_{r}, acc{r});")
            lines += self._minimum(u, r)
        return lines

    def _minus(self, one: int, u: int, r: int) -> str:
        """What takes `one` and the zero from two halves."""
        weight = self.op.weight
        if weight.zero == "zero_point":
            zero = f"{-one}.0f - {self._of_group('z', u, r)}"
            return f"pack({zero}, {zero})"
        return both_halves(-one - (weight.zero_point if weight.zero == "symmetric" else 0))

    def _store(self) -> list[str]:
        pairs = [(r, f"acc{r}", f"acc{r + 1}") for r in range(0, self.columns, 2)]
        return [line for r, a, b in pairs for line in store_pair(f"o{r}", f"(row >> 1u) + {r // 2}u", (a, b), self.op)]


def _text(op: Matmul, decisions: Decisions, gpu: Gpu) -> Program:
    rows, lanes, threads, unroll = (decisions[name] for name in ("rows", "lanes", "threads", "unroll"))
    rows = max(rows, 4) if op.gate else rows  # two outputs at least
    blocks, left = divmod(op.n, rows * threads // lanes)
    if left:
        raise ValueError(f"{op.n} outputs do not come in whole blocks of {rows * threads // lanes}")
    kernel = _Kernel(op, rows, lanes, threads, unroll, bool(decisions.get("pairs", 0)))
    params = kernel.params()
    body, shared = kernel.body(gpu.adds_lanes)
    return in_one_launch(shader_for(gpu, params, threads, body, shared), (blocks, 1, 1))


TEMPLATES = (
    Template(
        "text-row",
        Matmul,
        "one row, for GPU APIs: k shared by lanes",
        _choices,
        text=_text,
        weights=(16, 4, 8),
        takes=("norm", "gate", "bias"),
    ),
)
