"""Whether today's normal images are what was learned: a test that may be looked at whenever one likes."""

import numpy as np
import pytest
from sklearn.base import clone

from vqad import HVQTransDetector
from vqad.calibration import drift_p_value
from vqad.datasets import make_textured_parts

RNG = np.random.default_rng


DRAWS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "cauchy": lambda rng, n: rng.standard_cauchy(n),
    "four values": lambda rng, n: rng.integers(0, 4, n) + 0.0,
}


@pytest.mark.parametrize("draw", DRAWS.values(), ids=DRAWS)
@pytest.mark.parametrize(("n_held", "n_new"), [(12, 500), (100, 500), (100, 30)])
def test_where_nothing_changed_an_alarm_is_as_rare_as_asked(draw, n_held, n_new):
    p = np.array([drift_p_value(draw(RNG(k), n_held), draw(RNG(9999 - k), n_new), k) for k in range(200)])
    for alpha in (0.05, 0.2):
        assert (p <= alpha).mean() <= alpha + 3 * np.sqrt(alpha * (1 - alpha) / 200)
    assert (p > 0).all()
    assert (p <= 1).all()


@pytest.mark.parametrize(("n_held", "sure"), [(20, 0.05), (50, 0.001), (200, 0.001)])
def test_a_shift_is_found_in_sixty_images(n_held, sure):
    p = [drift_p_value(RNG(k).standard_normal(n_held), RNG(k + 99).standard_normal(60) + 3, k) for k in range(20)]
    assert max(p) < sure


def test_a_few_defects_among_many_images_are_no_drift():
    score = RNG(0).standard_normal(500)
    score[::50] = 30.0
    assert drift_p_value(RNG(1).standard_normal(100), score) > 0.05


def test_lower_scores_are_no_alarm_and_without_images_there_is_none():
    assert drift_p_value(RNG(1).standard_normal(100), RNG(0).standard_normal(200) - 5) > 0.5
    assert drift_p_value(RNG(1).standard_normal(100), np.empty(0)) == 1.0


@pytest.mark.slow
def test_another_lamp_is_noticed():
    seen, later = (
        make_textured_parts(n_normal=n, n_anomalous=0, categories=["disc"], image_size=64, random_state=s).images
        for n, s in ((60, 0), (60, 1))
    )
    detector = HVQTransDetector(image_size=64, d_model=16, n_codes=8, max_iter=1, false_alarm_rate=0.1, random_state=0)
    made = clone(detector).fit(seen, category=["disc"] * 60)
    darker = (255 * (later / 255.0) ** 2.2).astype(np.uint8)
    assert made.drift(darker) < 0.001
    assert made.drift(later) > 0.01
