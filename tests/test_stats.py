"""Statistics: any number of samples, known answers, and decisions that can be wrong in neither direction."""

import math
import random
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tunebench import stats
from tunebench.spec import Decision, Kernel

SAMPLES = st.lists(st.integers(1, 10**12), max_size=30)


def around(centre: float, spread: float, count: int, seed: int) -> list[float]:
    generator = random.Random(seed)
    return [centre * math.exp(generator.gauss(0, spread)) for _ in range(count)]


@given(SAMPLES, SAMPLES, st.floats(0, 0.5))
def test_any_samples_are_decided_by_their_interval(first: list[int], second: list[int], noise: float) -> None:
    decided = stats.decide(first, second, noise)
    interval = decided.interval
    won = interval.known and interval.low > 1 and interval.ratio > 1 + noise
    assert (decided.decision == "promoted") == won
    assert decided.decision == "kept default" or interval.high > 1 or not interval.known
    assert decided.reason
    assert all(": " in warning for warning in stats.warnings(first, second))
    floor = stats.noise_floor(first, second)
    assert floor is None or floor >= 0


@given(
    st.lists(st.integers(1, 10**9), min_size=5, max_size=30), st.lists(st.integers(1, 10**9), min_size=5, max_size=30)
)
def test_the_interval_holds_the_ratio_and_repeats(first: list[int], second: list[int]) -> None:
    interval = stats.ratio_interval(first, second)
    assert interval.low <= interval.ratio <= interval.high
    assert (interval.low > 1 or interval.high < 1) == (interval.p < 0.01)
    assert interval == stats.ratio_interval(first, second)


@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_too_few_samples_are_said(count: int) -> None:
    few, many = around(1e6, 0.01, count, 1), around(5e5, 0.01, 20, 2)
    for first, second in ((few, many), (many, few)):
        decided = stats.decide(first, second)
        assert decided.decision == "inconclusive"
        assert "too few samples" in decided.reason
        assert not decided.interval.known
        assert stats.noise_floor(first, second) is None
    assert "too few samples" in stats.warnings(few, [1])[0]


def test_median_and_spread() -> None:
    assert stats.median([3, 1, 2]) == 2
    assert math.isnan(stats.median([]))
    assert stats.spread([0, 1, 2, 3, 4]) == 1
    assert math.isnan(stats.spread([1]))


def test_the_interval_narrows_with_samples_and_holds_the_truth() -> None:
    few = stats.ratio_interval(around(2e6, 0.05, 8, 1), around(1e6, 0.05, 8, 2))
    many = stats.ratio_interval(around(2e6, 0.05, 200, 1), around(1e6, 0.05, 200, 2))
    assert many.high - many.low < few.high - few.low
    assert many.low < 2 < many.high


def test_pairs_are_compared_and_not_the_arms_as_they_lie() -> None:
    slow_then_fast = [(2e6 if moment < 12 else 1e6) * (1 + 0.001 * (moment % 3)) for moment in range(20)]
    tuned = [moment / 1.05 for moment in slow_then_fast]
    paired = stats.ratio_interval(slow_then_fast, tuned)
    apart = stats.ratio_interval(slow_then_fast, tuned, interleaved=False)
    assert paired.ratio == pytest.approx(1.05)
    assert paired.low > 1.04
    assert apart.low < 1 < apart.high
    assert stats.ratio_interval(slow_then_fast, tuned[:7]).low > 1.04  # an arm that stopped early


def test_one_wild_pair_of_ten_changes_little() -> None:
    default, tuned = around(1e6, 0.01, 10, 1), around(0.9e6, 0.01, 10, 2)
    wild = [*tuned[:-1], 5e6]
    assert stats.ratio_interval(default, wild).ratio == pytest.approx(1 / 0.9, rel=0.02)
    assert stats.ratio_interval(default, wild).low > 1


def test_the_interval_is_yuens() -> None:
    """Of ten pairs the middle six, their winsorized deviation, and Student's 4.032 for five degrees of freedom."""
    logs = [-0.2, 0.01, 0.02, 0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.9]
    interval = stats.ratio_interval([math.exp(value) for value in logs], [1.0] * 10)
    winsorized = [0.02, 0.02, *logs[2:8], 0.07, 0.07]
    mean = sum(winsorized) / 10
    error = math.sqrt(sum((value - mean) ** 2 for value in winsorized) / (6 * 5))
    assert math.log(interval.ratio) == pytest.approx(0.045)
    assert math.log(interval.low) == pytest.approx(0.045 - 4.0321 * error, abs=1e-5)
    assert math.log(interval.high) == pytest.approx(0.045 + 4.0321 * error, abs=1e-5)


def test_arms_apart_are_compared_as_scipy_does() -> None:
    ttest = pytest.importorskip("scipy.stats").ttest_ind
    first, second = around(1.03e6, 0.02, 20, 1), around(1e6, 0.03, 15, 2)
    theirs = ttest([math.log(v) for v in first], [math.log(v) for v in second], equal_var=False, trim=0.2)
    assert stats.ratio_interval(first, second, interleaved=False).p == pytest.approx(theirs.pvalue, rel=1e-6)


def test_many_comparisons_are_held_to_more() -> None:
    small = stats.Interval(1.05, 1.01, 1.09, p=0.004)
    large = stats.Interval(0.5, 0.45, 0.55, p=1e-9)
    unknown = stats.Interval(2.0, 0.0, math.inf)
    assert stats.effect(small, 0.02) == 1
    assert stats.effect(small, 0.06) == 0
    assert stats.effects([small, large, unknown], [0.02, 0.02, None]) == [1, -1, 0]
    assert stats.effects([small, large, small, small], [None] * 4) == [0, -1, 0, 0]


@pytest.mark.parametrize(
    ("gain", "spread", "noise", "decision", "words"),
    [
        (1.30, 0.01, 0.02, "promoted", "above the noise floor of 2.0%"),
        (0.90, 0.01, 0.02, "kept default", "slower"),
        (1.00, 0.002, 0.05, "kept default", "no gain above"),
        (1.03, 0.03, 0.0275, "inconclusive", "interval"),
        (1.04, 0.005, 0.042, "inconclusive", "within the noise floor"),
    ],
)
def test_decisions(gain: float, spread: float, noise: float, decision: str, words: str) -> None:
    default = around(1e6, spread, 20, 5)
    tuned = [value / gain for value in around(1e6, spread, 20, 6)]
    if words.startswith("within"):
        default, tuned = [1.04e6] * 9 + [1.05e6] * 9, [1e6] * 18
        noise = 0.047
    decided = stats.decide(default, tuned, noise)
    assert decided.decision == decision, decided.reason
    assert words in decided.reason


def test_a_gain_below_the_noise_floor_is_not_promoted() -> None:
    default, tuned = [1.03e6 + step for step in range(20)], [1e6 + step for step in range(20)]
    assert stats.decide(default, tuned, 0.02).decision == "promoted"
    assert stats.decide(default, tuned, 0.04).decision == "kept default"


def test_zero_times_give_no_interval() -> None:
    assert math.isnan(stats.ratio_interval([0] * 10, [1] * 10).ratio)
    assert stats.decide([0] * 10, [0] * 10).decision == "inconclusive"


def test_the_noise_floor_is_symmetric_and_covers_a_bias() -> None:
    first, second = around(1e6, 0.005, 30, 1), around(1.05e6, 0.005, 30, 2)
    floor = stats.noise_floor(first, second)
    other = stats.noise_floor(second, first)
    assert floor is not None
    assert other is not None
    assert 0.045 < floor < 0.07
    assert other == pytest.approx(floor, rel=0.1)


def kernel(decision: str, gain: float) -> Kernel:
    default, tuned = around(1e6, 0.002, 12, 1), around(1e6 / gain, 0.002, 12, 2)
    schedule = "tuned" if decision == "promoted" else "default"
    samples = [[round(value) for value in values] for values in (default, tuned)]
    return Kernel("t", "decode", 1, 1, 0.5, schedule, "why", decision, *samples)


@pytest.mark.parametrize("decision", get_args(Decision))
def test_a_stored_kernel_keeps_the_decision_of_the_tuner(decision: str) -> None:
    decided = stats.kernel_decision(kernel(decision, 1.5))
    assert (decided.decision, decided.reason) == (decision, "why")
    assert decided.interval.ratio == pytest.approx(1.5, rel=0.01)


@pytest.mark.parametrize(
    ("decision", "reason", "expected"),
    [
        ("kept default", "not searched before the time ran out", "not searched"),
        ("kept default", "never measured: run `tunebench tune`", "not searched"),
        ("", "never measured: run `tunebench tune`", "not searched"),
        ("", "not judged yet: the run was stopped", "not searched"),
        ("kept default", "no space is for it", "nothing to decide"),
        ("kept default", "no schedule space: an error", "nothing to decide"),
        ("kept default", "no candidate ran and was correct", "kept default"),
    ],
)
def test_decisions_that_had_one_name_are_told_apart_by_their_reason(decision: str, reason: str, expected: str) -> None:
    decided = stats.kernel_decision(Kernel("t", "decode", 1, 1, 0.5, "default", reason, decision))
    assert (decided.decision, decided.reason) == (expected, reason)
    assert not decided.interval.known


def test_a_kernel_that_was_timed_and_not_judged_is_inconclusive() -> None:
    assert stats.kernel_decision(kernel("", 1.5)).decision == "inconclusive"


STEADY = [1000 + step % 3 for step in range(20)]


@pytest.mark.parametrize(
    ("samples", "warmup", "word"),
    [
        (STEADY[:7], [1000], "too few samples"),
        (STEADY, [], "no warm-up"),
        ([800, 1200] * 10, [1000], "large spread"),
        ([1500, *STEADY], [1000], "slow start"),
        ([*STEADY, 2000, *STEADY], [1000], "outlier"),
        ([1000 + 10 * step for step in range(20)], [1000], "slower than the first"),
        ([1200 - 10 * step for step in range(20)], [1000], "faster than the first"),
    ],
)
def test_each_warning_is_given_for_its_cause(samples: list[int], warmup: list[int], word: str) -> None:
    assert any(word in warning for warning in stats.warnings(samples, warmup))
    assert stats.warnings(STEADY, [1000]) == []
