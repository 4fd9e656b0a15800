"""Mahalanobis's length of errors and latents."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vqad import HVQTransDetector
from vqad.nn.hvq_trans import HVQTrans
from vqad.nn.vq_flow import VQFlow
from vqad.nn.whiten import Whitening, learn_second_moments


def vectors(n, seed, channels=6, grid=(4, 5)):
    """Maps whose channels are correlated and of different spread."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator) * torch.logspace(-1, 1, channels)
    return torch.einsum("nchw,cd->ndhw", torch.randn(n, channels, *grid, generator=generator), mixing)


def learned(x, group=None, n_groups=1):
    whitening = Whitening(x.shape[1], n_groups)
    learn_second_moments([whitening], [([x], torch.zeros(len(x), dtype=torch.long) if group is None else group)])
    return whitening


FIRST = torch.zeros(3, dtype=torch.long)


def test_before_anything_is_learned_it_is_the_mean_of_the_squares():
    x = vectors(3, 0)
    torch.testing.assert_close(Whitening(6)(x, FIRST), x.square().mean(1))


@given(st.integers(1, 9), st.integers(1, 6), st.integers(0, 99))
def test_it_is_the_quadratic_form_of_the_inverse_second_moment(n, channels, seed):
    x, new = vectors(n, seed, channels), vectors(3, seed + 1, channels)
    rows = x.double().movedim(1, -1).reshape(-1, channels).numpy()
    second = rows.T @ rows / len(rows)
    second += (0.01 + channels / len(rows)) * np.trace(second) / channels * np.eye(channels)
    cells = new.double().movedim(1, -1).numpy()
    expected = np.einsum("nhwc,cd,nhwd->nhw", cells, np.linalg.inv(second), cells) / channels
    np.testing.assert_allclose(learned(x)(new, FIRST).numpy(), expected, rtol=2e-4)


@given(st.floats(1e-3, 1e3), st.integers(0, 99))
def test_units_and_axes_do_not_matter(scale, seed):
    """Scaled and turned together, what is learned and what is measured, give the same."""
    turn = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))).Q
    x, new = vectors(8, seed), vectors(3, seed + 1)
    turned = [scale * torch.einsum("nchw,cd->ndhw", maps, turn) for maps in (x, new)]
    torch.testing.assert_close(learned(turned[0])(turned[1], FIRST), learned(x)(new, FIRST), rtol=1e-3, atol=1e-4)


def test_normal_vectors_are_one_in_the_mean_and_those_of_a_rare_direction_more():
    x = torch.randn(40, 6, 4, 5, generator=torch.Generator().manual_seed(0))
    assert 0.95 < learned(x)(x, torch.zeros(40, dtype=torch.long)).mean() <= 1
    flat = torch.cat([x[:, :5], 1e-3 * x[:, 5:]], 1)
    odd = flat[:3].clone()
    odd[:, 5] += flat.std()
    whitening = learned(flat)
    # The same step along the others is within what is usual.
    usual = flat[:3].clone()
    usual[:, 4] += flat.std()
    assert whitening(odd, FIRST).mean() > 5 * whitening(usual, FIRST).mean()


def test_groups_learn_from_their_own_images_in_any_batches():
    x, group = vectors(12, 0), torch.tensor([0, 2, 2] * 4)
    x[group == 2] *= 3
    mixed = learned(x, group, 3)
    apart = Whitening(6, 3)
    learn_second_moments([apart], [([x[i : i + 1]], group[i : i + 1]) for i in range(12)])
    torch.testing.assert_close(apart(x, group), mixed(x, group))
    alone = learned(x[group == 2])
    torch.testing.assert_close(mixed(x[group == 2], group[group == 2]), alone(x[group == 2], torch.zeros(8).long()))
    assert torch.equal(mixed.root[1], torch.eye(6))


def test_more_groups_and_more_learning_leave_the_others_every_bit():
    x = vectors(4, 0)
    whitening = learned(x)
    before = whitening.root.clone()
    whitening.add_groups(2)
    learn_second_moments([whitening], [([vectors(4, 1)], torch.ones(4, dtype=torch.long))])
    assert whitening.root.shape == (3, 6, 6)
    assert torch.equal(whitening.root[:1], before)
    assert not torch.equal(whitening.root[1], torch.eye(6))
    assert torch.equal(whitening.root[2], torch.eye(6))


def test_where_nothing_was_ever_missed_every_direction_counts_alike():
    whitening = learned(torch.zeros(4, 6, 4, 5))
    torch.testing.assert_close(whitening(vectors(3, 0), FIRST), vectors(3, 0).square().mean(1))


def test_half_precision_around_it_changes_nothing():
    x = vectors(4, 0)
    whitening = learned(x)
    with torch.autocast("cpu", torch.bfloat16):
        again = learned(x)
        under = whitening(x[:3], FIRST)
    assert torch.equal(again.root, whitening.root)
    assert torch.equal(under, whitening(x[:3], FIRST))


def test_a_state_of_before_there_was_one_loads_as_nothing_learned():
    whitening = learned(vectors(4, 0))
    whitening.load_state_dict({})
    assert torch.equal(whitening.root, torch.eye(6)[None])


# ---- in the models -------------------------------------------------------------------------------


def features(n, seed, shape=(8, 4, 4)):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


CATEGORY = torch.tensor([0, 1] * 8)


def test_the_error_of_hvq_trans_is_measured_by_what_its_decoder_misses_of_normal_images():
    torch.manual_seed(0)
    model = HVQTrans(8, (4, 4), 2, d_model=8, n_heads=2, dim_feedforward=8, n_layers=1, n_codes=4).eval()
    x = features(16, 0)
    with torch.no_grad():
        error = torch.nn.functional.avg_pool2d(
            model(x, CATEGORY).reconstruction - x, 3, stride=1, padding=1, count_include_pad=False
        )
    plain = model.anomaly_map(x, CATEGORY, levels=[], window=3)
    torch.testing.assert_close(plain["averaged_reconstruction"], error.norm(dim=1))
    model.settle([(x[:6], CATEGORY[:6]), (x[6:], CATEGORY[6:])], window=3)
    settled = model.anomaly_map(x, CATEGORY, levels=[], window=3)
    assert torch.equal(settled["reconstruction"], plain["reconstruction"])
    whitening = learned(error, CATEGORY, 2)
    expected = 8 * whitening(error, CATEGORY)
    torch.testing.assert_close(settled["averaged_reconstruction"].square(), expected, rtol=1e-3, atol=1e-4)


def test_the_latents_of_vq_flow_are_measured_by_those_of_normal_images():
    torch.manual_seed(0)
    model = VQFlow(
        (4, 4, 6, 6),
        n_concepts=2,
        n_patterns=4,
        d_concept=8,
        d_position=4,
        n_blocks=(1, 1, 1),
        hidden=4,
        n_categories=2,
    ).eval()
    x = [features(16, k, (c, side, side)) for k, (c, side) in enumerate(((4, 16), (4, 8), (6, 4), (6, 2)))]
    plain = model.anomaly_map(x, CATEGORY)
    for k in (1, 2, 3):
        torch.testing.assert_close(plain[f"mahalanobis_{k}"], plain[f"log_likelihood_{k}"])
    batches = [([part[:6] for part in x], CATEGORY[:6]), ([part[6:] for part in x], CATEGORY[6:])]
    with pytest.raises(TypeError, match="twice"):
        model.settle(iter(batches))
    model.settle(batches)
    with torch.no_grad():
        z = model(x, CATEGORY).latents.z
    settled = model.anomaly_map(x, CATEGORY)
    for k in (1, 2, 3):
        expected = 0.5 * learned(z[k - 1], CATEGORY, 2)(z[k - 1], CATEGORY)
        torch.testing.assert_close(settled[f"mahalanobis_{k}"], expected, rtol=1e-3, atol=1e-4)
    alone = model.anomaly_map([part[1::2] for part in x])
    assert not torch.allclose(alone["mahalanobis_1"], settled["mahalanobis_1"][1::2])


def test_what_a_fit_learned_is_of_the_images_that_it_trained_on():
    rng = np.random.default_rng(0)
    maps = rng.normal(size=(40, 4, 4, 6)).astype(np.float32)
    small = {"d_model": 8, "n_heads": 2, "n_layers": 1, "n_codes": 4, "dim_feedforward": 8, "max_iter": 1}
    detector = HVQTransDetector(backbone=None, random_state=0, false_alarm_rate=0.2, **small).fit(maps)
    root = detector.model_.whitening.root
    assert not torch.equal(root, torch.eye(6)[None])
    again = HVQTransDetector(backbone=None, random_state=0, false_alarm_rate=0.2, **small).fit(maps)
    assert torch.equal(again.model_.whitening.root, root)
