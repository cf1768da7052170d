"""A chunk's rotation and its place in the cache, as source text for GPU APIs: one launch for q, keys and values."""

from __future__ import annotations

from tunebench.kernels.operation import Append
from tunebench.kernels.shader_dialect import Param
from tunebench.kernels.templates import Choices, Decisions, Gpu, Template, in_one_launch, shader_for
from tunebench.runtime.plan import Program


def _choices(op: Append, gpu: Gpu) -> Choices:
    if gpu.language is None or op.dtype != "float16" or op.dim % 4:
        return {}
    return {"threads": [t for t in (64, 128, 256) if t <= gpu.threads]}


def _text(op: Append, decisions: Decisions, gpu: Gpu) -> Program:
    b, m, heads, kv_heads, dim, context = op.b, op.m, op.heads, op.kv_heads, op.dim, op.context
    every, half, words, threads = heads + 2 * kv_heads, dim // 2, dim // 4, decisions["threads"]
    total = b * m * every * words  # a thread has two neighbours of the first half and two of the second
    body = f"""\
  let i : u32 = bid * {threads}u + tid;
  if (i < {total}u) {{
    let word : u32 = i % {words}u;
    let head : u32 = i / {words}u % {every}u;
    let token : u32 = i / {words * every}u;
    let here : u32 = (token * {every}u + head) * {half}u + word;
    let place : u32 = u32(position[0]) + token % {m}u;
    let sequence : u32 = token / {m}u;
    let a : vec2f = unpack(qkv[here]);
    let b : vec2f = unpack(qkv[here + {words}u]);
    let turn : u32 = place * {half}u + 2u * word;
    let c : vec2f = vec2f(rope_cos_sin[turn], rope_cos_sin[turn + 1u]);
    let s : vec2f = vec2f(rope_cos_sin[{context * half}u + turn], rope_cos_sin[{context * half}u + turn + 1u]);
    let low : u32 = pack(a.x * c.x - b.x * s.x, a.y * c.y - b.y * s.y);
    let high : u32 = pack(b.x * c.x + a.x * s.x, b.y * c.y + a.y * s.y);
    if (head < {heads}u) {{
      let to : u32 = (token * {heads}u + head) * {half}u + word;
      q[to] = low;
      q[to + {words}u] = high;
    }} else {{
      let cached : u32 = head - select({heads + kv_heads}u, {heads}u, head < {heads + kv_heads}u);
      let to : u32 = ((sequence * {kv_heads}u + cached) * {context}u + place) * {half}u + word;
      if (head < {heads + kv_heads}u) {{
        keys[to] = low;
        keys[to + {words}u] = high;
      }} else {{
        values[to] = qkv[here];
        values[to + {words}u] = qkv[here + {words}u];
      }}
    }}
  }}"""
    outputs = [Param(name, "u32", True) for name in ("keys", "values", "q")]
    params = [Param("qkv", "u32"), Param("position", "i32"), Param("rope_cos_sin", "f32"), *outputs]
    made = shader_for(gpu, params, threads, body)
    return in_one_launch(made, (-(-total // threads), 1, 1))


TEMPLATES = (Template("text-append", Append, "for GPU APIs: rotation and cache in one launch", _choices, text=_text),)
