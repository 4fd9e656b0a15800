"""Other thresholds without another fit: for another rate, or from new normal images."""

import warnings

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone

import vqad
from vqad import HVQTransDetector
from vqad.cli import main
from vqad.datasets import make_textured_parts
from vqad.nn.model import Term
from vqad.nn.terms import TermScorer

TINY = HVQTransDetector(
    backbone=None, d_model=8, n_heads=2, n_layers=1, dim_feedforward=8, n_codes=8, max_iter=1, false_alarm_rate=0.05,
    random_state=0,
)  # fmt: skip
CENTER = 8 * np.random.default_rng(9).standard_normal((3, 8))


def draw(n, seed, shift=0.0):
    """Rows of three kinds; those of the first are ``shift`` away from where they were."""
    kind = np.arange(n) % 3
    noise = np.random.default_rng(seed).standard_normal((n, 8))
    return CENTER[kind] + noise + shift * (kind == 0)[:, None], np.array(["a", "b", "c"])[kind]


def share(detector, X):
    return (detector.predict(X) == -1).mean()


@pytest.fixture(scope="module")
def fitted():
    X, kind = draw(300, 0)
    return clone(TINY).fit(X, category=kind)


@pytest.fixture
def made(fitted):
    made = clone(TINY)
    vars(made).update(vars(fitted))
    return made


@pytest.mark.parametrize("rate", [0.05, 0.1, 0.3, 0.5])
@pytest.mark.parametrize("threshold", ["global", "category"])
def test_another_rate_is_that_of_a_fit_with_it(rate, threshold):
    X, kind = draw(300, 0)
    made = clone(TINY).set_params(threshold=threshold).fit(X, category=kind).recalibrate(false_alarm_rate=rate)
    anew = clone(TINY).set_params(threshold=threshold, false_alarm_rate=rate).fit(X, category=kind)
    np.testing.assert_array_equal(made.offset_, anew.offset_)
    assert made.map_threshold_ == anew.map_threshold_
    assert made.false_alarm_rate == made.fitted_.thresholds.rate == rate


def test_a_rate_that_is_set_after_fit_counts_at_once_and_is_what_a_saved_model_says(made, tmp_path):
    X, _ = draw(3000, 1)
    before = made.offset_
    scores = made.score_samples(X)
    made.set_params(false_alarm_rate=0.3)
    assert 0.2 < share(made, X) < 0.4
    np.testing.assert_array_equal(made.score_samples(X), scores)
    vqad.save(made, tmp_path / "m.safetensors")
    opened = vqad.load(tmp_path / "m.safetensors")
    assert opened.get_params()["false_alarm_rate"] == 0.3
    assert share(opened, X) == share(made, X)
    made.set_params(false_alarm_rate=0.05)
    assert made.offset_ == before


def test_a_rate_out_of_range_is_told_at_fit_as_any_parameter(made):
    before = made.offset_
    for wrong in ("half", None, 2.0):
        made.set_params(false_alarm_rate=wrong)
        assert made.offset_ == before
    with pytest.raises(ValueError, match="false_alarm_rate"):
        made.recalibrate()
    with pytest.raises(ValueError, match="false_alarm_rate"):
        made.recalibrate(false_alarm_rate=0)
    assert made.false_alarm_rate == 2.0


def test_new_normal_images_are_normal_again_and_other_categories_keep_every_bit(made):
    later, _ = draw(600, 2, shift=1.6)
    first = np.arange(600) % 3 == 0
    assert share(made, later[first]) > 0.5
    scores = made.score_samples(later[~first])
    more, kind = draw(240, 3, shift=1.6)
    made.recalibrate(more[::3], category=kind[::3])
    assert share(made, later[first]) < 0.12
    np.testing.assert_array_equal(made.score_samples(later[~first]), scores)
    again = made.score_samples(later[first])
    assert abs(np.median(again)) < 0.5
    assert len(made.fitted_.held_out) == 80 + 40


def test_without_labels_images_count_for_the_nearest_category(made, fitted):
    X, kind = draw(90, 4)
    told = clone(TINY)
    vars(told).update(vars(fitted))
    told.recalibrate(X, category=kind)
    made.recalibrate(X)
    np.testing.assert_array_equal(made.score_samples(X), told.score_samples(X))


def test_one_image_of_each_group_counts(made):
    X, kind = draw(90, 5)
    made.recalibrate(X, category=kind, groups=np.arange(90) // 6)
    assert len(made.fitted_.held_out) == 15


def test_what_is_labelled_an_anomaly_is_left_out(made):
    X, kind = draw(60, 6)
    made.recalibrate(np.vstack([X, X + 50]), np.repeat([1, -1], 60), category=np.tile(kind, 2))
    assert len(made.fitted_.held_out) == 60


def test_what_cannot_be_is_said_and_changes_nothing(made):
    X, _ = draw(30, 7)
    before = made.fitted_
    with pytest.raises(ValueError, match=r"category has 'z', which was not learned; known are \['a', 'b', 'c'\]"):
        made.recalibrate(X, category=np.repeat("z", 30))
    with pytest.raises(ValueError, match="category 'a' has 1 normal image to recalibrate from"):
        made.recalibrate(X[:1])
    with pytest.raises(ValueError, match="features"):
        made.recalibrate(X[:, :5])
    assert made.fitted_ is before


@pytest.mark.slow
@pytest.mark.parametrize("rate", [0.1, 0.3])
@pytest.mark.parametrize("per_category", [False, True])
def test_false_alarms_are_as_rare_as_asked(rate, per_category, fitted):
    """Of 60 draws of 60 new normal images of shifted kinds, the mean over further ones."""
    shares = []
    for seed in range(60):
        made = clone(TINY).set_params(threshold="category" if per_category else "global")
        vars(made).update(_fitted=fitted._fitted, n_features_in_=fitted.n_features_in_)
        X, kind = draw(60, 1000 + seed, shift=0.7)
        shares.append(share(made.recalibrate(X, category=kind, false_alarm_rate=rate), draw(150, 5000 + seed, 0.7)[0]))
    assert np.mean(shares) <= rate + 3 * np.std(shares) / np.sqrt(60)
    assert np.mean(shares) > rate / 2


def test_normal_images_alone_set_a_threshold_for_the_rate(made):
    X, _ = draw(300, 8)
    made.set_threshold(X, np.ones(300, dtype=int))
    assert share(made, X) <= 0.05
    assert share(made, draw(3000, 9)[0]) < 0.09
    with pytest.raises(ValueError, match="y is -1 for all 300 images"):
        made.set_threshold(X, -np.ones(300, dtype=int))


def test_the_command(tmp_path, capsys):
    parts = make_textured_parts(n_normal=20, n_anomalous=0, categories=["disc"], image_size=64, random_state=0)
    new = make_textured_parts(n_normal=9, n_anomalous=0, categories=["disc"], image_size=64, random_state=1)
    for folder, images in (("good", parts.images), ("new", 255 - new.images)):
        (tmp_path / folder).mkdir()
        for k, image in enumerate(images):
            Image.fromarray(image).save(tmp_path / folder / f"{k}.png")
    model, strict, moved = (str(tmp_path / f"{name}.safetensors") for name in ("model", "strict", "moved"))
    small = ["--image-size", "64", "--max-iter", "1", "--set", "d_model=16", "--set", "n_codes=8"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert main(["fit", str(tmp_path / "good"), "-o", model, *small, "--false-alarm-rate", "0.4"]) == 0
        assert main(["recalibrate", model, "--false-alarm-rate", "0.2", "-o", strict]) == 0
        assert main(["recalibrate", model, str(tmp_path / "new"), "-o", moved]) == 0
    before, rarer, other = (vqad.load(path) for path in (model, strict, moved))
    assert rarer.false_alarm_rate == 0.2
    assert rarer.offset_ < before.offset_
    assert np.median(other.score_samples(255 - new.images)) > np.median(before.score_samples(255 - new.images))
    capsys.readouterr()
    assert main(["recalibrate", model, "-o", strict]) == 2
    assert "nothing to do" in capsys.readouterr().err
    assert main(["score", model, str(tmp_path / "good"), "--false-alarm-rate", "0.2"]) == 0
    assert f"scores over {-rarer.offset_:.3f}" in capsys.readouterr().out


def test_scores_that_were_rescaled_twice_are_of_one_scale():
    scorer = TermScorer([Term("t", 1.0, (0.0,))], {"t": (0, 1, 1)}, 1)
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (40, 31))
    first, second = 3 * first + 5, 4 * second
    scorer.rescale(0, first)
    center, scale = scorer.ends[0].clone()
    scorer.rescale(0, second)
    assert torch.allclose(scorer.ends[0, 0], center + scale * second.median(), atol=0.3)
    assert 2 < scorer.ends[0, 1] / scale < 6
