"""Categories from labels, categories found without labels, and distances to them."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.cluster import AgglomerativeClustering
from sklearn.metrics import adjusted_rand_score, silhouette_score

from vqad.routing import CategoryRouter, _cuts, describe, discover


def learn(X, category=None, **more):
    return CategoryRouter.learn(X, category, **more)


def found(X):
    """The category of each of these images, found without labels."""
    return learn(X)[2]


def predict(router, X):
    return [each.numpy() for each in router(torch.from_numpy(X))]


def blobs(k, n=12, dim=16, distance=8.0, seed=0):
    """k x n points about k centres that are about ``distance * sqrt(2 * dim)`` apart, and which is whose."""
    rng = np.random.default_rng(seed)
    category = rng.permutation(np.repeat(np.arange(k), n))
    return distance * rng.standard_normal((k, dim))[category] + rng.standard_normal((k * n, dim)), category


@pytest.mark.parametrize("names", [["nut", "screw", "bolt"], [7, -1, 3]])
def test_labels_are_learned_exactly(names):
    X, category = blobs(3)
    label = np.array(names)[category]
    router, categories, index = learn(X, label)
    assert list(categories) == sorted(names)
    assert not router.discovered
    assert np.isnan(router.silhouette)
    np.testing.assert_array_equal(categories[index], label)
    new, category = blobs(3)
    np.testing.assert_array_equal(categories[predict(router, new)[0]], np.array(names)[category])


def test_labels_are_obeyed_where_they_cut_through_a_blob():
    X, _ = blobs(1, n=40)
    label = np.array(["front", "back"])[np.arange(40) % 2]
    _, categories, index = learn(X, label)
    np.testing.assert_array_equal(categories[index], label)


def test_a_label_of_a_single_image_is_kept():
    X, category = blobs(2)
    label = np.where(np.arange(24) == 5, 9, category)
    router, categories, _ = learn(X, label)
    assert list(categories) == [0, 1, 9]
    assert np.isfinite(predict(router, X)[1]).all()


def even_blobs(k, n, dim, seed):
    """Blobs whose centres are equally far from each other; drawn at random, two may lie so close as to be one."""
    rng = np.random.default_rng(seed)
    category = rng.permutation(np.repeat(np.arange(k), n))
    centres = 8.0 * np.sqrt(dim) * np.linalg.qr(rng.standard_normal((dim, k)))[0].T
    return centres[category] + rng.standard_normal((k * n, dim)), category


@settings(max_examples=20)
@given(st.integers(1, 6), st.integers(6, 20), st.sampled_from([8, 16, 60]), st.integers(0, 10**6))
def test_separate_blobs_are_found(k, n, dim, seed):
    X, category = even_blobs(k, n, dim, seed=seed)
    router, categories, index = learn(X)
    assert router.discovered
    np.testing.assert_array_equal(categories, np.arange(k))
    assert adjusted_rand_score(category, index) == 1
    assert k == 1 or router.silhouette > 0.4


@pytest.mark.parametrize("k", [30, 100])
def test_many_categories_are_found(k):
    X, category = blobs(k)
    index = found(X)
    assert adjusted_rand_score(category, index) == 1


def test_pieces_photographed_a_few_times_each_are_told_from_categories():
    X, _ = blobs(20, n=6)
    with pytest.warns(
        UserWarning,
        match=r"20 categories were discovered in 120 images, with a median of 6 images, which are .*category=",
    ):
        found(X)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert learn(X, ["part"] * 120)[2].max() == 0
        found(blobs(20, n=20)[0])


@settings(max_examples=20)
@given(st.integers(10, 70), st.integers(1, 4), st.integers(0, 10**6))
def test_cuts_are_those_of_wards_tree_and_silhouettes_those_of_scikit_learn(n, dim, seed):
    X = np.random.default_rng(seed).standard_normal((n, dim))
    cuts = {len(np.unique(label)) - (label < 0).any(): (label, score) for label, score in _cuts(X)}
    for k in range(2, n // 5 + 1):
        label = AgglomerativeClustering(k).fit_predict(X)
        if np.bincount(label).min() >= 5:  # none is odd
            mine, score = cuts[k]
            assert adjusted_rand_score(label, mine) == 1
            assert score == pytest.approx(silhouette_score(X, label), abs=1e-5)
    for label, score in cuts.values():
        placed = label >= 0
        assert (~placed).sum() <= max(1, 0.02 * n)
        assert score == pytest.approx(silhouette_score(X[placed], label[placed]), abs=1e-5)


def test_parts_that_differ_in_last_digits_leave_no_empty_category():
    rng = np.random.default_rng(0)
    for _ in range(10):
        centre = 1 + 3e-9 * rng.standard_normal((4, 2))
        index, _ = discover(centre[rng.integers(0, 4, 40)] + 1e-10 * rng.standard_normal((40, 2)))
        assert len(np.unique(index)) == index.max() + 1


@pytest.mark.parametrize("scale", [1e-6, 1.0, 1e6])
def test_units_do_not_matter(scale):
    X, category = blobs(3)
    unit = scale * np.geomspace(1, 1000, X.shape[1])
    index = found(X * unit + 5 * unit)
    assert adjusted_rand_score(category, index) == 1


@pytest.mark.parametrize("ratio", [1e7, 1e8, 1e10])
def test_one_number_in_large_units_does_not_hide_the_others(ratio):
    X, category = blobs(3)
    X = np.column_stack([X / ratio, np.random.default_rng(0).standard_normal(len(X))])
    assert adjusted_rand_score(category, found(X)) == 1
    router, _, _ = learn(X, category)
    np.testing.assert_array_equal(predict(router, X)[0], category)


def test_rounding_in_maps_that_are_constant_over_space_does_not_hide_the_categories():
    X, category = blobs(3)
    maps = torch.from_numpy(X.astype(np.float32))[:, :, None, None].expand(-1, -1, 7, 7)
    assert adjusted_rand_score(category, found(describe([maps]).numpy())) == 1


def test_blobs_of_unequal_size_are_found():
    X, category = blobs(2, n=100)
    keep = (category == 0) | (np.cumsum(category == 1) <= 6)
    index = found(X[keep])
    assert adjusted_rand_score(category[keep], index) == 1


@pytest.mark.parametrize("distance", [30, 100, 300])
def test_a_foreign_image_does_not_hide_the_categories(distance):
    X, category = blobs(3, n=20)
    X = np.vstack([X, distance * np.ones(16)])
    index = found(X)
    assert index.max() == 2
    assert adjusted_rand_score(category, index[:60]) == 1


def test_fewer_than_five_images_are_no_category():
    X, category = blobs(2, n=50)
    keep = (category == 0) | (np.cumsum(category == 1) <= 4)
    assert found(X[keep]).max() == 0


@pytest.mark.parametrize("n", [2, 3, 4, 9])
def test_few_images_are_one_category(n):
    X = np.random.default_rng(0).standard_normal((n, 30))
    router, _, index = learn(X)
    np.testing.assert_array_equal(index, 0)
    assert np.isfinite(predict(router, X)[1]).all()


@pytest.mark.filterwarnings("error")
def test_identical_images_are_one_category_at_distance_0():
    router, _, index = learn(np.ones((20, 6)))
    np.testing.assert_array_equal(index, 0)
    np.testing.assert_allclose(predict(router, np.ones((2, 6)))[1], 0, atol=1e-9)


@pytest.mark.filterwarnings("error")
def test_two_pictures_repeated_are_two_categories():
    X = np.repeat(np.random.default_rng(0).standard_normal((2, 6)), 10, axis=0)
    np.testing.assert_array_equal(np.abs(np.diff(found(X))), np.arange(19) == 9)


def test_distances_are_mahalanobis_distances():
    """Of the pooled covariance within the categories, hardly shrunk where images are many."""
    rng = np.random.default_rng(0)
    mixing, category = rng.standard_normal((4, 4)) + 2 * np.eye(4), np.repeat([0, 1], 2000)
    center = 30 * rng.standard_normal((2, 4))
    X = center[category] + rng.standard_normal((4000, 4)) @ mixing
    router, _, _ = learn(X, category)
    means = np.stack([X[category == c].mean(0) for c in (0, 1)])
    residual = X - means[category]
    inverse = np.linalg.inv(residual.T @ residual / 4000)
    new = center[0] + 3 * rng.standard_normal((50, 4)) @ mixing
    off = new[:, None] - means
    expected = np.sqrt(np.einsum("nkd,de,nke->nk", off, inverse, off))
    index, distance = predict(router, new)
    np.testing.assert_array_equal(index, expected.argmin(1))
    np.testing.assert_allclose(distance, expected.min(1), rtol=0.05)


def test_an_image_far_from_everything_is_at_a_large_distance():
    X, _ = blobs(3, n=30)
    router, _, _ = learn(X)
    near = predict(router, blobs(3, n=30)[0])[1]
    assert predict(router, np.full((1, 16), 100.0))[1] > 5 * near.max()


@pytest.mark.parametrize("dim", [5, 33, 200])
def test_rows_do_not_depend_on_company(dim):
    X, _ = blobs(3, dim=dim)
    router, _, _ = learn(X)
    new = np.random.default_rng(1).standard_normal((50, dim)) * 20
    index, distance = predict(router, new)
    for i in range(50):
        own_index, own_distance = predict(router, new[[i]])
        assert (own_index[0], own_distance[0]) == (index[i], distance[i])
    order = np.random.default_rng(2).permutation(50)
    np.testing.assert_array_equal(predict(router, new[order])[1], distance[order])


def test_one_seed_finds_the_same_and_global_state_is_left_alone():
    X, _ = blobs(4)
    np.random.seed(0)  # noqa: NPY002 - the global state is what is tested
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    (first, _, index), (second, _, other) = (learn(X, random_state=7) for _ in range(2))
    np.testing.assert_array_equal(index, other)
    np.testing.assert_array_equal(predict(first, X)[1], predict(second, X)[1])
    np.testing.assert_array_equal(np.random.get_state()[1], before)  # noqa: NPY002


def test_many_images_are_discovered_from_a_part_of_them(monkeypatch):
    monkeypatch.setattr("vqad.routing.MAX_DISCOVERY_IMAGES", 400)
    X, category = blobs(2, n=210, dim=6)
    looked_at = []
    monkeypatch.setattr("vqad.routing._cuts", lambda sample: looked_at.append(len(sample)) or _cuts(sample))
    index, silhouette = discover(X)
    assert looked_at == [400]
    assert len(index) == 420
    assert adjusted_rand_score(category, index) == 1
    assert silhouette > 0.8


def test_constant_columns_do_no_harm():
    X, category = blobs(2)
    padded = np.hstack([X, np.ones((24, 5)), np.zeros((24, 5))])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        index = found(padded)
    assert adjusted_rand_score(category, index) == 1
