"""Which of two detectors is better, on the same images."""

import numpy as np
import pytest
from conftest import save_png
from sklearn.metrics import roc_auc_score

import vqad
from vqad import HVQTransDetector
from vqad.cli import main
from vqad.datasets import make_textured_parts
from vqad.metrics import compare


def drawn(seed, n=80, gain=0.0):
    """Labels, and scores of two detectors that find the same images hard; the second is better by ``gain``."""
    rng = np.random.default_rng(seed)
    y = np.repeat([1, -1], n)
    hard = rng.standard_normal(2 * n)
    a, b = (hard + 0.3 * rng.standard_normal(2 * n) + shift * (y == -1) for shift in (1.0, 1.0 + gain))
    return y, a, b


def test_numbers_are_those_of_each_detector_alone():
    y, a, b = drawn(0, gain=0.4)
    a = a.round(1)  # ties
    found = compare(y, a, b, false_alarm_rate=0.1, n_resamples=20, random_state=0)
    assert found.auroc == pytest.approx((roc_auc_score(y == -1, a), roc_auc_score(y == -1, b)))
    assert found.auroc_difference == pytest.approx(found.auroc[1] - found.auroc[0])
    for score, share in zip((a, b), found.found):
        # The best of all thresholds that at most 8 of 80 normal images are over.
        right = [(score[y == -1] > t).mean() for t in np.unique(score) if (score[y == 1] > t).sum() <= 8]
        assert share == max(right)
    assert (found.n_normal, found.n_anomalous) == (80, 80)


def test_intervals_hold_what_is_true_and_pairs_make_them_narrow():
    """Two equal detectors: 0 lies outside in about one of twenty sets of images."""
    outside, width, apart = np.zeros(2), 0.0, 0.0
    for seed in range(100):
        y, a, b = drawn(seed)
        found = compare(y, a, b, n_resamples=200, random_state=seed)
        for k, (low, high) in enumerate((found.auroc_interval, found.found_interval)):
            outside[k] += not low <= 0 <= high
        width += np.ptp(found.auroc_interval)
        other = drawn(seed + 1000)[2]  # not of the same images
        apart += np.ptp(compare(y, a, other, n_resamples=200, random_state=seed).auroc_interval)
    assert outside.max() <= 12  # 5 expected; more than 12 happens less than once in 500 times
    assert width < 0.6 * apart


def test_a_difference_is_seen_and_changes_its_sign_with_the_order():
    y, a, b = drawn(1, gain=0.8)
    one, other = compare(y, a, b, random_state=0), compare(y, b, a, random_state=0)
    assert one.auroc_interval[0] > 0
    assert other.auroc_interval == pytest.approx((-one.auroc_interval[1], -one.auroc_interval[0]))
    assert "b is better" in str(one)
    assert "a is better" in str(other)
    assert "no significant difference" in str(compare(y, a, a, random_state=0))


def test_each_category_keeps_its_share():
    """A category that both get wrong at one scale: drawn by chance, its share alone would move the AUROC."""
    y, a, b = drawn(2)
    kind = np.tile([0, 1], 80)
    narrow = compare(y, a + 3 * kind, b + 3 * kind, category=kind, random_state=0)
    wide = compare(y, a + 3 * kind, b, category=None, random_state=0)
    assert np.ptp(narrow.auroc_interval) < np.ptp(wide.auroc_interval)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"false_alarm_rate": 1.0}, "false_alarm_rate"),
        ({"confidence_level": 0}, "confidence_level"),
        ({"n_resamples": 0}, "n_resamples"),
        ({"category": [1, 2]}, "category has shape"),
    ],
)
def test_what_cannot_be_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        compare(*drawn(0), **given)


def test_the_command_prints_both_and_the_difference(tmp_path, capsys):
    parts = make_textured_parts(24, 6, categories=("disc",), image_size=64, random_state=0)
    for k, pixels in enumerate(parts.images):
        place = "train" if k < 16 else "test"
        save_png(tmp_path / "data" / "disc" / place / ("good" if k < 24 else "hole") / f"{k}.png", pixels)
    small = {"image_size": 64, "d_model": 16, "n_layers": 1, "n_codes": 8, "max_iter": 1, "false_alarm_rate": 0.25}
    models = [str(tmp_path / f"{seed}.safetensors") for seed in (0, 1)]
    for seed, path in enumerate(models):
        vqad.save(HVQTransDetector(random_state=seed, weights="random", **small).fit(parts.images[:16]), path)
    assert main(["compare", *models, str(tmp_path / "data")]) == 0
    out = capsys.readouterr().out
    assert "8 normal images, 6 anomalies" in out
    a, b = (roc_auc_score([0] * 8 + [1] * 6, -vqad.load(path).score_samples(parts.images[16:])) for path in models)
    assert f"{a:.3f}  {b:6.3f}  {b - a:+7.3f}" in out
