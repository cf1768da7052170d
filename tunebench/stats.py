"""Statistics over raw samples: robust summaries, speed-ups with intervals, decisions, stability warnings.

Samples are times in nanoseconds; every function accepts any number of them, none included. Two arms of one run were
measured in turn, so their n-th samples share what the machine was like at that moment: they are compared pair by pair,
by the trimmed mean of the logarithms of their ratios (Yuen 1974, for pairs; Welch's form where there are none).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import exp, inf, isfinite, log, nan, sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.special import stdtr, stdtrit

from tunebench.spec import Decision, Kernel

CONFIDENCE = 0.99  # of an interval that decides
FLOOR_CONFIDENCE = 0.8  # of the one whose end is the noise floor
TRIM = 0.2  # of the pairs at either end, which are outliers or straddle a change of the machine's speed
FEWEST = 5  # the range of fewer samples holds the median in less than nine of ten cases
ENOUGH = 10
BLOCK = 32  # tokens of a text in a row that are taken together
LARGE_SPREAD = 0.05  # half the interquartile range, over the median
DRIFT = 0.03
SLOW_START = 1.15
OUTLIER = 1.5
NO_SPACE = ("no space is for it", "no schedule space", "its space has no candidate")  # how reasons of old rows begin
NOT_SEARCHED = ("not searched before", "never measured", "its default schedule failed")


@dataclass(frozen=True)
class Interval:
    """A speed-up and its 99 % interval; `low` is 0 and `high` infinite where there are too few samples."""

    ratio: float
    low: float
    high: float
    p: float = 1.0  # the chance of a ratio so far from 1, either way, between two arms of the same program

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


def ratio_interval(
    reference: Sequence[float], candidate: Sequence[float], interleaved: bool = True, confidence: float = CONFIDENCE
) -> Interval:
    """The speed-up of `candidate` over `reference` (times, reference / candidate), with its interval.

    `interleaved`: the n-th samples of both were taken in the same round. An arm that stopped early has fewer, and the
    other's samples beyond are left out. With too few for an interval the ratio is of medians.
    """
    if not len(reference) or not len(candidate) or min(*reference, *candidate) <= 0:
        return Interval(nan, 0.0, inf)
    if _too_few(reference, candidate):
        return Interval(median(reference) / median(candidate), 0.0, inf)
    arms = [np.log(np.asarray(arm, dtype=np.float64)) for arm in (reference, candidate)]
    if interleaved:
        pairs = min(map(len, arms))
        parts = [_trimmed(arms[0][:pairs] - arms[1][:pairs])]
        centre = parts[0][0]
    else:
        parts = [_trimmed(arm) for arm in arms]
        centre = parts[0][0] - parts[1][0]
    return _student(centre, parts, confidence)


def mean_interval(values: NDArray[np.float64], block: int = BLOCK) -> list[float]:
    """Low and high end of the 99 % interval of a mean of values in order, which depend on those near them.

    Neighbours are taken together in blocks, whose means have Student's distribution; empty for fewer than `FEWEST`.
    """
    count = len(values) // block
    if count < FEWEST:
        return []
    means = [float(part.mean()) for part in np.array_split(values, count)]
    reach = float(stdtrit(count - 1, 0.5 + CONFIDENCE / 2)) * float(np.std(means, ddof=1)) / sqrt(count)
    return [float(values.mean()) - reach, float(values.mean()) + reach]


def effect(interval: Interval, noise: float | None) -> int:
    """1 where the candidate is faster beyond doubt and beyond the `noise` floor, -1 where it is slower, else 0."""
    return effects([interval], [noise])[0]


def effects(intervals: Sequence[Interval], noises: Sequence[float | None]) -> list[int]:
    """The `effect` of each of many comparisons that are looked at together.

    Each p-value is held against how many there are (Holm 1979): not one in a hundred such lists has a false effect.
    """
    known = [place for place, interval in enumerate(intervals) if interval.known]
    called = [0] * len(intervals)
    for rank, place in enumerate(sorted(known, key=lambda place: intervals[place].p)):
        interval, noise = intervals[place], noises[place] or 0.0
        if interval.p * (len(known) - rank) >= 1 - CONFIDENCE:
            break
        called[place] = (interval.ratio > 1 + noise) - (interval.ratio < 1 / (1 + noise))
    return called


def decide(default_ns: Sequence[float], tuned_ns: Sequence[float], noise: float = 0.0) -> Decided:
    """Whether the tuned kernel replaces the default one.

    It does only if the interval excludes 1 and the gain is above the `noise` floor (a ratio - 1, such as 0.02).
    The default is kept where a gain above the noise is ruled out; anything else is inconclusive.
    """
    interval = ratio_interval(default_ns, tuned_ns)
    if not interval.known:
        fewest = min(len(default_ns), len(tuned_ns))
        return Decided("inconclusive", f"too few samples ({fewest}, at least {FEWEST} are needed)", interval)
    bounds = f"{interval.ratio:.3f}x, 99 % interval {interval.low:.3f} to {interval.high:.3f}"
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
    """The effect, as a ratio - 1, that two arms of the same program showed: the far end of its 80 % interval.

    None where there are too few samples to tell.
    """
    interval = ratio_interval(aa_first, aa_second, confidence=FLOOR_CONFIDENCE)
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


def _trimmed(values: NDArray[np.float64]) -> tuple[float, float, int]:
    """Trimmed mean, its squared standard error (of the winsorized values), and how many values are left."""
    ordered = np.sort(values)
    count, cut = len(ordered), int(TRIM * len(ordered))
    left = count - 2 * cut
    winsorized = np.clip(ordered, ordered[cut], ordered[count - cut - 1])
    squared = float(winsorized.var(ddof=1)) * (count - 1) / (left * (left - 1))
    return float(ordered[cut : count - cut].mean()), squared, left


def _student(centre: float, parts: Sequence[tuple[float, float, int]], confidence: float) -> Interval:
    """Student's interval around a difference of logarithms, by Welch's degrees of freedom."""
    variance = sum(squared for _, squared, _ in parts)
    if not variance > 0:  # every pair says the same
        return Interval(exp(centre), exp(centre), exp(centre), float(centre == 0))
    freedom = variance**2 / sum(squared**2 / (left - 1) for _, squared, left in parts)
    error, reach = sqrt(variance), float(stdtrit(freedom, 0.5 + confidence / 2))
    p = 2 * float(stdtr(freedom, -abs(centre) / error))
    most = log(np.finfo(np.float64).max) / 2
    low, high = (exp(min(most, max(-most, centre + sign * reach * error))) for sign in (-1, 1))
    return Interval(exp(centre), low, high, p)


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
    change = (
        ratio_interval(samples[-half:], samples[:half], interleaved=False)
        if half >= FEWEST
        else Interval(1.0, 0.0, inf)
    )
    clear = change.low > 1 or change.high < 1
    if not clear or abs(change.ratio - 1) <= DRIFT:
        return ""
    where = "slower" if change.ratio > 1 else "faster"
    cure = "let the machine cool down or fix the clocks" if change.ratio > 1 else "warm up longer"
    return f"drift: the second half is {abs(change.ratio - 1):.1%} {where} than the first; {cure}"


def _upper(samples: Sequence[float]) -> float:
    return float(np.percentile(samples, 75))
