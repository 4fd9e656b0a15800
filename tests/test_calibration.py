"""Scales, thresholds and p-values against brute force, and what they promise by simulation."""

import warnings
from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import stats

from vqad.calibration import ConformalCalibration, MapCalibration, ScoreCalibration, conformal_quantile, pool_map

SCORES = st.lists(st.integers(-5, 5).map(float), min_size=1, max_size=30)


def robust_deviation(values):
    """Of a normal distribution it is the standard deviation."""
    return np.median(np.abs(values - np.median(values))) / stats.norm.ppf(0.75)


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
    with pytest.warns(UserWarning, match="^4 held-out .* of category screw are too few .* is 0.2,") as record:
        np.testing.assert_array_equal(known.thresholds(0.1, ["screw", "nut"]), [3, 12])
    assert len(record) == 1
    assert record[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        known.thresholds(0.2)


def test_no_scores_raise():
    with pytest.raises(ValueError, match="No calibration images: raise calibration_fraction"):
        conformal_quantile(np.array([]), 0.1)


# ---- maps ----------------------------------------------------------------------------------------


def make_terms(rng, category, shape=(6, 7)):
    """Two terms whose level and spread depend on the category, and on the place: the first row is always high."""
    place = np.zeros(shape)
    place[0] = 20
    level, spread = np.array([3.0, 80.0, -5.0])[category], np.array([1.0, 9.0, 0.2])[category]
    noise = rng.standard_normal((2, len(category), *shape))
    return {
        "first": (level[:, None, None] + spread[:, None, None] * (noise[0] + place)).astype(np.float32),
        "second": (1e4 * spread[:, None, None] * np.exp(0.3 * noise[1])).astype(np.float32),
    }


@pytest.fixture(scope="module")
def calibrated():
    rng = np.random.default_rng(0)
    reference, held_out = np.arange(360) % 3, np.arange(180) % 3
    terms, held = make_terms(rng, reference), make_terms(rng, held_out)
    return MapCalibration().fit(terms, reference, held, held_out, 3), rng


@pytest.mark.parametrize("term", ["first", "second"])
def test_new_maps_of_every_category_have_median_0_and_robust_deviation_1(term):
    rng = np.random.default_rng(1)
    reference, held_out, new = (np.arange(n) % 3 for n in (360, 180, 600))
    calibration = MapCalibration({term: 1.0}).fit(
        make_terms(rng, reference), reference, make_terms(rng, held_out), held_out, 3
    )
    maps = calibration.combine(make_terms(rng, new), new)
    assert maps.dtype == np.float32
    for c in range(3):
        cells = maps[new == c].ravel()
        assert abs(np.median(cells)) < 0.05
        assert abs(robust_deviation(cells) - 1) < 0.1


def test_places_that_are_always_high_are_not_high_on_the_map(calibrated):
    calibration, rng = calibrated
    category = np.zeros(300, int)
    terms = make_terms(rng, category)
    gap = terms["first"][:, 0].mean() - terms["first"][:, 3:].mean()
    maps = calibration.combine(terms, category)
    assert gap > 15  # standard deviations of that term
    assert abs(maps[:, 0].mean() - maps[:, 3:].mean()) < 3


def test_weights_add_the_terms_up():
    rng, category = np.random.default_rng(2), np.arange(60) % 3
    terms, held = make_terms(rng, category), make_terms(rng, category)

    def combined(weights):
        return MapCalibration(weights).fit(terms, category, held, category, 3).combine(held, category)

    one, other = combined({"first": 1.0}), combined({"second": 1.0})
    np.testing.assert_allclose(combined({"first": 3.0, "second": 1.0}), 0.75 * one + 0.25 * other, atol=1e-5)
    np.testing.assert_allclose(combined(None), (one + other) / 2, atol=1e-5)


def test_maps_do_not_depend_on_company(calibrated):
    calibration, rng = calibrated
    category = np.arange(12) % 3
    terms = make_terms(rng, category)
    maps = calibration.combine(terms, category)
    for i in range(12):
        alone = calibration.combine({name: term[[i]] for name, term in terms.items()}, category[[i]])
        np.testing.assert_array_equal(alone[0], maps[i])


def test_few_images_say_little_about_places():
    """The mean at a place moves from the mean over all places to its own as n / (n + 20)."""
    term = np.zeros((1, 5, 400))
    term[:, :, 200:] = 1  # far from the edge the blur does not reach
    for n in (1, 20, 180):
        terms, category = {"t": np.repeat(term, n, axis=0).astype(np.float32)}, np.zeros(n, int)
        calibration = MapCalibration().fit(terms, category, terms, category, 1)
        own = n / (n + 20)
        np.testing.assert_allclose(calibration.mean_[0, 0, 2, [20, 380]], [(1 - own) / 2, (1 + own) / 2], atol=1e-6)


def test_the_spread_of_a_place_never_vanishes():
    rng = np.random.default_rng(0)
    term = rng.standard_normal((50, 4, 40)).astype(np.float32)
    term[:, :, :20] = 0  # normal images agree to the last bit
    category = np.zeros(50, int)
    calibration = MapCalibration().fit({"t": term}, category, {"t": term}, category, 1)
    overall = term.std()
    assert calibration.spread_.min() > 0.3 * overall
    assert calibration.spread_[0, 0, :, 35:].mean() > calibration.spread_[0, 0, :, :5].mean()


def test_categories_without_images_give_finite_maps():
    rng, category = np.random.default_rng(0), np.arange(30) % 2
    terms = make_terms(rng, category)
    calibration = MapCalibration().fit(terms, category, terms, category, 3)
    assert np.isfinite(calibration.combine(terms, np.full(30, 2))).all()


def test_constant_terms_give_finite_maps():
    terms, category = {"t": np.full((8, 3, 3), 5, np.float32)}, np.zeros(8, int)
    calibration = MapCalibration().fit(terms, category, terms, category, 1)
    np.testing.assert_array_equal(calibration.combine(terms, category), 0)


def test_left_out_maps_are_those_of_a_calibration_without_the_image():
    rng = np.random.default_rng(3)
    reference, held_out = np.arange(60) % 3, np.array([0] * 5 + [1] * 101 + [2])
    terms, held = make_terms(rng, reference), make_terms(rng, held_out)
    calibration = MapCalibration().fit(terms, reference, held, held_out, 3)
    left_out = calibration.leave_one_out(held, held_out)
    combined = calibration.combine(held, held_out)
    for i in range(5):
        others = np.arange(107) != i
        without = {name: term[others] for name, term in held.items()}
        again = MapCalibration().fit(terms, reference, without, held_out[others], 3)
        one = {name: term[[i]] for name, term in held.items()}
        np.testing.assert_allclose(left_out[i], again.combine(one, held_out[[i]])[0], rtol=1e-4, atol=1e-5)
    assert np.abs(left_out[:5] - combined[:5]).max() > 1e-3
    np.testing.assert_array_equal(left_out[5:106], combined[5:106])  # one of many changes nothing
    assert np.isfinite(left_out[106]).all()


def test_few_feature_rows_set_no_scale_of_their_own():
    """Of two numbers the median and the deviation say nothing: the unit stays that of the places."""
    rng, category = np.random.default_rng(0), np.repeat([0, 1], [19, 20])
    terms = {"t": rng.standard_normal((39, 1, 1)).astype(np.float32)}
    calibration = MapCalibration().fit(terms, category, terms, category, 2)
    assert (calibration.center_[0, 0], calibration.scale_[0, 0]) == (0, 1)
    located = (terms["t"][19:, 0, 0] - calibration.mean_[1, 0, 0, 0]) / calibration.spread_[1, 0, 0, 0]
    np.testing.assert_allclose(calibration.center_[1, 0], np.median(located), atol=1e-6)
    np.testing.assert_allclose(calibration.scale_[1, 0], robust_deviation(located), rtol=1e-4)
    left_out = calibration.leave_one_out(terms, category)
    np.testing.assert_array_equal(left_out[:19], calibration.combine(terms, category)[:19])


def test_categories_of_one_row_share_a_scale_that_each_is_left_out_of():
    rng, category = np.random.default_rng(0), np.arange(30)
    terms = {"t": rng.standard_normal((30, 1, 1)).astype(np.float32)}
    calibration = MapCalibration().fit({"t": terms["t"][:0]}, category[:0], terms, category, 30)
    assert len(np.unique(calibration.scale_)) == 1
    left_out = calibration.leave_one_out(terms, category)
    for i in (0, 7, 29):
        others = np.delete(terms["t"].ravel(), i)
        expected = (terms["t"].ravel()[i] - np.median(others)) / robust_deviation(others)
        np.testing.assert_allclose(left_out[i, 0, 0], expected, rtol=1e-4)


def test_what_categories_of_one_image_share_is_worked_out_once(monkeypatch):
    rng, n = np.random.default_rng(0), 120
    terms, category, located = {"t": rng.standard_normal((n, 5, 5)).astype(np.float32)}, np.arange(n), []
    cells = MapCalibration._cells
    monkeypatch.setattr(MapCalibration, "_cells", lambda *args: located.append(1) or cells(*args))
    calibration = MapCalibration().fit(terms, category, terms, category, n)
    # One of more than 100 images makes no difference.
    np.testing.assert_array_equal(calibration.leave_one_out(terms, category), calibration.combine(terms, category))
    assert len(located) == 1


# ---- image scores --------------------------------------------------------------------------------


def test_scores_of_every_category_have_median_0_and_robust_deviation_1():
    rng, category = np.random.default_rng(0), np.arange(3000) % 3
    score = np.array([0.0, 50, -3])[category] + np.array([1.0, 3.0, 0.4])[category] * rng.standard_normal(3000)
    made = ScoreCalibration().fit(score, category, 3).transform(score, category)
    for c in range(3):
        assert abs(np.median(made[category == c])) < 1e-12
        assert abs(robust_deviation(made[category == c]) - 1) < 0.1


@pytest.mark.parametrize("n", [2, 5, 20, 100])
def test_spread_of_few_images_is_pulled_to_the_pooled_one(n):
    rng = np.random.default_rng(0)
    score, category = np.r_[rng.standard_normal(2000), 100 * rng.standard_normal(n)], np.r_[np.zeros(2000), np.ones(n)]
    category = category.astype(int)
    made = ScoreCalibration().fit(score, category, 2)
    residual = np.r_[score[:2000] - np.median(score[:2000]), score[2000:] - np.median(score[2000:])]
    own, pooled = robust_deviation(score[2000:]), robust_deviation(residual)
    np.testing.assert_allclose(made.scale_[1], (n * own + 20 * pooled) / (n + 20), rtol=1e-4)


def test_categories_without_scores_take_the_pooled_scale():
    score, category = np.random.default_rng(0).standard_normal(40), np.zeros(40, int)
    made = ScoreCalibration().fit(score, category, 2)
    np.testing.assert_allclose(made.transform(score, np.ones(40, int)), made.transform(score, category), rtol=0.5)


def test_left_out_scores_do_not_help_to_set_their_own_center():
    rng, category = np.random.default_rng(0), np.repeat([0, 1, 2], [4, 6, 1])
    score = rng.standard_normal(11) + 10 * category
    calibration = ScoreCalibration().fit(score, category, 3)
    unseen = score + 0.5
    made = calibration.leave_one_out(score, unseen, category)
    for i in range(10):
        own = score[(category == category[i]) & (np.arange(11) != i)]
        n, center = len(own), np.median(own)
        scale = (n * robust_deviation(own) + 20 * calibration.pooled_scale_) / (n + 20)
        assert made[i] == pytest.approx((unseen[i] - center) / scale, rel=1e-4)
    assert made[10] == pytest.approx((unseen[10] - np.median(score[:10])) / calibration.pooled_scale_)


def test_of_many_scores_one_is_not_left_out():
    rng, category = np.random.default_rng(0), np.repeat([0, 1], [101, 100])
    score = rng.standard_normal(201)
    calibration = ScoreCalibration().fit(score, category, 2)
    made, plain = calibration.leave_one_out(score, score, category), calibration.transform(score, category)
    np.testing.assert_array_equal(made[:101], plain[:101])
    assert (made[101:] != plain[101:]).any()
    np.testing.assert_allclose(made, plain, atol=0.1)


@pytest.mark.parametrize("unit", [0.01, 1.0])
@pytest.mark.parametrize("per_category", [1, 2, 3, 8])
def test_few_images_of_many_categories_raise_no_more_false_alarms_than_asked(per_category, unit):
    """Thresholds from scores that set their own category's scale would: 2 images a category raise them by half."""
    rng, rate, rates = np.random.default_rng(0), 0.2, []
    category = np.repeat(np.arange(6), per_category)
    for _ in range(150):
        level = 5 * rng.standard_normal(6)
        score, new = (unit * (level[category] + rng.standard_normal(len(category))) for _ in range(2))
        scale = ScoreCalibration().fit(score, category, 6)
        known = scale.leave_one_out(score, score, category)
        threshold = ConformalCalibration().fit(known, category, 6).thresholds(rate)[0]
        rates.append((scale.transform(new, category) > threshold).mean())
    assert np.mean(rates) < rate + 3 * np.std(rates) / np.sqrt(len(rates))


# ---- pooling -------------------------------------------------------------------------------------


@given(
    hnp.arrays(np.float32, st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 9)),
               elements=st.floats(-100, 100, width=32)),
    st.floats(0.001, 1),
)  # fmt: skip
def test_pooling_is_the_mean_of_the_highest_cells(maps, fraction):
    n_cells = maps[0].size
    k = min(n_cells, max(1, round(fraction * n_cells)))
    expected = [np.sort(m.astype(np.float64), axis=None)[::-1][:k].mean() for m in maps]
    np.testing.assert_allclose(pool_map(maps, fraction), expected, rtol=1e-12, atol=1e-12)


def test_pooling_does_not_depend_on_company():
    maps = np.random.default_rng(0).standard_normal((20, 14, 14)).astype(np.float32)
    together = pool_map(maps, 0.03)
    np.testing.assert_array_equal([pool_map(maps[[i]], 0.03)[0] for i in range(20)], together)
