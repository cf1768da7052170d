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
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, spec

from tunebench import installation, registry, stored
from tunebench.dtypes import numpy_dtype
from tunebench.errors import TuneBenchError
from tunebench.kernels import cpu as cpu_kernels
from tunebench.kernels import gpu as gpu_kernels
from tunebench.kernels.tvmscript import quick_parsing
from tunebench.model import architectures, quantization
from tunebench.model.architectures import Matrix, ModelConfig
from tunebench.model.quantization import Array, Arrays
from tunebench.spec import Scheme, Workload

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

    @property
    def matrices(self) -> dict[str, Matrix]:
        """Every weight matrix by name."""
        return self.architecture.matrices(self.config)

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
        return sum(tied.values()) + sum(self.architecture.vectors(self.config).values())

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
        quantization.check(stored_scheme(workload.scheme, matrix), matrix.n, matrix.k, name)
    _check_shape(workload, config)
    if workload.device_kind == "gpu" and workload.scheme.activations == "int8":
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

    Each takes (tokens int32 [b, m], position int32 [1], last_token int32 [1], rope_cos_sin float32 [2, C, D / 2], keys,
    values, params) and returns float32 logits [b, vocab] and the cache it updated in place.
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
            "rope_cos_sin": spec.Tensor([2, workload.context, config.head_dim // 2], "float32"),
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
    return model.architecture.build(model.config, model.workload, lambda name: _Stored(model, name))


class _Stored(nn.Module):
    """A weight matrix in the scheme's form. A table is N-major in every scheme, as its rows are looked up."""

    def __init__(self, model: Model, name: str) -> None:
        self.matrix, self.device = model.matrices[name], model.workload.device_kind
        self.scheme = stored_scheme(model.workload.scheme, self.matrix)
        self.kind = quantization.kind_of(self.scheme.weight)
        shapes = self.kind.shapes(self.scheme.weight, self.matrix.n, self.matrix.k)
        self.suffixes = tuple(shapes)
        for suffix, (shape, dtype) in shapes.items():
            setattr(self, suffix, nn.Parameter(shape, dtype))

    def matmul(self, x: Tensor, out_dtype: str, residual: Tensor | None = None) -> Tensor:
        scheme, parts = self.scheme, self._parts()
        if self.device == "gpu":
            weights = functools.partial(self.kind.weights, scheme.weight)
            return gpu_kernels.matmul(x, parts, weights, self.matrix.n, scheme.weight, out_dtype, residual)
        y = self.kind.matmul(scheme, x, parts, out_dtype)
        return y if residual is None else residual + y

    def take(self, tokens: Tensor) -> Tensor:
        return self.kind.take(self.scheme, tokens, self._parts())

    def _parts(self) -> dict[str, Tensor]:
        return {suffix: getattr(self, suffix) for suffix in self.suffixes}


def stored_scheme(scheme: Scheme, matrix: Matrix) -> Scheme:
    """The scheme with the layout that this matrix has."""
    if not matrix.is_table:
        return scheme
    return replace(scheme, weight=replace(scheme.weight, layout="NK", packing="in_order"), activations="float")


def rope_cos_sin(model: Model) -> Array:
    """Cosines and sines of every position's rotation, float32 [2, C, D / 2]."""
    half = model.config.head_dim // 2
    exponent = np.arange(half, dtype=np.float32) / np.float32(half)
    frequency = (1.0 / np.float32(model.config.rope_theta) ** exponent).astype(np.float32)
    turned = np.arange(model.workload.context, dtype=np.float32)[:, None] * frequency
    return np.stack([np.cos(turned), np.sin(turned)]).astype(np.float32)


def with_rope(model: Model, weights: Iterable[tuple[str, Array]]) -> Iterator[tuple[str, Array]]:
    """Weights by name, and then the cosines and sines that a plan takes beside them."""
    yield from weights
    yield "rope_cos_sin", rope_cos_sin(model)


def random_weights(model: Model, seed: int) -> Iterator[tuple[str, Array]]:
    """Made-up weights in stored form, one array at a time, in no particular order."""
    rng = np.random.default_rng(seed)
    for name, length in model.architecture.vectors(model.config).items():
        yield name, np.ones(length, numpy_dtype(model.workload.scheme.dtype))
    for name, matrix in model.matrices.items():
        weight = stored_scheme(model.workload.scheme, matrix).weight
        parts: Arrays = quantization.kind_of(weight).random(weight, matrix.n, matrix.k, rng)
        yield from ((f"{name}.{suffix}", part) for suffix, part in parts.items())
