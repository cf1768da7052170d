"""Many tensors in one allocation: CUDA gives memory by 2 MiB, and each tensor of its own would waste a part of them."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence

import tvm
import tvm_ffi

from tunebench.dtypes import numpy_dtype
from tunebench.runtime.cuda import address

ALIGNMENT = 256  # bytes, as CUDA aligns an allocation
KINDS = {"i": 0, "u": 1, "f": 2}  # DLPack's codes of numpy's kinds


class _Device(ctypes.Structure):
    _fields_ = (("kind", ctypes.c_int32), ("number", ctypes.c_int32))


class _Type(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16))


class _Tensor(ctypes.Structure):
    """DLPack's DLManagedTensor, with nothing to call when it is dropped."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device", _Device),
        ("ndim", ctypes.c_int32),
        ("dtype", _Type),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    )


class Arena:
    """One allocation, from which tensors are taken one after the other. It must outlive them."""

    def __init__(self, size_bytes: int, device: tvm.runtime.Device) -> None:
        self._device = device
        self._memory = tvm.runtime.empty((size_bytes,), "uint8", device)
        self._end, self._size = 0, size_bytes
        self._described: list[_Tensor] = []

    @staticmethod
    def size_of(shapes: Sequence[tuple[tuple[int, ...], str]]) -> int:
        """Bytes that tensors of these shapes and dtypes take."""
        return sum(_aligned(math.prod(shape) * numpy_dtype(dtype).itemsize) for shape, dtype in shapes)

    def take(self, shape: tuple[int, ...], dtype: str) -> tvm.runtime.Tensor:
        """The next tensor, its contents undefined; a ValueError where there is no room left."""
        kind = numpy_dtype(dtype)
        start, self._end = self._end, self._end + self.size_of([(shape, dtype)])
        if self._end > self._size:
            raise ValueError(f"no room for {shape} of {dtype}")
        strides = [math.prod(shape[i + 1 :]) for i in range(len(shape))]
        described = _Tensor(
            data=address(self._memory) + start,
            device=_Device(self._device.dlpack_device_type(), self._device.index),
            ndim=len(shape),
            dtype=_Type(KINDS[kind.kind], kind.itemsize * 8, 1),
            shape=(ctypes.c_int64 * len(shape))(*shape),
            strides=(ctypes.c_int64 * len(shape))(*strides),
        )
        self._described.append(described)
        return tvm_ffi.from_dlpack(_capsule(ctypes.byref(described), b"dltensor", None))


_capsule = ctypes.pythonapi.PyCapsule_New
_capsule.restype = ctypes.py_object
_capsule.argtypes = (ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p)


def _aligned(size_bytes: int) -> int:
    return -(-size_bytes // ALIGNMENT) * ALIGNMENT
