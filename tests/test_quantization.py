"""Every scheme: what is stored, and how far it is from what was given."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from tunebench.dtypes import numpy_dtype
from tunebench.errors import TuneBenchError
from tunebench.model import quantization
from tunebench.model.quantization import group
from tunebench.spec import Scheme

SCHEMES = quantization.schemes()
GROUPED = sorted(name for name, scheme in SCHEMES.items() if scheme.group_size)
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
    scheme = Scheme("any", "group", "float16", bits, 32)
    values = data.draw(integers(bits))
    words = group.pack(scheme, values)
    assert words.dtype == np.uint32
    assert words.shape == (values.shape[0], values.shape[1] * bits // 32)
    np.testing.assert_array_equal(group.unpack(scheme, words), values)


@pytest.mark.parametrize("name", GROUPED)
@given(matrix=matrices())
def test_the_error_is_half_a_step(name: str, matrix: np.ndarray) -> None:
    scheme = SCHEMES[name]
    family = quantization.families()[scheme.family]
    back = family.dequantize(scheme, family.quantize(scheme, matrix))
    zero = 2 ** (scheme.weight_bits - 1) - 1
    largest = np.abs(matrix).reshape(matrix.shape[0], -1, 32).max(-1).repeat(32, axis=1)
    scale = largest / zero
    # Rounding the scale to float16 moves an integer of `zero` steps by so much.
    rounding = zero * (scale * FLOAT16_STEP + FLOAT16_TINY) if scheme.dtype == "float16" else 0
    assert (np.abs(back - matrix) <= scale / 2 * (1 + 2 * FLOAT16_STEP) + rounding + 1e-5 * largest).all()


@given(matrix=matrices())
def test_the_two_layouts_are_transposes(matrix: np.ndarray) -> None:
    scheme = SCHEMES["q4f16_0"]
    family = quantization.families()[scheme.family]
    k_major, n_major = family.quantize(scheme, matrix), family.quantize(SCHEMES["q4f16_1"], matrix)
    for part in ("q_weight", "q_scale"):
        np.testing.assert_array_equal(k_major[part], n_major[part].T)
    np.testing.assert_array_equal(family.dequantize(scheme, k_major), family.dequantize(SCHEMES["q4f16_1"], n_major))


def test_the_bits_lie_as_in_mlc() -> None:
    scheme = SCHEMES["q4f16_1"]
    steps = np.array([-7, -6, -1, 0, 1, 2, 6, 7, *[0] * 24], np.float32)  # a word of all kinds, three of zeros
    parts = quantization.families()["group"].quantize(scheme, steps[None] * 0.5)
    np.testing.assert_array_equal(parts["q_scale"], np.array([[0.5]], np.float16))  # 3.5 / 7
    stored = [0, 1, 6, 7, 8, 9, 13, 14]
    first = sum(value << (4 * i) for i, value in enumerate(stored))
    np.testing.assert_array_equal(parts["q_weight"], np.array([[first, *[0x77777777] * 3]], np.uint32))


def test_the_bits_of_eight_bit_words() -> None:
    scheme = SCHEMES["q8f16_1"]
    steps = np.zeros((1, 32), np.float32)
    steps[0, :4] = -127, 0, 1, 127
    parts = quantization.families()["group"].quantize(scheme, steps)
    np.testing.assert_array_equal(parts["q_scale"], np.array([[1]], np.float16))
    assert parts["q_weight"][0, 0] == (0 | 127 << 8 | 128 << 16 | 254 << 24)


@pytest.mark.parametrize("name", GROUPED)
def test_a_group_of_zeros_stays_zero(name: str) -> None:
    scheme = SCHEMES[name]
    family = quantization.families()[scheme.family]
    matrix = np.zeros((16, 64), np.float32)
    matrix[1, 32:] = 1
    np.testing.assert_allclose(family.dequantize(scheme, family.quantize(scheme, matrix)), matrix, rtol=1e-3)


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_made_up_weights_are_as_declared(name: str) -> None:
    scheme = SCHEMES[name]
    family = quantization.families()[scheme.family]
    declared = {part: (shape, numpy_dtype(dtype)) for part, (shape, dtype) in family.shapes(scheme, 48, 256).items()}
    made = family.random(scheme, 48, 256, np.random.default_rng(0))
    real = family.quantize(scheme, np.ones((48, 256), np.float32))
    for parts in (made, real):
        assert {part: (array.shape, array.dtype) for part, array in parts.items()} == declared
    assert 0.015 < family.dequantize(scheme, made).std() < 0.025


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_inputs_must_be_whole_groups(name: str) -> None:
    scheme = SCHEMES[name]
    quantization.check(scheme, 48, 96, "some.matrix")
    if not scheme.group_size:
        quantization.check(scheme, 48, 100, "some.matrix")
        return
    with pytest.raises(TuneBenchError, match=f"some.matrix has 100 inputs.*{name}"):
        quantization.check(scheme, 48, 100, "some.matrix")
    quantization.check(replace(scheme, group_size=50), 48, 100, "some.matrix")


@pytest.mark.parametrize("name", ["q4i8f16_0", "q8i8f16_0"])
def test_outputs_must_be_whole_tiles(name: str) -> None:
    with pytest.raises(TuneBenchError, match=f"some.matrix has 40 outputs.*{name}"):
        quantization.check(SCHEMES[name], 40, 96, "some.matrix")


@pytest.mark.parametrize(("name", "plain"), [("q4i8f16_0", "q4f16_1"), ("q8i8f16_0", "q8f16_1")])
@given(matrix=matrices())
def test_tiles_hold_what_rows_hold(name: str, plain: str, matrix: np.ndarray) -> None:
    family = quantization.families()["group"]
    tiles, rows = (family.quantize(SCHEMES[each], matrix) for each in (name, plain))
    np.testing.assert_array_equal(group.by_row(SCHEMES[name], tiles["q_scale"]), rows["q_scale"])
    np.testing.assert_array_equal(family.dequantize(SCHEMES[name], tiles), family.dequantize(SCHEMES[plain], rows))
