"""Thresholds and p-values against brute force, and what they promise by simulation."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from vqad.calibration import ConformalCalibration, conformal_quantile

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30)


# ---- conformal quantiles and p-values ------------------------------------------------------------


@given(SCORES, st.integers(1, 19))
def test_threshold_is_the_lowest_that_keeps_the_rate(scores, twentieths):
    """A score just over the threshold has a p-value of at most the rate; so has none just over a lower threshold."""
    rate, n = Fraction(twentieths, 20), len(scores)
    p_over = {t: Fraction(1 + sum(s > t for s in scores), n + 1) for t in scores}
    allowed = [t for t, p in p_over.items() if p <= rate]
    if allowed:
        assert conformal_quantile(np.sort(scores), float(rate)) == min(allowed)
    else:
        with pytest.warns(UserWarning, match="too few"):
            assert conformal_quantile(np.sort(scores), float(rate)) == max(scores)


@given(SCORES, SCORES)
def test_p_values_count_scores_at_least_as_high(known, new):
    calibration = ConformalCalibration().fit(np.array(known), np.zeros(len(known), int), 1)
    expected = [(1 + sum(k >= s for k in known)) / (len(known) + 1) for s in new]
    np.testing.assert_allclose(calibration.p_values(np.array(new), np.zeros(len(new), int)), expected, rtol=1e-15)


def test_p_values_of_each_category_count_its_own_scores():
    score, category = np.array([0.0, 1, 2, 10, 11, 12]), np.array([0, 0, 0, 1, 1, 1])
    calibration = ConformalCalibration(per_category=True).fit(score, category, 2)
    np.testing.assert_allclose(calibration.p_values(np.array([5.0, 5.0]), np.array([0, 1])), [1 / 4, 1])
    np.testing.assert_array_equal(calibration.thresholds(0.5), [1, 11])
    pooled = ConformalCalibration().fit(score, category, 2)
    np.testing.assert_allclose(pooled.p_values(np.array([5.0, 5.0]), np.array([0, 1])), [4 / 7, 4 / 7])
    np.testing.assert_array_equal(pooled.thresholds(0.5), [10])


@pytest.mark.parametrize(("n", "rate"), [(19, 0.1), (19, 0.05), (50, 0.2)])
def test_p_values_are_valid(n, rate):
    """Of normal images a share of floor(rate (n + 1)) / (n + 1) has a p-value up to the rate, whatever their law."""
    rng, n_trials = np.random.default_rng(0), 5000
    draws = rng.standard_exponential((n_trials, n + 1))
    false = 0
    for known, new in zip(draws[:, :n], draws[:, n:]):
        calibration = ConformalCalibration().fit(known, np.zeros(n, int), 1)
        false += int(calibration.p_values(new, np.zeros(1, int))[0] <= rate)
    share = np.floor(rate * (n + 1) + 1e-9) / (n + 1)
    low, high = stats.binom.interval(1 - 1e-6, n_trials, share)
    assert low <= false <= high


def test_threshold_and_p_value_agree():
    rng = np.random.default_rng(0)
    known, new = rng.standard_normal(30), rng.standard_normal(200)
    calibration = ConformalCalibration().fit(known, np.zeros(30, int), 1)
    p = calibration.p_values(new, np.zeros(200, int))
    for rate in (0.05, 0.1, 0.31, 0.9):
        np.testing.assert_array_equal(new > calibration.thresholds(rate)[0], p <= rate)


def test_too_few_scores_warn_with_the_smallest_rate_and_the_category():
    known = ConformalCalibration(per_category=True).fit(np.arange(13.0), np.r_[np.zeros(4, int), np.ones(9, int)], 2)
    with pytest.warns(UserWarning, match="^4 held-out .* of category screw .* support, 0.2, is used") as record:
        np.testing.assert_array_equal(known.thresholds(0.1, ["screw", "nut"]), [3, 12])
    assert len(record) == 1
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known.thresholds(0.2)


def test_no_scores_raise():
    with pytest.raises(ValueError, match="There are no calibration images: raise calibration_fraction"):
        conformal_quantile(np.array([]), 0.1)
