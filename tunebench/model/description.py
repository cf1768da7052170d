"""A decoder as data: its blocks, and the weights of each under Hugging Face's names.

An architecture describes itself in these; `decoder` computes what they describe. Nothing here knows a device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar

from tunebench.kernels.operation import Activation

Dealt = tuple[int, ...]
"""(runs, widths...): rows lie in so many runs, each of so many rows of every kind; here each kind's lie together.

Empty: they are of one kind.
"""


@dataclass(frozen=True)
class Matrix:
    """A weight matrix [n, k] that a scheme may quantize, and the Hugging Face tensors stacked in it, by rows."""

    name: str
    n: int
    k: int
    sources: tuple[str, ...]
    is_table: bool = False  # looked up by row, not multiplied
    once_a_chunk: bool = False  # multiplied with one row of a chunk, however many it has
    bias: Vector | None = None  # [n], added to its products
    dealt: tuple[Dealt, ...] = ()  # how the rows of each source, or of each expert in it, lie; empty: as here
    stays_float: bool = False  # in every scheme, as the router of experts does
    experts: int = 1  # parts by rows, of which a token is multiplied with some
    transposed: bool = False  # in Hugging Face's one tensor plain numbers of each expert lie [k, n / experts]


@dataclass(frozen=True)
class Vector:
    """A weight [length] that stays float, and the Hugging Face tensors one behind the other in it."""

    name: str
    length: int
    sources: tuple[str, ...] = ()  # empty: its own name
    plus: float = 0.0  # is added to what is stored: 1 in Gemma's norms
    times: float = 1.0  # what is stored is multiplied by
    dtype: str = ""  # empty: the activations'
    dealt: tuple[Dealt, ...] = ()  # as of a matrix, of whose products it is the bias
    experts: int = 1  # rows of its one tensor

    @property
    def stored(self) -> tuple[str, ...]:
        """Hugging Face's names."""
        return self.sources or (self.name,)


@dataclass(frozen=True)
class Norm:
    """Of rows: root mean square, or with mean and bias as LayerNorm."""

    weight: Vector
    epsilon: float
    bias: Vector | None = None  # LayerNorm


@dataclass(frozen=True)
class Rope:
    """A rotation of the first `2 len(inv_freq)` elements of a head, element d with d + len(inv_freq)."""

    inv_freq: tuple[float, ...]  # radians a position
    times: float = 1.0  # cosines and sines are multiplied by: yarn's and longrope's attention factor


@dataclass(frozen=True)
class Attention:
    """Grouped-query attention over the cache."""

    qkv: Matrix  # all queries, then keys, then values
    out: Matrix
    heads: int
    kv_heads: int
    dim: int  # of a head
    scale: float = 0.0  # of the scores; 0: dim^-1/2
    rope: int = 0  # which of the decoder's
    query_norm: Norm | None = None  # of each head's elements, before the rotation
    key_norm: Norm | None = None
    window: int = 0  # positions that a token sees, its own among them; 0: all
    softcap: float = 0.0
    sinks: Vector | None = None  # float32 [heads]: a score that takes its share and has no value
    gated: bool = False  # gates between queries and keys, one each: what comes out is multiplied by their sigmoids

    @property
    def first(self) -> Matrix:
        """What x is multiplied with first."""
        return self.qkv


@dataclass(frozen=True)
class LinearAttention:
    """The gated delta rule: a convolution over the last tokens, and a matrix for each head that tokens correct."""

    mixed: Matrix  # all queries, keys, values, and as many gates as values
    factors: Matrix  # [2 value_heads, hidden]: shares of corrections, then decays
    out: Matrix
    convolution: Vector  # float32 [channels * taps], of queries, keys and values
    slopes: Vector  # float32 [value_heads], logarithms
    offsets: Vector  # float32 [value_heads]
    norm: Norm  # of each value head
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int

    @property
    def first(self) -> Matrix:
        """What x is multiplied with first."""
        return self.mixed

    @property
    def channels(self) -> int:
        """Of the convolution."""
        return 2 * self.key_heads * self.key_dim + self.value_heads * self.value_dim


@dataclass(frozen=True)
class Mlp:
    """down(activation(up x)), or down(activation(gate x) * up x) where `up` has both, the gate first."""

    up: Matrix
    down: Matrix
    activation: Activation = "silu"
    gated: bool = True


@dataclass(frozen=True)
class Experts:
    """A mixture: each token's `per_token` experts of the highest router scores, weighted by a softmax of these."""

    router: Matrix  # [count, hidden]
    up: Matrix  # [count * 2 inner, hidden]: of each expert the gate, then what it multiplies
    down: Matrix  # [count * hidden, inner]
    per_token: int
    normalized: bool = True  # the chosen ones' weights add up to 1; otherwise all experts' do
    activation: Activation = "silu"
    shared: Mlp | None = None  # of every token
    shared_gate: Matrix | None = None  # [1, hidden], whose sigmoid multiplies what `shared` makes
    gated: ClassVar[bool] = True


@dataclass(frozen=True)
class Layer:
    """x + attention(norm x), then x + mlp(norm x); `parallel`: both of the same x."""

    attention: Attention | LinearAttention
    mlp: Mlp | Experts
    attention_norm: Norm
    mlp_norm: Norm
    attention_post: Norm | None = None  # of what attention gives, before it is added
    mlp_post: Norm | None = None
    parallel: bool = False


@dataclass(frozen=True)
class Decoder:
    """A whole model: embedding, layers, norm, head."""

    embedding: Matrix
    layers: tuple[Layer, ...]
    norm: Norm
    head: Matrix
    embedding_scale: float = 1.0
    logits_softcap: float = 0.0
    ropes: tuple[Ropes, ...] = field(default=())

    @property
    def attentions(self) -> list[Attention]:
        """Those of layers that have keys and values."""
        return [layer.attention for layer in self.layers if isinstance(layer.attention, Attention)]

    @property
    def is_recurrent(self) -> bool:
        """Whether a step changes more than the places of its own tokens, and so is not to be run twice."""
        return len(self.attentions) < len(self.layers)

    def matrices(self) -> dict[str, Matrix]:
        """Every weight matrix by name, in the order of the computation."""
        return {each.name: each for each in _held(self) if isinstance(each, Matrix)}

    def vectors(self) -> dict[str, Vector]:
        """Every weight that stays float by name."""
        return {each.name: each for each in _held(self) if isinstance(each, Vector)}


@dataclass(frozen=True)
class Ropes:
    """The rotation of a model that is run with so many positions at most, and the one beyond that."""

    within: Rope
    limit: int = 0  # positions; 0: `within` serves any number
    beyond: Callable[[int], Rope] | None = None  # for a cache of so many positions

    def of(self, context: int) -> Rope:
        """The rotation for a cache of `context` positions."""
        return self.beyond(context) if self.beyond and context > self.limit else self.within


def one_of_each(layers: Sequence[Layer]) -> tuple[Layer, ...]:
    """The first layer of each kind, in order: of those that differ in nothing but their weights' names."""
    kinds: dict[Any, Layer] = {}
    for layer in layers:
        kinds.setdefault(_unnamed(layer), layer)
    return tuple(kinds.values())


def _unnamed(block: Any) -> Any:
    """A block's values without names, to be compared."""
    if not is_dataclass(block):
        return block
    values = [_unnamed(getattr(block, part.name)) for part in fields(block) if part.name not in ("name", "sources")]
    return (type(block), *values)


def _held(block: Any) -> Iterator[Matrix | Vector]:
    """The weights of a block and of those inside it."""
    if isinstance(block, Matrix | Vector):
        yield block
    for each in block if isinstance(block, tuple) else [getattr(block, part.name) for part in fields(block)]:
        if is_dataclass(each) or isinstance(each, tuple):
            yield from _held(each)
