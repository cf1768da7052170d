"""Attention as source text for GPU APIs: a block has a few rows of queries of one head of the cache, and a slice of it.

A row is a token, or where there is one token a head that shares its keys. Threads have positions when scores are made,
and pairs of elements when values are mixed. Where the cache is split, a second kernel puts the slices together.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunebench.gpu_ops import LOG2_E
from tunebench.plan import Launch, Program
from tunebench.shaders import Param, Shared
from tunebench.templates import Choices, Decisions, Gpu, Operation, Template, shader_for

LOWEST = "-1.0e30f"
MOST_SHARED_ROWS = 8  # heads of one block: more would leave too few blocks


def _choices(op: Operation, gpu: Gpu) -> Choices:
    dim, m, context = op["dim"], op["m"], op["context"]
    if gpu.language is None or op["dtype"] != "float16" or dim % 8 or context % 8:
        return {}
    threads = [t for t in (64, 128, 256) if t <= gpu.threads and t % (dim // 2) == 0]
    if m == 1:
        share = op["heads"] // op["kv_heads"]
        rows = [share] if share <= MOST_SHARED_ROWS else [1]
        splits = [1, 2, 4, 8, 16]
    else:
        rows, splits = [r for r in (2, 4, 8) if m % r == 0], [1]
    rows = [r for r in rows if threads and 4 * r * (dim + threads[-1]) <= gpu.shared_bytes]
    return {"rows": rows, "splits": splits, "threads": threads} if rows and threads else {}


@dataclass(frozen=True)
class _Kernel:
    """What one kernel is made of."""

    op: Operation
    rows: int
    splits: int
    threads: int

    @property
    def tokens(self) -> int:
        """Rows that are tokens; the others are heads."""
        return 1 if self.op["m"] == 1 else self.rows

    def body(self) -> tuple[str, list[Shared]]:
        """Scores, their softmax as it goes, and the mix of values."""
        rows, dim, threads = range(self.rows), self.op["dim"], self.threads
        pairs = dim // 2
        lines = [
            *self._places(),
            f"  let end : u32 = u32(position[0]) + token + {self.tokens}u;",
            f"  let slice : u32 = (end + {self.splits - 1}u) / {self.splits}u;",
            "  let start : u32 = bid_y * slice;",
            "  let stop : u32 = min(start + slice, end);",
            f"  for (var i : u32 = tid; i < {self.rows * dim // 4}u; i += {threads}u) {{",
            f"    let at : u32 = query + (i / {dim // 4}u) * {self._row_stride() // 4}u + i % {dim // 4}u;",
            "    let two : vec2u = q[at];",
            "    let low : vec2f = unpack(two.x);",
            "    let high : vec2f = unpack(two.y);",
            f"    queries[i] = vec4f(low.x, low.y, high.x, high.y) * {LOG2_E * dim**-0.5:.9e}f;",
            "  }",
            f"  let part : u32 = tid / {pairs}u;",
            f"  let pair : u32 = tid % {pairs}u;",
        ]
        for r in rows:
            lines += [f"  var {name}{r} : f32 = 0.0f;" for name in ("total", "x", "y")]
            lines.append(f"  var top{r} : f32 = {LOWEST};")
        lines += [
            "  workgroupBarrier();",
            f"  for (var first : u32 = start; first < stop; first += {threads}u) {{",
            "    let t : u32 = first + tid;",
            *(f"    var s{r} : f32 = 0.0f;" for r in rows),
            "    if (t < stop) {",
            f"      for (var j : u32 = 0u; j < {dim // 8}u; j += 1u) {{",
            f"        let words : vec4u = keys[(cache + t) * {dim // 8}u + j];",
            *(f"        let k{c} : vec2f = unpack(words.{c});" for c in "xyzw"),
            "        let k0 : vec4f = vec4f(kx.x, kx.y, ky.x, ky.y);",
            "        let k1 : vec4f = vec4f(kz.x, kz.y, kw.x, kw.y);",
        ]
        for r in rows:
            at = f"{r * dim // 4}u + j * 2u"
            lines.append(f"        s{r} += dot(queries[{at}], k0) + dot(queries[{at} + 1u], k1);")
        lines += ["      }", "    }"]
        for r in rows:
            limit = f"end - {self.tokens - 1 - r}u" if self.tokens > 1 else "end"
            lines.append(f"    s{r} = select({LOWEST}, s{r}, t < min(stop, {limit}));")
            lines.append(f"    weights[{r * threads}u + tid] = s{r};")
        lines += ["    workgroupBarrier();", *self._maxima()]
        for r in rows:
            lines += [
                f"    let next{r} : f32 = max(top{r}, weights[{r * threads}u]);",
                f"    let fade{r} : f32 = exp2(top{r} - next{r});",
                *(f"    {name}{r} = {name}{r} * fade{r};" for name in ("total", "x", "y")),
                f"    top{r} = next{r};",
            ]
        lines.append("    workgroupBarrier();")
        for r in rows:
            lines.append(f"    weights[{r * threads}u + tid] = select(0.0f, exp2(s{r} - next{r}), s{r} > {LOWEST});")
        lines += [
            "    workgroupBarrier();",
            f"    let count : u32 = min({threads}u, stop - first);",
            f"    for (var i : u32 = part; i < count; i += {threads // pairs}u) {{",
            f"      let v : vec2f = unpack(values[(cache + first + i) * {pairs}u + pair]);",
        ]
        for r in rows:
            lines += [
                f"      let w{r} : f32 = weights[{r * threads}u + i];",
                f"      total{r} += w{r};",
                f"      x{r} = fma(w{r}, v.x, x{r});",
                f"      y{r} = fma(w{r}, v.y, y{r});",
            ]
        lines += ["    }", "    workgroupBarrier();", "  }", *self._finish()]
        shared = [
            Shared("queries", "vec4f", self.rows * dim // 4),
            Shared("weights", "f32", max(3, self.rows) * threads),
        ]
        return "\n".join(lines), shared

    def _row_stride(self) -> int:
        """Elements of q, and of the output, from one row to the next."""
        return int(self.op["dim"]) * (int(self.op["heads"]) if self.tokens > 1 else 1)

    def _places(self) -> list[str]:
        """Where a block's queries, its part of the cache and its output begin."""
        op = self.op
        heads, kv_heads, dim, m, context = (op[name] for name in ("heads", "kv_heads", "dim", "m", "context"))
        if self.tokens > 1:
            tiles, share = m // self.rows, heads // kv_heads
            return [
                f"  let token : u32 = (bid % {tiles}u) * {self.rows}u;",
                f"  let head : u32 = bid / {tiles}u % {heads}u;",
                f"  let sequence : u32 = bid / {tiles * heads}u;",
                f"  let cache : u32 = (sequence * {kv_heads}u + head / {share}u) * {context}u;",
                f"  let query : u32 = ((sequence * {m}u + token) * {heads}u + head) * {dim // 4}u;",
            ]
        per_head = heads // self.rows  # blocks of a sequence
        share = heads // kv_heads // self.rows
        return [
            f"  let token : u32 = bid % {m}u;",
            f"  let head : u32 = bid / {m}u % {per_head}u;",
            f"  let sequence : u32 = bid / {m * per_head}u;",
            f"  let cache : u32 = (sequence * {kv_heads}u + head / {share}u) * {context}u;",
            f"  let query : u32 = ((sequence * {m}u + token) * {heads}u + head * {self.rows}u) * {dim // 4}u;",
        ]

    def _maxima(self) -> list[str]:
        """Each row's largest score, left in its first place."""
        lines = []
        step = self.threads // 2
        while step:
            lines.append(f"    if (tid < {step}u) {{")
            for r in range(self.rows):
                at = f"weights[{r * self.threads}u + tid"
                lines.append(f"      {at}] = max({at}], {at} + {step}u]);")
            lines += ["    }", "    workgroupBarrier();"]
            step //= 2
        return lines

    def _finish(self) -> list[str]:
        """Add up the parts of each row and write it, whole or as a slice."""
        dim, threads = self.op["dim"], self.threads
        pairs = dim // 2
        lines = []
        for r in range(self.rows):
            for i, name in enumerate(("total", "x", "y")):
                lines.append(f"  weights[{i * threads}u + tid] = {name}{r};")
            lines += ["  workgroupBarrier();", f"  if (tid < {pairs}u) {{"]
            for i, name in enumerate(("total", "x", "y")):
                parts = [f"weights[{i * threads + part * pairs}u + tid]" for part in range(threads // pairs)]
                lines.append(f"    {name}{r} = {' + '.join(parts)};")
            if self.splits == 1:
                at = f"query * 2u + {r * self._row_stride() // 2}u + tid"
                lines.append(f"    out[{at}] = pack(x{r} / total{r}, y{r} / total{r});")
            else:
                row = f"(query / {dim // 4}u + {r}u)"
                lines += [
                    f"    let at{r} : u32 = ({row} * {self.splits}u + bid_y) * {dim + 2}u;",
                    f"    slices[at{r} + 2u * tid] = x{r};",
                    f"    slices[at{r} + 2u * tid + 1u] = y{r};",
                    f"    if (tid == 0u) {{ slices[at{r} + {dim}u] = top{r}; slices[at{r} + {dim + 1}u] = total{r}; }}",
                ]
            lines += ["  }", "  workgroupBarrier();"]
        return lines


def _together(dim: int, splits: int) -> tuple[str, list[Param]]:
    """The kernel that puts slices together, a block a row."""
    lines = [f"  let base : u32 = bid * {splits * (dim + 2)}u;", f"  var top : f32 = {LOWEST};"]
    lines += [f"  top = max(top, slices[base + {s * (dim + 2) + dim}u]);" for s in range(splits)]
    lines += ["  var total : f32 = 0.0f;", "  var x : f32 = 0.0f;", "  var y : f32 = 0.0f;"]
    for s in range(splits):
        at = f"base + {s * (dim + 2)}u"
        lines += [
            f"  let w{s} : f32 = exp2(slices[{at} + {dim}u] - top);",
            f"  total = fma(w{s}, slices[{at} + {dim + 1}u], total);",
            f"  x = fma(w{s}, slices[{at} + 2u * tid], x);",
            f"  y = fma(w{s}, slices[{at} + 2u * tid + 1u], y);",
        ]
    lines.append(f"  out[bid * {dim // 2}u + tid] = pack(x / total, y / total);")
    return "\n".join(lines), [Param("slices", "f32"), Param("out", "u32", True)]


def _text(op: Operation, decisions: Decisions, gpu: Gpu) -> Program:
    kernel = _Kernel(op, *(decisions[name] for name in ("rows", "splits", "threads")))
    inputs = [Param("q", "vec2u"), Param("keys", "vec4u"), Param("values", "u32"), Param("position", "i32")]
    body, shared = kernel.body()
    every = op["b"] * op["m"] * op["heads"]
    blocks = (every // kernel.rows, kernel.splits, 1)
    if kernel.splits == 1:
        params = [*inputs, Param("out", "u32", True)]
        shaders = {"attention": shader_for(gpu, params, kernel.threads, body, shared)}
        return Program(shaders, (Launch("attention", (0, 1, 2, 3, 4), blocks),))
    slices = Param("slices", "f32", True)
    last, params = _together(op["dim"], kernel.splits)
    shaders = {
        "slices": shader_for(gpu, [*inputs, slices], kernel.threads, body, shared),
        "together": shader_for(gpu, params, op["dim"] // 2, last),
    }
    launches = (Launch("slices", (0, 1, 2, 3, 5), blocks), Launch("together", (5, 4), (every, 1, 1)))
    return Program(shaders, launches, (4 * every * kernel.splits * (op["dim"] + 2),))


TEMPLATES = (
    Template(
        "text-attention", "attention", "for GPU APIs: rows that share keys, the cache in slices", _choices, text=_text
    ),
)
