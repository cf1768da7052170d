"""Every scheme: what is stored, and how far it is from what was given."""

from __future__ import annotations

from dataclasses import replace

import gguf
import numpy as np
import pytest
import torch
from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8
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


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
@given(data=st.data())
def test_packing_loses_nothing(bits: int, data: st.DataObject) -> None:
    weight = WeightFormat("integer", bits, "float16", 32)
    values = data.draw(integers(bits))
    words = integer.pack(weight, values)
    assert words.dtype == np.uint32
    assert words.shape == (values.shape[0], values.shape[1] * bits // 32)
    np.testing.assert_array_equal(integer.unpack(weight, words), values)


def error(weight: WeightFormat, found: np.ndarray, matrix: np.ndarray) -> float:
    """What rounding makes as small as it can, a root mean square."""
    return float(np.sqrt(np.mean(np.square(found - matrix, dtype=np.float64))))


def plainly(matrix: np.ndarray, bits: int) -> np.ndarray:
    """Rounded to nearest, with the largest magnitude of a group of 32 as the largest integer, scales in float32."""
    groups, most = matrix.reshape(matrix.shape[0], -1, 32), 2 ** (bits - 1) - 1
    scale = np.abs(groups).max(-1, keepdims=True) / most
    return np.asarray(np.rint(np.divide(groups, scale, out=np.zeros_like(groups), where=scale > 0)) * scale).reshape(
        matrix.shape
    )


def spanned(matrix: np.ndarray) -> np.ndarray:
    """Rounded to nearest in 4 bits from the least of a group of 32 to the largest, both as float16 has them."""
    groups = matrix.reshape(matrix.shape[0], -1, 32)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    low, scale = (each.astype(np.float16).astype(np.float32) for each in (low, (high - low) / 15))
    steps = np.divide(groups - low, scale, out=np.zeros_like(groups), where=scale > 0)
    return np.asarray(np.clip(np.rint(steps), 0, 15) * scale + low).reshape(matrix.shape)


@pytest.mark.parametrize("name", ["q4f16_1", "q8f16_1", "q4i8f16_0", "q4_0f16", "q4_1f16", "q5_0f16"])
@given(matrix=matrices())
def test_the_error_is_no_larger_than_that_of_plain_rounding(name: str, matrix: np.ndarray) -> None:
    weight = SCHEMES[name].weight
    back = dequantized(weight, matrix)
    largest = np.abs(matrix).max()
    rounding = 2 ** (weight.bits - 1) * (largest * FLOAT16_STEP / 8 + FLOAT16_TINY)
    plain = spanned(matrix) if weight.zero == "minimum" else plainly(matrix, weight.bits)
    assert error(weight, back, matrix) <= error(weight, plain, matrix) + rounding


@pytest.mark.parametrize(
    ("name", "better"),
    [("q4f16_1", 0.95), ("q4_1f16", 0.79), ("q4_kf16", 0.81), ("q4_0f16", 0.95), ("q6_kf16", 0.23), ("q3f16_1", 2.1)],
)
def test_normal_weights_are_met_better_than_by_plain_rounding(name: str, better: float) -> None:
    matrix = np.random.default_rng(0).standard_normal((64, 2560)).astype(np.float32)
    found, plain = dequantized(SCHEMES[name].weight, matrix) - matrix, plainly(matrix, 4) - matrix
    assert np.linalg.norm(found) < better * np.linalg.norm(plain)


@pytest.mark.parametrize("name", ["q4f16_1", "q4_1f16", "q4_kf16", "w4a16_asym", "nvfp4f16"])
def test_inputs_that_count_more_are_met_better(name: str) -> None:
    rng = np.random.default_rng(0)
    matrix = rng.standard_normal((32, 512)).astype(np.float32)
    importance = np.where(rng.uniform(size=512) < 0.1, 100, 1).astype(np.float32)
    even, weighted = ((dequantized(SCHEMES[name].weight, matrix, w) - matrix) ** 2 for w in (None, importance))
    assert (weighted * importance).sum() < 0.9 * (even * importance).sum()


def dequantized(weight: WeightFormat, matrix: np.ndarray, importance: np.ndarray | None = None) -> np.ndarray:
    """What is left of a matrix."""
    kind = quantization.kind_of(weight)
    n, k = matrix.shape
    return kind.dequantize(weight, kind.quantize(weight, matrix, importance))[:n, :k]


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


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("zero", ASYMMETRIC)
@given(matrix=matrices())
def test_what_is_not_symmetric_is_met_as_well_as_by_its_range(zero: str, bits: int, matrix: np.ndarray) -> None:
    weight = replace(FORMATS[zero], bits=bits)
    groups = matrix.reshape(matrix.shape[0], -1, 32)
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    if zero == "zero_point":  # 0 is one of the integers
        low, high = np.minimum(low, 0), np.maximum(high, 0)
    scale = (high - low) / (2**bits - 1)
    rounding = 2**bits * (scale * FLOAT16_STEP + FLOAT16_TINY) + np.abs(low) * FLOAT16_STEP + FLOAT16_TINY
    bound = scale * (1 if zero == "zero_point" else 0.5) + rounding + 1e-5 * np.abs(groups).max(-1, keepdims=True)
    off = dequantized(weight, matrix).reshape(groups.shape) - groups
    assert (np.sqrt(np.mean(off**2, axis=-1, keepdims=True)) <= bound).all()


@pytest.mark.parametrize("name", [*GROUPED, *ASYMMETRIC])
def test_a_group_of_zeros_stays_zero(name: str) -> None:
    weight = FORMATS[name]
    kind = quantization.kind_of(weight)
    matrix = np.zeros((16, 64), np.float32)
    matrix[1] = 1
    np.testing.assert_allclose(kind.dequantize(weight, kind.quantize(weight, matrix))[:, :64], matrix, rtol=1e-2)


def declared(weight: WeightFormat, n: int, k: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Shapes and types, as numpy has them."""
    shapes = quantization.kind_of(weight).shapes(weight, n, k)
    return {part: (shape, numpy_dtype(dtype)) for part, (shape, dtype) in shapes.items()}


@pytest.mark.parametrize("name", FORMATS)
def test_made_up_weights_are_as_declared(name: str) -> None:
    weight = FORMATS[name]
    kind = quantization.kind_of(weight)
    made = kind.random(weight, 48, 256, np.random.default_rng(0))
    real = kind.quantize(weight, np.ones((48, 256), np.float32))
    for parts in (made, real):
        assert {part: (array.shape, array.dtype) for part, array in parts.items()} == declared(weight, 48, 256)
    assert 0.015 < kind.dequantize(weight, made).std() < 0.025


@pytest.mark.parametrize("name", sorted(SCHEMES))
def test_products_of_bytes_are_of_whole_groups(name: str) -> None:
    scheme = SCHEMES[name]
    quantization.check(scheme, 48, 96, "some.matrix")
    if scheme.activations == "float":
        quantization.check(scheme, 48, 100, "some.matrix")
        return
    with pytest.raises(TuneBenchError, match=f"some.matrix has 100 inputs.*{name}"):
        quantization.check(scheme, 48, 100, "some.matrix")


@pytest.mark.parametrize("shape", [(40, 96), (37, 100), (5, 30)])
@pytest.mark.parametrize("name", GROUPED)
def test_what_no_group_or_tile_divides_is_padded(name: str, shape: tuple[int, int]) -> None:
    weight = SCHEMES[name].weight
    kind = quantization.kind_of(weight)
    matrix = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    parts = kind.quantize(weight, matrix)
    assert {p: (a.shape, a.dtype) for p, a in parts.items()} == declared(weight, *shape)
    off = kind.dequantize(weight, parts)[: shape[0], : shape[1]] - matrix
    assert np.linalg.norm(off) < 0.25 * np.linalg.norm(matrix)


@pytest.mark.parametrize("name", [name for name in GROUPED if SCHEMES[name].weight.layout != "NK"])
@given(matrix=matrices())
def test_other_layouts_hold_what_rows_hold(name: str, matrix: np.ndarray) -> None:
    form = SCHEMES[name].weight
    plain, kind = quantization.by_rows(form), quantization.kind_of(form)
    rows = kind.quantize(plain, matrix)
    stored = kind.laid_out(form, rows)
    np.testing.assert_array_equal(integer.by_row(form, stored["q_scale"]), rows["q_scale"])
    np.testing.assert_array_equal(kind.dequantize(form, stored), kind.dequantize(plain, rows))


def test_floats_in_groups_are_not_taken_for_plain_ones() -> None:
    with pytest.raises(ValueError, match="floats in groups"):
        quantization.stored_bits(WeightFormat("float", 4, "float16", 32))


@pytest.mark.parametrize(
    ("name", "bits"),
    [
        *(("q0f16", 16), ("q4f16_1", 4.5), ("q4f32_1", 5), ("zero_point", 5), ("q3f16_1", 3.6), ("q5_0f16", 5.5)),
        *(("q4_kf16", 4.625), ("q6_ki8f16", 6.5625), ("mxfp4f16", 4.25), ("w4a16", 4.125), ("w4a16_asym", 4.25)),
    ],
)
def test_what_a_weight_takes_counts_what_its_group_has(name: str, bits: float) -> None:
    assert quantization.stored_bits(FORMATS[name]) == bits


def ggml_blocks(name: str, parts: dict[str, np.ndarray]) -> np.ndarray:
    """Parts of 256 weights a row -> the bytes of ggml's blocks, uint8 [N, bytes]."""
    form, n = SCHEMES[f"{name}f16"].weight, len(parts["q_weight"])
    q = integer.unpacked(form, parts).astype(np.uint8)

    def of(part: str, blocks: int) -> np.ndarray:
        return np.ascontiguousarray(parts[part]).view(np.uint8).reshape(n, blocks, -1)

    def nibbles(width: int) -> np.ndarray:
        low = (q & 15).reshape(n, -1, 2, width)
        return low[:, :, 0] | low[:, :, 1] << 4

    if name == "q4_k":
        sc, m = parts["q_scale"], parts["q_min"]
        shared = [
            sc[:, :4] & 63 | sc[:, 4:] >> 4 << 6,
            m[:, :4] & 63 | m[:, 4:] >> 4 << 6,
            sc[:, 4:] & 15 | (m[:, 4:] & 15) << 4,
        ]
        minus = (-parts["q_super_min"]).view(np.uint8)
        return np.concatenate([parts["q_super"].view(np.uint8), minus, *shared, nibbles(32).reshape(n, -1)], axis=-1)
    if name == "q6_k":
        upper = (q >> 4).reshape(n, 2, 4, 32)
        high = upper[:, :, 0] | upper[:, :, 1] << 2 | upper[:, :, 2] << 4 | upper[:, :, 3] << 6
        every = [nibbles(64), high, of("q_scale", 1), of("q_super", 1)]
        return np.concatenate([each.reshape(n, -1) for each in every], axis=-1)
    quants = (q ^ 128).reshape(n, 8, 32) if name == "q8_0" else nibbles(16)
    high = [np.packbits(q.reshape(n, 8, 32) >> 4, axis=-1, bitorder="little")] if name == "q5_0" else []
    minimum = [of("q_min", 8)] if name == "q4_1" else []
    return np.concatenate([of("q_scale", 8), *minimum, *high, quants], axis=-1).reshape(n, -1)


@pytest.mark.parametrize("name", integer.GGML)
@pytest.mark.parametrize("source", ["random", "quantized"])
def test_a_weight_is_worth_what_ggml_says(name: str, source: str) -> None:
    form, rng = SCHEMES[f"{name}f16"].weight, np.random.default_rng(0)
    kind = quantization.kind_of(form)
    matrix = rng.standard_normal((32, 256)).astype(np.float32) + 0.3
    parts = kind.quantize(form, matrix) if source == "quantized" else kind.random(form, 32, 256, rng)
    known = gguf.dequantize(ggml_blocks(name, parts), gguf.GGMLQuantizationType[name.upper()])
    np.testing.assert_array_equal(kind.dequantize(form, parts), known)


@pytest.mark.parametrize("name", ["q4_0", "q4_1", "q5_0", "q8_0"])
@given(matrix=matrices())
def test_rounding_is_as_good_as_ggmls(name: str, matrix: np.ndarray) -> None:
    kind = gguf.GGMLQuantizationType[name.upper()]
    known = gguf.dequantize(gguf.quantize(matrix, kind), kind)
    form = SCHEMES[f"{name}f16"].weight
    tiny = FLOAT16_TINY * 2**form.bits + np.abs(matrix).max() * FLOAT16_STEP
    assert error(form, dequantized(form, matrix), matrix) <= error(form, known, matrix) + tiny


def test_mxfp4_is_worth_what_ggml_says() -> None:
    form, rng = SCHEMES["mxfp4f16"].weight, np.random.default_rng(0)
    kind = quantization.kind_of(form)
    parts = kind.quantize(form, rng.standard_normal((8, 256)).astype(np.float32) * 10.0 ** rng.integers(-6, 6, (8, 1)))
    codes = integer.unpack(form, parts["q_weight"]).astype(np.uint8).reshape(8, 8, 2, 16)
    blocks = np.concatenate([parts["q_scale"][..., None], codes[:, :, 0] | codes[:, :, 1] << 4], axis=-1)
    known = gguf.dequantize(blocks.reshape(8, -1), gguf.GGMLQuantizationType.MXFP4)
    np.testing.assert_array_equal(kind.dequantize(form, parts), known)


def test_fp8_and_nvfp4_are_worth_what_torch_says() -> None:
    rng = np.random.default_rng(0)
    for name in ("fp8f16", "nvfp4f16"):
        form = SCHEMES[name].weight
        kind = quantization.kind_of(form)
        parts = kind.quantize(form, rng.standard_normal((16, 256)).astype(np.float32))
        if name == "fp8f16":
            codes = torch.from_numpy(parts["q_weight"].view(np.uint8)).view(torch.float8_e4m3fn).float()
            known = codes * torch.from_numpy(parts["q_scale"])
        else:
            codes = unpack_fp4_from_uint8(torch.from_numpy(parts["q_weight"].view(np.uint8)), 16, 256, torch.float32)
            scale = torch.from_numpy(parts["q_scale"]).view(torch.float8_e4m3fn).float() / torch.from_numpy(
                parts["q_super"]
            )
            known = codes * scale.repeat_interleave(16, dim=1)
        np.testing.assert_array_equal(kind.dequantize(form, parts), known.numpy())


def test_scales_of_blocks_are_shared_by_rows() -> None:
    form = WeightFormat("codes", 8, "float32", 128, code="float8_e4m3fn", rows=128)
    kind = quantization.kind_of(form)
    matrix = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32)
    parts = kind.quantize(form, matrix)
    assert parts["q_scale"].shape == (2, 2)
    np.testing.assert_allclose(kind.dequantize(form, parts), matrix, atol=0.07 * np.abs(matrix).max())
    codes = parts["q_weight"].view(np.uint8).view(numpy_dtype("float8_e4m3fn")).astype(np.float32)
    assert kind.dequantize(form, parts)[150, 130] == codes[150, 130] * parts["q_scale"][1, 1]


def test_an_order_of_inputs_is_undone() -> None:
    form = WeightFormat("integer", 4, "float16", 32, "zero_point", ordered=True)
    kind, rng = quantization.kind_of(form), np.random.default_rng(0)
    matrix, importance = rng.standard_normal((8, 64)).astype(np.float32), rng.uniform(size=64)
    parts = kind.quantize(form, matrix, importance)
    assert list(importance[parts["q_order"]]) == sorted(importance, reverse=True)
    assert np.abs(kind.dequantize(form, parts) - matrix).max() < 0.5
