"""Whether a fused kernel is used: it must compute what the kernels it replaces do, and be faster than they are.

Both run on the device as launches one after the other, over input sets that are larger than its caches, with the
protocol of every decision.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence

import numpy as np

from tunebench import stats
from tunebench.compile.fusion import Pair
from tunebench.runners.base import FINAL
from tunebench.runners.bench import MOST_SETS, distance, random_arrays, too_far
from tunebench.runners.shader import Array, LoadedProgram
from tunebench.runtime.apis import ApiDevice, Call
from tunebench.runtime.plan import Program
from tunebench.timing import interleave

Arrays = Mapping[int, Array]
"""By place."""
Invocation = tuple[Program, tuple[int, ...]]


class FusionJudge:
    """Decides on fused kernels of one device, on each once; `decided` has a line for each, by name."""

    def __init__(self, device: ApiDevice, cold_bytes: int) -> None:
        self._device, self._cold_bytes = device, cold_bytes
        self._known: dict[str, str] = {}  # by a digest of the programs
        self.decided: dict[str, str] = {}

    def __call__(self, pair: Pair) -> bool:
        """Whether to use it."""
        key = hashlib.sha1(repr((pair.apart, pair.fused[0])).encode()).hexdigest()
        if key not in self._known:
            self._known[key] = self._judged(pair)
        self.decided[pair.name] = self._known[key]
        return self._known[key].startswith("promoted")

    def _judged(self, pair: Pair) -> str:
        """The decision and its reason."""
        out = pair.fused[1][-1]
        arrays = dict(
            zip(pair.params, random_arrays(list(pair.params.values()), 0, np.random.default_rng(0)), strict=True)
        )
        arrays[out] = np.full(arrays[out].nbytes, 0xFF, np.uint8).view(arrays[out].dtype)  # NaN in every float type
        count = math.ceil(self._cold_bytes / sum(array.nbytes for array in arrays.values()))
        sets = [self._set(arrays) for _ in range(max(1, min(MOST_SETS, count)))]
        apart, fused = self._calls(pair.apart, sets), self._calls([pair.fused], sets)
        expected = self._output(apart, sets[-1][out])
        self._device.write(sets[-1][out].buffer, arrays[out])
        wrong = too_far(*distance(self._output(fused, sets[-1][out]), expected), "float16")
        return f"kept default: {wrong}" if wrong else self._timed(apart, fused, len(sets))

    def _timed(self, apart: Sequence[Call], fused: Sequence[Call], sets: int) -> str:
        once = self._device.record(apart)
        once.run()
        rounds = max(1, round(FINAL.sample_s * 1e9 / max(1, once.elapsed_ns())))
        arms = {"apart": apart, "fused": fused, "again": fused}
        recorded = {name: self._device.record(calls, rounds) for name, calls in arms.items()}
        for each in recorded.values():
            each.run()
        samplers = {name: each.elapsed_ns for name, each in recorded.items()}
        calls = rounds * sets
        taken = interleave(samplers, FINAL, take=lambda sample, _: round(sample() / calls), calls=lambda *_: calls)
        apart_ns, fused_ns, again_ns = (taken[name].samples_ns for name in arms)
        decided = stats.decide(apart_ns, fused_ns, stats.noise_floor(fused_ns, again_ns) or 0.0)
        return f"{decided.decision}: {decided.reason}"

    def _set(self, arrays: Mapping[int, np.ndarray]) -> Arrays:
        made = {}
        for place, array in arrays.items():
            made[place] = Array(self._device.allocate(array.nbytes), array.nbytes, array.dtype)
            self._device.write(made[place].buffer, array)
        return made

    def _calls(self, invocations: Sequence[Invocation], sets: Sequence[Arrays]) -> list[Call]:
        """The launches over every set."""
        loaded = [(LoadedProgram(self._device, program), places) for program, places in invocations]
        return [
            call for each in sets for program, places in loaded for call in program.calls([each[p] for p in places])
        ]

    def _output(self, calls: Sequence[Call], out: Array) -> np.ndarray:
        self._device.record(calls).run()
        return self._device.read(out.buffer, out.size_bytes).view(out.dtype)
