"""Every scheme: what is stored, and how far it is from what was given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from conftest import ASYMMETRIC
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tunebench.dtypes import numpy_dtype
from tunebench.errors import TuneBenchError
from tunebench.model import quantization
from tunebench.model.quantization import integer
from tunebench.spec import WeightFormat

SCHEMES = quantization.schemes()
FORMATS = {name: scheme.weight for name, scheme in {**SCHEMES, **ASYMMETRIC}.items()}
GROUPED = sorted(name for name, scheme in SCHEMES.items() if scheme.weight.group)
FLOAT16_STEP = 2.0**-11  # largest relative rounding of a normal float16
FLOAT16_TINY = 2.0**-25  # and the largest absolute one of a subnormal


@st.composite
def integers(draw: st.DrawFn, bits: int) -> np.ndarray:
    """Unsigned integers of `bits` bits, a few whole words a row."""
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 4)) * (32 // bits)
    return draw(arrays.arrays(np.uint32, shape, elements=st.integers(0, 2**bits - 1)))


@st.composite
def matrices(draw: st.DrawFn) -> np.ndarray:
    """Float32 matrices of 16 rows and one or two groups a row, of any size that float16 scales can hold."""
    shape = 16, 32 * draw(st.integers(1, 2))
    unit = arrays.arrays(np.float32, shape, elements=st.floats(-1, 1, width=32, allow_subnormal=False))
    return draw(unit) * np.float32(10.0 ** draw(st.integers(-4, 4)))


@pytest.mark.parametrize("bits", [4, 8])
@given(data=st.data())
def test_packing_loses_nothing(bits: int, data: st.DataObject) -> None:
    weight = WeightFormat("integer", bits, "float16", 32)
    values = data.draw(integers(bits))
    words = integer.pack(weight, values)
    assert words.dtype == np.uint32
    assert words.shape == (values.shape[0], values.shape[1] * bits // 32)
    np.testing.assert_array_equal(integer.unpack(weight, words), values)


@pytest.mark.parametrize("name", GROUPED)
@given(matrix=matrices())
def test_the_error_is_half_a_step(name: str, matrix: np.ndarray) -> None:
    weight = SCHEMES[name].weight
    kind = quantization.kind_of(weight)
    back = kind.dequantize(weight, kind.quantize(weight, matrix))
    zero = 2 ** (weight.bits - 1) - 1
    largest = np.abs(matrix).reshape(matrix.shape[0], -1, 32).max(-1).repeat(32, axis=1)
    scale = largest / zero
    # Rounding the scale to float16 moves an integer of `zero` steps by so much.
    rounding = zero * (scale * FLOAT16_STEP + FLOAT16_TINY) if weight.dtype == "float16" else 0
    assert (np.abs(back - matrix) <= scale / 2 * (1 + 2 * FLOAT16_STEP) + rounding + 1e-5 * largest).all()


@given(matrix=matrices())
def test_the_two_layouts_are_transposes(matrix: np.ndarray) -> None:
    weight, rows = SCHEMES["q4f16_0"].weight, SCHEMES["q4f16_1"].weight
    kind = quantization.kind_of(weight)
    k_major, n_major = kind.quantize(weight, matrix), kind.quantize(rows, matrix)
    for part in ("q_weight", "q_scale"):
        np.testing.assert_array_equal(k_major[part], n_major[part].T)
    np.testing.assert_array_equal(kind.dequantize(weight, k_major), kind.dequantize(rows, n_major))


def test_the_bits_lie_as_in_mlc() -> None:
    weight = SCHEMES["q4f16_1"].weight
    steps = np.array([-7, -6, -1, 0, 1, 2, 6, 7, *[0] * 24], np.float32)  # a word of all kinds, three of zeros
    parts = quantization.kind_of(weight).quantize(weight, steps[None] * 0.5)
    np.testing.assert_array_equal(parts["q_scale"], np.array([[0.5]], np.float16))  # 3.5 / 7
    stored = [0, 1, 6, 7, 8, 9, 13, 14]
    first = sum(value << (4 * i) for i, value in enumerate(stored))
    np.testing.assert_array_equal(parts["q_weight"], np.array([[first, *[0x77777777] * 3]], np.uint32))


def test_the_bits_of_eight_bit_words() -> None:
    weight = SCHEMES["q8f16_1"].weight
    steps = np.zeros((1, 32), np.float32)
    steps[0, :4] = -127, 0, 1, 127
    parts = quantization.kind_of(weight).quantize(weight, steps)
    np.testing.assert_array_equal(parts["q_scale"], np.array([[1]], np.float16))
    assert parts["q_weight"][0, 0] == (0 | 127 << 8 | 128 << 16 | 254 << 24)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("zero", ASYMMETRIC)
@given(matrix=matrices())
def test_what_is_not_symmetric_spans_a_groups_range(zero: str, bits: int, matrix: np.ndarray) -> None:
    weight = replace(FORMATS[zero], bits=bits)
    kind = quantization.kind_of(weight)
    groups = matrix.reshape(matrix.shape[0], -1, 32)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    if zero == "zero_point":  # 0 is one of the integers
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / (2**bits - 1)
    rounding = 2**bits * (scale * FLOAT16_STEP + FLOAT16_TINY) + np.abs(low) * FLOAT16_STEP + FLOAT16_TINY
    back = kind.dequantize(weight, kind.quantize(weight, matrix)).reshape(groups.shape)
    assert (np.abs(back - groups) <= scale / 2 + rounding + 1e-5 * np.abs(groups).max(-1, keepdims=True)).all()


@pytest.mark.parametrize("name", [*GROUPED, *ASYMMETRIC])
def test_a_group_of_zeros_stays_zero(name: str) -> None:
    weight = FORMATS[name]
    kind = quantization.kind_of(weight)
    matrix = np.zeros((16, 64), np.float32)
    matrix[1, 32:] = 1
    np.testing.assert_allclose(kind.dequantize(weight, kind.quantize(weight, matrix)), matrix, rtol=1e-3)


@pytest.mark.parametrize("name", FORMATS)
def test_made_up_weights_are_as_declared(name: str) -> None:
    weight = FORMATS[name]
    kind = quantization.kind_of(weight)
    declared = {part: (shape, numpy_dtype(dtype)) for part, (shape, dtype) in kind.shapes(weight, 48, 256).items()}
    made = kind.random(weight, 48, 256, np.random.default_rng(0))
    real = kind.quantize(weight, np.ones((48, 256), np.float32))
    for parts in (made, real):
        assert {part: (array.shape, array.dtype) for part, array in parts.items()} == declared
    assert 0.015 < kind.dequantize(weight, made).std() < 0.025


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_inputs_must_be_whole_groups(name: str) -> None:
    scheme = SCHEMES[name]
    quantization.check(scheme, 48, 96, "some.matrix")
    if not scheme.weight.group:
        quantization.check(scheme, 48, 100, "some.matrix")
        return
    with pytest.raises(TuneBenchError, match=f"some.matrix has 100 inputs.*{name}"):
        quantization.check(scheme, 48, 100, "some.matrix")
    quantization.check(replace(scheme, weight=replace(scheme.weight, group=50)), 48, 100, "some.matrix")


@pytest.mark.parametrize("name", ["q4i8f16_0", "q8i8f16_0"])
def test_outputs_must_be_whole_tiles(name: str) -> None:
    with pytest.raises(TuneBenchError, match=f"some.matrix has 40 outputs.*{name}"):
        quantization.check(SCHEMES[name], 40, 96, "some.matrix")


@pytest.mark.parametrize(("name", "plain"), [("q4i8f16_0", "q4f16_1"), ("q8i8f16_0", "q8f16_1")])
@given(matrix=matrices())
def test_tiles_hold_what_rows_hold(name: str, plain: str, matrix: np.ndarray) -> None:
    tiled, plain_rows = SCHEMES[name].weight, SCHEMES[plain].weight
    kind = quantization.kind_of(tiled)
    tiles, rows = kind.quantize(tiled, matrix), kind.quantize(plain_rows, matrix)
    np.testing.assert_array_equal(integer.by_row(tiled, tiles["q_scale"]), rows["q_scale"])
    np.testing.assert_array_equal(kind.dequantize(tiled, tiles), kind.dequantize(plain_rows, rows))


def test_floats_in_groups_are_not_taken_for_plain_ones() -> None:
    with pytest.raises(ValueError, match="floats in groups"):
        quantization.stored_bits(WeightFormat("float", 4, "float16", 32))


@pytest.mark.parametrize(("name", "bits"), [("q0f16", 16), ("q4f16_1", 4.5), ("q4f32_1", 5), ("zero_point", 5)])
def test_what_a_weight_takes_counts_what_its_group_has(name: str, bits: float) -> None:
    assert quantization.stored_bits(FORMATS[name]) == bits
