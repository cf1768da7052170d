"""A model as a GGUF file for llama.cpp: the blocks of its description under gguf's names, the very same weights."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tunebench.engines import gguf_blocks
from tunebench.engines.base import Weights
from tunebench.engines.hugging_face import grouped
from tunebench.kernels.operation import Activation
from tunebench.model.description import Attention, Experts, Layer, Matrix, Mlp, Norm, Rope
from tunebench.model.quantization import Array, Arrays

if TYPE_CHECKING:
    from gguf import GGUFWriter

    from tunebench.model.rope import RopeScaling
    from tunebench.model.workload import Model


@dataclass(frozen=True)
class _Graph:
    """What llama.cpp computes for an architecture."""

    name: str  # in gguf.MODEL_ARCH
    activation: Activation = "silu"
    paired: bool = False  # rotates neighbours, where Hugging Face rotates elements d and d + D / 2
    factors: tuple[str, ...] = ()  # gguf's tensors of what each frequency of the rotation is divided by
    takes: frozenset[str] = frozenset()  # of what `_features` finds


LLAMA = _Graph("LLAMA", paired=True, factors=("ROPE_FREQS",))
GEMMA3 = _Graph("GEMMA3", "gelu_tanh", takes=frozenset({"sliding window", "scaled embedding", "capped logits"}))
SCALES = frozenset({"scaled embedding", "scale of scores"})
GRAPHS = {
    "llama": LLAMA,
    "mistral": LLAMA,
    "mixtral": LLAMA,
    "qwen2": _Graph("QWEN2"),
    "qwen3": _Graph("QWEN3"),
    "qwen3_moe": _Graph("QWEN3MOE"),
    "phi3": _Graph("PHI3", factors=("ROPE_FACTORS_SHORT", "ROPE_FACTORS_LONG")),
    "gemma2": _Graph("GEMMA2", "gelu_tanh", takes=GEMMA3.takes | {"capped scores"}),
    "gemma3_text": GEMMA3,
    "gpt_neox": _Graph("GPTNEOX", "gelu"),
    "granite": _Graph("GRANITE", paired=True, factors=LLAMA.factors, takes=SCALES),
    "gpt_oss": _Graph("GPT_OSS", "clamped_swiglu", takes=frozenset({"sliding window"})),
}
"""By `model_type`."""


@dataclass(frozen=True)
class _Tensor:
    """A tensor of the file: rows of one of our weights, in an order; [experts, rows] where it has three axes."""

    name: str
    rows: Array


def unlike(model: Model) -> str:
    """Why llama.cpp does not compute what a model does, or an empty string."""
    graph = GRAPHS.get(model.architecture.name)
    if graph is None:
        return f"its GGUF is not written for {model.architecture.name}"
    lacking = sorted(_features(model, graph) - graph.takes)
    if lacking:
        return f"llama.cpp's {graph.name.lower()} lacks this model's {' and '.join(lacking)}"
    if any(len(model.pieces(matrix)) > 1 for matrix in model.matrices.values()):
        return "tensors of several formats are stacked in it"
    for matrix in model.matrices.values():
        if not _kind(model, matrix):
            return f"no type of ggml holds {matrix.name}, [{matrix.n}, {matrix.k}], in {model.workload.scheme.name}"
    return ""


def _features(model: Model, graph: _Graph) -> set[str]:
    """What a model computes beside or unlike llama's, as far as a graph of llama.cpp may lack it."""
    decoder, context = model.decoder, model.workload.context
    found = {"scaled embedding" if decoder.embedding_scale != 1 else "", _odd_rotation(model, graph)}
    found |= {"capped logits" if decoder.logits_softcap else ""}
    kinds = {type(layer.mlp) for layer in decoder.layers}
    found |= {"layers of which some have experts" if len(kinds) > 1 else ""}
    for attention, mlp in ((layer.attention, layer.mlp) for layer in decoder.layers):
        if not isinstance(attention, Attention):
            found.add("linear attention")
            continue
        partial = isinstance(mlp, Experts) and not mlp.normalized
        found |= {
            f"{mlp.activation} activation" if mlp.activation != graph.activation else "",
            "sliding window" if 0 < attention.window < context else "",
            "capped scores" if attention.softcap else "",
            "scale of scores" if attention.scale and not np.isclose(attention.scale, attention.dim**-0.5) else "",
            "mixture whose weights do not add up to 1" if partial else "",
        }
    return found - {""}


def write(model: Model, weights: Weights, path: Path) -> None:
    """Write a model that `unlike` has nothing against; its weights come in order, vectors before matrices."""
    import gguf

    graph = GRAPHS[model.architecture.name]
    writer = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH[graph.name]])
    _write_shape(writer, model)
    _write_attention(writer, model)
    _write_rope(writer, model, graph)
    tensors, factors = _tensors(model, graph), _factors(model, graph)
    for tensor in factors:
        _announce(writer, tensor, "F32", 1)
    names = [*model.vectors, *model.matrices]
    for name in names:
        for tensor in tensors.get(name, ()):
            _announce(writer, tensor, *_stored(model, name))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for tensor in factors:
        writer.write_tensor_data(tensor.rows)
    for expected, (name, parts) in zip(names, grouped(model, weights), strict=True):
        if name != expected:
            raise ValueError(f"{name} came where {expected} belongs")
        for tensor in tensors.get(name, ()):
            writer.write_tensor_data(_data(model, name, parts, tensor.rows.reshape(-1)))
    writer.close()


def _write_shape(writer: GGUFWriter, model: Model) -> None:
    config, decoder = model.config, model.decoder
    layer = decoder.layers[0]
    writer.add_context_length(config.max_position_embeddings)
    writer.add_vocab_size(decoder.embedding.n)
    writer.add_embedding_length(decoder.embedding.k)
    writer.add_block_count(len(decoder.layers))
    writer.add_tokenizer_model("no_vocab")
    writer.add_feed_forward_length(layer.mlp.down.k)
    if isinstance(layer.mlp, Experts):
        writer.add_expert_feed_forward_length(layer.mlp.down.k)
        writer.add_expert_count(layer.mlp.router.n)
        writer.add_expert_used_count(layer.mlp.per_token)
    if layer.attention_norm.bias:
        writer.add_layer_norm_eps(decoder.norm.epsilon)
        writer.add_parallel_residual(layer.parallel)
    else:
        writer.add_layer_norm_rms_eps(decoder.norm.epsilon)
    writer.add_embedding_scale(decoder.embedding_scale)
    writer.add_logit_scale(1.0)  # a scale of the logits is in the last norm's weights
    if decoder.logits_softcap:
        writer.add_final_logit_softcapping(decoder.logits_softcap)


def _write_attention(writer: GGUFWriter, model: Model) -> None:
    attention = model.decoder.attentions[0]
    writer.add_head_count(attention.heads)
    writer.add_head_count_kv(attention.kv_heads)
    writer.add_key_length(attention.dim)
    writer.add_value_length(attention.dim)
    writer.add_attention_scale(attention.scale or attention.dim**-0.5)
    if attention.softcap:
        writer.add_attn_logit_softcapping(attention.softcap)
    windows = [attention.window for attention in model.decoder.attentions]
    if any(windows):
        writer.add_sliding_window(max(windows))
        writer.add_sliding_window_pattern([window > 0 for window in windows])


def _write_rope(writer: GGUFWriter, model: Model, graph: _Graph) -> None:
    """Its base, and a scale or a table of factors that make the frequencies of it."""
    import gguf

    rope, local, yarn = _rope(model, False), _rope(model, True), _yarn(model, graph)
    base = model.config.rope_theta if yarn else _base(rope)
    writer.add_rope_dimension_count(2 * len(rope.inv_freq))
    writer.add_rope_freq_base(base)
    writer.add_rope_freq_base_swa(base if local == rope else _base(local))
    times = rope.times
    if yarn:
        times /= 1 + 0.1 * np.log(yarn.factor)  # which llama.cpp multiplies by itself
        writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
        writer.add_rope_scaling_factor(yarn.factor)
        writer.add_rope_scaling_orig_ctx_len(yarn.original_max_position_embeddings)
        writer.add_rope_scaling_yarn_beta_fast(yarn.beta_fast)
        writer.add_rope_scaling_yarn_beta_slow(yarn.beta_slow)
    elif not graph.factors:
        writer.add_rope_scaling_factor(1 / rope.inv_freq[0])
    writer.add_rope_scaling_attn_factors(float(times))


def _rope(model: Model, windowed: bool) -> Rope:
    """The rotation of layers with a window or without, or of all where there are no such."""
    attentions = model.decoder.attentions
    chosen = next((each for each in attentions if bool(each.window) == windowed), attentions[0])
    return model.decoder.ropes[chosen.rope].of(model.workload.context)


def _base(rope: Rope) -> float:
    """The base whose powers the frequencies are: the last exactly, all of them where they are even."""
    count = len(rope.inv_freq)
    return float((rope.inv_freq[0] / rope.inv_freq[-1]) ** (count / (count - 1))) if count > 1 else 1.0


def _divisors(rope: Rope) -> Array:
    """What the powers of the base are divided by, float32."""
    count = len(rope.inv_freq)
    return np.array(_base(rope) ** -(np.arange(count) / count) / np.array(rope.inv_freq), np.float32)


def _is_even(rope: Rope) -> bool:
    divisors = _divisors(rope)
    return bool(np.allclose(divisors, divisors[0], rtol=1e-4))


def _odd_rotation(model: Model, graph: _Graph) -> str:
    rope, local = _rope(model, False), _rope(model, True)
    if graph.paired and 2 * len(rope.inv_freq) != model.decoder.attentions[0].dim:
        return "partial rotation"
    served = bool(graph.factors) or _is_even(rope) or _yarn(model, graph) is not None
    plain = local == rope or (_is_even(local) and np.isclose(local.inv_freq[0], 1) and local.times == rope.times)
    return "" if served and plain else "scaled rotation"


def _yarn(model: Model, graph: _Graph) -> RopeScaling | None:
    """What yarn is told, where a graph has no table of factors that would say the same.

    llama.cpp rounds where its ramp begins and ends, also for gpt-oss, which does not: there logits differ a little.
    """
    scaling = model.config.rope_scaling
    return scaling if scaling and scaling.rope_type == "yarn" and not graph.factors else None


def _factors(model: Model, graph: _Graph) -> list[_Tensor]:
    """The tables of what frequencies are divided by; both of longrope's are the one that the context asks for."""
    divisors = _divisors(_rope(model, False))
    return [] if np.all(divisors == 1) else [_Tensor(_named(tensor), divisors) for tensor in graph.factors]


def _tensors(model: Model, graph: _Graph) -> dict[str, list[_Tensor]]:
    """The tensors of each of our weights by its name; none where llama.cpp takes the embedding as the head."""
    import gguf

    has = {tensor.name for tensor in gguf.MODEL_TENSORS[gguf.MODEL_ARCH[graph.name]]}
    decoder = model.decoder
    found = _block(decoder.embedding, {"TOKEN_EMBD": _all(decoder.embedding)}) | _norm(decoder.norm, "OUTPUT_NORM")
    if "OUTPUT" in has:
        found |= _block(decoder.head, {"OUTPUT": _all(decoder.head)})
    for i, (layer, attention) in enumerate(zip(decoder.layers, decoder.attentions, strict=True)):
        found |= _attention(attention, has, graph.paired, i) | _mlp(layer.mlp, has, i) | _norms(layer, has, i)
    return found


def _attention(attention: Attention, has: set[str], paired: bool, layer: int) -> dict[str, list[_Tensor]]:
    rows, (heads, kv_heads, dim) = _all(attention.qkv), (attention.heads, attention.kv_heads, attention.dim)
    q, k, v = np.split(rows, [heads * dim, (heads + kv_heads) * dim])
    if paired:
        q, k = (part.reshape(-1, 2, dim // 2).swapaxes(1, 2).reshape(-1) for part in (q, k))
    qkv = {"ATTN_QKV": rows} if "ATTN_QKV" in has else {"ATTN_Q": q, "ATTN_K": k, "ATTN_V": v}
    found = _block(attention.qkv, qkv, layer) | _block(attention.out, {"ATTN_OUT": _all(attention.out)}, layer)
    for norm, tensor in ((attention.query_norm, "ATTN_Q_NORM"), (attention.key_norm, "ATTN_K_NORM")):
        found |= _norm(norm, tensor, layer)
    sinks = attention.sinks
    return found | ({sinks.name: [_Tensor(_named("ATTN_SINKS", layer), np.arange(sinks.length))]} if sinks else {})


def _mlp(mlp: Mlp | Experts, has: set[str], layer: int) -> dict[str, list[_Tensor]]:
    if isinstance(mlp, Experts):
        gate, up = _all(mlp.up).reshape(mlp.router.n, 2, -1).swapaxes(0, 1)
        down = {"FFN_DOWN_EXP": _all(mlp.down).reshape(mlp.router.n, -1)}
        found = _block(mlp.router, {"FFN_GATE_INP": _all(mlp.router)}, layer) | _block(mlp.down, down, layer)
        return found | _block(mlp.up, {"FFN_GATE_EXP": gate, "FFN_UP_EXP": up}, layer)
    gate, up = np.split(_all(mlp.up), 2)
    split = mlp.gated and "FFN_GATE" in has
    ups = {"FFN_GATE": gate, "FFN_UP": up} if split else {"FFN_UP": _all(mlp.up)}
    return _block(mlp.up, ups, layer) | _block(mlp.down, {"FFN_DOWN": _all(mlp.down)}, layer)


def _norms(layer: Layer, has: set[str], i: int) -> dict[str, list[_Tensor]]:
    before_mlp = "FFN_NORM" if has & {"FFN_NORM", "FFN_PRE_NORM"} else "ATTN_POST_NORM"
    return (
        _norm(layer.attention_norm, "ATTN_NORM", i)
        | _norm(layer.attention_post, "ATTN_POST_NORM", i)
        | _norm(layer.mlp_norm, before_mlp, i)
        | _norm(layer.mlp_post, "FFN_POST_NORM", i)
    )


def _all(matrix: Matrix) -> Array:
    return np.arange(matrix.n)


def _block(matrix: Matrix, rows: dict[str, Array], layer: int = 0) -> dict[str, list[_Tensor]]:
    """A matrix's tensors and its bias's, from their rows."""
    found = {matrix.name: [_Tensor(_named(tensor, layer), each) for tensor, each in rows.items()]}
    if matrix.bias:
        found[matrix.bias.name] = [_Tensor(_named(tensor, layer, "bias"), each) for tensor, each in rows.items()]
    return found


def _norm(norm: Norm | None, tensor: str, layer: int = 0) -> dict[str, list[_Tensor]]:
    vectors = {"weight": norm.weight, "bias": norm.bias} if norm else {}
    return {
        vector.name: [_Tensor(_named(tensor, layer, suffix), np.arange(vector.length))]
        for suffix, vector in vectors.items()
        if vector
    }


def _named(tensor: str, layer: int = 0, suffix: str = "weight") -> str:
    import gguf

    return f"{gguf.TENSOR_NAMES[gguf.MODEL_TENSOR[tensor]].format(bid=layer)}.{suffix}"


def _stored(model: Model, name: str) -> tuple[str, int]:
    """The type of a weight in the file, and how many there are in a row: vectors and routers are float32."""
    matrix = model.matrices.get(name)
    if matrix is None:
        return "F32", 1
    return _kind(model, matrix), matrix.k


def _kind(model: Model, matrix: Matrix) -> str:
    """The type of ggml that holds a matrix; empty where there is none."""
    return "F32" if matrix.stays_float else gguf_blocks.type_of(model.scheme_of(matrix).weight, matrix.k)


def _announce(writer: GGUFWriter, tensor: _Tensor, kind: str, k: int) -> None:
    import gguf

    block, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
    row = [k // block * size] if k > 1 else []
    shape = (*tensor.rows.shape, *row) if row else (*tensor.rows.shape[:-1], tensor.rows.shape[-1] * size)
    raw = gguf.GGMLQuantizationType[kind]
    writer.add_tensor_info(tensor.name, shape, np.dtype(np.uint8), int(np.prod(shape)), raw_dtype=raw)


def _data(model: Model, name: str, parts: Arrays, rows: Array) -> Array:
    """The bytes of a tensor."""
    matrix = model.matrices.get(name)
    if matrix is None or matrix.stays_float:
        return np.ascontiguousarray(parts["" if matrix is None else "weight"][rows].astype(np.float32))
    return np.concatenate(list(gguf_blocks.blocks(model.scheme_of(matrix).weight, parts, rows)))
