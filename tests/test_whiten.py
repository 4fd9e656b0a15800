"""Mahalanobis's length of errors and latents."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.base import clone

import vqad.nn.whiten
from vqad import HVQTransDetector, VQFlowDetector
from vqad._checks import split_rows
from vqad.nn.hvq_trans import HVQTrans
from vqad.nn.vq_flow import VQFlow
from vqad.nn.whiten import Whitening, leaving_out, second_moments, total_second_moments, whitenings


def vectors(n, seed, channels=6, grid=(4, 5)):
    """Maps whose channels are correlated and of different spread."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=generator) * torch.logspace(-1, 1, channels)
    return torch.einsum("nchw,cd->ndhw", torch.randn(n, channels, *grid, generator=generator), mixing)


def learned(x, group=None, n_groups=1):
    whitening = Whitening(x.shape[1], n_groups)
    learn(whitening, x, torch.zeros(len(x), dtype=torch.long) if group is None else group)
    return whitening


def learn(whitening, x, group):
    for g in torch.unique(group).tolist():
        own = x[group == g]
        whitening.learn(g, total_second_moments(own), own[:, 0].numel())


FIRST = torch.zeros(3, dtype=torch.long)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_no_number_is_not_learned_from(value):
    x = vectors(4, 0)
    x[1, 2, 0, 0] = value
    assert torch.equal(learned(x).root, torch.eye(6)[None])


def test_one_group_and_several_give_the_same():
    x, group = vectors(6, 0), torch.tensor([0, 1, 1, 0, 1, 1])
    whitening = learned(x, group, 2)
    of_one = whitening(x[group == 1], group[group == 1])
    torch.testing.assert_close(whitening(x, group)[group == 1], of_one)


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


def test_groups_learn_from_their_own_images():
    x, group = vectors(12, 0), torch.tensor([0, 2, 2] * 4)
    x[group == 2] *= 3
    mixed, alone = learned(x, group, 3), learned(x[group == 2])
    torch.testing.assert_close(mixed(x[group == 2], group[group == 2]), alone(x[group == 2], torch.zeros(8).long()))
    assert torch.equal(mixed.root[1], torch.eye(6))


@pytest.mark.parametrize("wide", [1, 1024])
def test_left_out_each_image_is_seen_as_if_nothing_had_been_learned_from_it(wide, monkeypatch):
    monkeypatch.setattr(vqad.nn.whiten, "_WIDE", wide)
    x, group = vectors(7, 0), torch.tensor([0, 1, 1, 0, 1, 2, 1])
    x[4] *= 10
    whitening = learned(x, group, 4)
    together = whitening(x, group)
    with leaving_out(torch.nn.ModuleList([whitening])):
        found = whitening(x, group)
    for i in (0, 1, 2, 3, 4, 6):
        others = (group == group[i]) & (torch.arange(7) != i)
        torch.testing.assert_close(found[i], learned(x[others])(x[i : i + 1], FIRST[:1])[0], rtol=1e-3, atol=1e-4)
    # An odd image hides in what was learned from it.
    assert found[4].mean() > 3 * together[4].mean()
    # Without the only image of a group nothing is known.
    assert torch.equal(found[5], together[5])
    assert torch.equal(whitening(x, group), together)
    whitening.forget()
    with leaving_out(whitening):
        assert torch.equal(whitening(x, group), together)


@pytest.mark.parametrize("factor", [10, 1e3, 1e4, 1e8])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_an_image_that_outweighs_all_others_can_be_left_out(factor, layout):
    x, group = vectors(8, 0, 8), torch.zeros(8, dtype=torch.long)
    x[3] *= factor
    whitening, rows = learned(x), torch.arange(8)
    with leaving_out(whitening):
        found = whitening(x.contiguous(memory_format=layout), group)
    for i in range(8):
        # What was learned from it stays where nothing else is left in the sum.
        expected = whitening if i == 3 and factor == 1e8 else learned(x[rows != i])
        torch.testing.assert_close(found[i], expected(x[i : i + 1], FIRST[:1])[0], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("grid", [(2, 3), (5, 6)])
@pytest.mark.parametrize("factor", [1, 1e2, 1e4, 1e6])
def test_wide_vectors_are_left_out_as_others_are(grid, factor, monkeypatch):
    x, group = vectors(6, 1, 24, grid), torch.zeros(6, dtype=torch.long)
    if factor > 1:  # one image outweighs all others
        x[2] = factor * x[2, :, :1, :1]
    with leaving_out(plain := learned(x)):
        expected = plain(x, group)
    monkeypatch.setattr(vqad.nn.whiten, "_WIDE", 1)
    with leaving_out(wide := learned(x)):
        found = wide(x, group)
    torch.testing.assert_close(found, expected, rtol=1e-4 if factor == 1 else 1e-3, atol=1e-5)
    assert torch.equal(plain(x, group), wide(x, group))


def test_more_groups_and_more_learning_leave_the_others_every_bit():
    x = vectors(4, 0)
    whitening = learned(x)
    before = whitening.root.clone()
    whitening.add_groups(2)
    learn(whitening, vectors(4, 1), torch.ones(4, dtype=torch.long))
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


# ---- in the models -------------------------------------------------------------------------------


def features(n, seed, shape=(8, 4, 4)):
    return torch.randn(n, *shape, generator=torch.Generator().manual_seed(seed))


SMALL = {
    HVQTransDetector: {"d_model": 8, "n_heads": 2, "n_layers": 1, "n_codes": 4, "dim_feedforward": 8, "max_iter": 2},
    VQFlowDetector: {"n_concepts": 2, "n_patterns": 4, "d_concept": 8, "d_position": 4, "hidden": 4, "max_iter": 2},
}
CATEGORY = torch.tensor([0, 1] * 8)


def test_the_error_of_hvq_trans_is_measured_by_what_its_decoder_misses_of_normal_images():
    torch.manual_seed(0)
    model = HVQTrans(8, (4, 4), 2, d_model=8, n_heads=2, dim_feedforward=8, n_layers=1, n_codes=4).eval()
    x = features(16, 0)
    plain = model.anomaly_map(x, CATEGORY, levels=[], window=3)
    error = model.averaged_error(x, CATEGORY, 3)
    torch.testing.assert_close(error.norm(dim=1), plain["averaged_reconstruction"])
    (whitening,) = whitenings(model)
    learn(whitening, error, CATEGORY)
    learned = model.anomaly_map(x, CATEGORY, levels=[], window=3)
    assert torch.equal(learned["reconstruction"], plain["reconstruction"])
    torch.testing.assert_close(learned["averaged_reconstruction"].square(), 8 * whitening(error, CATEGORY))
    assert not torch.allclose(learned["averaged_reconstruction"], plain["averaged_reconstruction"], rtol=0.1)


def test_the_latents_of_vq_flow_are_measured_by_those_of_normal_images():
    torch.manual_seed(0)
    sizes = {"n_concepts": 2, "n_patterns": 4, "d_concept": 8, "d_position": 4, "n_blocks": (1, 1, 1), "hidden": 4}
    model = VQFlow((4, 4, 6, 6), n_categories=2, **sizes).eval()
    x = [features(16, k, (c, side, side)) for k, (c, side) in enumerate(((4, 16), (4, 8), (6, 4), (6, 2)))]
    with torch.no_grad():
        plain, z = model.anomaly_map(x, CATEGORY), model(x, CATEGORY).latents.z
        for k, (latent, whitening) in enumerate(zip(z, whitenings(model), strict=True), 1):
            torch.testing.assert_close(plain[f"mahalanobis_{k}"], plain[f"log_likelihood_{k}"])
            learn(whitening, latent, CATEGORY)
        found, first = model.anomaly_map(x, CATEGORY), model.anomaly_map(x)
    for k, (latent, whitening) in enumerate(zip(z, whitenings(model)), 1):
        torch.testing.assert_close(found[f"mahalanobis_{k}"], 0.5 * whitening(latent, CATEGORY))
        torch.testing.assert_close(found[f"log_likelihood_{k}"], plain[f"log_likelihood_{k}"])
    assert not torch.allclose(first["mahalanobis_1"][1::2], found["mahalanobis_1"][1::2])


@pytest.mark.parametrize("kind", [HVQTransDetector, VQFlowDetector])
def test_a_fit_learns_from_all_its_images_and_calibrates_as_if_from_none_held_out(kind):
    """Of 40 images eight are held out, of which one is odd: left out, it is as odd as it would be if new."""
    maps = np.random.default_rng(0).normal(size=(40, 8, 8, 6)).astype(np.float32)
    detector = kind(backbone=None, random_state=0, false_alarm_rate=0.2, **SMALL[kind])
    detector.fit(maps)
    held_out = split_rows(np.zeros(40, dtype=int), detector.calibration_fraction, detector._split_seed)[1]
    assert all(not torch.allclose(each.root, torch.eye(each.dim)) for each in whitenings(detector.model_))
    assert all(not each._moments for each in whitenings(detector.model_))
    odd = maps.copy()
    odd[held_out[0], :4, :, 2] += 9
    detector.fit(odd)
    as_seen = -detector.score_samples(odd[held_out])
    as_new = np.max(detector.conformal_.scores_[0])
    assert as_seen.argmax() == 0
    assert as_new > 1.2 * as_seen[0]
    again = clone(detector).fit(odd)
    for ours, theirs in zip(whitenings(again.model_), whitenings(detector.model_)):
        assert torch.equal(ours.root, theirs.root)


@pytest.mark.parametrize("kind", [HVQTransDetector, VQFlowDetector])
@pytest.mark.parametrize("n", [60, 560])
def test_false_alarms_are_no_more_than_asked_with_as_many_channels_as_images(kind, n):
    """Each held-out row has a direction of its own, by which it would look normal if it had been learned from."""
    rate, alarms = 0.1, []
    for seed in range(3):
        X = np.random.default_rng(seed).normal(size=(n + 500, 96)).astype(np.float32)
        detector = kind(backbone=None, random_state=seed, false_alarm_rate=rate, **SMALL[kind]).fit(X[:n])
        alarms.append((detector.predict(X[n:]) == -1).mean())
    # Thresholds of a few held-out rows scatter: by 0.08 a fit of 60, 0.03 of 560.
    assert np.mean(alarms) < rate + (0.1 if n == 60 else 0.04)


def test_the_sum_of_second_moments_is_that_of_each_image_to_the_last_bit():
    x = torch.randn(9, 12, 3, 5) * torch.logspace(-3, 3, 9)[:, None, None, None]
    one_by_one = torch.zeros(12, 12, dtype=torch.float64)
    for i in range(9):
        one_by_one += second_moments(x[i : i + 1])[0].double()
    assert torch.equal(total_second_moments(x), one_by_one)
