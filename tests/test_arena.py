"""Tensors that share one allocation."""

import numpy as np
import pytest
import tvm
from tvm import te

from tunebench.runtime.arena import ALIGNMENT, Arena

SHAPES = [((3, 5), "float32"), ((7,), "uint32"), ((2, 2, 2), "float16")]


def filled() -> tuple[Arena, list[tvm.runtime.Tensor], list[np.ndarray]]:
    arena = Arena(Arena.size_of(SHAPES), tvm.cpu())
    tensors = [arena.take(*each) for each in SHAPES]
    arrays = [np.arange(np.prod(shape)).reshape(shape).astype(dtype) for shape, dtype in SHAPES]
    for tensor, array in zip(tensors, arrays, strict=True):
        tensor.copyfrom(array)
    return arena, tensors, arrays


def test_tensors_do_not_overlap() -> None:
    _arena, tensors, arrays = filled()
    for tensor, array in zip(tensors, arrays, strict=True):
        np.testing.assert_array_equal(tensor.numpy(), array)
        assert str(tensor.dtype) == array.dtype.name
    starts = [int(tensor.data_ptr()) for tensor in tensors]
    assert [start - starts[0] for start in starts] == [0, ALIGNMENT, 2 * ALIGNMENT]


def test_kernels_take_them() -> None:
    _arena, tensors, arrays = filled()
    x = te.placeholder((7,), "uint32", name="x")
    kernel = tvm.compile(te.create_prim_func([x, te.compute((7,), lambda i: x[i] + x[i])]), target="llvm")
    out = tvm.runtime.empty((7,), "uint32")
    kernel["main"](tensors[1], out)
    np.testing.assert_array_equal(out.numpy(), 2 * arrays[1])


def test_no_more_than_there_is() -> None:
    arena, *_ = filled()
    with pytest.raises(ValueError, match=r"no room for \(1,\)"):
        arena.take((1,), "float32")
