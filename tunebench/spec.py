"""The frozen values that every layer shares. Those that files hold are Structs, whose types are checked when read."""

from dataclasses import dataclass
from enum import Enum
from typing import Annotated, ClassVar, Literal

from msgspec import Meta, Struct

Phase = Literal["prefill", "decode"]
Schedule = Literal["default", "tuned", "library"]
"""Where a kernel comes from; `library` also where an engine brings all of its own."""
Decision = Literal["promoted", "kept default", "inconclusive", "not searched", "nothing to decide"]
"""`kept default`: searched, and none won. `not searched`: may win yet. `nothing to decide`: no space is for it."""
MOST = 2**62
Amount = Annotated[int, Meta(ge=0, le=MOST)]
"""Of bytes, tokens, nanoseconds: whole and not negative."""
Size = Annotated[int, Meta(ge=1, le=MOST)]
"""What there is at least one of."""
Figure = Annotated[float, Meta(ge=0, le=1e24)]
"""A rate, a time or a ratio: finite, also after it was scaled."""
Words = Annotated[str, Meta(max_length=1 << 16)]
"""A name or a sentence: any text, but not any length."""
Amounts = Annotated[list[Amount], Meta(max_length=1000)]
Sizes = Annotated[list[Size], Meta(max_length=1000)]
"""Samples, among others; every interval takes thousands of resamples of them."""
Layout = Literal["NK", "KN", "N16"]
"""How a weight of N outputs and K inputs is stored: N-major [N, K], K-major [K, N], or [N / 16, K, 16]."""
Packing = Literal["in_order", "by_byte", "planes"]
"""Where a word of 32 bits has its p-th weight: at bit bits * p, or at bit 8 (p mod 4) + bits (p div 4).

`planes`, of 5 and 6 bits: the lower four in such words, the others in words of their own; both in order, or both by
byte where the layout is N16.
"""
PLANE_BITS = 4  # of the lower plane
BYTE_GROUP = 32  # activations that share a scale where they are quantized by group
Zero = Literal["symmetric", "zero_point", "minimum"]
"""What a group's integers mean: (q - z) * scale with z the same for all, with a z of the group, q * scale + minimum."""
Activations = Literal["float", "int8", "int8_token"]
"""What a matrix product multiplies weights with: activations as they are, or quantized, a scale a group or a token."""
WHOLE_ROW = -1
"""As a group: all weights of an output."""


class EngineName(str, Enum):
    """The engines that TuneBench knows, as command lines and rows say them."""

    TVM = "tvm"
    WEBGPU = "webgpu"
    DAWN = "dawn"
    OPENCL = "opencl"
    BROWSER = "browser"
    LLAMA_CPP = "llama_cpp"
    TORCH = "torch"

    __str__ = str.__str__  # Python 3.10 to 3.13 would each format a member in another way


@dataclass(frozen=True)
class WeightFormat:
    """How a weight matrix is stored and what its numbers mean.

    Two formats are the same where all fields are: whoever reads a format names it whole, and never gets another one.
    """

    kind: Literal["integer", "float", "codes"]  # of a weight; integers are unsigned, codes small floats
    bits: int  # of a weight
    dtype: str  # of what a group has beside its integers; of the weights where there are no groups
    group: int = 0  # weights along K that share a scale; 0 where there is none, WHOLE_ROW where all of an output do
    zero: Zero = "symmetric"
    layout: Layout = "NK"
    packing: Packing = "in_order"
    full_range: bool = False  # symmetric integers: 2^(bits - 1) stands for 0, not the integer below it
    super_group: int = 0  # weights along K whose groups' scales are integers times a scale of their own; 0: no such
    code: str = ""  # ml_dtypes' name of what a code is
    rows: int = 1  # outputs that share a scale
    ordered: bool = False  # the inputs are taken in an order of the matrix's own

    @property
    def low_bits(self) -> int:
        """Of a weight in the words of `q_weight`: all of them, but for planes."""
        return PLANE_BITS if self.packing == "planes" else self.bits

    @property
    def per_word(self) -> int:
        """Weights in a word of 32 bits, of `q_weight`."""
        return 32 // self.low_bits

    @property
    def zero_point(self) -> int:
        """The integer that stands for 0 in a symmetric format."""
        return (1 << (self.bits - 1)) - (not self.full_range)

    def group_of(self, k: int) -> int:
        """Weights that share a scale, of k inputs."""
        return k if self.group == WHOLE_ROW else self.group

    @property
    def byte_group(self) -> int:
        """Inputs whose products with int8 activations are summed as integers: those of a group, or of a part of it."""
        return self.group if 0 < self.group < BYTE_GROUP else BYTE_GROUP

    @property
    def words(self) -> str:
        """What is stored, for a user: `4-bit integers with a minimum, groups of 32`."""
        if not self.group:
            return self.dtype
        beside = {"symmetric": "", "zero_point": " with a zero point", "minimum": " with a minimum"}[self.zero]
        numbers = self.code if self.kind == "codes" else f"{self.bits}-bit integers{beside}"
        shared = "a scale an output" if self.group == WHOLE_ROW else f"groups of {self.group}"
        blocks = f"blocks of {self.rows} x {self.group}" if self.rows > 1 else shared
        above = f", their scales in {self.dtype}" if self.kind == "codes" else ""
        wider = {0: "", WHOLE_ROW: ", scaled an output"}.get(self.super_group, f", scaled in {self.super_group}s")
        return f"{numbers}, {blocks}{above}{wider}" + (", inputs in an order of its own" if self.ordered else "")


@dataclass(frozen=True)
class Scheme:
    """A quantization scheme, named as MLC LLM names it: `q<weight bits>f<activation bits>_<variant>`.

    `i8` before the `f` says that matrix products quantize their activations to int8; all else stays float.
    """

    name: str
    weight: WeightFormat
    dtype: str  # activations
    activations: Activations = "float"
    native: bool = False  # each weight as its checkpoint has it; `weight` is the format of most of them


@dataclass(frozen=True)
class TargetPreset:
    """A compilation target as plain data."""

    name: str
    kind: str  # TVM's target kind
    summary: str
    attrs: tuple[tuple[str, str | int | tuple[str, ...]], ...] = ()
    device: str = "cpu"  # the TVM device that runs it
    runs_here: bool = True  # False: code generation only
    tag: str = ""  # of TVM, in place of `attrs`
    api: str = ""  # the GPU API in `tunebench.runtime.apis` that runs its source, where TVM has no runtime
    absent: str = ""  # why it does not run on a machine like this
    blocked: str = ""  # why nothing can be compiled for it; empty where it can


@dataclass(frozen=True)
class Test:
    """What one case measures, in llama-bench's terms: token counts."""

    __test__: ClassVar[bool] = False  # not a pytest class

    n_prompt: int = 0
    n_gen: int = 0
    n_depth: int = 0

    @property
    def name(self) -> str:
        """llama-bench's name: `pp512`, `tg128`, `pp512+tg128`, `tg128 @ d4096`."""
        parts = [f"pp{self.n_prompt}"] if self.n_prompt else []
        parts += [f"tg{self.n_gen}"] if self.n_gen else []
        return "+".join(parts) + (f" @ d{self.n_depth}" if self.n_depth else "")

    @property
    def n_tokens(self) -> int:
        """Tokens that the timed part processes."""
        return self.n_prompt + self.n_gen

    @property
    def phase(self) -> Phase | Literal["both"]:
        """`prefill`, `decode`, or `both`."""
        if self.n_prompt and self.n_gen:
            return "both"
        return "prefill" if self.n_prompt else "decode"


@dataclass(frozen=True)
class Workload:
    """model x scheme x shape: what is compiled.

    A prompt runs in chunks of the static lengths in `chunks` (the last one padded to the smallest), a new
    token in a chunk of length 1, over a KV cache of `context` positions for each of `batch` sequences.
    """

    model: str  # a name in workloads/, the path of such a JSON, of a folder or a .gguf, or a hub id
    scheme: Scheme
    batch: int = 1
    chunks: tuple[int, ...] = (16, 128)
    context: int = 2048
    device_kind: str = "cpu"  # or gpu: which of the two ways to write its kernels
    layers: int = 0  # only so many; 0: all
    kv: str = ""  # how keys and values are held: int8 or fp8; empty: as the activations
    all_logits: bool = False  # of every token of a chunk, not of one alone: what a quality is computed from

    @property
    def chunk_sizes(self) -> tuple[int, ...]:
        """Every static chunk size, ascending, decode's 1 first."""
        return tuple(sorted({1, *self.chunks}))


class Count(Struct, frozen=True):
    """An amount of memory and the counter it came from; `bytes` is None where there is no counter."""

    bytes: Amount | None
    counter: Words


class Kernel(Struct, frozen=True):
    """One kernel of a phase: how much of the phase it takes, and which schedule it has and why."""

    task: Words
    phase: Phase
    chunk: Size  # tokens of the chunk it works on
    calls: Size  # per chunk
    share: Annotated[float, Meta(ge=0, le=1)]  # of the phase's time under the schedules in use
    schedule: Schedule
    reason: Words  # the decision in words
    decision: Decision | Literal[""] = ""  # empty where there is no decision yet
    default_ns: Amounts = []  # fresh samples, cold caches
    tuned_ns: Amounts = []
    by_source: dict[Schedule, Amounts] = {}  # the fastest of tuned and library, where both ran
