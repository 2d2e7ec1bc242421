"""Intervals against independent references, and what must hold for any numbers."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats

from vitrail.studies.intervals import Estimate, difference, joined, over_seeds, share


def test_the_mean_of_seeds_is_students_t() -> None:
    values = [0.91, 0.94, 0.925]
    found = over_seeds(values)
    wanted = stats.ttest_1samp(values, 0.0).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.value == pytest.approx(np.mean(values))
    assert found.deviation == pytest.approx(np.std(values, ddof=1))
    assert found.seeds == 3


def test_one_run_is_wilsons_interval() -> None:
    # Newcombe 1998, "Two-sided confidence intervals for the single proportion", table I: 81 of 263.
    found = share(81 / 263, 263)
    assert (round(found.low, 4), round(found.high, 4)) == (0.2553, 0.3662)
    assert share(1.0, 100).high == pytest.approx(1.0)
    assert share(1.0, 100).low > 0.95


def test_a_difference_of_seeds_is_welchs() -> None:
    first, second = [0.97, 0.98, 0.975], [0.91, 0.95, 0.93, 0.90]
    found = difference(over_seeds(first), over_seeds(second))
    wanted = stats.ttest_ind(first, second, equal_var=False).confidence_interval(0.95)
    assert (found.low, found.high) == pytest.approx((wanted.low, wanted.high))
    assert found.seeds == 3


def test_a_difference_of_single_runs_is_newcombes() -> None:
    # Newcombe 1998, "Interval estimation for the difference between independent proportions", table II,
    # example (a), method 10: 56/70 - 48/80.
    found = difference(share(56 / 70, 70), share(48 / 80, 80))
    assert (round(found.low, 4), round(found.high, 4)) == (0.0524, 0.3339)
    assert found.seeds == 1


def test_a_difference_turned_round_is_the_same_turned_round() -> None:
    for first, second in (
        (share(0.9, 100), share(0.8, 50)),
        (over_seeds([0.9, 0.95]), over_seeds([0.7, 0.8, 0.75])),
        (over_seeds([0.9, 0.95]), share(0.8, 50)),
    ):
        forth, back = difference(first, second), difference(second, first)
        assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low))
        assert forth.low < forth.value < forth.high


def test_equal_seeds_have_no_width_and_one_is_left_as_it_is() -> None:
    same = over_seeds([0.5, 0.5])
    assert (same.low, same.high) == (0.5, 0.5)
    assert difference(same, same) == Estimate(value=0.0, low=0.0, high=0.0, seeds=2)
    alone = share(0.5, 10)
    assert joined([alone]) is alone
    assert joined([alone, share(0.7, 10)]).value == pytest.approx(0.6)
