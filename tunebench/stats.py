"""Statistics over raw samples: robust summaries, speed-ups with intervals, decisions, stability warnings.

Samples are times in nanoseconds; every function accepts any number of them, none included.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, nan

import numpy as np
from numpy.typing import NDArray

from tunebench.spec import Decision, Kernel

CONFIDENCE = 0.95
RESAMPLES = 4000
SEED = 20_240_601
FEWEST = 5  # the range of fewer samples holds the median in less than nine of ten cases
ENOUGH = 10
LARGE_SPREAD = 0.05  # half the interquartile range, over the median
DRIFT = 0.03
SLOW_START = 1.15
OUTLIER = 1.5
NO_SPACE = ("no space is for it", "no schedule space")  # how reasons of rows before schema 3 begin
NOT_SEARCHED = ("not searched before the time ran out", "never measured")


@dataclass(frozen=True)
class Interval:
    """A speed-up and its 95 % interval; `low` is 0 and `high` infinite where there are too few samples."""

    ratio: float
    low: float
    high: float

    @property
    def known(self) -> bool:
        """Whether there were enough samples for an interval."""
        return isfinite(self.high)


@dataclass(frozen=True)
class Decided:
    """What to do with a tuned kernel, and why."""

    decision: Decision
    reason: str
    interval: Interval


def median(values: Sequence[float]) -> float:
    """The median in the unit of `values`; NaN where there are none."""
    return float(np.median(values)) if len(values) else nan


def spread(values: Sequence[float]) -> float:
    """Half the interquartile range in the unit of `values`; NaN below two values."""
    if len(values) < 2:
        return nan
    low, high = np.percentile(values, (25, 75))
    return float(high - low) / 2


def ratio_interval(reference: Sequence[float], candidate: Sequence[float]) -> Interval:
    """The speed-up of `candidate` over `reference` (medians of times, reference / candidate), with its interval.

    A percentile bootstrap with a fixed seed, so the same samples always give the same interval.
    """
    if not len(reference) or not len(candidate) or min(*reference, *candidate) <= 0:
        return Interval(nan, 0.0, inf)
    ratio = median(reference) / median(candidate)
    if _too_few(reference, candidate):
        return Interval(ratio, 0.0, inf)
    generator = np.random.default_rng(SEED)
    ratios = _medians(reference, generator) / _medians(candidate, generator)
    tail = 50 * (1 - CONFIDENCE)
    low, high = np.percentile(ratios, (tail, 100 - tail))
    return Interval(ratio, min(float(low), ratio), max(float(high), ratio))


def decide(default_ns: Sequence[float], tuned_ns: Sequence[float], noise: float = 0.0) -> Decided:
    """Whether the tuned kernel replaces the default one.

    It does only if the interval excludes 1 and the gain is above the `noise` floor (a ratio - 1, such as 0.02).
    The default is kept where a gain above the noise is ruled out; anything else is inconclusive.
    """
    interval = ratio_interval(default_ns, tuned_ns)
    if not interval.known:
        fewest = min(len(default_ns), len(tuned_ns))
        return Decided("inconclusive", f"too few samples ({fewest}, at least {FEWEST} are needed)", interval)
    bounds = f"{interval.ratio:.3f}x, 95 % interval {interval.low:.3f} to {interval.high:.3f}"
    floor = f"the noise floor of {noise:.1%}"
    if interval.low > 1 and interval.ratio > 1 + noise:
        return Decided("promoted", f"faster: {bounds}, above {floor}", interval)
    if interval.high < 1:
        return Decided("kept default", f"slower: {bounds}", interval)
    if interval.high <= 1 + noise:
        return Decided("kept default", f"no gain above {floor}: {bounds}", interval)
    if interval.low > 1:
        return Decided("inconclusive", f"the gain is within {floor}: {bounds}", interval)
    return Decided("inconclusive", f"the interval includes 1: {bounds}", interval)


def kernel_decision(kernel: Kernel) -> Decided:
    """The decision on a stored kernel as the tuner took it, with the interval from its samples."""
    interval = ratio_interval(kernel.default_ns, kernel.tuned_ns)
    return Decided(_stored_decision(kernel), kernel.reason, interval)


def _stored_decision(kernel: Kernel) -> Decision:
    """The stored decision; those that had one name before schema 3 are told apart by their reason."""
    if kernel.decision not in ("", "kept default") or kernel.tuned_ns:
        return kernel.decision or "inconclusive"
    if kernel.reason.startswith(NO_SPACE):
        return "nothing to decide"
    return "not searched" if not kernel.decision or kernel.reason.startswith(NOT_SEARCHED) else "kept default"


def noise_floor(aa_first: Sequence[float], aa_second: Sequence[float]) -> float | None:
    """The largest effect, as a ratio - 1, that the interval of two arms of the same code still allows.

    None where there are too few samples to tell.
    """
    interval = ratio_interval(aa_first, aa_second)
    return max(interval.high, 1 / interval.low) - 1 if interval.known else None


def warnings(samples_ns: Sequence[float], warmup_ns: Sequence[float] = ()) -> list[str]:
    """What makes these samples hard to trust, each with what to do next."""
    if not len(samples_ns):
        return ["too few samples: there is none; measure at least 10"]
    found = [_few(samples_ns), _no_warmup(warmup_ns), _wide(samples_ns), _slow_start(samples_ns)]
    found += [_outlier(samples_ns), _drift(samples_ns)]
    return [warning for warning in found if warning]


def _too_few(*arms: Sequence[float]) -> bool:
    return min(len(arm) for arm in arms) < FEWEST


def _medians(values: Sequence[float], generator: np.random.Generator) -> NDArray[np.float64]:
    data = np.asarray(values, dtype=np.float64)
    picks = generator.integers(0, len(data), size=(RESAMPLES, len(data)))
    return np.asarray(np.median(data[picks], axis=1), dtype=np.float64)


def _few(samples: Sequence[float]) -> str:
    count = len(samples)
    return f"too few samples: {count}; measure at least {ENOUGH}" if count < ENOUGH else ""


def _no_warmup(warmup: Sequence[float]) -> str:
    return "" if len(warmup) else "no warm-up: the first samples may include set-up; warm up with the timed shape"


def _wide(samples: Sequence[float]) -> str:
    share = spread(samples) / median(samples) if len(samples) >= FEWEST else 0.0
    if share <= LARGE_SPREAD:
        return ""
    return f"large spread: ± {share:.1%} of the median; close other programs, fix the clocks, or take more samples"


def _slow_start(samples: Sequence[float]) -> str:
    if len(samples) < FEWEST or samples[0] <= SLOW_START * max(median(samples[1:]), _upper(samples[1:])):
        return ""
    return f"slow start: the first sample is {samples[0] / median(samples[1:]):.2f}x the rest; warm up longer"


def _outlier(samples: Sequence[float]) -> str:
    if len(samples) < FEWEST or max(samples[1:]) <= OUTLIER * median(samples):
        return ""
    times = max(samples[1:]) / median(samples)
    return f"outlier: the slowest sample is {times:.2f}x the median; see what else ran, and measure again"


def _drift(samples: Sequence[float]) -> str:
    half = len(samples) // 2
    change = ratio_interval(samples[-half:], samples[:half]) if half >= FEWEST else Interval(1.0, 0.0, inf)
    clear = change.low > 1 or change.high < 1
    if not clear or abs(change.ratio - 1) <= DRIFT:
        return ""
    where = "slower" if change.ratio > 1 else "faster"
    cure = "let the machine cool down or fix the clocks" if change.ratio > 1 else "warm up longer"
    return f"drift: the second half is {abs(change.ratio - 1):.1%} {where} than the first; {cure}"


def _upper(samples: Sequence[float]) -> float:
    return float(np.percentile(samples, 75))
