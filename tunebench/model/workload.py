"""Workload -> model config, IRModule and weights."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import tvm
from tvm import te
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op, spec

from tunebench import installation, registry, stored
from tunebench.dtypes import numpy_dtype
from tunebench.errors import TuneBenchError
from tunebench.kernels import cpu as cpu_kernels
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels.tvmscript import quick_parsing
from tunebench.model import architectures, quantization
from tunebench.model.architectures import ModelConfig
from tunebench.model.decoder import DecoderModule
from tunebench.model.description import Decoder, Matrix, Rope, Vector
from tunebench.model.quantization import Array, Arrays
from tunebench.spec import Scheme, WeightFormat, Workload

CONFIG_BYTES = 16 << 20


@dataclass(frozen=True)
class Model:
    """A workload with what its config says. `name` is how rows and files call it."""

    workload: Workload
    config: ModelConfig
    architecture: architectures.Architecture[Any]
    name: str

    @property
    def model_id(self) -> str:
        """12 hex digits of a hash of what it computes: architecture and config, whatever it is called."""
        fields = msgspec.structs.asdict(self.config)
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

    def scheme_of(self, matrix: Matrix) -> Scheme:
        """The scheme in whose form a matrix is stored. A table is N-major in every scheme: its rows are looked up."""
        scheme = self.workload.scheme
        if matrix.stays_float:
            return replace(scheme, weight=WeightFormat("float", 8 * numpy_dtype(scheme.dtype).itemsize, scheme.dtype))
        if not matrix.is_table:
            return scheme
        rows = replace(quantization.by_rows(scheme.weight), ordered=False)
        return replace(scheme, weight=rows, activations="float")

    @property
    def cache_shapes(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """One layer's keys and values."""
        config, workload = self.config, self.workload
        shapes = gpu_kernels.cache_shapes if workload.device_kind == "gpu" else cpu_kernels.cache_shapes
        return shapes(workload.batch, config.num_key_value_heads, workload.context, config.head_dim)

    @property
    def cache_bytes(self) -> int:
        """The whole KV cache."""
        elements = sum(int(np.prod(shape)) for shape in self.cache_shapes)
        return elements * self.config.num_hidden_layers * numpy_dtype(self.workload.scheme.dtype).itemsize

    @property
    def cache_bytes_per_token(self) -> int:
        """What one position of one sequence adds to a decode step's reads."""
        return self.cache_bytes // (self.workload.context * self.workload.batch)

    @property
    def weight_bytes(self) -> int:
        """All weights in stored form."""
        sizes = [int(np.prod(shape)) * numpy_dtype(dtype).itemsize for shape, dtype in self.param_shapes.values()]
        return sum(sizes)

    @property
    def read_bytes(self) -> int:
        """Weights that one decode step reads: all but the embedding table, of which it reads a row."""
        table = [name for name, matrix in self.matrices.items() if matrix.is_table]
        skipped = [
            int(np.prod(shape)) * numpy_dtype(dtype).itemsize
            for name, (shape, dtype) in self.param_shapes.items()
            if name.rpartition(".")[0] in table
        ]
        return self.weight_bytes - sum(skipped)

    @property
    def n_params(self) -> int:
        """Weights, a tied embedding counted once."""
        tied = {matrix.sources: matrix.n * matrix.k for matrix in self.matrices.values()}
        return sum(tied.values()) + sum(vector.length for vector in self.vectors.values())

    @property
    def flops_per_token(self) -> int:
        """Of the matrix products of one prompt token, two for a multiply-add, the head (run once a chunk) left out."""
        body = [matrix for matrix in self.matrices.values() if not matrix.is_table and not matrix.once_a_chunk]
        return sum(2 * matrix.n * matrix.k for matrix in body)

    @property
    def param_shapes(self) -> dict[str, tuple[tuple[int, ...], str]]:
        """Shape and dtype of each parameter, in the order the compiled functions take them."""
        named = _module(self).named_parameters()
        return {name: (tuple(int(extent) for extent in param.shape), param.dtype) for name, param in named}


def names() -> list[str]:
    """The models that come with TuneBench."""
    return sorted(path.stem for path in installation.workloads().glob("*.json"))


def load_model(workload: Workload) -> Model:
    """Read the model's config and check that the workload fits it."""
    path = _config_path(workload.model)
    data = _read_json(path)
    architecture = registry.pick(architectures.architectures(), str(data["model_type"]), "model_type")
    config = architecture.read(data, path.name)
    model = Model(workload, config, architecture, _name(path, data))
    for name, matrix in model.matrices.items():
        quantization.check(model.scheme_of(matrix), matrix.n, matrix.k, name)
    _check_shape(workload, config)
    if workload.device_kind == "gpu" and workload.scheme.activations != "float":
        raise TuneBenchError(f"{workload.scheme.name} is for CPUs.", "Choose q4f16_1 or q8f16_1 on a GPU.")
    if workload.device_kind == "gpu" and workload.scheme.dtype == "bfloat16":
        raise TuneBenchError(f"{workload.scheme.name} is for CPUs.", "Choose q0f16 on a GPU.")
    return model


def _config_path(model: str) -> Path:
    """Of a model's name, of its config's path, or of the folder that holds a config.json."""
    path = Path(model)
    if model in names():
        return installation.workloads() / f"{model}.json"
    if os.path.isdir(path):  # also False where the name is too long for a path
        return path / "config.json"
    if path.suffix != ".json":
        raise registry.unknown(model, names(), "model")
    return path


def _name(path: Path, data: Mapping[str, Any]) -> str:
    """A config's own name; of a `config.json` its folder's, or what the config says where that folder is a commit's."""
    if path.stem != "config":
        return path.stem
    folder = path.resolve().parent.name
    if folder and not re.fullmatch(r"[0-9a-f]{40}", folder):
        return folder
    return str(data.get("_name_or_path") or "").rstrip("/").rpartition("/")[2] or str(data["model_type"])


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = stored.decode(stored.read_bytes(path, CONFIG_BYTES))
    except FileNotFoundError:
        raise TuneBenchError(f"no model config at {path}.", f"Name a file, or one of: {', '.join(names())}.") from None
    except OSError as error:
        raise TuneBenchError(f"cannot read {path} ({error}).", "Name a Hugging Face config.json.") from None
    except ValueError as error:
        raise TuneBenchError(f"{path} is not JSON ({error}).", "Name a Hugging Face config.json.") from None
    if not isinstance(data, dict) or "model_type" not in data:
        raise TuneBenchError(f"{path} is no model config: model_type is missing.", "Name a Hugging Face config.json.")
    return data


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
    if config.hidden_size % cpu_kernels.LANES or config.head_dim % 2 or not config.head_dim:
        raise TuneBenchError(
            f"hidden_size {config.hidden_size} and head_dim {config.head_dim} are not supported.",
            f"hidden_size must be divisible by {cpu_kernels.LANES}, head_dim by 2.",
        )


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
    workload, config = model.workload, model.config
    keys, values = model.cache_shapes
    dtype, layers = workload.scheme.dtype, config.num_hidden_layers
    one = spec.Tensor([1], "int32")
    specs = {
        function_name(chunk): {
            "tokens": spec.Tensor([workload.batch, chunk], "int32"),
            "position": one,
            "last_token": one,
            "rope_cos_sin": [spec.Tensor(turns.shape, "float32") for turns in rope_cos_sin(model)],
            "keys": [spec.Tensor(keys, dtype)] * layers,
            "values": [spec.Tensor(values, dtype)] * layers,
            "$": {"param_mode": "packed", "effect_mode": "none"},
        }
        for chunk in workload.chunk_sizes
    }
    with quick_parsing():
        mod, _ = module.export_tvm(spec=specs)
    return mod


def _module(model: Model) -> nn.Module:
    return DecoderModule(model.decoder, model.workload, functools.partial(_Stored, model))


class _Stored(nn.Module):
    """A weight matrix in the scheme's form."""

    def __init__(self, model: Model, matrix: Matrix) -> None:
        self.matrix, self.device = matrix, model.workload.device_kind
        self.scheme = model.scheme_of(matrix)
        self.kind = quantization.kind_of(self.scheme.weight)
        shapes = self.kind.shapes(self.scheme.weight, matrix.n, matrix.k)
        self.suffixes = tuple(shapes)
        for suffix, (shape, dtype) in shapes.items():
            setattr(self, suffix, nn.Parameter(shape, dtype))

    def matmul(self, x: Tensor, out_dtype: str, residual: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        scheme, parts = self.scheme, self._parts()
        if self.device == "gpu":
            x, parts = quantization.in_order(scheme.weight, x, parts)
            weight = replace(scheme.weight, ordered=False)
            weights = functools.partial(self.kind.weights, weight)
            return gpu_kernels.matmul(x, parts, weights, self.matrix.n, weight, out_dtype, residual, bias)
        y = _cut(self.kind.matmul(scheme, x, parts, out_dtype), self.matrix.n)
        y = y if bias is None else y + bias
        return y if residual is None else residual + y

    def take(self, tokens: Tensor) -> Tensor:
        return _cut(self.kind.take(self.scheme, tokens, self._parts()), self.matrix.k)

    def _parts(self) -> dict[str, Tensor]:
        return {suffix: getattr(self, suffix) for suffix in self.suffixes}


def _cut(x: Tensor, width: int) -> Tensor:
    """The first columns of a matrix, without those that pad it."""
    if int(x.shape[1]) == width:
        return x

    def columns(a: te.Tensor) -> te.Tensor:
        return te.compute((a.shape[0], width), lambda i, j: a[i, j], name="cut")

    return op.tensor_expr_op(columns, "cut", [x])


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
    for name, matrix in model.matrices.items():
        weight = model.scheme_of(matrix).weight
        parts: Arrays = quantization.kind_of(weight).random(weight, matrix.n, matrix.k, rng)
        yield from ((f"{name}.{suffix}", part) for suffix, part in parts.items())
