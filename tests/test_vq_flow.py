"""What is VQFlowDetector's own; the contract is in test_common.py."""

import copy
import pickle

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.utils._param_validation import InvalidParameterError

import vqad
from vqad import BackboneFeatures, VQFlowDetector
from vqad.backbones import load_backbone
from vqad.datasets import make_textured_parts
from vqad.metrics import image_auroc
from vqad.nn.vq_flow import VQFlow
from vqad.nn.vq_flow_output import resize

SMALL = VQFlowDetector(
    backbone=None, n_concepts=4, n_patterns=8, d_concept=8, d_position=4, n_blocks=(1, 1, 1), hidden=8, max_iter=20,
    learning_rate=3e-3, batch_size=8, false_alarm_rate=0.2, random_state=0,
)  # fmt: skip


@pytest.fixture(scope="module")
def maps():
    """40 normal feature maps (8, 8, 6) of two kinds, then 8 with a spot that belongs to neither."""
    rng = np.random.default_rng(0)
    pattern = 3 * rng.standard_normal((2, 8, 8, 6))
    made = pattern[np.arange(48) % 2] + rng.standard_normal((48, 8, 8, 6))
    made[40:, 2:5, 2:5] += 8 * rng.standard_normal((8, 3, 3, 6))
    return made.astype(np.float32)


def fit(maps, **parameters):
    return clone(SMALL).set_params(**parameters).fit(maps[:40])


@pytest.fixture(scope="module")
def fitted(maps):
    return fit(maps)


def test_paper_gives_the_published_configuration():
    published = {
        "image_size": 384,
        "n_concepts": 32,
        "n_patterns": 512,
        "d_concept": 512,
        "d_position": 64,
        "n_blocks": (2, 5, 8),
        "hidden": None,
        "clamp": 1.9,
        "max_iter": 60,
        "batch_size": 16,
        "learning_rate": 1e-4,
        "standardize": False,
        "gaussian": False,
    }
    parameters = VQFlowDetector.paper().get_params()
    assert {name: parameters[name] for name in published} == published
    assert parameters["backbone"].startswith("convnextv2_base")
    assert VQFlowDetector.paper(max_iter=3).get_params() == {**parameters, "max_iter": 3}


def test_paper_sees_four_stages_of_convnext():
    paper = VQFlowDetector.paper(backbone="convnextv2_atto")
    options = paper._feature_options()
    assert (options["stages"], options["image_size"]) == ((0, 1, 2, 3), 384)
    assert "deep_size" not in options
    network = load_backbone("convnextv2_atto", "random", options["stages"])
    with torch.inference_mode():
        maps = network(torch.zeros(1, 3, 64, 64))
    assert [64 // m.shape[2] for m in maps] == [4, 8, 16, 32]


def test_paper_fits_when_made_small(maps):
    made = VQFlowDetector.paper(backbone=None, d_concept=8, d_position=4, n_patterns=8, n_blocks=(1, 1, 1), max_iter=1)
    made.set_params(false_alarm_rate=0.2, random_state=0).fit(maps[:40])
    assert np.isfinite(made.score_samples(maps)).all()


def test_it_finds_the_spots_and_where_they_are(maps, fitted):
    found = fitted.anomaly_map(maps[40:])
    spot = np.zeros((8, 8), bool)
    spot[2:5, 2:5] = True
    assert found.shape == (8, 8, 8)
    assert found[:, spot].mean() > found[:, ~spot].mean() + 1
    assert fitted.predict(maps[40:]).mean() < 0 < fitted.predict(maps[:40]).mean()


def test_training_raises_the_likelihood(fitted):
    curve = fitted.loss_curve_
    assert curve[-1] < curve[0] - 0.2


def test_labels_do_not_enter_the_flows(maps):
    """Every parameter and code is the same whatever the images are called; only the scales of the scores differ."""
    found_by_itself = fit(maps, max_iter=2)
    found = found_by_itself.predict_category(maps[:40])
    assert sorted(set(found)) == [0, 1]
    labelled = clone(found_by_itself).fit(maps[:40], category=np.array(["a", "b"])[found])
    assert labelled.categories_.tolist() == ["a", "b"]
    ours, theirs = found_by_itself.model_.state_dict(), labelled.model_.state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_concepts_tell_the_kinds_of_object_apart(maps, fitted):
    concept = fitted.predict_concept(maps[:40])
    assert concept.shape == (40,)
    assert concept.dtype == np.int64
    assert not set(concept[::2]) & set(concept[1::2])
    assert fitted.predict_concept(maps[5:6]) == concept[5]


def assembled(detector, maps):
    """Maps (n, h, w, C), one or some, as the model takes them."""
    maps = maps if isinstance(maps, list) else [maps]
    return detector.scorer_.model_input([torch.from_numpy(m).movedim(3, 1) for m in maps])


def test_map_terms_add_up_to_the_density(maps, fitted):
    """The published terms and the volumes, undone their division by channels, are minus the log-density."""
    features = assembled(fitted, maps[:2])
    terms = fitted.model_.anomaly_map(features)
    with torch.no_grad():
        latents = fitted.model_(features).latents
    total = sum(6 * (terms[f"log_likelihood_{k}"] + terms[f"volume_{k}"]).sum((1, 2)) for k in (1, 2, 3))
    total += 0.5 * latents.n_dimensions * np.log(2 * np.pi)
    torch.testing.assert_close(-total, latents.log_prob, rtol=1e-4, atol=1e-3)


def test_what_is_measured_are_the_coarsest_latents_or_the_published_terms(maps, fitted):
    features, category = assembled(fitted, maps[:2]), torch.zeros(2, dtype=torch.long)
    terms = fitted.model_.anomaly_map(features)
    with torch.no_grad():
        (latent,) = fitted.model_.fields(features, category, True).values()
        torch.testing.assert_close(latent, fitted.model_(features).latents.z[-1])
        published = fitted.model_.fields(features, category, False)
    assert list(published) == [f"log_likelihood_{k}" for k in (1, 2, 3)]
    torch.testing.assert_close(published["log_likelihood_1"], terms["log_likelihood_1"])
    for k in (2, 3):
        torch.testing.assert_close(published[f"log_likelihood_{k}"], resize(terms[f"log_likelihood_{k}"], (4, 4)))


def test_a_single_map_becomes_a_pyramid():
    model = VQFlow([3] * 4, n_concepts=2, n_patterns=4, d_concept=4, d_position=4, n_blocks=(1, 1, 1), hidden=4)
    x = torch.randn(2, 3, 9, 16)
    stages = model.pool(x)
    assert [tuple(s.shape[2:]) for s in stages] == [(5, 8), (3, 4), (2, 2), (2, 2)]
    flat = model.pool(torch.ones(1, 3, 9, 16))[3]
    torch.testing.assert_close(flat, torch.ones_like(flat))  # no border darkens an average


def test_inverse_on_real_features():
    """The flows undo themselves in float32 on what a backbone makes of images."""
    parts = make_textured_parts(12, 0, image_size=64, random_state=0)
    detector = VQFlowDetector(image_size=64, hidden=16, max_iter=2, precision="float32", random_state=0)
    detector.set_params(false_alarm_rate=0.4).fit(parts.images)
    maps = detector.features_.transform(parts.images[:4])
    features = assembled(detector, maps)
    with torch.no_grad():
        output = detector.model_(features)
        restored = detector.model_.restore(output.latents.z, output.codes)
    for stage, again in zip(detector.model_.pool(features), restored):
        torch.testing.assert_close(again, stage, rtol=1e-4, atol=1e-4)


def test_a_backbone_that_merges_its_stages_gives_the_finest_of_a_pyramid():
    backbone = BackboneFeatures(weights="random", image_size=64, merge=True)
    parts = make_textured_parts(12, 0, image_size=64, random_state=0)
    made = clone(SMALL).set_params(backbone=backbone, max_iter=1, false_alarm_rate=0.4).fit(parts.images)
    assert made.model_.channels == (sum(made.features_.channels_),) * 4
    assert np.isfinite(made.score_samples(parts.images)).all()


def test_parameters_reach_the_model(maps):
    made = fit(maps, max_iter=1, clamp=0.7, feature_noise=0.1, hidden=5, n_blocks=(1, 2, 1), n_concepts=3, n_patterns=7)
    model = made.model_
    assert {block.clamp for flow in model.scale_flow for block in flow.blocks} == {0.7}
    assert [len(flow.blocks) for flow in model.scale_flow] == [1, 2, 1]
    assert (model.hierarchy.concept_codebook.n_codes, model.hierarchy.pattern_codebook[0].n_codes) == (3, 7)
    assert model.noise == model.noisy.std == 0.1


@pytest.mark.parametrize(
    ("name", "value"),
    [("n_concepts", 0), ("n_patterns", 1), ("d_concept", 0), ("d_position", 3), ("n_blocks", 2), ("hidden", 0),
     ("clamp", 0.0), ("schedule", "linear"), ("stages", 4)],
)  # fmt: skip
def test_parameters_of_the_model_are_checked(maps, name, value):
    with pytest.raises(InvalidParameterError, match=f"'{name}' parameter of VQFlowDetector must be"):
        fit(maps, **{name: value})


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"d_position": 6}, r"multiple of 4; got d_position=6"),
        ({"n_blocks": (1, 2)}, r"three integers of at least 1; got n_blocks=\(1, 2\)"),
        ({"n_blocks": (1, 0, 2)}, r"three integers of at least 1"),
    ],
)
def test_what_does_not_fit_together_is_told_before_features_are_extracted(maps, parameters, message, monkeypatch):
    monkeypatch.setattr("vqad.source.FeatureStore", None)
    with pytest.raises(ValueError, match=message):
        fit(maps, **parameters)


def test_other_than_four_stages_are_refused():
    parts = make_textured_parts(4, 0, image_size=64, random_state=0)
    with pytest.raises(ValueError, match=r"needs four stages of the backbone; got stages=\(1, 2\)"):
        VQFlowDetector(stages=(1, 2), image_size=64).fit(parts.images)


# ---- categories that partial_fit adds


def kinds_of_maps(n, seed, n_odd=0):
    """``n`` maps (8, 8, 6) of three kinds in turn, the last ``n_odd`` of them with a spot.

    The channels of the third kind vary together: half of their directions hardly do, and its spots are along those.
    """
    rng = np.random.default_rng(seed)
    pattern = 3 * np.random.default_rng(5).standard_normal((3, 8, 8, 6))
    directions = np.linalg.qr(np.random.default_rng(6).standard_normal((6, 6)))[0]
    mixing = np.stack([np.eye(6), np.eye(6), np.repeat([1.4, 0.1], 3)[:, None] * directions])
    kind = np.arange(n) % 3
    made = pattern[kind] + np.einsum("nhwc,ncd->nhwd", rng.standard_normal((n, 8, 8, 6)), mixing[kind])
    if n_odd:
        made[-n_odd:, 2:5, 2:5] += 2 * directions[4]
    return made.astype(np.float32), np.array(["a", "b", "c"])[kind]


@pytest.fixture(scope="module")
def of_two():
    """Knows the kinds a and b; not to be changed."""
    return fit_two()


@pytest.fixture(scope="module")
def of_three(of_two):
    """The same that learned c afterwards; not to be changed."""
    return add_third(of_two)


def fit_two(**parameters):
    maps, kind = kinds_of_maps(60, 0)
    made = clone(SMALL).set_params(max_iter=8, **parameters)
    return made.fit(maps[kind != "c"], category=kind[kind != "c"])


def add_third(detector):
    maps, kind = kinds_of_maps(60, 1)
    return copy.deepcopy(detector).set_params(max_iter=20).partial_fit(maps[kind == "c"], category=kind[kind == "c"])


def test_a_new_category_moves_no_score_of_the_old_ones(of_two, of_three):
    maps, kind = kinds_of_maps(48, 2, n_odd=9)
    old = maps[(kind != "c") & (of_two.predict_category(maps) == of_three.predict_category(maps))]
    assert len(old) >= 30
    np.testing.assert_array_equal(of_three.score_samples(old), of_two.score_samples(old))
    np.testing.assert_array_equal(of_three.anomaly_map(old), of_two.anomaly_map(old))
    np.testing.assert_array_equal(of_three.predict_concept(old), of_two.predict_concept(old))
    before = of_two.model_.state_dict()
    for name, value in of_three.model_.state_dict().items():
        if name in before:
            kept = value[: len(before[name])] if "codebook" in name else value
            assert torch.equal(kept, before[name]), name


def untrained(detector, monkeypatch):
    """What learns routing and thresholds of a new category alone."""

    def share(self, n, batches):
        self.n_shared += n

    monkeypatch.setattr(VQFlow, "extend", share)
    monkeypatch.setattr(VQFlow, "parts_of", lambda *args: [])
    maps, kind = kinds_of_maps(60, 1)
    return copy.deepcopy(detector).partial_fit(maps[kind == "c"], category=kind[kind == "c"])


def test_the_parts_of_a_new_category_learn_it(of_three, monkeypatch):
    """They raise the likelihood of its normal images that were never seen, and by it find its defects better."""
    curve = of_three.loss_curve_[8:]
    assert len(curve) == 20
    assert curve[-1] < curve[0] - 0.3
    maps, kind = kinds_of_maps(240, 3, n_odd=120)
    is_odd = (np.arange(240) >= 120)[kind == "c"]
    maps = maps[kind == "c"]
    assert set(of_three.predict_category(maps)) == {"c"}
    features = assembled(of_three, maps[~is_odd])
    with torch.no_grad():
        own, shared = (of_three.model_(features, torch.full((40,), c)).latents for c in (2, 0))
    assert own.log_prob.mean() > shared.log_prob.mean() + 0.1 * own.n_dimensions
    by_likelihood = fit_two(gaussian=False)
    trained, plain = add_third(by_likelihood), untrained(by_likelihood, monkeypatch)
    with_parts, without = (image_auroc(np.where(is_odd, -1, 1), -d.score_samples(maps)) for d in (trained, plain))
    assert with_parts > without + 0.1


def test_concepts_of_a_new_category_are_numbered_on(of_three):
    maps, kind = kinds_of_maps(30, 4)
    concept = of_three.predict_concept(maps)
    assert ((concept // 4 == 1) == (kind == "c")).all()


def test_more_images_of_a_category_train_what_it_alone_has(of_three):
    maps, kind = kinds_of_maps(60, 5)
    state = {name: value.clone() for name, value in of_three.model_.state_dict().items()}
    made = copy.deepcopy(of_three).partial_fit(maps[kind == "a"], category=kind[kind == "a"])
    assert made.n_iter_ == of_three.n_iter_
    assert all(torch.equal(value, state[name]) for name, value in made.model_.state_dict().items())
    made.partial_fit(maps, category=kind)
    assert made.n_iter_ == of_three.n_iter_ + 1
    after = made.model_.state_dict()
    moved = {name for name, value in state.items() if not torch.equal(after[name], value)}
    assert {name.split(".")[0] for name in moved} == {"hierarchy", "added_flow", "added_mixture"}
    for name in moved:
        assert "hierarchy" not in name or torch.equal(after[name][0], state[name][0])


@pytest.mark.parametrize("way", ["save", "pickle"])
def test_a_model_with_added_categories_is_kept(of_three, way, tmp_path):
    maps, kind = kinds_of_maps(30, 6)
    if way == "save":
        vqad.save(of_three, tmp_path / "model.safetensors")
        again = vqad.load(tmp_path / "model.safetensors")
    else:
        again = pickle.loads(pickle.dumps(of_three))
    np.testing.assert_array_equal(again.score_samples(maps), of_three.score_samples(maps))
    again.set_params(max_iter=1).partial_fit(maps[kind == "c"], category=np.full(10, "d"))
    assert again.model_.n_added == 2
    np.testing.assert_array_equal(again.score_samples(maps[kind == "a"]), of_three.score_samples(maps[kind == "a"]))


def test_another_fit_has_no_added_categories_and_a_warm_one_keeps_them(of_three):
    maps, kind = kinds_of_maps(45, 7)
    warm = copy.deepcopy(of_three).set_params(warm_start=True, max_iter=1).fit(maps, category=kind)
    assert warm.model_.n_added == 1
    fresh = copy.deepcopy(of_three).set_params(max_iter=1).fit(maps, category=kind)
    assert fresh.model_.n_added == 0
    plain = clone(of_three).set_params(max_iter=1).fit(maps, category=kind)
    np.testing.assert_array_equal(fresh.score_samples(maps), plain.score_samples(maps))


@pytest.mark.slow
def test_noise_keeps_the_density_of_few_images_from_falling_to_nothing_between_them(maps):
    """Learned from ten images for long, the density of others of the same kind is higher with noise than without."""
    unseen = [torch.from_numpy(m).permute(2, 0, 1)[None] for m in maps[10:40]]

    def loss_of_others(noise):
        detector = clone(SMALL).set_params(feature_noise=noise, max_iter=150, false_alarm_rate=0.5).fit(maps[:10])
        with torch.no_grad():
            losses = [float(detector.model_.loss(detector.scorer_.model_input([m]))) for m in unseen]
        return np.mean(losses), detector.loss_curve_[-1]

    (without, without_seen), (with_noise, with_noise_seen) = loss_of_others(0.0), loss_of_others(0.3)
    assert without_seen < with_noise_seen
    assert with_noise < without - 0.1
