"""llama.cpp, through llama-cpp-python's low-level interface, over a GGUF file with the very same weights.

A model that came as a GGUF file is run from it. For others a file is written for the run, and removed with it.
"""

from __future__ import annotations

import ctypes
import functools
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tunebench.dtypes import DTYPES
from tunebench.engines import gguf_file
from tunebench.engines.base import Engine, Weights
from tunebench.engines.baselines import Peer
from tunebench.errors import TuneBenchError
from tunebench.spec import EngineName

if TYPE_CHECKING:
    from tunebench.model.workload import Model

ERROR = 4  # the level of a message
_CALLED: list[object] = []  # by llama.cpp, as long as it is there


def refuses(model: Model) -> str:
    """Why llama.cpp cannot run a model, or an empty string."""
    if model.workload.kv:
        return "its cache holds floats here"
    return "" if _own_file(model) else gguf_file.unlike(model)


def _own_file(model: Model) -> Path | None:
    """The GGUF file that a model is run from in its own formats, all its layers."""
    whole = model.workload.scheme.native and not model.workload.layers
    path = model.source.weights if model.source and whole else None
    return path if path and path.suffix == ".gguf" else None


@functools.cache
def _errors() -> list[bytes]:
    """What llama.cpp says of errors from now on; nothing else of it is seen."""
    from llama_cpp import llama_cpp as api

    said: list[bytes] = []
    note = api.llama_log_callback(lambda level, text, data: said.append(text) if level == ERROR else None)
    api.llama_log_set(note, ctypes.c_void_p(0))
    _CALLED.append(note)
    return said


class LlamaCpp:
    """One model in llama.cpp, with its own settings but for threads, context and the type of cache and attention."""

    def __init__(self, path: Path, model: Model, threads: int) -> None:
        import gguf
        from llama_cpp import llama_cpp as api

        self._api, errors = api, _errors()
        errors.clear()
        api.llama_backend_init()
        batch = model.workload.batch
        model_params, params = api.llama_model_default_params(), api.llama_context_default_params()
        model_params.n_gpu_layers = 0
        params.n_ctx, params.n_seq_max = model.workload.context * batch, batch
        params.type_k = params.type_v = gguf.GGMLQuantizationType[DTYPES[model.workload.scheme.dtype].short.upper()]
        if model.workload.scheme.dtype == "float32":
            params.flash_attn_type = api.LLAMA_FLASH_ATTN_TYPE_DISABLED  # it computes in float16
        params.n_threads = params.n_threads_batch = threads
        self._model: Any = api.llama_model_load_from_file(str(path).encode(), model_params)
        self._context: Any = self._model and api.llama_init_from_model(self._model, params)
        if not self._context:
            why = b"".join(errors[:1]).decode(errors="replace").strip() or "it does not say why"
            raise TuneBenchError(f"llama.cpp could not load {path}: {why}.")
        self._memory = api.llama_get_memory(self._context)
        self._vocab = api.llama_vocab_n_tokens(api.llama_model_get_vocab(self._model))
        self._batch_tokens = int(api.llama_n_batch(self._context))
        self._sequences, self._length = batch, 0

    @property
    def weight_bytes(self) -> int:
        """All tensors, as llama.cpp reports them."""
        return int(self._api.llama_model_size(self._model))

    def prefill(self, tokens: np.ndarray, position: int) -> None:
        """Process int32 tokens [b, n] that stand at `position`."""
        self._go_to(position)
        step = self._batch_tokens // self._sequences
        for start in range(0, tokens.shape[1], step):
            self._decode(tokens[:, start : start + step])

    def decode(self, tokens: np.ndarray, position: int) -> None:
        """Process one token a sequence, int32 [b, 1], at `position`."""
        self._go_to(position)
        self._decode(tokens)

    def wait(self) -> None:
        """Nothing: each call waits."""

    def logits(self) -> np.ndarray:
        """Float32 logits [b, vocab] of the last call."""
        rows = [self._api.llama_get_logits_ith(self._context, i) for i in self._last]
        return np.stack([np.ctypeslib.as_array(row, (self._vocab,)).copy() for row in rows])

    def _go_to(self, position: int) -> None:
        """Drop what lies behind `position` in the cache, or fill it up to there."""
        if self._length > position:
            for sequence in range(self._sequences):
                self._api.llama_memory_seq_rm(self._memory, sequence, position, -1)
            self._length = position
        elif self._length < position:
            missing = position - self._length
            filler = np.random.default_rng(0).integers(0, self._vocab, (self._sequences, missing), np.int32)
            self.prefill(filler, self._length)

    def _decode(self, tokens: np.ndarray) -> None:
        sequences, n = tokens.shape
        batch = self._api.llama_batch_init(sequences * n, 0, 1)
        batch.n_tokens = sequences * n
        self._last = [sequence * n + n - 1 for sequence in range(sequences)]
        for i, token in enumerate(tokens.reshape(-1).tolist()):
            sequence, place = divmod(i, n)
            batch.token[i], batch.pos[i] = token, self._length + place
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
            batch.logits[i] = place == n - 1
        failed = self._api.llama_decode(self._context, batch)
        self._api.llama_synchronize(self._context)
        self._api.llama_batch_free(batch)
        if failed:
            raise RuntimeError(f"llama_decode returned {failed}")
        self._length += n

    def __del__(self) -> None:
        if getattr(self, "_context", None):
            self._api.llama_free(self._context)
        if getattr(self, "_model", None):
            self._api.llama_model_free(self._model)


def load(model: Model, weights: Weights, threads: int, folder: Path) -> Engine:
    """Write the weights as GGUF and open them; the file goes once llama.cpp has it."""
    path = _own_file(model)
    if path:
        return LlamaCpp(path, model, threads)
    with tempfile.TemporaryDirectory(prefix="gguf-", dir=folder) as scratch:
        path = Path(scratch) / "model.gguf"
        gguf_file.write(model, weights, path)
        return LlamaCpp(path, model, threads)


def facts() -> dict[str, object]:
    """Its version; the instruction sets, and what else it was compiled with, as it prints them."""
    from llama_cpp import __version__
    from llama_cpp import llama_cpp as api

    compiled = api.llama_print_system_info().decode(errors="replace").strip()
    return {"llama_cpp": {"llama_cpp_python": __version__, "system_info": compiled}}


PEERS = (
    Peer(
        name=EngineName.LLAMA_CPP,
        summary="llama.cpp on the CPU, the same weights in a type of GGUF, or the model's own file",
        packages=("llama_cpp", "gguf"),
        refuses=refuses,
        load=load,
        facts=facts,
    ),
)
