"""Gaussians by location against formulas that are worked out directly."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.covariance import ledoit_wolf_shrinkage

from vqad.nn.gaussian import OWN_IMAGES, RIDGE, LocationGaussian

ZERO = torch.tensor(0)


def draw(n, d, grid, seed=0):
    """Maps whose directions have variances of their own, at each place others."""
    g = torch.Generator().manual_seed(seed)
    spread = torch.rand(1, d, *grid, generator=g) + 0.2
    mix = torch.randn(d, d, generator=g)
    return torch.einsum("de,nehw->ndhw", mix, spread * torch.randn(n, d, *grid, generator=g)) + 3.0


def directly(x, q):
    """The docstring's formula with full matrices in float64, (m, h, w)."""
    n, d = x.shape[:2]
    x, q = x.double(), q.double()
    mean = x.mean(0)
    vectors = (x - mean).permute(0, 2, 3, 1).reshape(-1, d)
    second = vectors.T @ vectors / len(vectors)
    delta = ledoit_wolf_shrinkage(vectors.numpy(), assume_centered=True)
    delta = max(RIDGE, delta)
    values, directions = torch.linalg.eigh((1 - delta) * second + delta * torch.eye(d) * second.trace() / d)
    white = directions / values.sqrt()
    own = n / (n + OWN_IMAGES)
    out = torch.empty(len(q), *q.shape[2:], dtype=torch.float64)
    for i in range(q.shape[2]):
        for j in range(q.shape[3]):
            r = (x[:, :, i, j] - mean[:, i, j]) @ white
            s = own * r.T @ r / n + (1 - own) * torch.eye(d, dtype=torch.float64)
            v = (q[:, :, i, j] - mean[:, i, j]) @ white
            out[:, i, j] = (v * torch.linalg.solve(s, v.T).T).sum(1).sqrt()
    return out


@pytest.mark.parametrize(("n", "d"), [(40, 6), (5, 12), (3, 3)])
def test_distances_are_those_of_the_formula(n, d):
    x, q = draw(n, d, (3, 2)), draw(7, d, (3, 2), seed=1)
    measure = LocationGaussian(d, (3, 2))
    measure.learn(0, x)
    torch.testing.assert_close(measure(q, ZERO).double(), directly(x, q), rtol=5e-3, atol=1e-3)


def test_of_a_truncated_factor_the_leading_directions_count_in_full_and_the_rest_by_their_mean(monkeypatch):
    monkeypatch.setattr("vqad.nn.gaussian.FACTOR_NUMBERS", 4 * 6 * 2)
    x, q = draw(50, 6, (2, 2)), draw(9, 6, (2, 2), seed=1)
    measure = LocationGaussian(6, (2, 2))
    assert measure.factor.shape[-1] == 2
    measure.learn(0, x)
    white = (x - x.mean(0)).flatten(2).permute(2, 0, 1) @ measure.whitening[0]
    own = 50 / (50 + OWN_IMAGES)
    for cell in range(4):
        values, vectors = torch.linalg.eigh(white[cell].T @ white[cell] / 50)
        values = torch.cat([values[:4].mean().expand(4), values[4:]])
        inverse = vectors @ torch.diag(1 / (own * values + 1 - own)) @ vectors.T
        v = (q - x.mean(0)).flatten(2)[:, :, cell] @ measure.whitening[0]
        expected = (v @ inverse * v).sum(1).sqrt()
        torch.testing.assert_close(measure(q, ZERO).flatten(1)[:, cell], expected, rtol=5e-3, atol=1e-3)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 30), st.integers(1, 20), st.floats(1e-6, 1e6))
def test_a_change_of_unit_changes_nothing(n, d, unit):
    x, q = draw(n, d, (2, 3)), draw(4, d, (2, 3), seed=1)
    here, there = LocationGaussian(d, (2, 3)), LocationGaussian(d, (2, 3))
    here.learn(0, x)
    there.learn(0, unit * x)
    torch.testing.assert_close(here(q, ZERO), there(unit * q, ZERO), rtol=2e-2, atol=2e-2)


def test_cross_fitted_distances_are_those_of_what_the_other_folds_taught():
    x, fold = draw(12, 5, (2, 2)), torch.arange(12) % 3
    found = LocationGaussian(5, (2, 2)).learn(0, x, fold)
    for k in range(3):
        other = LocationGaussian(5, (2, 2))
        other.learn(0, x[fold != k])
        torch.testing.assert_close(found[fold == k], other(x[fold == k], ZERO))
    assert found.mean() > 1.1 * _own(x).mean()


def _own(x):
    measure = LocationGaussian(x.shape[1], x.shape[2:])
    measure.learn(0, x)
    return measure(x, ZERO)


def test_categories_are_learned_apart_and_keep_every_bit():
    a, b = draw(20, 4, (2, 2)), 9 * draw(20, 4, (2, 2), seed=2)
    measure = LocationGaussian(4, (2, 2))
    measure.learn(0, a)
    before = measure(b, ZERO)
    measure.add_groups(1)
    measure.learn(1, b)
    assert torch.equal(measure(b, ZERO), before)
    alone = LocationGaussian(4, (2, 2))
    alone.learn(0, b)
    assert torch.equal(measure(a, torch.tensor(1)), alone(a, ZERO))


@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("kind", ["equal", "constant", "huge", "one channel dead"])
def test_whatever_is_learned_distances_are_numbers(n, kind):
    x = draw(n, 4, (2, 2))
    if kind == "equal":
        x = x[:1].expand(n, -1, -1, -1)
    elif kind == "constant":
        x = torch.ones_like(x)
    elif kind == "huge":
        x = 1e12 * x
    else:
        x[:, 1] = 0.0
    measure = LocationGaussian(4, (2, 2))
    measure.learn(0, x)
    found = measure(torch.cat([x, x + 1.0, -x]), ZERO)
    assert found.isfinite().all()
    assert (found >= 0).all()


def test_a_category_takes_no_more_memory_than_promised():
    """At the sizes of the default backbone, for all four views of the features and a field of the model."""
    grids = {(40, (36, 36)), (152, (18, 18)), (512, (7, 7)), (512, (1, 1))}
    fields = [*grids, (152, (18, 18))]
    size = sum(b.numel() * b.element_size() for d, grid in fields for b in LocationGaussian(d, grid).buffers())
    assert size < 10e6


def test_a_place_where_normal_images_vary_forgives_more_than_one_where_they_do_not():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((200, 3, 1, 2)).astype(np.float32)
    x[..., 1] *= 0.1
    measure = LocationGaussian(3, (1, 2))
    measure.learn(0, torch.from_numpy(x))
    wide, narrow = measure(torch.ones(1, 3, 1, 2), ZERO)[0, 0]
    assert narrow > 1.5 * wide
