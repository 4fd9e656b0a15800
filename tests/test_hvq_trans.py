"""What is HVQTransDetector's own; the contract is in test_common.py."""

import math

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils._param_validation import InvalidParameterError

from vqad import BackboneFeatures, HVQTransDetector
from vqad.nn.model import FeatureShape

SMALL = HVQTransDetector(
    backbone=None, n_codes=16, d_model=16, n_layers=2, n_heads=2, dim_feedforward=16, max_iter=2,
    false_alarm_rate=0.2, random_state=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def maps():
    """40 normal feature maps (4, 6, 10) of two kinds, then 8 with a spot that belongs to neither."""
    rng = np.random.default_rng(0)
    pattern = 3 * rng.standard_normal((2, 4, 6, 10))
    made = pattern[np.arange(48) % 2] + rng.standard_normal((48, 4, 6, 10))
    made[40:, 1:3, 2:4] = 6 * rng.standard_normal((8, 2, 2, 10))
    return made.astype(np.float32)


def fit(maps, **parameters):
    return clone(SMALL).set_params(**parameters).fit(maps[:40], category=np.arange(40) % 2)


def test_paper_gives_the_published_configuration():
    published = {
        "backbone": "tf_efficientnet_b4",
        "image_size": 224,
        "n_codes": 512,
        "d_model": 256,
        "n_layers": 4,
        "n_heads": 8,
        "dim_feedforward": 1024,
        "dropout": 0.1,
        "transport": "conditional",
        "max_iter": 1000,
        "learning_rate": 1e-4,
        "weight_decay": 1e-4,
        "standardize": False,
        "gaussian": False,
        "patch_size": 1,
    }
    parameters = HVQTransDetector.paper().get_params()
    assert {name: parameters[name] for name in published} == published
    assert HVQTransDetector.paper(max_iter=3, weights="hub").get_params() == {
        **parameters,
        "max_iter": 3,
        "weights": "hub",
    }


def test_paper_sees_272_channels_on_a_grid_of_14():
    paper = HVQTransDetector.paper()
    options = paper.set_params(weights="random")._feature_options()
    assert (options["stages"], options["image_size"]) == ((0, 1, 2, 3), 224)
    assert "deep_size" not in options
    features = BackboneFeatures(paper.backbone, merge=False, **options).fit()
    with torch.inference_mode():
        maps = features.network_(torch.zeros(1, 3, 224, 224))
    assert sum(m.shape[1] for m in maps) == 272
    assert tuple(maps[-1].shape[2:]) == (14, 14)
    shape = FeatureShape(tuple(m.shape[1] for m in maps), tuple(tuple(m.shape[2:]) for m in maps), features.strides_)
    model = paper.model_class(**paper._model_config(shape, 1, 0))
    assert (model.in_channels, model.grid) == (272, (14, 14))
    assert tuple(model.arrange(maps).shape) == (1, 272, 14, 14)


def test_paper_fits_when_made_small(maps):
    made = HVQTransDetector.paper(backbone=None, d_model=16, n_codes=8, n_heads=2, dim_feedforward=16, max_iter=1)
    made.set_params(false_alarm_rate=0.2, random_state=0).fit(maps[:40])
    assert np.isfinite(made.score_samples(maps)).all()


@pytest.mark.parametrize("transport_weight", [0.0, 0.1])
@pytest.mark.parametrize("transport", ["conditional", "nearest", "sinkhorn", "exact"])
@pytest.mark.parametrize("gaussian", [True, False])
def test_every_transport_fits_and_finds_the_spots(maps, transport, transport_weight, gaussian):
    if transport == "exact" and transport_weight:
        with pytest.raises(ValueError, match=r"transport='exact' has no gradient .* transport_weight=0"):
            fit(maps, transport=transport, transport_weight=transport_weight)
        return
    made = fit(maps, transport=transport, transport_weight=transport_weight, gaussian=gaussian)
    found = made.anomaly_map(maps[40:])
    spot = np.zeros((4, 6), bool)
    spot[1:3, 2:4] = True
    assert found[:, spot].mean() > found[:, ~spot].mean() + 1
    assert made.predict(maps[40:]).mean() < 0 < made.predict(maps[:40]).mean()


@pytest.mark.parametrize(
    ("parameters", "message"),
    [({"n_heads": 3}, "a multiple of n_heads"), ({"d_model": 9, "n_heads": 3}, "must be even"),
     ({"transport": "exact", "transport_weight": 1.0}, "has no gradient")],
)  # fmt: skip
def test_what_does_not_fit_together_is_told_before_features_are_extracted(maps, parameters, message, monkeypatch):
    monkeypatch.setattr("vqad.source.FeatureStore", None)
    with pytest.raises(ValueError, match=message):
        fit(maps, **parameters)


def test_transport_changes_the_scores_but_not_the_training(maps):
    """With ``gaussian`` the map alone rests on it, and on the published terms the score too."""
    for gaussian in (True, False):
        nearest, sinkhorn = (fit(maps, transport=kind, gaussian=gaussian) for kind in ("nearest", "sinkhorn"))
        assert nearest.loss_curve_ == sinkhorn.loss_curve_
        assert np.array_equal(nearest.score_samples(maps), sinkhorn.score_samples(maps)) == gaussian
        assert not np.array_equal(nearest.anomaly_map(maps), sinkhorn.anomaly_map(maps))
    assert fit(maps, transport="nearest", transport_weight=1.0).loss_curve_ != nearest.loss_curve_


def test_unknown_transport_is_refused(maps):
    with pytest.raises(InvalidParameterError, match=r"'transport' parameter .* \{.*'sinkhorn'.*\}.*'euclid'"):
        fit(maps, transport="euclid")


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_codes", 1), ("d_model", 1), ("n_layers", 0), ("n_heads", 0), ("dim_feedforward", 0), ("dropout", 1.0),
     ("transport_weight", -1.0), ("patch_size", 0), ("stages", 2)],
)  # fmt: skip
def test_parameters_of_the_model_are_checked(maps, name, value):
    with pytest.raises(InvalidParameterError, match=f"'{name}' parameter of HVQTransDetector must be"):
        fit(maps, **{name: value})


def test_width_that_heads_do_not_divide_is_explained(maps):
    for d_model, n_heads in ((15, 1), (14, 4)):
        with pytest.raises(ValueError, match=f"multiple of n_heads; got d_model={d_model}, n_heads={n_heads}"):
            fit(maps, d_model=d_model, n_heads=n_heads)


def test_standardised_channels_count_alike(maps):
    """Unless switched off, a channel's unit does not matter, not even in the last digits that scores are read by."""
    unit = np.geomspace(0.125, 8, 10).round(3).astype(np.float32)
    scores = fit(maps, precision="float32").score_samples(maps)
    np.testing.assert_allclose(fit(maps * unit, precision="float32").score_samples(maps * unit), scores, atol=0.3)
    raw = fit(maps, standardize=False)
    assert raw.scorer_.scaling.scale_0.tolist() == [1.0]
    assert raw.scorer_.scaling.mean_0.tolist() == [0.0]
    changed = fit(maps * unit, standardize=False).score_samples(maps * unit)
    assert np.abs(changed - raw.score_samples(maps)).max() > 0.3


def test_perplexity_of_the_codebooks_is_recorded(maps):
    made = fit(maps, max_iter=3)
    recorded = made.training_log_.perplexity
    assert len(recorded) == 3
    assert all(1 < value <= 16 for value in recorded)
    # Computed anew from the counts: exp of the entropy, the mean over 3 levels and 2 categories.
    counts = torch.cat([quantizer.cluster_size for quantizer in made.model_.quantizers]).double().numpy()
    shares = counts / counts.sum(1, keepdims=True)
    entropy = -(shares * np.log(np.maximum(shares, 1e-300))).sum(1)
    assert len(counts) == 6
    assert math.isclose(recorded[-1], np.exp(entropy).mean(), rel_tol=1e-5)


def test_every_category_has_codebooks_started_from_its_data(maps):
    made = fit(maps, max_iter=1)
    for quantizer in made.model_.quantizers:
        assert quantizer.n_groups == 2
        assert (quantizer.cluster_size.sum(1) > 0).all()
        assert not torch.equal(quantizer.embed[0], quantizer.embed[1])


def test_training_lowers_the_loss(maps):
    curve = fit(maps, max_iter=15, learning_rate=1e-3).loss_curve_
    assert curve[-1] < 0.9 * curve[0]


def test_model_rests_on_the_cpu_in_evaluation_mode(maps):
    made = fit(maps)
    assert not made.model_.training
    assert {p.device.type for p in made.model_.parameters()} == {"cpu"}


def test_patches_change_the_tokens_not_the_map(maps):
    for patch_size, tokens in ((1, 24), (2, 6)):
        made = fit(maps, patch_size=patch_size)
        assert made.anomaly_map(maps[:2]).shape == (2, 4, 6)
        passed = made.model_(torch.from_numpy(maps[:1]).movedim(3, 1), torch.zeros(1, dtype=torch.long))
        assert passed.levels[0].indices.shape == (1, tokens)


def test_a_grid_that_patches_do_not_divide_is_taken_cell_by_cell(maps):
    with pytest.warns(UserWarning, match=r"patch_size=2 does not divide maps of \(3, 6\) cells"):
        made = fit(maps[:, :3], patch_size=2)
    assert made.model_.token_grid == (3, 6)
    assert made.anomaly_map(maps[:2, :3]).shape == (2, 3, 6)
