"""Images that are called known and look like nothing that was learned of their category."""

import copy
import warnings

import numpy as np
import pytest

from vqad import HVQTransDetector

CENTER = 8 * np.random.default_rng(9).standard_normal((3, 8))


def rows(kind, n, seed, shift=0.0):
    return CENTER["abc".index(kind)] + np.random.default_rng(seed).standard_normal((n, 8)) + shift


@pytest.fixture(scope="module")
def fitted():
    X = np.vstack([rows(kind, 60, k) for k, kind in enumerate("ab")])
    detector = HVQTransDetector(
        backbone=None, d_model=8, n_heads=2, n_layers=1, dim_feedforward=8, n_codes=8, max_iter=1, false_alarm_rate=0.1,
        random_state=0,
    )  # fmt: skip
    return detector.fit(X, category=np.repeat(["a", "b"], 60))


@pytest.mark.parametrize("n", [1, 5, 30])
def test_they_are_left_out_and_said(fitted, n):
    made = copy.deepcopy(fitted)
    with pytest.warns(UserWarning, match=rf"{n} images of category 'a' are left out: their median score, \d+\.\d"):
        made.partial_fit(rows("a", n, 5, shift=12.0), category=["a"] * n)
    X = np.vstack([rows("a", 20, 6), rows("b", 20, 7)])
    np.testing.assert_array_equal(made.decision_function(X), fitted.decision_function(X))


def test_others_of_the_same_call_are_learned(fitted):
    made = copy.deepcopy(fitted)
    X = np.vstack([rows("a", 10, 5, shift=12.0), rows("b", 10, 6), rows("c", 30, 7)])
    with pytest.warns(UserWarning, match="10 images of category 'a' are left out"):
        made.partial_fit(X, category=np.repeat(["a", "b", "c"], [10, 10, 30]))
    assert list(made.categories_) == ["a", "b", "c"]
    assert made.n_images_ == 120 + 40
    assert (made.predict(rows("c", 30, 8)) == 1).mean() > 0.5


def test_some_odd_images_among_many_and_a_small_shift_are_learned(fitted):
    made = copy.deepcopy(fitted)
    X = np.vstack([rows("a", 16, 5), rows("a", 4, 6, shift=12.0)])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made.partial_fit(X, category=["a"] * 20)
        made.partial_fit(rows("a", 20, 7, shift=1.0), category=["a"] * 20)
    assert made.n_images_ == 160
