"""How well a model in a scheme predicts a text, beside the same model in float32 on this machine's CPU.

The text is cut into windows of the context, and each runs as a prompt would, in chunks, whose head computes the logits
of every token; then the end of the last window once more, a token at a time, as decode would. Kernels are the tuned
ones where the database has records. The float model's predictions are computed once for each model and text.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import msgspec
import numpy as np
from scipy.special import log_softmax

from tunebench import stats
from tunebench.bench.ready import known, load_ready, real_weights
from tunebench.devices import targets
from tunebench.devices.opening import open_device
from tunebench.engines.chunked import ChunkedEngine
from tunebench.errors import TuneBenchError
from tunebench.model import quantization, tokenizer
from tunebench.model.workload import Model
from tunebench.results import Quality
from tunebench.spec import Workload
from tunebench.tuning.drawn import drawn
from tunebench.tuning.session import Lowered, Session, lower

PROSE = Path(__file__).parent / "prose.txt"
DECODED = 128  # tokens at most that are decoded, too
LEAST = 16  # tokens that a text has
TEXT_BYTES = 64 << 20
Say = Callable[[str], None]
Array = np.ndarray


@dataclass(frozen=True)
class Text:
    """What is predicted."""

    name: str
    content: str

    @property
    def said(self) -> str:
        """Which text, as rows say it."""
        return f"{self.name} {hashlib.sha256(self.content.encode()).hexdigest()[:12]}"


def read_text(path: Path) -> Text:
    """A file of text in UTF-8; a TuneBenchError where it is none."""
    try:
        if path.stat().st_size > TEXT_BYTES:
            raise ValueError(f"it is larger than {TEXT_BYTES >> 20} MiB")
        return Text(path.name, path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise TuneBenchError(f"cannot read {path} ({error}).", "Name a file of plain text in UTF-8.") from None


@dataclass
class Judge:
    """Gives models in schemes their quality, and keeps what the float model predicts."""

    text: Text
    weights: str  # where they and the tokenizer are; empty: the model's own
    most: int  # tokens of the text
    _references: dict[tuple[str, int, int], list[Array]] = field(default_factory=dict)

    def quality(self, lowered: Lowered, say: Say) -> Quality:
        """Of the model in its scheme on its device; a TuneBenchError where there is too little text."""
        workload, windows = lowered.model.workload, self._windows(lowered.model)
        key = (workload.model, workload.context, workload.layers)
        if key not in self._references:
            self._references[key] = self._reference(lowered, windows, say)
        engine = self._load(lowered.session, workload, say)
        meter = _Meter(say, workload.scheme.name, windows)
        scores = [
            _score(*row)
            for window, reference in zip(windows, self._references[key], strict=True)
            for row in zip(_rows(engine, window, meter), reference, window[1:], strict=True)
        ]
        loss, reference_loss, kl, same_top = np.array(scores).T
        decoded = _decoded(engine, windows[-1], loss)
        found = Quality(
            text=self.text.said,
            tokens=len(loss),
            perplexity=_perplexity(loss),
            reference_perplexity=_perplexity(reference_loss),
            kl=max(0.0, float(kl.mean())),
            same_top=float(same_top.mean()),
            perplexity_interval=np.exp(stats.mean_interval(loss)).tolist(),
            kl_interval=np.clip(stats.mean_interval(kl), 0, None).tolist(),
            same_top_interval=np.clip(stats.mean_interval(same_top), 0, 1).tolist(),
        )
        return msgspec.structs.replace(found, decode_perplexity=decoded[0], decode_prefill_perplexity=decoded[1])

    def _windows(self, model: Model) -> list[Array]:
        """The text's tokens, int32 [n], in windows of the context, each behind what the tokenizer puts first."""
        words, vocab = real_weights(model, self.weights).tokenizer(), model.config.vocab_size
        before, tokens = tokenizer.encode(words, self.text.content, vocab)
        size = min(model.workload.context, model.config.max_position_embeddings) - len(before)
        tokens = tokens[: self.most]
        if len(tokens) < LEAST:
            raise TuneBenchError(
                f"{self.text.name} has {len(tokens)} tokens, and {LEAST} are needed.", "Use more text."
            )
        cut = [np.array([*before, *tokens[at : at + size]], np.int32) for at in range(0, len(tokens), size)]
        return [window for window in cut if len(window) > 1]

    def _reference(self, lowered: Lowered, windows: Sequence[Array], say: Say) -> list[Array]:
        """The float model's logarithms of probabilities, float32 [n - 1, vocab] of each window."""
        session, workload = lowered.session, lowered.model.workload
        device = open_device(targets.find("llvm"), session.threads)
        floats = replace(workload, scheme=quantization.schemes()["q0f32"], chunks=(), kv="")
        engine = self._load(Session(device, session.work_dir, session.results_path), floats, say)
        meter = _Meter(say, "float model", windows)
        return [
            np.stack([log_softmax(row).astype(np.float32) for row in _rows(engine, window, meter)])
            for window in windows
        ]

    def _load(self, session: Session, workload: Workload, say: Say) -> ChunkedEngine:
        """An engine that gives the logits of all tokens. A kernel without a record has any schedule of its space."""
        say(f"quality: compile {workload.scheme.name}")
        chunks = workload.chunks or session.device.default_chunks
        sizes = tuple(size for size in chunks if size <= workload.context)
        lowered = lower(session, replace(workload, batch=1, chunks=sizes, all_logits=True))
        engine = load_ready(lowered, {**drawn(lowered), **known(lowered).records}, self.weights)
        if not isinstance(engine, ChunkedEngine):
            raise TuneBenchError(f"{session.device.target_name} gives no logits of every token.", "Use another target.")
        return engine


class _Meter:
    """Says how many tokens of the windows are done, and how long the rest will take."""

    def __init__(self, say: Say, what: str, windows: Sequence[Array]) -> None:
        self._say, self._what, self._total = say, what, sum(len(window) - 1 for window in windows)
        self._done, self._start = 0, time.monotonic()

    def add(self, count: int) -> None:
        """So many more."""
        self._done += count
        left_s = (time.monotonic() - self._start) / self._done * (self._total - self._done)
        self._say(f"quality: {self._what}, {self._done} of {self._total} tokens, about {left_s:.0f} s left")


def _score(logits: Array, reference: Array, token: int) -> tuple[float, float, float, float]:
    """Of one token that is predicted, from its float32 logits and the float model's logarithms, both [vocab]."""
    found, expected = log_softmax(logits.astype(np.float64)), reference.astype(np.float64)
    if not np.isfinite(found[token]):
        raise TuneBenchError("the logits are not finite.", "Choose a scheme of larger floats.")
    divergence = float(np.exp(expected) @ (expected - found))
    return -found[token], -expected[token], divergence, float(found.argmax() == expected.argmax())


def _perplexity(losses: Array) -> float:
    return float(np.exp(losses.mean()))


def _rows(engine: ChunkedEngine, window: Array, meter: _Meter) -> Iterator[Array]:
    """Logits [vocab] of every token of a window but the last, which predicts nothing that is known."""
    for valid in engine.prefill_chunks(window[None, :-1], 0):
        yield from engine.logits()[:valid]
        meter.add(valid)


def _decoded(engine: ChunkedEngine, window: Array, losses: Array) -> tuple[float, float]:
    """Perplexity of the end of the window that was just processed, a token at a time and, by `losses`, in chunks."""
    count = min(DECODED, len(window) - 1)
    found = []
    for at in range(len(window) - 1 - count, len(window) - 1):
        engine.decode(window[None, at : at + 1], at)
        found.append(-log_softmax(engine.logits()[0].astype(np.float64))[window[at + 1]])
    return _perplexity(np.array(found)), _perplexity(losses[-count:])
