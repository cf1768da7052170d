"""Products of packed integer weights with int8 activations, and the instructions that compute them.

Weights of 4 or 8 bits lie in words of 32 bits, 16 outputs side by side, [N / 16, K / per word, 16]. Byte j of a
word holds, from its lowest bits on, the weights of places j, j + 4, ... of the word, so that one mask and one
shift of a vector of words leave bytes whose dot products with 4 activations accumulate in 16 lanes of int32.
Weights are unsigned, with a zero point that leaves the sum: once a group, through `offset`. Of 5 or 6 bits, the upper
ones lie in words of their own in the same way, so that a word of them completes several of the others.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from tvm import te, tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.target import Target, codegen

from tunebench.kernels.tvmscript import quick_parsing
from tunebench.spec import WHOLE_ROW, WeightFormat

LANES = 16  # outputs side by side
SDOT = "aarch64.neon.sdot.v4i32.v16i8"
PER_BYTES = 4  # activations that one instruction multiplies with each lane
MASKS = {4: 0x0F0F0F0F, 8: 0xFFFFFFFF}  # weight bits -> the lowest weight of each byte of a word


Step = Callable[[tirx.Expr, tirx.Expr, tirx.Expr], tirx.Expr]


@dataclass(frozen=True)
class Instruction:
    """One way to add 16 x 4 products of bytes to 16 lanes of int32; in order of preference."""

    name: str  # of the TensorIntrin, as records hold it
    features: tuple[str, ...]  # what the target must have, as LLVM names it
    most_bits: int  # of a weight: with more, a sum of 16 bits would saturate, or the weight read as negative
    body: Step  # (16 sums int32, 16 words uint32, the word of four activations) -> sums


def _call(name: str, dtype: str, *args: tirx.Expr) -> tirx.Expr:
    return T.call_llvm_pure_intrin(T.llvm_lookup_intrinsic_id(f"llvm.{name}"), *args, dtype=dtype)


def _split(lanes: int, step: Step) -> Step:
    """An instruction of fewer lanes, as often as it takes."""

    def every(sums: tirx.Expr, words: tirx.Expr, four: tirx.Expr) -> tirx.Expr:
        def part(vector: tirx.Expr, start: int) -> tirx.Expr:
            return T.Shuffle([vector], list(range(start, start + lanes)))

        fours = T.broadcast(four, lanes)
        parts = [step(part(sums, start), part(words, start), fours) for start in range(0, LANES, lanes)]
        return T.Shuffle(parts, list(range(LANES)))

    return every


def _accumulating(name: str, lanes: int, weights: str = "uint8") -> Step:
    """An instruction that adds four products of bytes to each lane."""

    def step(sums: tirx.Expr, words: tirx.Expr, fours: tirx.Expr) -> tirx.Expr:
        left = T.reinterpret(words, dtype=f"{weights}x{PER_BYTES * lanes}")
        return _call(name, f"int32x{lanes}", sums, left, T.reinterpret(fours, dtype=f"int8x{PER_BYTES * lanes}"))

    return step


def _vpdpbusd_512(sums: tirx.Expr, words: tirx.Expr, four: tirx.Expr) -> tirx.Expr:
    return _accumulating("x86.avx512.vpdpbusd.512", LANES)(sums, words, T.broadcast(four, LANES))


def _pmaddubsw(sums: tirx.Expr, words: tirx.Expr, fours: tirx.Expr) -> tirx.Expr:
    left, right = T.reinterpret(words, dtype="uint8x32"), T.reinterpret(fours, dtype="int8x32")
    pairs = _call("x86.avx2.pmadd.ub.sw", "int16x16", left, right)
    return sums + _call("x86.avx2.pmadd.wd", "int32x8", pairs, T.broadcast(T.int16(1), 16))


def _pmaddwd(sums: tirx.Expr, words: tirx.Expr, fours: tirx.Expr) -> tirx.Expr:
    """Even and odd bytes as 16 bits: exact for weights of 8 bits, where `pmaddubsw` saturates."""

    def split(vector: tirx.Expr, dtype: str) -> tuple[tirx.Expr, tirx.Expr]:
        wide, eight = T.reinterpret(vector, dtype=dtype), T.broadcast(tirx.const(8, dtype.split("x")[0]), 16)
        even = T.shift_right(T.shift_left(wide, eight), eight)
        return T.reinterpret(even, dtype="int16x16"), T.reinterpret(T.shift_right(wide, eight), dtype="int16x16")

    for left, right in zip(split(words, "uint16x16"), split(fours, "int16x16"), strict=True):
        sums = sums + _call("x86.avx2.pmadd.wd", "int32x8", left, right)
    return sums


def _less_128(words: tirx.Expr) -> tirx.Expr:
    """Bytes minus 128, signed."""
    return T.reinterpret(words ^ T.broadcast(T.uint32(0x80808080), 4), dtype="int8x16")


def _sdot_wide(sums: tirx.Expr, words: tirx.Expr, fours: tirx.Expr) -> tirx.Expr:
    """Weights minus 128; 128 times the activations, the same for all lanes, makes it good."""
    right = T.reinterpret(fours, dtype="int8x16")
    low = _call(SDOT, "int32x4", T.broadcast(T.int32(0), 4), T.broadcast(T.int8(-128), 16), right)
    return _call(SDOT, "int32x4", sums, _less_128(words), right) - low


def _smull(sums: tirx.Expr, words: tirx.Expr, fours: tirx.Expr) -> tirx.Expr:
    """Products of 16 bits, added in pairs twice."""
    return sums + _products(T.reinterpret(words, dtype="int8x16"), T.reinterpret(fours, dtype="int8x16"))


def _smull_wide(sums: tirx.Expr, words: tirx.Expr, fours: tirx.Expr) -> tirx.Expr:
    right = T.reinterpret(fours, dtype="int8x16")
    sum_of_four = _long_pairs(_long_pairs(right, "v8i16.v16i8", "int16x8"), "v4i32.v8i16", "int32x4")
    return sums + _products(_less_128(words), right) + sum_of_four * T.broadcast(T.int32(128), 4)


def _products(left: tirx.Expr, right: tirx.Expr) -> tirx.Expr:
    def eight(start: int) -> tirx.Expr:
        halves = (T.Shuffle([vector], list(range(start, start + 8))) for vector in (left, right))
        return _call("aarch64.neon.smull.v8i16", "int16x8", *halves)

    pairs = _call("aarch64.neon.addp.v8i16", "int16x8", eight(0), eight(8))
    return _long_pairs(pairs, "v4i32.v8i16", "int32x4")


def _long_pairs(vector: tirx.Expr, types: str, dtype: str) -> tirx.Expr:
    return _call(f"aarch64.neon.saddlp.{types}", dtype, vector)


INSTRUCTIONS = (
    Instruction("tunebench.dot.avx512vnni", ("avx512vnni",), 8, _vpdpbusd_512),
    Instruction("tunebench.dot.avxvnni", ("avxvnni",), 8, _split(8, _accumulating("x86.avx512.vpdpbusd.256", 8))),
    Instruction("tunebench.dot.avx2", ("avx2",), 6, _split(8, _pmaddubsw)),
    Instruction("tunebench.dot.avx2.wide", ("avx2",), 8, _split(8, _pmaddwd)),
    Instruction("tunebench.dot.i8mm", ("i8mm",), 8, _split(4, _accumulating("aarch64.neon.usdot.v4i32.v16i8", 4))),
    Instruction("tunebench.dot.dotprod", ("dotprod",), 7, _split(4, _accumulating(SDOT, 4, "int8"))),
    Instruction("tunebench.dot.dotprod.wide", ("dotprod",), 8, _split(4, _sdot_wide)),
    Instruction("tunebench.dot.neon", ("neon", "v8a"), 7, _split(4, _smull)),
    Instruction("tunebench.dot.neon.wide", ("neon", "v8a"), 8, _split(4, _smull_wide)),
)


def instruction(target: Target, weight_bits: int) -> str:
    """The TensorIntrin to use for a target, registered; empty where it has none."""
    register()
    for each in INSTRUCTIONS:
        if weight_bits <= each.most_bits and all(codegen.target_has_features(name, target) for name in each.features):
            return each.name
    return ""


MATRIX = "tunebench.dot.i8mm.rows"  # two rows of activations at a time, eight places


def matrix_instruction(target: Target) -> str:
    """The TensorIntrin for products of two rows, registered; empty where the target has none."""
    register()
    return MATRIX if codegen.target_has_features("i8mm", target) else ""


def _usmmla(sums: list[tirx.Expr], words: list[tirx.Expr], eights: list[tirx.Expr]) -> list[tirx.Expr]:
    """Rows of sums -> rows of sums: a product of 2 outputs x 8 places with 8 places x 2 rows gives 4 sums, by output.

    LLVM leaves out the shuffles between one call and the next.
    """
    x, done = T.Shuffle(eights, list(range(16))), []
    for start in range(0, LANES, 4):
        low, high, first, second = (T.Shuffle([v], list(range(start, start + 4))) for v in (*words, *sums))
        halves = []
        for order in ([0, 4, 1, 5], [2, 6, 3, 7]):
            outputs = T.reinterpret(T.Shuffle([low, high], order), dtype="uint8x16")
            by_output = T.Shuffle([first, second], order)
            halves.append(_call("aarch64.neon.usmmla.v4i32.v16i8", "int32x4", by_output, outputs, x))
        done.append([T.Shuffle(halves, order) for order in ([0, 2, 4, 6], [1, 3, 5, 7])])
    return [T.Shuffle(list(parts), list(range(LANES))) for parts in zip(*done, strict=True)]


@functools.cache
def register() -> None:
    """Make the intrinsics known to TVM in this process, as schedules that name them need."""
    with quick_parsing():
        TensorIntrin.register(MATRIX, *_matrix(), override=True)
        for each in INSTRUCTIONS:
            TensorIntrin.register(each.name, _description(), _implementation(each), override=True)


def _description() -> tirx.PrimFunc:
    @T.prim_func(s_tir=True)
    def dot(
        words: T.Buffer((LANES,), "uint32", offset_factor=1),
        four: T.Buffer((PER_BYTES,), "int8", offset_factor=1),
        sums: T.Buffer((LANES,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:LANES], words[0:LANES], four[0:PER_BYTES])
            T.writes(sums[0:LANES])
            for i, j in T.grid(LANES, PER_BYTES):
                with T.sblock("update"):
                    lane, byte = T.axis.remap("SR", [i, j])
                    sums[lane] = sums[lane] + T.Cast(
                        "int32",
                        T.bitwise_and(T.shift_right(words[lane], T.Cast("uint32", byte * 8)), T.uint32(255)),
                    ) * T.Cast("int32", four[byte])

    return dot


def _implementation(each: Instruction) -> tirx.PrimFunc:
    body = each.body

    @T.prim_func(s_tir=True)
    def dot(
        words: T.Buffer((LANES,), "uint32", offset_factor=1),
        four: T.Buffer((PER_BYTES,), "int8", offset_factor=1),
        sums: T.Buffer((LANES,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(sums[0:LANES], words[0:LANES], four[0:PER_BYTES])
            T.writes(sums[0:LANES])
            sums[T.ramp(T.int32(0), 1, LANES)] = body(
                sums.vload([0], dtype="int32x16"),
                words.vload([0], dtype="uint32x16"),
                T.reinterpret(four.vload([0], dtype="int8x4"), dtype="int32"),
            )

    return dot


def _matrix() -> tuple[tirx.PrimFunc, tirx.PrimFunc]:
    """Description and implementation of `MATRIX`; the sums' rows lie side by side, the activations' need not."""

    @T.prim_func(s_tir=True)
    def description(a: T.handle, b: T.handle, c: T.handle) -> None:
        stride = T.int32()
        words = T.match_buffer(a, (2, LANES), "uint32", offset_factor=1)
        eights = T.match_buffer(b, (2, 2 * PER_BYTES), "int8", offset_factor=1, strides=[stride, 1])
        sums = T.match_buffer(c, (2, LANES), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(sums[0:2, 0:LANES], words[0:2, 0:LANES], eights[0:2, 0 : 2 * PER_BYTES])
            T.writes(sums[0:2, 0:LANES])
            for i, j, k, m in T.grid(2, LANES, 2, PER_BYTES):
                with T.sblock("update"):
                    row, lane, part, byte = T.axis.remap("SSRR", [i, j, k, m])
                    sums[row, lane] = sums[row, lane] + T.Cast(
                        "int32",
                        T.bitwise_and(T.shift_right(words[part, lane], T.Cast("uint32", byte * 8)), T.uint32(255)),
                    ) * T.Cast("int32", eights[row, part * PER_BYTES + byte])

    @T.prim_func(s_tir=True)
    def implementation(a: T.handle, b: T.handle, c: T.handle) -> None:
        stride = T.int32()
        words = T.match_buffer(a, (2, LANES), "uint32", offset_factor=1)
        eights = T.match_buffer(b, (2, 2 * PER_BYTES), "int8", offset_factor=1, strides=[stride, 1])
        sums = T.match_buffer(c, (2, LANES), "int32", offset_factor=1)
        with T.sblock("root"):
            T.reads(sums[0:2, 0:LANES], words[0:2, 0:LANES], eights[0:2, 0 : 2 * PER_BYTES])
            T.writes(sums[0:2, 0:LANES])
            found = T.meta_var(
                _usmmla(
                    [sums.vload([row, 0], dtype="int32x16") for row in range(2)],
                    [words.vload([part, 0], dtype="uint32x16") for part in range(2)],
                    [eights.vload([row, 0], dtype="int8x8") for row in range(2)],
                )
            )
            first: T.let[T.int32x16] = found[0]
            second: T.let[T.int32x16] = found[1]
            sums[0, T.ramp(T.int32(0), 1, LANES)] = first
            sums[1, T.ramp(T.int32(0), 1, LANES)] = second

    return description, implementation


def why_not(weight: WeightFormat) -> str:
    """Why there are no products of bytes with such weights; empty where there are."""
    if weight.kind != "integer" or weight.layout != "N16":
        return f"products of bytes are for integers in tiles of {LANES} outputs"
    if weight.low_bits not in MASKS or weight.packing == "in_order":
        return "products of bytes are for 4 and 8 bits by byte, and planes of 5 and 6"
    whole = weight.group == WHOLE_ROW or (weight.group and weight.group % weight.byte_group == 0)
    return "" if whole else f"products of bytes are for groups of whole {weight.byte_group} inputs"


def product(
    weight: WeightFormat, out_dtype: str, names: Sequence[str] = ("q_weight", "q_scale")
) -> Callable[..., te.Tensor]:
    """y = x @ weight.T as stages `unpack`, `dot` (int32, a group each), `matmul` (the groups, scaled) and `out`.

    The body takes x int8 [M, K], its scales float32 [M, groups] or [M, 1], its offsets int32 [M, groups], and then
    the parts of the weights, named by `names`, in layout N16 -> [M, N], N as it is padded. A group's offset is what a
    zero point adds, minus that times the group's sum, where it is the same for all; otherwise it is the sum. Groups
    here are of at most 32 inputs, several of which may share a scale of the weights. A ValueError where weights are
    stored in another way.
    """
    if why_not(weight):
        raise ValueError(f"{why_not(weight)}, not for {weight}")
    bits, group_size, per_word = weight.low_bits, weight.byte_group, weight.per_word
    halves, mask = 8 // bits, MASKS[bits]

    def body(x: te.Tensor, x_scale: te.Tensor, offset: te.Tensor, *held: te.Tensor) -> te.Tensor:
        parts = dict(zip(names, held, strict=True))
        words = parts["q_weight"]
        (m, k), tiles, per_group = x.shape, words.shape[0], group_size // per_word
        groups = k // group_size
        word, half = te.reduce_axis((0, per_group), name="word"), te.reduce_axis((0, halves), name="half")
        byte, group = te.reduce_axis((0, PER_BYTES), name="byte"), te.reduce_axis((0, groups), name="group")

        def bytes_of(t: tirx.Var, g: tirx.Var, w: tirx.Var, h: tirx.Var, lane: tirx.Var) -> tirx.Expr:
            shift = (h * bits).astype("uint32")
            low = (words[t, g * per_group + w, lane] >> shift) & tirx.const(mask, "uint32")
            if "q_high" not in parts:
                return low
            return low | _high(weight, parts["q_high"], t, (g * per_group + w) * halves + h, lane)

        unpacked = te.compute((tiles, groups, per_group, halves, LANES), bytes_of, name="unpack")

        def product_of(row: tirx.Var, t: tirx.Var, g: tirx.Var, lane: tirx.Var) -> tirx.Expr:
            of_word = unpacked[t, g, word, half, lane] >> (byte * 8).astype("uint32")
            integer = (of_word & tirx.const(255, "uint32")).astype("int32")
            place = g * group_size + word * per_word + half * PER_BYTES + byte
            return te.sum(integer * x[row, place].astype("int32"), axis=[word, half, byte])

        dot = te.compute((m, tiles, groups, LANES), product_of, name="dot")

        def scaled(row: tirx.Var, t: tirx.Var, lane: tirx.Var) -> tirx.Expr:
            of_x = x_scale[row, group if int(x_scale.shape[1]) > 1 else 0]
            return _scaled(weight, parts, t, group, lane, dot[row, t, group, lane], offset[row, group], of_x)

        y = te.compute((m, tiles, LANES), lambda *at: te.sum(scaled(*at), axis=group), name="matmul")
        return te.compute(
            (m, tiles * LANES), lambda row, n: y[row, n // LANES, n % LANES].astype(out_dtype), name="out"
        )

    return body


def _high(weight: WeightFormat, words: te.Tensor, tile: tirx.Var, fours: tirx.Expr, lane: tirx.Var) -> tirx.Expr:
    """The upper bits of weights 4 `fours` and after, each in its byte, above the lower four."""
    bits = weight.bits - weight.low_bits
    in_word = 8 // bits
    shifted = words[tile, fours // in_word, lane] >> (fours % in_word * bits).astype("uint32")
    mask = ((1 << bits) - 1) * 0x01010101
    return (shifted & tirx.const(mask, "uint32")) << tirx.const(weight.low_bits, "uint32")


def _scaled(
    weight: WeightFormat,
    parts: Mapping[str, te.Tensor],
    tile: tirx.Var,
    group: tirx.Var,
    lane: tirx.Var,
    dot: tirx.Expr,
    offset: tirx.Expr,
    x_scale: tirx.Expr,
) -> tirx.Expr:
    """What a group adds to an output."""

    def of_group(name: str, shared: str = "") -> tirx.Expr:
        size = weight.byte_group
        place = 0 if weight.group == WHOLE_ROW else group if weight.group == size else group * size // weight.group
        value = parts[name][tile, place, lane].astype("float32")
        if shared not in parts:
            return value
        return value * parts[shared][tile, group * size // weight.super_group, lane].astype("float32")

    scale = of_group("q_scale", "q_super")
    if weight.zero == "symmetric":
        return (dot + offset).astype("float32") * (scale * x_scale)
    if weight.zero == "zero_point":
        return (dot.astype("float32") - offset.astype("float32") * of_group("q_zero")) * (scale * x_scale)
    return (dot.astype("float32") * scale + offset.astype("float32") * of_group("q_min", "q_super_min")) * x_scale
