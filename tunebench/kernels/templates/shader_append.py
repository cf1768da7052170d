"""A chunk's rotation and its place in the cache, as source text for GPU APIs: one launch for q, keys and values."""

from __future__ import annotations

from dataclasses import dataclass

from tunebench.kernels.operation import Append
from tunebench.kernels.shader_dialect import Param, Shared, lane_sums
from tunebench.kernels.templates import Choices, Decisions, Gpu, Template, in_one_launch, shader_for
from tunebench.runtime.plan import Program


def _choices(op: Append, gpu: Gpu) -> Choices:
    words = op.dim // 4
    if gpu.language is None or op.dtype != "float16" or op.dim % 4 or op.rotated % 4:
        return {}
    if op.norm and words & (words - 1):  # a head's threads add up by halves
        return {}
    return {"threads": [t for t in (64, 128, 256) if t <= gpu.threads and (not op.norm or t >= words)]}


def _text(op: Append, decisions: Decisions, gpu: Gpu) -> Program:
    b, m, heads, kv_heads, dim, context = op.b, op.m, op.heads, op.kv_heads, op.dim, op.context
    every, half, words, threads = heads + 2 * kv_heads, dim // 2, dim // 4, decisions["threads"]
    total = b * m * every * words  # a thread has two neighbours of the first half and two of the second
    pairs = _pairs(op)
    square, shared = _square(op, threads, total, gpu.adds_lanes) if op.norm else ([], [])
    gains = _gains(op) if op.norm else []
    low, high = (f" * g{i}" if op.norm else "" for i in range(2))
    body = f"""\
{lines(f"  let i : u32 = bid * {threads}u + tid;", *square)}
  if (i < {total}u) {{
{lines(*pairs.places)}
    let head : u32 = i / {words}u % {every}u;
    let token : u32 = i / {words * every}u;
    let here : u32 = (token * {every}u + head) * {half}u + word;
    let place : u32 = u32(position[0]) + token % {m}u;
    let sequence : u32 = token / {m}u;
{lines(*gains, f"    let a : vec2f = unpack(qkv[here]){low};")}
    let b : vec2f = unpack(qkv[here + {pairs.apart}]){high};
    let turn : u32 = place * {op.rotated // 2}u + 2u * {pairs.turned};
    let c : vec2f = {pairs.turning(_angles(""), 1)};
    let s : vec2f = {pairs.turning(_angles(f"{context * op.rotated // 2}u + "), 0)};
    let low : u32 = pack(a.x * c.x - b.x * s.x, a.y * c.y - b.y * s.y);
    let high : u32 = pack(b.x * c.x + a.x * s.x, b.y * c.y + a.y * s.y);
    if (head < {heads}u) {{
      let to : u32 = (token * {heads}u + head) * {half}u + word;
      q[to] = low;
      q[to + {pairs.apart}] = high;
    }} else {{
      let cached : u32 = head - select({heads + kv_heads}u, {heads}u, head < {heads + kv_heads}u);
      let to : u32 = ((sequence * {kv_heads}u + cached) * {context}u + place) * {half}u + word;
      if (head < {heads + kv_heads}u) {{
        keys[to] = low;
        keys[to + {pairs.apart}] = high;
      }} else {{
        values[to] = qkv[here];
        values[to + {pairs.apart}] = qkv[here + {pairs.apart}];
      }}
    }}
  }}"""
    outputs = [Param(name, "u32", True) for name in ("keys", "values", "q")]
    norms = [Param(name, "u32") for name in ("query_norm", "key_norm")] if op.norm else []
    params = [Param("qkv", "u32"), Param("position", "i32"), Param("rope_cos_sin", "f32"), *norms, *outputs]
    made = shader_for(gpu, params, threads, body, shared)
    return in_one_launch(made, (-(-total // threads), 1, 1))


def lines(*each: str) -> str:
    return "\n".join(each)


@dataclass(frozen=True)
class _Pairs:
    """Where a thread's two words lie, of neighbours that turn together or, past those, do not turn."""

    places: list[str]  # declares `word`, and what else there is to say
    apart: str  # from the first word to the second
    turned: str  # the word's place among those that turn
    partial: bool

    def turning(self, angles: str, rest: int) -> str:
        """The cosines or sines of a word; `rest` where it does not turn."""
        return f"select(vec2f({rest}.0f, {rest}.0f), {angles}, turns)" if self.partial else angles


def _pairs(op: Append) -> _Pairs:
    words, turned = op.dim // 4, op.rotated // 4
    if not op.rotary:
        return _Pairs([f"    let word : u32 = i % {words}u;"], f"{words}u", "word", False)
    places = [
        f"    let turns : bool = i % {words}u < {turned}u;",
        f"    let word : u32 = i % {words}u + select({turned}u, 0u, turns);",
        f"    let apart : u32 = select({words - turned}u, {turned}u, turns);",
    ]
    return _Pairs(places, "apart", f"(i % {words}u % {turned}u)", True)


def _angles(first: str) -> str:
    return f"vec2f(rope_cos_sin[{first}turn], rope_cos_sin[{first}turn + 1u])"


def _square(op: Append, threads: int, total: int, adds_lanes: bool) -> tuple[list[str], list[Shared]]:
    """The factor that normalises a thread's head, whose sum of squares its threads share."""
    words = op.dim // 4
    sums, shared = lane_sums(["square"], words, threads, adds_lanes)
    found = [
        f"  let lane : u32 = tid % {words}u;",
        f"  let near : u32 = min(i, {total - 1}u);",
        f"  let first : u32 = near / {words}u * {2 * words}u + near % {words}u;",
        "  let p : vec2f = unpack(qkv[first]);",
        f"  let r : vec2f = unpack(qkv[first + {words}u]);",
        "  var square : f32 = dot(p, p) + dot(r, r);",
        *sums,
        f"  if (lane == 0u) {{ squares[tid / {words}u] = square; }}",
        "  workgroupBarrier();",
        f"  let factor : f32 = 1.0f / sqrt(squares[tid / {words}u] / {float(op.dim)}f + {op.norm:.9e}f);",
    ]
    return found, [*shared, Shared("squares", "f32", threads // words)]


def _gains(op: Append) -> list[str]:
    """What a thread's two words are multiplied with."""
    apart = _pairs(op).apart
    return [
        f"    let g{i} : vec2f = factor * unpack(select(key_norm[{at}], query_norm[{at}], head < {op.heads}u));"
        for i, at in enumerate(("word", f"word + {apart}"))
    ]


TEMPLATES = (
    Template(
        "text-append",
        Append,
        "for GPU APIs: rotation and cache in one launch",
        _choices,
        text=_text,
        takes=("rotary", "norm"),
    ),
)
