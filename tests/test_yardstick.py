"""The untrained Gaussian by place that the demonstration and the benchmarks measure beside."""

import numpy as np
import pytest
import torch

from vqad._yardstick import GaussianYardstick, _distances_to_others, _Gaussians
from vqad.backbones import load_backbone
from vqad.datasets import make_textured_parts
from vqad.images import check_images
from vqad.metrics import image_auroc

KINDS = ("disc", "weave")


@pytest.fixture(scope="module")
def parts():
    """48 normal and 16 defective parts of two kinds."""
    return make_textured_parts(48, 16, categories=KINDS, image_size=64, random_state=0)


@pytest.fixture(scope="module")
def yardstick(parts):
    """Fitted on the first 32 parts."""
    return GaussianYardstick("cpu").fit(parts.images[:32], parts.category[:32])


def test_planted_defects_score_higher_than_normal_parts(yardstick, parts):
    score = yardstick.anomaly_score(parts.images[32:], parts.category[32:])
    assert score.shape == (32,)
    assert score.dtype == np.float64
    for kind in KINDS:
        own = parts.category[32:] == kind
        assert image_auroc(parts.target[32:][own], score[own]) > 0.8


def test_a_score_does_not_depend_on_the_other_images(yardstick, parts):
    rows = np.r_[30:34, 48:52]
    together = yardstick.anomaly_score(parts.images[rows], parts.category[rows])
    alone = [yardstick.anomaly_score(parts.images[[i]], parts.category[[i]])[0] for i in rows]
    turned = yardstick.anomaly_score(parts.images[rows[::-1]], parts.category[rows[::-1]])[::-1]
    np.testing.assert_allclose(alone, together, atol=1e-4)
    np.testing.assert_allclose(turned, together, atol=1e-4)


def test_an_image_is_measured_by_the_category_that_it_is_said_to_be(yardstick, parts):
    own = yardstick.anomaly_score(parts.images[32:36], parts.category[32:36])
    other = yardstick.anomaly_score(parts.images[32:36], parts.category[33:37])
    assert (other > own + 10).all()


def test_maps_are_those_of_the_backbones_blocks(yardstick, parts):
    maps = yardstick._maps(check_images(parts.images), np.array([0, 40]))
    network, x = load_backbone("tf_efficientnet_lite0"), check_images(parts.images).load([0, 40], (224, 224))
    deep = load_backbone("tf_efficientnet_lite0", stages=(4,)).blocks
    by_block = {}
    with torch.inference_mode():
        x = network.bn1(network.conv_stem((x - 0.5) / 0.5))
        for k in range(7):
            x = by_block[k] = deep[k](x)
    assert [m.shape[1] for m in maps] == [40, 112, 320, 192]
    for given, k in zip(maps, (2, 4, 6, 5)):
        torch.testing.assert_close(given, by_block[k], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("n", [2, 7, 40])
def test_distances_are_mahalanobis_with_half_of_the_covariance_shared(n):
    rng = np.random.default_rng(n)
    x, q = rng.normal(size=(n, 5, 12)) @ rng.normal(size=(12, 12)) + 3, rng.normal(size=(4, 5, 12))
    mean = x.mean(0)
    rows = (x - mean).reshape(-1, 12)
    shared = rows.T @ rows / len(rows)
    shared += np.eye(12) * (0.01 * np.trace(shared) / 12 + 1e-6 * np.square(x).mean())
    expected = np.empty((4, 5))
    for cell in range(5):
        own = (x[:, cell] - mean[cell]).T @ (x[:, cell] - mean[cell]) / n
        inverse = np.linalg.inv((own + shared) / 2)
        expected[:, cell] = [np.sqrt(d @ inverse @ d) for d in q[:, cell] - mean[cell]]
    x, q = (torch.from_numpy(v).float() for v in (x, q))
    np.testing.assert_allclose(_Gaussians(x).distance(q), expected, rtol=1e-3)


def test_training_images_are_far_from_gaussians_that_did_not_see_them():
    x = torch.randn(30, 3, 50, generator=torch.Generator().manual_seed(0))
    assert (_distances_to_others(x).mean(0) > 1.5 * _Gaussians(x).distance(x).mean(0)).all()


@pytest.mark.parametrize("n", [2, 3, 5])
def test_few_images_are_enough(parts, n):
    few = np.flatnonzero(parts.category == "disc")[:n]
    images = np.concatenate([parts.images[few], parts.images[[few[0]] * n]])  # as many, of one kind all equal
    learned = GaussianYardstick("cpu").fit(images, ["disc"] * n + ["same"] * n)
    for kind in ("disc", "same"):
        assert np.isfinite(learned.anomaly_score(parts.images[40:42], [kind] * 2)).all()


def test_mistakes_are_told(yardstick, parts):
    with pytest.raises(ValueError, match="category 'b' has 1 image"):
        GaussianYardstick().fit(parts.images[:3], ["a", "a", "b"])
    with pytest.raises(ValueError, match="'pill' was not learned; known are"):
        yardstick.anomaly_score(parts.images[:2], ["disc", "pill"])
    with pytest.raises(ValueError, match="category is None"):
        yardstick.anomaly_score(parts.images[:2], None)
    with pytest.raises(ValueError, match="one label each"):
        yardstick.anomaly_score(parts.images[:2], ["disc"])
