"""Element types: what TVM, numpy and result rows call by one name, and what others call it."""

from dataclasses import dataclass

import ml_dtypes  # noqa: F401  (tells numpy of bfloat16)
import numpy as np


@dataclass(frozen=True)
class DType:
    """A type by its names elsewhere, empty where it is not used there."""

    name: str  # as TVM and numpy have it
    short: str  # as llama-bench and shaders write it; in capitals, safetensors and GGUF
    cuda: str = ""
    opencl: str = ""


DTYPES = {
    each.name: each
    for each in (
        DType("float32", "f32", "float", "float"),
        DType("float16", "f16", "__half", "half"),
        DType("bfloat16", "bf16", "__nv_bfloat16"),
        DType("int32", "i32", "int", "int"),
        DType("uint32", "u32", "unsigned int", "uint"),
        DType("int8", "i8", "signed char", "char"),
        DType("uint8", "u8", "unsigned char", "uchar"),
    )
}


def numpy_dtype(name: str) -> np.dtype:
    """The numpy dtype of a TVM dtype name, bfloat16 included."""
    return np.dtype(name)
