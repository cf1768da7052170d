"""How often verdicts err: arms of a known effect on simulated machines, decided as a bench and a tuning run decide.

    python benchmarks/simulate_verdicts.py

Prints a Markdown table: of comparisons in which the candidate is truly so much faster, how many are called faster and
how many slower, in per cent; and of reports of 40 cases, 10 of them 10 % faster, how many call any of the other 30.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from tunebench import stats

EFFECTS = (0.0, 0.01, 0.03, 0.1)
COUNTS = (5, 10, 20)  # samples of an arm: a slow test, a short run, and what bench and tune take where time allows
ARMS = 4  # default, tuned, the tuned one's twin, and another
MACHINES = ("quiet", "drifting", "outliers", "two states", "all three", "heavy tails", "skewed")
QUIET = 0.01  # standard deviation of a sample's logarithm
DRIFT = 0.08  # from the first sample to the last, either way
OUTLIERS, OUTLIER = 0.05, 0.3  # how many samples, and by how much more on average
SLOW, SWITCH = 0.15, 0.1  # of the slow state, and the chance that a sample begins with a change

Samples = NDArray[np.float64]


def machine(kind: str, moments: int, rng: np.random.Generator) -> Samples:
    """Logarithms of what a machine does to a sample's time, moment by moment."""
    if kind == "heavy tails":
        return np.asarray(rng.standard_t(2, moments) * 2 * QUIET)
    if kind == "skewed":
        return rng.exponential(4 * QUIET, moments)
    noise = rng.normal(0, QUIET, moments)
    everything = kind == "all three"
    if kind == "drifting" or everything:
        noise += np.linspace(0, DRIFT, moments) * rng.choice([-1, 1])
    if kind == "outliers" or everything:
        noise += (rng.random(moments) < OUTLIERS) * rng.exponential(OUTLIER, moments)
    if kind == "two states" or everything:
        noise += SLOW * ((np.cumsum(rng.random(moments) < SWITCH) + rng.integers(2)) % 2)
    return noise


def measured(kind: str, effect: float, count: int, rng: np.random.Generator) -> tuple[Samples, Samples, Samples]:
    """Nanoseconds of the default, of a candidate faster by `effect`, and of its twin, interleaved as `timing` does."""
    noise = machine(kind, ARMS * count, rng).reshape(count, ARMS)
    rounds = np.take_along_axis(noise, rng.permuted(np.tile(np.arange(ARMS), (count, 1)), axis=1), axis=1)
    default, tuned, twin, _ = 1e6 * np.exp(rounds.T)
    return default, tuned / (1 + effect), twin / (1 + effect)


def verdicts(kind: str, effect: float, count: int, many: int, seed: int = 0) -> tuple[float, float]:
    """Of `many` comparisons, the shares called faster and slower."""
    rng = np.random.default_rng([seed, MACHINES.index(kind), count, round(1000 * effect)])
    called = np.array([_called(*measured(kind, effect, count, rng)) for _ in range(many)])
    return float(np.mean(called > 0)), float(np.mean(called < 0))


def _called(default: Samples, tuned: Samples, twin: Samples) -> int:
    """1 where the candidate is called faster, -1 where slower, 0 where no difference is called."""
    return stats.effect(stats.ratio_interval(default, tuned), stats.noise_floor(tuned, twin))


def reports(kind: str, count: int, many: int, seed: int = 0) -> tuple[float, float]:
    """Of `many` reports of 40 cases, the share that calls a difference where there is none, and of the others found."""
    rng = np.random.default_rng([seed, MACHINES.index(kind), count])
    true = [0.1] * 10 + [0.0] * 30
    wrong, found = [], []
    for _ in range(many):
        arms = [measured(kind, effect, count, rng) for effect in true]
        intervals = [stats.ratio_interval(default, tuned) for default, tuned, _ in arms]
        floors = [stats.noise_floor(tuned, twin) for _, tuned, twin in arms]
        called = stats.effects(intervals, floors)
        wrong.append(any(called[10:]))
        found += [each > 0 for each in called[:10]]
    return float(np.mean(wrong)), float(np.mean(found))


def rows(many: int) -> Iterator[Sequence[str]]:
    """The table, a machine and a number of samples a row."""
    for kind in MACHINES:
        for count in COUNTS:
            shares = [verdicts(kind, effect, count, many) for effect in EFFECTS]
            wrong, found = reports(kind, count, max(1, many // 10))
            cells = [f"{100 * faster:.1f} / {100 * slower:.1f}" for faster, slower in shares]
            yield kind, str(count), *cells, f"{100 * wrong:.1f}", f"{100 * found:.1f}"


def main() -> None:
    """Print the table."""
    columns = ["machine", "samples", *(f"{effect:.0%}" for effect in EFFECTS), "40 cases: any false", "10 % found"]
    for line in (columns, ["---"] * len(columns), *rows(4000)):
        print("| " + " | ".join(line) + " |", flush=True)


if __name__ == "__main__":
    main()
