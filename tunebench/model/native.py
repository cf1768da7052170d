"""The scheme of a quantized checkpoint: every matrix in the form in which it is stored."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace

from tunebench.dtypes import DTYPES
from tunebench.errors import TuneBenchError
from tunebench.model import quantization
from tunebench.model.checkpoints import Checkpoint, Tensor, float_form
from tunebench.model.description import Matrix
from tunebench.spec import WHOLE_ROW, Activations, Scheme, WeightFormat

NAMES = re.compile(r"native((?:i8)?)(f16|f32)?")
"""What `-q` takes: `native`, and what matrix products multiply with, where that is not the usual."""


def is_native(name: str) -> bool:
    """Whether a scheme's name asks for the form that the weights have."""
    return NAMES.fullmatch(name) is not None


def scheme(name: str, checkpoint: Checkpoint | None) -> Scheme:
    """The scheme that `native`, `nativef32` or `nativei8f16` is for a checkpoint; floats are held in their own type.

    Alone, `native` multiplies bytes where there is such a product, as llama.cpp does, and otherwise float16.
    """
    asked = NAMES.fullmatch(name)
    if asked is None or checkpoint is None:
        raise TuneBenchError("native is the form of real weights, and there are none.", "Name a folder or a .gguf.")
    bytes_, short = asked.groups()
    form = checkpoint.common_form()
    if not checkpoint.scheme:
        return quantization.schemes()[f"q0{short or _short(form.dtype)}"]
    activations: Activations = "int8" if bytes_ or (name == "native" and form.kind == "integer") else "float"
    dtype = "float32" if short == "f32" else "float16"
    return _named(Scheme(checkpoint.scheme, form, dtype, activations, native=True))


def _named(scheme: Scheme) -> Scheme:
    """With what products multiply in its name."""
    activations = "" if scheme.activations == "float" else "i8"
    return replace(scheme, name=f"{scheme.name}{activations}{DTYPES[scheme.dtype].short}")


def on_device(scheme: Scheme, device_kind: str) -> Scheme:
    """What a native scheme is on a device: GPUs multiply floats."""
    if not scheme.native or device_kind == "cpu" or scheme.activations == "float":
        return scheme
    short = DTYPES[scheme.dtype].short
    return _named(replace(scheme, name=scheme.name.removesuffix(f"i8{short}"), activations="float"))


def _short(dtype: str) -> str:
    """As schemes say a float type; of one without a scheme the widest."""
    return DTYPES[dtype].short if dtype in ("float16", "bfloat16") else "f32"


def stored_as(checkpoint: Checkpoint | None, matrix: Matrix) -> Mapping[str, Tensor]:
    """A checkpoint's tensors; a TuneBenchError where it has not all of a matrix."""
    tensors: Mapping[str, Tensor] = checkpoint.tensors if checkpoint else {}
    missing = [source for source in matrix.sources if source not in tensors]
    if checkpoint and missing:
        raise checkpoint.lacks(missing)
    return tensors


def alike(tensor: Tensor) -> tuple[object, ...]:
    """What two tensors have in common that lie one below the other in one matrix."""
    order = tensor.read(0, 1)[quantization.ORDER].tobytes() if tensor.form.ordered else b""
    whole = tensor.shape[0] % tensor.form.rows == 0
    return tensor.form, order, tensor.shape if not whole else ()


def of_matrix(scheme: Scheme, form: WeightFormat, matrix: Matrix, device_kind: str) -> Scheme:
    """The scheme of one matrix: its form, laid out for products of bytes where the scheme and the form have such."""
    if form.kind == "float":
        return replace(scheme, weight=float_form(scheme.dtype), activations="float")
    if matrix.is_table and form.ordered:
        raise TuneBenchError(f"{matrix.name} has its inputs in another order, which no look-up reads.", "Choose q0f16.")
    by_bytes = scheme.activations != "float" and device_kind == "cpu" and form.kind == "integer"
    if not by_bytes or matrix.is_table or matrix.experts > 1 or matrix.k % form.byte_group:
        return replace(scheme, weight=form, activations="float")
    packing = form.packing if form.packing == "planes" else "by_byte"
    activations: Activations = "int8_token" if form.group == WHOLE_ROW and form.bits == 8 else "int8"
    return replace(scheme, weight=replace(form, layout="N16", packing=packing), activations=activations)
