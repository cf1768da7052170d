"""Workload -> model config, IRModule and weights."""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tvm
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import spec

from tunebench import registry
from tunebench.dtypes import numpy_dtype
from tunebench.errors import TuneBenchError
from tunebench.kernels import cpu as cpu_kernels
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels.arithmetic import KV_MOST
from tunebench.kernels.tvmscript import quick_parsing
from tunebench.model import architectures, native, quantization, sources
from tunebench.model.architectures import ModelConfig
from tunebench.model.checkpoints import Checkpoint, float_form
from tunebench.model.decoder import DecoderModule
from tunebench.model.description import Attention, Decoder, Experts, LinearAttention, Matrix, Rope, Vector
from tunebench.model.quantization import Array, Arrays
from tunebench.model.sources import Source
from tunebench.model.stored_matrix import Pieces, StoredMatrix
from tunebench.spec import Scheme, Workload

Form = tuple[tuple[int, ...], str]
"""Shape and dtype."""
ALWAYS = {*ModelConfig.__struct_fields__, "rms_norm_eps", "tie_word_embeddings"} - {"rope_scaling"}
"""What a model's id is made of also where it is as its default says: ids in rows stay as they are."""


@dataclass(frozen=True)
class Model:
    """A workload with what its config says. `name` is how rows and files call it."""

    workload: Workload
    config: ModelConfig
    architecture: architectures.Architecture[Any]
    name: str
    source: Source | None = None

    @functools.cached_property
    def checkpoint(self) -> Checkpoint | None:
        """Its real weights, opened; None where there are none."""
        return self.source.open() if self.source else None

    @property
    def model_id(self) -> str:
        """12 hex digits of a hash of what it computes: architecture and config, whatever it is called."""
        config = msgspec.to_builtins(self.config)
        usual = {field.name: field.default for field in msgspec.structs.fields(self.config)}
        fields = {name: value for name, value in config.items() if name in ALWAYS or value != usual[name]}
        fields.pop("max_position_embeddings")  # says how far it was trained, and changes no operation
        text = json.dumps([self.architecture.name, fields], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:12]

    @functools.cached_property
    def decoder(self) -> Decoder:
        """What it computes."""
        return self.architecture.describe(self.config)

    @functools.cached_property
    def matrices(self) -> dict[str, Matrix]:
        """Every weight matrix by name."""
        return self.decoder.matrices()

    @functools.cached_property
    def vectors(self) -> dict[str, Vector]:
        """Every weight that stays float by name."""
        return self.decoder.vectors()

    def pieces(self, matrix: Matrix) -> tuple[Matrix, ...]:
        """What a matrix is stored as: itself, or, in a native scheme, parts by rows that each have one form."""
        if not self.workload.scheme.native or matrix.stays_float:
            return (matrix,)
        tensors = native.stored_as(self.checkpoint, matrix)
        dealt = dict(zip(matrix.sources, matrix.dealt, strict=True)) if matrix.dealt else {}
        runs = [list(run) for _, run in itertools.groupby(matrix.sources, lambda source: native.alike(tensors[source]))]
        if matrix.experts > 1 and (len(runs) > 1 or tensors[matrix.sources[0]].form.ordered):
            what = f"the experts of {matrix.name} are in several formats, or in an order of their own"
            raise TuneBenchError(f"{what}, which native does not serve.", "Choose another scheme.")
        if len(runs) == 1:
            return (matrix,)
        return tuple(
            replace(
                matrix,
                name=f"{matrix.name}.{i}",
                n=sum(tensors[each].shape[0] for each in run),
                sources=tuple(run),
                dealt=tuple(dealt[each] for each in run) if dealt else (),
            )
            for i, run in enumerate(runs)
        )

    def scheme_of(self, matrix: Matrix) -> Scheme:
        """The scheme in whose form a matrix, or a piece of one, is stored.

        A table is N-major in every scheme, as its rows are looked up, and so are experts, whose rows lie together;
        their products take float activations, as there are none of bytes for them.
        """
        scheme = self.workload.scheme
        if matrix.stays_float:
            return replace(scheme, weight=float_form(scheme.dtype))
        if scheme.native:
            form = native.stored_as(self.checkpoint, matrix)[matrix.sources[0]].form
            return native.of_matrix(scheme, form, matrix, self.workload.device_kind)
        if not matrix.is_table and matrix.experts == 1:
            return scheme
        rows = replace(quantization.by_rows(scheme.weight), ordered=False)
        return replace(scheme, weight=rows, activations="float")

    @property
    def caches(self) -> tuple[list[Form], list[Form]]:
        """Keys and values of every layer, of linear attention its two states; scales of a quantized cache follow."""
        workload, layers = self.workload, self.decoder.layers
        kept = [self._kept(layer.attention) for layer in layers]
        keys, values = [each[0] for each in kept], [each[1] for each in kept]
        scales: list[Form] = [((2, *shape[:2], workload.context), "float32") for shape, _ in keys if workload.kv]
        return keys, values + scales

    def _kept(self, attention: Attention | LinearAttention) -> tuple[Form, Form]:
        """Keys and values of one layer, or its last inputs and its state."""
        workload, b = self.workload, self.workload.batch
        if isinstance(attention, LinearAttention):
            state = (b, attention.value_heads, attention.key_dim, attention.value_dim)
            return ((b, attention.taps - 1, attention.channels), "float32"), (state, "float32")
        kernels = gpu_kernels if workload.device_kind == "gpu" else cpu_kernels
        keys, values = kernels.cache_shapes(b, attention.kv_heads, workload.context, attention.dim, workload.kv)
        dtype = kernels.cache_dtype(workload.kv, workload.scheme.dtype)
        return (keys, dtype), (values, dtype)

    @property
    def cache_bytes(self) -> int:
        """The whole KV cache, states included."""
        return sum(_bytes(held) for part in self.caches for held in part)

    def cache_read_bytes(self, depth: float) -> float:
        """What a decode step reads of all sequences' caches at `depth` positions, of a layer its window's at most."""
        decoder, context = self.decoder, self.workload.context
        linear = [layer.attention for layer in decoder.layers if isinstance(layer.attention, LinearAttention)]
        states = sum(sum(map(_bytes, self._kept(attention))) for attention in linear)
        seen = sum(min(depth, attention.window or depth) for attention in decoder.attentions)
        return states + (self.cache_bytes - states) * seen / (context * max(len(decoder.attentions), 1))

    @property
    def weight_bytes(self) -> int:
        """All weights in stored form."""
        return sum(map(_bytes, self.param_shapes.values()))

    @property
    def read_bytes(self) -> int:
        """Weights that one decode step reads, experts chosen at random; of the embedding table, a row: nothing."""
        read = {name: self._read_share(matrix) for name, matrix in self.matrices.items()}
        parts = [_bytes(held) * read.get(name.rpartition(".")[0], 1.0) for name, held in self.param_shapes.items()]
        return round(sum(parts))

    def _read_share(self, matrix: Matrix) -> float:
        """The part of a matrix that a decode step is expected to read."""
        if matrix.is_table:
            return 0.0
        return 1 - (1 - self._active_share(matrix)) ** self.workload.batch

    def _active_share(self, matrix: Matrix) -> float:
        """The part of a matrix that one token is multiplied with."""
        return self._per_token.get(matrix.name, 1) / matrix.experts

    @functools.cached_property
    def _per_token(self) -> dict[str, int]:
        """Of each matrix of experts, how many a token has."""
        mixtures = [layer.mlp for layer in self.decoder.layers if isinstance(layer.mlp, Experts)]
        return {matrix.name: each.per_token for each in mixtures for matrix in (each.up, each.down)}

    @property
    def n_params(self) -> int:
        """Weights, a tied embedding counted once."""
        tied = {matrix.sources: matrix.n * matrix.k for matrix in self.matrices.values()}
        return sum(tied.values()) + sum(vector.length for vector in self.vectors.values())

    @property
    def active_n_params(self) -> int:
        """Of those, what one token is multiplied with: all but the experts that it does not choose."""
        idle = [matrix.n * matrix.k * (1 - self._active_share(matrix)) for matrix in self.matrices.values()]
        return self.n_params - round(sum(idle))

    @property
    def flops_per_token(self) -> int:
        """Of the matrix products of one prompt token, two for a multiply-add, the head (run once a chunk) left out."""
        body = [matrix for matrix in self.matrices.values() if not matrix.is_table and not matrix.once_a_chunk]
        return round(sum(2 * matrix.n * matrix.k * self._active_share(matrix) for matrix in body))

    @property
    def param_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each parameter, in the order the compiled functions take them."""
        named = _module(self).named_parameters()
        return {name: (tuple(int(extent) for extent in param.shape), param.dtype) for name, param in named}


def load_model(workload: Workload) -> Model:
    """Read the model's config and check that the workload fits it."""
    workload = replace(workload, scheme=native.on_device(workload.scheme, workload.device_kind))
    source = sources.find(workload.model)
    architecture, config = architectures.read(source.config, str(source.path))
    workload, config = _first_layers(workload, config, source.path)
    model = Model(workload, config, architecture, source.name, source)
    for piece in itertools.chain.from_iterable(map(model.pieces, model.matrices.values())):
        quantization.check(model.scheme_of(piece), piece.n, piece.k, piece.name)
    _check_shape(workload, config)
    if workload.kv and model.decoder.is_recurrent:
        raise TuneBenchError(f"{model.name} has linear attention: its cache cannot be quantized.", "Leave --kv out.")
    if workload.device_kind == "gpu" and workload.scheme.activations != "float":
        raise TuneBenchError(f"{workload.scheme.name} is for CPUs.", "Choose q4f16_1 or q8f16_1 on a GPU.")
    if workload.device_kind == "gpu" and workload.scheme.dtype == "bfloat16":
        raise TuneBenchError(f"{workload.scheme.name} is for CPUs.", "Choose q0f16 on a GPU.")
    return model


def _first_layers(workload: Workload, config: ModelConfig, path: Path) -> tuple[Workload, ModelConfig]:
    """The config with as many layers as are asked for; the workload asks for none where those are all."""
    count = config.num_hidden_layers
    if workload.layers > count:
        raise TuneBenchError(f"{path} has {count} layers, not {workload.layers}.", f"Ask for --layers {count} at most.")
    if workload.layers in (0, count):
        return replace(workload, layers=0), config
    return workload, msgspec.structs.replace(config, num_hidden_layers=workload.layers)


def _check_shape(workload: Workload, config: ModelConfig) -> None:
    if workload.context % cpu_kernels.LANES or min(workload.chunks, default=0) < 2:
        raise TuneBenchError(
            f"a context of {workload.context} with chunks {workload.chunks} cannot be compiled.",
            f"Choose a context divisible by {cpu_kernels.LANES} and chunks of at least 2 tokens.",
        )
    if max(workload.chunks) > workload.context:
        raise TuneBenchError(
            f"a chunk of {max(workload.chunks)} tokens does not fit a context of {workload.context}.",
            "Lower --prompt, or raise --context.",
        )
    if workload.kv not in ("", *KV_MOST):
        raise registry.unknown(workload.kv, sorted(KV_MOST), "kind of KV cache")
    if workload.kv and workload.device_kind == "gpu" and config.head_dim % 4:
        raise TuneBenchError(
            f"head_dim {config.head_dim} has no KV cache in {workload.kv} on a GPU.", "Leave out --kv."
        )
    if config.head_dim % 2 or not config.head_dim:
        raise TuneBenchError(f"head_dim {config.head_dim} is not supported.", "It must be divisible by 2.")


def function_name(chunk: int) -> str:
    """The compiled function that runs a chunk of `chunk` tokens."""
    return "decode" if chunk == 1 else f"prefill_{chunk}"


def build_module(model: Model) -> tvm.IRModule:
    """The model as an IRModule: `decode` and one `prefill_<chunk>` for each chunk.

    Each takes (tokens int32 [b, m], position int32 [1], last_token int32 [1], rope_cos_sin, keys, values,
    params) and returns float32 logits [b, vocab] and the cache it updated in place.
    """
    module = _module(model)
    for chunk in model.workload.chunk_sizes:
        setattr(module, function_name(chunk), module.step)
    workload, (keys, values) = model.workload, model.caches
    one = spec.Tensor([1], "int32")
    specs = {
        function_name(chunk): {
            "tokens": spec.Tensor([workload.batch, chunk], "int32"),
            "position": one,
            "last_token": one,
            "rope_cos_sin": [spec.Tensor(turns.shape, "float32") for turns in rope_cos_sin(model)],
            "keys": [spec.Tensor(*each) for each in keys],
            "values": [spec.Tensor(*each) for each in values],
            "$": {"param_mode": "packed", "effect_mode": "none"},
        }
        for chunk in workload.chunk_sizes
    }
    with quick_parsing():
        mod, _ = module.export_tvm(spec=specs)
    return mod


def _module(model: Model) -> nn.Module:
    def store(matrix: Matrix) -> StoredMatrix | Pieces:
        kind = model.workload.device_kind
        pieces = [StoredMatrix(piece, model.scheme_of(piece), kind) for piece in model.pieces(matrix)]
        return pieces[0] if len(pieces) == 1 else Pieces(pieces)

    return DecoderModule(model.decoder, model.workload, store)


def _bytes(held: Form) -> int:
    shape, dtype = held
    return math.prod(shape) * numpy_dtype(dtype).itemsize


def rope_cos_sin(model: Model) -> list[Array]:
    """Cosines and sines of every position's rotation, float32 [2, C, rotated / 2], of each of the model's ropes."""
    return [_turns(ropes.of(model.workload.context), model.workload.context) for ropes in model.decoder.ropes]


def _turns(rope: Rope, context: int) -> Array:
    turned = np.arange(context, dtype=np.float32)[:, None] * np.array(rope.inv_freq, np.float32)
    return np.stack([np.cos(turned), np.sin(turned)]).astype(np.float32) * np.float32(rope.times)


def with_rope(model: Model, weights: Iterable[tuple[str, Array]]) -> Iterator[tuple[str, Array]]:
    """Weights by name, and then the cosines and sines that a plan takes beside them."""
    yield from weights
    yield from ((rope_name(i), turns) for i, turns in enumerate(rope_cos_sin(model)))


def rope_name(place: int) -> str:
    """What a plan calls the cosines and sines of a model's rope."""
    return f"rope_cos_sin.{place}" if place else "rope_cos_sin"


def random_weights(model: Model, seed: int) -> Iterator[tuple[str, Array]]:
    """Made-up weights in stored form, one array at a time, in no particular order."""
    rng = np.random.default_rng(seed)
    for name, vector in model.vectors.items():
        yield name, np.ones(vector.length, numpy_dtype(vector.dtype or model.workload.scheme.dtype))
    for piece in itertools.chain.from_iterable(map(model.pieces, model.matrices.values())):
        weight = model.scheme_of(piece).weight
        parts: Arrays = quantization.kind_of(weight).random(weight, piece.n, piece.k, rng)
        yield from ((f"{piece.name}.{suffix}", part) for suffix, part in parts.items())
