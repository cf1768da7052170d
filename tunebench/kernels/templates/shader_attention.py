"""Attention as source text for GPU APIs: a block has a few rows of queries of one head of the cache, and a slice of it.

A row is a token, or where there is one token a head that shares its keys. Keys go through shared memory. Threads have a
position and up to four rows when scores are made, and four elements of all rows when values are mixed. Where the cache
is split, a second kernel puts the slices together.
"""

from __future__ import annotations

from dataclasses import dataclass

from tunebench.kernels.arithmetic import LOG2_E
from tunebench.kernels.operation import Attention
from tunebench.kernels.shader_dialect import Param, Shared
from tunebench.kernels.templates import Choices, Decisions, Gpu, Template, shader_for
from tunebench.runtime.plan import Launch, Program

LOWEST = "-1.0e30f"
SHARED_ROWS = (1, 2, 4, 8)  # heads of one block: more would leave too few blocks
MOST = "126.0f"  # of an exponent of 2: compilers may take it that nothing is infinite
UNROLL = 4  # positions whose values are loaded before they are mixed
PARTIAL = 8  # maxima of a row from which every thread makes the last one


def _choices(op: Attention, gpu: Gpu) -> Choices:
    dim, m, context = op.dim, op.m, op.context
    if gpu.language is None or op.dtype != "float16" or dim % 8 or context % 8:
        return {}
    if m == 1:
        share = op.heads // op.kv_heads
        rows = [max(r for r in SHARED_ROWS if share % r == 0)]
        splits = [1, 2, 4, 8, 16]
    else:
        rows, splits = [r for r in (2, 4, 8, 16) if m % r == 0][-3:], [1]
    threads = [t for t in (64, 128, 256) if t <= gpu.threads and all(_fits(op, r, t, gpu) for r in rows)]
    return {"rows": rows, "splits": splits, "threads": threads} if rows and threads else {}


def _fits(op: Attention, rows: int, threads: int, gpu: Gpu) -> bool:
    """Whether there is work, and room, for so many threads."""
    kernel = _Kernel(op, rows, 1, threads, gpu.shared_bytes)
    return threads >= kernel.quads and kernel.tile >= max(PARTIAL, kernel.parts) and kernel.width > 0


@dataclass(frozen=True)
class _Kernel:
    """What one kernel is made of."""

    op: Attention
    rows: int
    splits: int
    threads: int
    shared_bytes: int  # that there are

    @property
    def tokens(self) -> int:
        """Rows that are tokens; the others are heads."""
        return 1 if self.op.m == 1 else self.rows

    @property
    def own(self) -> int:
        """Rows of which a thread makes scores."""
        return min(self.rows, 4)

    @property
    def tile(self) -> int:
        """Positions that are looked at together."""
        return self.threads * self.own // self.rows

    @property
    def width(self) -> int:
        """Eights of a key that are in shared memory at once; 0 where there is no room."""
        eights = self.op.dim // 8
        room = self.shared_bytes - 4 * self.rows * (8 * eights + self.tile + self.spare + PARTIAL)
        fitting = (w for w in range(1, eights + 1) if eights % w == 0 and 16 * self._keys(w) <= room)
        return max(fitting, default=0)

    def _keys(self, width: int) -> int:
        """Of sixteen bytes, what so much of a tile's keys takes, rows lying in different banks."""
        return max(self.tile * (width | 1), self.threads)

    @property
    def quads(self) -> int:
        """Threads that mix values of one position, four elements each."""
        return self.op.dim // 4

    @property
    def parts(self) -> int:
        """Threads that mix the same elements, of other positions. What is left of all threads does as the first do."""
        return self.threads // self.quads

    @property
    def unroll(self) -> int:
        """Positions that a thread mixes at a time."""
        return min(UNROLL, self.tile // self.parts)

    @property
    def spare(self) -> int:
        """Positions behind a tile that threads come to when it is not a multiple of what they mix at a time."""
        step = self.parts * self.unroll
        return 0 if self.threads % self.quads == 0 and self.tile % step == 0 else step + self.parts

    @property
    def kind(self) -> str:
        """Weights of a thread's rows, as they lie in shared memory."""
        return {1: "f32", 2: "vec2f", 4: "vec4f"}[self.own]

    def of(self, name: str, r: int) -> str:
        """Row r of a variable of that kind, or of several."""
        single = f"{name}{r // self.own}"
        return single if self.own == 1 else f"{single}.{'xyzw'[r % self.own]}"

    def body(self) -> tuple[str, list[Shared]]:
        """Scores, their softmax as it goes, and the mix of values."""
        rows, dim, threads, tile, own = range(self.rows), self.op.dim, self.threads, self.tile, self.own
        quads, bundles, eights, stride = self.quads, self.rows // own, dim // 8, self.width | 1
        behind, begin, length = self._seen()
        lines = [
            *self._places(),
            f"  let end : u32 = u32(position[0]) + token + {self.tokens}u;",
            *behind,
            f"  let slice : u32 = ({length} + {self.splits - 1}u) / {self.splits}u;",
            f"  let start : u32 = {begin}bid_y * slice;",
            "  let stop : u32 = min(start + slice, end);",
            f"  for (var i : u32 = tid; i < {self.rows * quads}u; i += {threads}u) {{",
            f"    let at : u32 = query + (i / {quads}u) * {self._row_stride() // 4}u + i % {quads}u;",
            "    let two : vec2u = q[at];",
            "    let low : vec2f = unpack(two.x);",
            "    let high : vec2f = unpack(two.y);",
            f"    queries[i] = vec4f(low.x, low.y, high.x, high.y) * {self._factor():.9e}f;",
            "  }",
            f"  let mine : u32 = tid % {tile}u;",
            f"  let bundle : u32 = tid / {tile}u;",
            f"  let part : u32 = tid / {quads}u;",
            f"  let quad : u32 = tid % {quads}u;",
        ]
        if self.spare:
            total = f"{self.spare * bundles}u; i += {threads}u"
            zeros = self._bundle(["0.0f"] * own)
            lines.append(f"  for (var i : u32 = tid; i < {total}) {{ weights[i + {tile * bundles}u] = {zeros}; }}")
        for r in rows:
            lines += [f"  var mix{r} : vec4f = vec4f(0.0f, 0.0f, 0.0f, 0.0f);", f"  var top{r} : f32 = {LOWEST};"]
        lines += [f"  var sum{r} : f32 = 0.0f;" for r in range(own)]
        lines += [f"  for (var first : u32 = start; first < stop; first += {tile}u) {{", *self._fetch()]
        lines += [f"    var s{r} : f32 = 0.0f;" for r in range(own)]
        for chunk in range(eights // self.width):
            lines += ["    workgroupBarrier();", *self._put(chunk), "    workgroupBarrier();"]
            lines += [
                f"    for (var j : u32 = 0u; j < {self.width}u; j += 1u) {{",
                f"      let words : vec4u = tile[mine * {stride}u + j];",
                *(f"      let k{c} : vec2f = unpack(words.{c});" for c in "xyzw"),
                "      let k0 : vec4f = vec4f(kx.x, kx.y, ky.x, ky.y);",
                "      let k1 : vec4f = vec4f(kz.x, kz.y, kw.x, kw.y);",
            ]
            for r in range(own):
                at = f"(bundle * {own}u + {r}u) * {quads}u + (j + {chunk * self.width}u) * 2u"
                lines.append(f"      s{r} += dot(queries[{at}], k0) + dot(queries[{at} + 1u], k1);")
            lines.append("    }")
        lines.append("    let t : u32 = first + mine;")
        for r in range(own):
            limit = f"end - ({self.tokens - 1 - r}u - bundle * {own}u)" if self.tokens > 1 else "end"
            late = f" && t + {self.op.window}u >= {limit}" if self.op.window else ""
            lines += [*self._capped(f"s{r}"), f"    s{r} = select({LOWEST}, s{r}, t < min(stop, {limit}){late});"]
        lines += [f"    weights[mine * {bundles}u + bundle] = {self._bundle([f's{r}' for r in range(own)])};"]
        lines += ["    workgroupBarrier();", *self._maxima()]
        for r in rows:
            lines += [
                f"    let next{r} : f32 = max(top{r}, {self.of('most', r)});",
                f"    let fade{r} : f32 = exp2(top{r} - next{r});",
                f"    mix{r} = mix{r} * fade{r};",
                f"    top{r} = next{r};",
            ]
        for r in range(own):
            fade, highest = (self._chosen(name, r) for name in ("fade", "next"))
            lines += [
                f"    let w{r} : f32 = select(0.0f, exp2(s{r} - {highest}), s{r} > {LOWEST});",
                f"    sum{r} = sum{r} * {fade} + w{r};",
            ]
        lines += [f"    weights[mine * {bundles}u + bundle] = {self._bundle([f'w{r}' for r in range(own)])};"]
        lines += ["    workgroupBarrier();", *self._mix(), "  }", *self._finish()]
        shared = [
            Shared("queries", "vec4f", self.rows * quads),
            Shared("tile", "vec4u", self._keys(self.width)),
            Shared("weights", self.kind, (tile + self.spare) * bundles),
            Shared("maxima", self.kind, PARTIAL * bundles),
        ]
        return "\n".join(lines), shared

    def _seen(self) -> tuple[list[str], str, str]:
        """The first position that a row sees: what declares it, what it is added as, and the positions from it on."""
        if not self.op.window:
            return [], "", "end"
        before = f"{self.op.window + self.tokens - 1}u"
        return [f"  let begin : u32 = max(end, {before}) - {before};"], "begin + ", "end - begin"

    def _factor(self) -> float:
        """Of products of queries and keys: to powers of two, or to what `_capped` takes."""
        return LOG2_E * self.op.scaled * (2 / self.op.softcap if self.op.softcap else 1)

    def _capped(self, score: str) -> list[str]:
        cap = LOG2_E * self.op.softcap
        return [f"    {score} = {cap:.9e}f - {2 * cap:.9e}f / (1.0f + exp2(min({score}, {MOST})));"] if cap else []

    def _sink(self, r: int) -> str:
        """What a row's head adds to the sum of its weights."""
        head = "head" if self.tokens > 1 else f"head * {self.rows}u + {r}u"
        return _sink(f"sinks[{head}]", f"top{r}") if self.op.sinks else ""

    def _bundle(self, values: list[str]) -> str:
        """A thread's rows as one value."""
        return values[0] if self.own == 1 else f"{self.kind}({', '.join(values)})"

    def _chosen(self, name: str, r: int) -> str:
        """A variable that there is for every row, for the r-th of a thread's own."""
        chosen = f"{name}{r}"
        for bundle in range(1, self.rows // self.own):
            chosen = f"select({chosen}, {name}{bundle * self.own + r}, bundle == {bundle}u)"
        return chosen

    def _fetch(self) -> list[str]:
        """A thread's part of the keys of a tile, sixteen bytes at a time."""
        eights, lines = self.op.dim // 8, []
        for chunk in range(eights // self.width):
            for u in range(self._loads()):
                index = f"(tid + {u * self.threads}u)"
                row = f"min(first + {index} / {self.width}u, stop - 1u)"
                at = f"(cache + {row}) * {eights}u + {chunk * self.width}u + {index} % {self.width}u"
                lines.append(f"    let key{chunk}_{u} : vec4u = keys[{at}];")
        return lines

    def _loads(self) -> int:
        """Of a thread, for one part of a tile's keys."""
        return -(-self.tile * self.width // self.threads)

    def _put(self, chunk: int) -> list[str]:
        """What was fetched of one part of all keys, to shared memory."""
        total, lines = self.tile * self.width, []
        for u in range(self._loads()):
            index = f"(tid + {u * self.threads}u)"
            guard = "" if (u + 1) * self.threads <= total else f"if ({index} < {total}u) "
            place = f"{index} / {self.width}u * {self.width | 1}u + {index} % {self.width}u"
            lines.append(f"    {guard}{{ tile[{place}] = key{chunk}_{u}; }}")
        return lines

    def _row_stride(self) -> int:
        """Elements of q, and of the output, from one row to the next."""
        return self.op.dim * (self.op.heads if self.tokens > 1 else 1)

    def _places(self) -> list[str]:
        """Where a block's queries, its part of the cache and its output begin."""
        op = self.op
        heads, kv_heads, dim, m, context = op.heads, op.kv_heads, op.dim, op.m, op.context
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
        """Each row's largest score."""
        bundles, tile = self.rows // self.own, self.tile
        lines = [
            f"    if (tid < {PARTIAL * bundles}u) {{",
            f"      var most : {self.kind} = weights[tid];",
            f"      for (var i : u32 = 1u; i < {tile // PARTIAL}u; i += 1u) {{",
            f"        most = max(most, weights[tid + i * {PARTIAL * bundles}u]);",
            "      }",
            "      maxima[tid] = most;",
            "    }",
            "    workgroupBarrier();",
        ]
        for bundle in range(bundles):
            lines.append(f"    var most{bundle} : {self.kind} = maxima[{bundle}u];")
            lines += [
                f"    most{bundle} = max(most{bundle}, maxima[{i * bundles + bundle}u]);" for i in range(1, PARTIAL)
            ]
        return lines

    def _mix(self) -> list[str]:
        """Add a tile's values, by weight. Those behind its end have none."""
        bundles = self.rows // self.own
        unroll = self.unroll
        lines = [f"    for (var i : u32 = part; i < min({self.tile}u, stop - first); i += {self.parts * unroll}u) {{"]
        for u in range(unroll):
            row = f"min(first + i + {u * self.parts}u, stop - 1u)"
            lines.append(f"      let v{u} : vec2u = values[(cache + {row}) * {self.quads}u + quad];")
        for u in range(unroll):
            lines += [
                f"      let a{u} : vec2f = unpack(v{u}.x);",
                f"      let b{u} : vec2f = unpack(v{u}.y);",
                f"      let e{u} : vec4f = vec4f(a{u}.x, a{u}.y, b{u}.x, b{u}.y);",
            ]
            for bundle in range(bundles):
                at = f"(i + {u * self.parts}u) * {bundles}u + {bundle}u"
                lines.append(f"      let c{u}_{bundle} : {self.kind} = weights[{at}];")
            lines += [f"      mix{r} = mix{r} + e{u} * {self.of(f'c{u}_', r)};" for r in range(self.rows)]
        return [*lines, "    }"]

    def _finish(self) -> list[str]:
        """Add up the parts of each row and write it, whole or as a slice."""
        dim, quads = self.op.dim, self.quads
        lines = []
        for r in range(self.rows):
            words = ", ".join(f"as_u32(mix{r}.{c})" for c in "xyzw")
            lines += ["  workgroupBarrier();", f"  tile[tid] = vec4u({words});"]
            if r % self.own == 0:
                sums = self._bundle([f"sum{i}" for i in range(self.own)])
                lines.append(f"  if (bundle == {r // self.own}u) {{ weights[mine] = {sums}; }}")
            lines.append("  workgroupBarrier();")
            if r % self.own == 0:
                lines += self._totals(r // self.own)
            lines.append(f"  if (tid < {quads}u) {{")
            for i, c in enumerate("xyzw"):
                parts = [f"as_f32(tile[tid + {part * quads}u].{c})" for part in range(self.parts)]
                lines.append(f"    let o{r}_{i} : f32 = {' + '.join(parts)};")
            if self.splits == 1:
                at = f"query * 2u + {r * self._row_stride() // 2}u + 2u * tid"
                total = self.of("total", r)
                total = f"(1.0f / ({total}{self._sink(r)}))" if self.op.sinks else f"(1.0f / {total})"
                for word, (i, j) in enumerate(((0, 1), (2, 3))):
                    lines.append(f"    out[{at} + {word}u] = pack(o{r}_{i} * {total}, o{r}_{j} * {total});")
            else:
                lines.append(
                    f"    let at{r} : u32 = ((query / {quads}u + {r}u) * {self.splits}u + bid_y) * {dim + 2}u;"
                )
                lines += [f"    slices[at{r} + 4u * tid + {i}u] = o{r}_{i};" for i in range(4)]
                last = f"slices[at{r} + {dim}u] = top{r}; slices[at{r} + {dim + 1}u] = {self.of('total', r)};"
                lines.append(f"    if (tid == 0u) {{ {last} }}")
            lines.append("  }")
        return lines

    def _totals(self, bundle: int) -> list[str]:
        """Sums of a bundle's weights, of which threads have a few each."""
        kept = [f"maxima[{i}u]" for i in range(PARTIAL)]
        return [
            f"  if (tid < {PARTIAL}u) {{",
            f"    var some : {self.kind} = weights[tid];",
            f"    for (var i : u32 = 1u; i < {self.tile // PARTIAL}u; i += 1u) {{",
            f"      some = some + weights[tid + i * {PARTIAL}u];",
            "    }",
            "    maxima[tid] = some;",
            "  }",
            "  workgroupBarrier();",
            f"  let total{bundle} : {self.kind} = {' + '.join(kept)};",
        ]


def _sink(sink: str, top: str) -> str:
    return f" + exp2(min({sink} * {LOG2_E:.9e}f - {top}, {MOST}))"


def _together(op: Attention, splits: int) -> tuple[str, list[Param]]:
    """The kernel that puts slices together, a block a row."""
    dim = op.dim
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
    if op.sinks:
        lines.append(f"  total = total{_sink(f'sinks[bid % {op.heads}u]', 'top')};")
    lines.append(f"  out[bid * {dim // 2}u + tid] = pack(x / total, y / total);")
    return "\n".join(lines), [Param("slices", "f32"), *_sinks(op), Param("out", "u32", True)]


def _sinks(op: Attention) -> list[Param]:
    return [Param("sinks", "f32")] if op.sinks else []


def _text(op: Attention, decisions: Decisions, gpu: Gpu) -> Program:
    kernel = _Kernel(op, decisions["rows"], decisions["splits"], decisions["threads"], gpu.shared_bytes)
    inputs = [Param("q", "vec2u"), Param("keys", "vec4u"), Param("values", "vec2u"), Param("position", "i32")]
    body, shared = kernel.body()
    every = op.b * op.m * op.heads
    blocks = (every // kernel.rows, kernel.splits, 1)
    sinks = _sinks(op)
    out, scratch = 4 + len(sinks), 5 + len(sinks)  # places of buffers, of which sinks are the one before out
    if kernel.splits == 1:
        params = [*inputs, *sinks, Param("out", "u32", True)]
        shaders = {"attention": shader_for(gpu, params, kernel.threads, body, shared)}
        return Program(shaders, (Launch("attention", tuple(range(out + 1)), blocks),))
    slices = Param("slices", "f32", True)
    last, params = _together(op, kernel.splits)
    shaders = {
        "slices": shader_for(gpu, [*inputs, slices], kernel.threads, body, shared),
        "together": shader_for(gpu, params, op.dim // 2, last),
    }
    together = (scratch, *range(4, out + 1))
    launches = (Launch("slices", (0, 1, 2, 3, scratch), blocks), Launch("together", together, (every, 1, 1)))
    return Program(shaders, launches, (4 * every * kernel.splits * (op.dim + 2),))


TEMPLATES = (
    Template(
        "text-attention",
        Attention,
        "for GPU APIs: rows that share keys, the cache in slices",
        _choices,
        text=_text,
        takes=("scale", "softcap", "window", "sinks"),
    ),
)
