"""llama.cpp, through llama-cpp-python's low-level interface, over a GGUF file with the very same weights.

4-bit weights become Q4_0 and 8-bit ones Q8_0 without loss: both hold (integer - zero) * scale in groups of 32,
and the sign of a float scale absorbs the other zero point. The file is written for the run and removed with it.
"""

from __future__ import annotations

import ctypes
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from tunebench.dtypes import DTYPES
from tunebench.engines.base import Engine, Weights
from tunebench.engines.baselines import Peer
from tunebench.errors import TuneBenchError
from tunebench.model.quantization import Array, Arrays, integer
from tunebench.spec import EngineName, WeightFormat

if TYPE_CHECKING:
    from tunebench.model.architectures.llama import LlamaConfig
    from tunebench.model.workload import Model

GROUP = 32  # weights of a block of Q4_0 and Q8_0
ROWS = 4096  # of a matrix converted at a time
BLOCKS = {4: "Q4_0", 8: "Q8_0"}  # by the bits of a weight


@dataclass(frozen=True)
class _Part:
    """Rows [start, stop) of one of our matrices as one tensor of GGUF, `heads` > 0 where rotated in pairs."""

    name: str
    start: int
    stop: int
    heads: int = 0


def refuses(model: Model) -> str:
    """Why llama.cpp cannot run a model, or an empty string."""
    weight = model.workload.scheme.weight
    if model.architecture.name != "llama":
        return f"its GGUF is not written for {model.architecture.name}"
    if weight.kind == "integer" and (weight.bits not in BLOCKS or weight.group != GROUP or weight.zero != "symmetric"):
        return f"Q4_0 and Q8_0 have symmetric integers in groups of {GROUP}"
    return ""


def gguf_type(weight: WeightFormat) -> str:
    """The type in GGUF that holds matrices of a format."""
    return BLOCKS[weight.bits] if weight.kind == "integer" else DTYPES[weight.dtype].short.upper()


def write_gguf(model: Model, weights: Weights, path: Path) -> None:
    """Write a model for llama.cpp."""
    import gguf

    config, weight = cast("LlamaConfig", model.config), model.workload.scheme.weight
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")
    kind = gguf.GGMLQuantizationType[gguf_type(weight)]
    names: list[str] = []
    for name, vector in model.vectors.items():
        names.append(name)
        length = vector.length
        writer.add_tensor_info(_vector(name), (length,), np.dtype(np.float32), 4 * length)
    for name, matrix in model.matrices.items():
        names.append(name)
        for part in _parts(config, name, matrix.n):
            shape = (part.stop - part.start, _row_bytes(weight, matrix.k))
            size = int(np.prod(shape))
            writer.add_tensor_info(part.name, shape, np.dtype(np.uint8), size, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for expected, (name, parts) in zip(names, _grouped(model, weights), strict=True):
        if name != expected:
            raise ValueError(f"{name} came where {expected} belongs")
        if name not in model.matrices:
            writer.write_tensor_data(parts[""].astype(np.float32))
            continue
        for part in _parts(config, name, model.matrices[name].n):
            writer.write_tensor_data(np.concatenate(list(_rows(model, name, parts, part))))
    writer.close()


def _grouped(model: Model, weights: Weights) -> Iterator[tuple[str, Arrays]]:
    """Each weight with all its parts; a vector's only part has no suffix."""
    name, parts = "", Arrays()
    for full, array in weights:
        matrix, _, suffix = full.rpartition(".")
        owner, suffix = (matrix, suffix) if matrix in model.matrices else (full, "")
        if parts and owner != name:
            yield name, parts
            parts = Arrays()
        name = owner
        parts[suffix] = array
    yield name, parts


def _vector(name: str) -> str:
    kinds = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
    if name == "model.norm.weight":
        return "output_norm.weight"
    _, _, layer, kind, _ = name.split(".")
    return f"blk.{layer}.{kinds[kind]}.weight"


def _parts(config: LlamaConfig, name: str, n: int) -> list[_Part]:
    """The tensors of GGUF that one of our matrices holds."""
    if "layers" not in name:
        return [_Part({"model.embed_tokens": "token_embd", "lm_head": "output"}[name] + ".weight", 0, n)]
    _, _, layer, _, kind = name.split(".")
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    half = n // 2
    parts = {
        "qkv_proj": [
            _Part("attn_q", 0, queries, config.num_attention_heads),
            _Part("attn_k", queries, queries + keys, config.num_key_value_heads),
            _Part("attn_v", queries + keys, n),
        ],
        "o_proj": [_Part("attn_output", 0, n)],
        "gate_up_proj": [_Part("ffn_gate", 0, half), _Part("ffn_up", half, n)],
        "down_proj": [_Part("ffn_down", 0, n)],
    }[kind]
    return [_Part(f"blk.{layer}.{part.name}.weight", part.start, part.stop, part.heads) for part in parts]


def _row_bytes(weight: WeightFormat, k: int) -> int:
    scales = k // weight.group if weight.group else 0
    return 2 * scales + k * weight.bits // 8


def _rows(model: Model, name: str, parts: Arrays, part: _Part) -> Iterator[Array]:
    """A tensor's bytes, some rows at a time."""
    weight = model.scheme_of(model.matrices[name]).weight
    rows = np.arange(part.start, part.stop)
    if part.heads:  # llama.cpp rotates neighbours, Hugging Face elements d and d + D / 2
        rows = rows.reshape(part.heads, 2, -1).swapaxes(1, 2).reshape(-1)
    by_row = {suffix: integer.by_row(weight, array) for suffix, array in parts.items()}
    for start in range(0, len(rows), ROWS):
        some = {suffix: array[rows[start : start + ROWS]] for suffix, array in by_row.items()}
        if weight.kind == "float":
            yield np.ascontiguousarray(some["weight"]).view(np.uint8)
        else:
            yield _blocks(weight, some["q_weight"], some["q_scale"])


def _blocks(weight: WeightFormat, words: Array, scales: Array) -> Array:
    """Q4_0: float16 d, 16 bytes with weights i and i + 16, (q - 8) d. Q8_0: float16 d, 32 signed bytes, q d."""
    n = words.shape[0]
    integers = integer.unpack(weight, words).astype(np.uint8).reshape(n, -1, GROUP)
    if BLOCKS[weight.bits] == "Q4_0":
        flipped = 15 - integers  # (15 - q - 8) * -d = (q - 7) * d
        quants = flipped[..., : GROUP // 2] | flipped[..., GROUP // 2 :] << 4
    else:
        quants = (127 - integers.astype(np.int16)).astype(np.int8).view(np.uint8)  # 127 - q fits, q - 127 may not
    deltas = (-scales).astype(np.float16).reshape(n, -1, 1).view(np.uint8)
    return np.concatenate([deltas, quants], axis=-1).reshape(n, -1)


class LlamaCpp:
    """One model in llama.cpp, with llama.cpp's own settings but for the number of threads and the context."""

    def __init__(self, path: Path, batch: int, context: int, threads: int) -> None:
        from llama_cpp import llama_cpp as api

        self._api = api
        self._quiet = api.llama_log_callback(lambda level, text, data: None)
        api.llama_log_set(self._quiet, ctypes.c_void_p(0))
        api.llama_backend_init()
        model_params, params = api.llama_model_default_params(), api.llama_context_default_params()
        model_params.n_gpu_layers = 0
        params.n_ctx, params.n_seq_max = context * batch, batch
        params.n_threads = params.n_threads_batch = threads
        self._model: Any = api.llama_model_load_from_file(str(path).encode(), model_params)
        self._context: Any = self._model and api.llama_init_from_model(self._model, params)
        if not self._context:
            raise TuneBenchError(f"llama.cpp could not load {path}.")
        self._memory = api.llama_get_memory(self._context)
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch_tokens = int(api.llama_n_batch(self._context))
        self._sequences, self._length = batch, 0

    @property
    def weight_bytes(self) -> int:
        """All tensors, as llama.cpp reports them."""
        return int(self._api.llama_model_size(self._model))

    def prefill(self, tokens: np.ndarray, position: int) -> None:
        """Process int32 tokens [b, n] that stand at `position`."""
        self._go_to(position)
        step = self._batch_tokens // self._sequences
        for start in range(0, tokens.shape[1], step):
            self._decode(tokens[:, start : start + step])

    def decode(self, tokens: np.ndarray, position: int) -> None:
        """Process one token a sequence, int32 [b, 1], at `position`."""
        self._go_to(position)
        self._decode(tokens)

    def wait(self) -> None:
        """Nothing: each call waits."""

    def logits(self) -> np.ndarray:
        """Float32 logits [b, vocab] of the last call."""
        rows = [self._api.llama_get_logits_ith(self._context, i) for i in self._last]
        return np.stack([np.ctypeslib.as_array(row, (self._vocab,)).copy() for row in rows])

    def _go_to(self, position: int) -> None:
        """Drop what lies behind `position` in the cache, or fill it up to there."""
        if self._length > position:
            for sequence in range(self._sequences):
                self._api.llama_memory_seq_rm(self._memory, sequence, position, -1)
            self._length = position
        elif self._length < position:
            missing = position - self._length
            filler = np.random.default_rng(0).integers(0, self._vocab, (self._sequences, missing), np.int32)
            self.prefill(filler, self._length)

    def _decode(self, tokens: np.ndarray) -> None:
        sequences, n = tokens.shape
        batch = self._api.llama_batch_init(sequences * n, 0, 1)
        batch.n_tokens = sequences * n
        self._last = [sequence * n + n - 1 for sequence in range(sequences)]
        for i, token in enumerate(tokens.reshape(-1).tolist()):
            sequence, place = divmod(i, n)
            batch.token[i], batch.pos[i] = token, self._length + place
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = place == n - 1
        failed = self._api.llama_decode(self._context, batch)
        self._api.llama_synchronize(self._context)
        self._api.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        self._length += n

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._api.llama_free(self._context)
        if getattr(self, "_model", None):
            self._api.llama_model_free(self._model)


def load(model: Model, weights: Weights, threads: int, folder: Path) -> Engine:
    """Write the weights as GGUF and open them; the file goes once llama.cpp has it."""
    with tempfile.TemporaryDirectory(prefix="gguf-", dir=folder) as scratch:
        path = Path(scratch) / "model.gguf"
        write_gguf(model, weights, path)
        return LlamaCpp(path, model.workload.batch, model.workload.context, threads)


PEERS = (
    Peer(
        name=EngineName.LLAMA_CPP,
        summary="llama.cpp on the CPU, the same weights as GGUF: Q4_0, Q8_0 or floats",
        packages=("llama_cpp", "gguf"),
        refuses=refuses,
        load=load,
    ),
)
