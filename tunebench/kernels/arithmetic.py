"""Functions that kernels compute in float32, as TensorIR expressions of plain arithmetic.

Arithmetic vectorizes, where LLVM would call the C library for each element, and not every GPU API has an error
function. Arguments appear several times in what is made of them.
"""

from tvm.tirx import Expr, FloatImm, const, floor, max, min, reinterpret

from tunebench.kernels.operation import Activation

LOG2_E = 1.4426950408889634
POWERS = (0.00133908634, 0.00967603192, 0.0555035711, 0.240221075, 0.693147188, 1.00000008)
"""2^x on [-1/2, 1/2] as a polynomial, the highest power first: interpolated at Chebyshev's points."""
ERF = (
    (
        -2.72614226e-10,
        2.77068143e-08,
        -2.10102402e-06,
        -5.69250639e-05,
        -7.34990631e-04,
        -2.95459981e-03,
        -1.60960334e-02,
    ),
    (-1.45660718e-05, -2.13374055e-04, -1.68282697e-03, -7.37332917e-03, -1.42647391e-02),
)
"""erf(x) / x as a ratio of polynomials of x^2, highest powers first, as Eigen has it; error 4e-7."""
TANH = (
    (-2.76076848e-16, 2.00018790e-13, -8.60467152e-11, 5.12229709e-08, 1.48572236e-05, 6.37261929e-04, 4.89352456e-03),
    (1.19825839e-06, 1.18534706e-04, 2.26843463e-03, 4.89352519e-03),
)
"""The same of tanh."""
ERF_MOST, TANH_MOST = 4.0, 7.9  # beyond, the functions are 1 or -1 in float32, and the ratios are not
KV_MOST = {"int8": 127.0, "fp8": 448.0}
"""What the largest magnitude of a head's keys or values at a position becomes in a quantized cache."""
GELU_TANH = 0.7978845608028654, 0.044715
CLAMPED, CLAMPED_SLOPE = 7.0, 1.702  # gpt-oss's swiglu_limit and alpha


def exp2(whole: Expr, part: Expr) -> Expr:
    """2^(whole + part), float32, for a whole number from -126 to 127 and |part| <= 1/2; relative error 2e-7.

    A polynomial for 2^part, and the exponent's bits for 2^whole.
    """
    series = FloatImm("float32", POWERS[0])
    for factor in POWERS[1:]:
        series = series * part + FloatImm("float32", factor)
    return series * reinterpret("float32", (whole.astype("int32") + 127) << 23)


def clamp(x: Expr, most: float) -> Expr:
    """x where it is within [-most, most], else the nearer of these."""
    return max(min(x, const(most, "float32")), const(-most, "float32"))


def erf(x: Expr) -> Expr:
    """The error function of what `clamp` to ERF_MOST left."""
    return _ratio(x, *ERF)


def tanh(x: Expr) -> Expr:
    """The hyperbolic tangent of what `clamp` to TANH_MOST left."""
    return _ratio(x, *TANH)


def _ratio(x: Expr, above: tuple[float, ...], below: tuple[float, ...]) -> Expr:
    return x * _polynomial(x * x, above) / _polynomial(x * x, below)


def _polynomial(x: Expr, factors: tuple[float, ...]) -> Expr:
    series = const(factors[0], "float32")
    for factor in factors[1:]:
        series = series * x + const(factor, "float32")
    return series


def entering(activation: Activation, x: Expr) -> Expr:
    """What an activation is computed of, of an element x."""
    return min(x, const(CLAMPED, "float32")) if activation == "clamped_swiglu" else x


def inner(activation: Activation, gate: Expr) -> Expr:
    """Of `gelu` the error function's argument; of the others y in gate / (1 + 2^y)."""
    if activation == "gelu":
        return clamp(gate * const(0.5**0.5, "float32"), ERF_MOST)
    if activation == "gelu_tanh":
        slope, cubic = GELU_TANH
        cube = const(1, "float32") + const(cubic, "float32") * gate * gate
        return gate * const(-2 * slope * LOG2_E, "float32") * cube
    return gate * const(-LOG2_E * (CLAMPED_SLOPE if activation == "clamped_swiglu" else 1), "float32")


def by_erf(gate: Expr, argument: Expr) -> Expr:
    """`gelu` of a gate, of which `inner` gave the argument."""
    return gate * (const(0.5, "float32") + const(0.5, "float32") * erf(argument))


def other(activation: Activation, up: Expr) -> Expr:
    """What an activation's result is multiplied with, of an element of the second half."""
    return clamp(up, CLAMPED) + const(1, "float32") if activation == "clamped_swiglu" else up


def from_code(kv: str, code: Expr) -> Expr:
    """What an integer, or the bits of an e4m3, of a quantized cache stands for, less its scale."""
    if kv == "int8":
        return code.astype("float32")
    bits = code.astype("uint32")
    places = ((bits & const(0x80, "uint32")) << 24) | ((bits & const(0x7F, "uint32")) << 20)
    return reinterpret("float32", places) * const(2.0**120, "float32")  # the exponent's bias is 7, and not 127


def to_code(kv: str, x: Expr) -> Expr:
    """The nearest that a quantized cache can hold of a float32 within its KV_MOST: int32, or an e4m3's bits, uint32."""
    if kv == "int8":
        return floor(x + const(0.5, "float32")).astype("int32")
    bits = reinterpret("uint32", x * const(2.0**-120, "float32"))
    magnitude = bits & const(0x7FFFFFFF, "uint32")
    even = (magnitude >> 20) & const(1, "uint32")
    nearest = (magnitude + const(0x7FFFF, "uint32") + even) >> 20
    return ((bits >> 24) & const(0x80, "uint32")) | nearest
