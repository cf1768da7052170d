"""Verdicts on simulated machines, whose true effects are known: how often they err, and what they find."""

import pytest

from benchmarks.simulate_verdicts import MACHINES, reports, verdicts

MANY = 1500


@pytest.mark.parametrize("count", [5, 10, 20])
@pytest.mark.parametrize("kind", MACHINES)
def test_less_than_one_in_a_hundred_is_called_where_there_is_no_difference(kind: str, count: int) -> None:
    faster, slower = verdicts(kind, 0.0, count, MANY)
    assert faster + slower < 0.01


@pytest.mark.parametrize("kind", [kind for kind in MACHINES if kind != "all three"])
def test_ten_per_cent_are_found_with_twenty_samples(kind: str) -> None:
    faster, slower = verdicts(kind, 0.1, 20, 300)
    assert faster > 0.98
    assert slower == 0


@pytest.mark.parametrize("effect", [0.01, 0.03, 0.1])
def test_what_is_faster_is_never_called_slower(effect: float) -> None:
    assert max(verdicts(kind, effect, 10, 300)[1] for kind in MACHINES) <= 0.004


def test_a_report_of_many_cases_calls_none_falsely() -> None:
    shares = [reports(kind, 20, 40) for kind in MACHINES]
    wrong = sum(share for share, _ in shares) / len(shares)
    assert wrong <= 0.02  # of reports; 30 of the 40 comparisons of each could err
    assert min(found for _, found in shares) > 0.8
