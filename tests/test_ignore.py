"""Where not to look: what is there is neither learned, nor scored, mapped, or counted in thresholds."""

import pickle

import numpy as np
import pytest
import torch
from conftest import save_png

import vqad
from vqad import HVQTransDetector, VQFlowDetector
from vqad.cli import main
from vqad.datasets import ImageDataset, make_textured_parts
from vqad.images import check_images
from vqad.nn.gaussian import LocationGaussian
from vqad.nn.terms import _place_statistics

SMALL = {"backbone": "test_efficientnet", "weights": "random", "image_size": 64, "max_iter": 1, "random_state": 0}
SMALL["false_alarm_rate"] = 0.25
HVQ = {"d_model": 16, "n_layers": 1, "n_codes": 8, **SMALL}
FLOW = {"hidden": 8, "n_patterns": 8, "n_concepts": 4, "n_blocks": (1, 1, 1), **SMALL}
PARTS = make_textured_parts(24, 2, categories=("tile",), image_size=64, random_state=0)
GOOD, BAD = PARTS.images[PARTS.target == 1], PARTS.images[PARTS.target == -1]
MASK = np.zeros((64, 64), bool)
MASK[:28, :44] = True


def elsewhere(images, seed=0):
    """The same images with other pixels where MASK is."""
    other = images.copy()
    other[:, MASK] = np.random.default_rng(seed).integers(0, 256, other[:, MASK].shape)
    return other


@pytest.fixture(scope="module")
def detector():
    return HVQTransDetector(ignore=MASK, **HVQ).fit(GOOD)


@pytest.mark.parametrize(("kind", "parameters"), [(HVQTransDetector, HVQ), (VQFlowDetector, FLOW)])
def test_what_is_ignored_changes_no_bit_of_anything(kind, parameters):
    made = kind(ignore=MASK, **parameters).fit(GOOD)
    other = kind(ignore=MASK, **parameters).fit(elsewhere(GOOD, 1))
    X, Y = np.concatenate([GOOD[:2], BAD]), elsewhere(np.concatenate([GOOD[:2], BAD]), 2)
    for method in ("score_samples", "predict", "p_values", "anomaly_map"):
        np.testing.assert_array_equal(getattr(made, method)(X), getattr(other, method)(Y))
    assert (made.offset_, made.map_threshold_) == (other.offset_, other.map_threshold_)
    assert made.drift(X) == other.drift(Y)
    a, b = made.explain(X[:1])[0], other.explain(Y[:1])[0]
    np.testing.assert_array_equal(a.standardized, b.standardized)
    np.testing.assert_allclose(sum(a.contributions.values()), a.standardized, atol=1e-3)
    made.recalibrate(GOOD[:9]), other.recalibrate(elsewhere(GOOD[:9], 3))
    assert made.offset_ == other.offset_
    made.partial_fit(GOOD[9:]), other.partial_fit(elsewhere(GOOD[9:], 4))
    np.testing.assert_array_equal(made.score_samples(X), other.score_samples(Y))


def test_maps_are_0_there_and_not_beside_it(detector):
    maps = detector.anomaly_map(BAD)
    assert not maps[:, MASK].any()
    assert (maps[:, ~MASK] != 0).mean() > 0.9
    drawn = detector.judge(BAD).anomaly_map(0, (32, 32))
    assert not drawn[:14, :22].any()
    assert drawn[20:].any()


def test_the_mask_is_stretched_to_images_of_other_sizes(detector):
    larger = np.kron(GOOD[:2], np.ones((1, 3, 2, 1), np.uint8))
    changed = larger.copy()
    changed[:, : 3 * 28, : 2 * 44] = 7
    np.testing.assert_array_equal(detector.score_samples(larger), detector.score_samples(changed))
    changed[:, 3 * 28 + 20 :] = 7
    assert (detector.score_samples(larger) != detector.score_samples(changed)).all()


def test_a_model_keeps_its_mask(detector, tmp_path):
    vqad.save(detector, tmp_path / "m.safetensors", include_backbone=True)
    for again in (vqad.load(tmp_path / "m.safetensors"), pickle.loads(pickle.dumps(detector))):
        np.testing.assert_array_equal(again.fitted_.ignore, MASK)
        np.testing.assert_array_equal(again.anomaly_map(elsewhere(BAD)), detector.anomaly_map(BAD))
    detector.set_params(ignore=None)  # takes effect at the next fit
    np.testing.assert_array_equal(detector.score_samples(elsewhere(BAD)), detector.score_samples(BAD))
    detector.set_params(ignore=MASK)


@pytest.mark.slow
def test_a_graph_has_the_mask_too(detector, tmp_path):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    path, larger = tmp_path / "m.onnx", np.kron(BAD[0], np.ones((2, 3, 1), np.uint8))
    vqad.export_onnx(detector, path, X=[*BAD, larger])  # which compares
    session, changed = onnxruntime.InferenceSession(path), larger.astype(np.float32) / 255
    score, heat = session.run(["score", "map"], {"image": changed.copy()})
    changed[: 2 * 28, : 3 * 44] = np.nan
    again, heat_again = session.run(["score", "map"], {"image": changed})
    assert score == again
    assert not heat_again[: 2 * 28, : 3 * 44].any()
    np.testing.assert_array_equal(heat, heat_again)


def test_a_mask_of_each_image_is_as_good_as_one_of_all_and_may_hide_what_is_no_number(detector, tmp_path):
    each = HVQTransDetector(**HVQ).fit(check_images(GOOD).ignoring([MASK] * len(GOOD)))
    hidden = BAD / 255.0
    hidden[:, MASK] = np.nan
    found = each.score_samples(check_images(hidden).ignoring([MASK.astype(int)] * len(BAD)))
    np.testing.assert_allclose(found, detector.score_samples(BAD), atol=1e-6)
    paths = [tmp_path / f"{k}.png" for k in range(len(BAD))]
    for path, pixels in zip(paths, elsewhere(BAD)):
        save_png(path, pixels)
    save_png(tmp_path / "mask.png", MASK.astype(np.uint8) * 255)
    collection = ImageDataset(paths, ignore_paths=[tmp_path / "mask.png"] * len(BAD))
    np.testing.assert_allclose(each.score_samples(collection[::-1])[::-1], found, atol=1e-6)
    assert (each.score_samples(collection[:0] + ImageDataset(paths)) != found).all()


def test_masks_that_move_leave_their_cells_out_of_what_is_learned():
    rng = np.random.default_rng(0)
    x, seen = rng.standard_normal((40, 3, 2, 2)).astype(np.float32), rng.random((40, 2, 2)) < 0.6
    seen[:, 1, 1] = True
    other = np.where(seen[:, None], x, 100 * rng.standard_normal(x.shape)).astype(np.float32)
    fold = torch.arange(40) % 4
    found = []
    for values in (x, other):
        gaussian = LocationGaussian(3, (2, 2))
        distance = gaussian.learn(0, torch.from_numpy(values), fold, torch.from_numpy(seen))
        found.append((gaussian.mean[0].numpy(), gaussian(torch.ones(1, 3, 2, 2), torch.tensor(0)), distance[:, 1, 1]))
    np.testing.assert_array_equal(found[0][0], found[1][0])
    np.testing.assert_array_equal(found[0][1], found[1][1])
    np.testing.assert_array_equal(found[0][2], found[1][2])
    alone = np.stack([[x[seen[:, i, j], :, i, j].mean(0) for j in range(2)] for i in range(2)])
    np.testing.assert_allclose(found[0][0].transpose(1, 2, 0), alone, atol=1e-5)


def test_statistics_of_places_are_those_of_what_is_seen():
    rng = np.random.default_rng(1)
    x, seen = rng.standard_normal((30, 5, 4)) + 3, rng.random((30, 5, 4)) < 0.7
    other = np.where(seen, x, 1e3)
    rows = torch.arange(30) < 25
    for leave_out in (False, True):
        a, b = (_place_statistics(torch.from_numpy(v), rows, torch.from_numpy(seen), leave_out) for v in (x, other))
        np.testing.assert_allclose(a[0], b[0], rtol=1e-12)
        np.testing.assert_allclose(a[1], b[1], rtol=1e-9)
    plain = _place_statistics(torch.from_numpy(x), rows)
    every = _place_statistics(torch.from_numpy(x), rows, torch.ones(30, 5, 4, dtype=torch.bool))
    np.testing.assert_allclose(plain[0], every[0], rtol=1e-12)
    # Of a single image the last term of the shrinkage is all there is: the mean over what it shows.
    one = _place_statistics(torch.from_numpy(other[:1]), rows[:1], torch.from_numpy(seen[:1]), leave_out=True)
    assert one[0].mean() == pytest.approx(x[:1][seen[:1]].mean(), abs=0.2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (np.ones((64, 64)), "covers the whole image"),
        (np.zeros((2, 64, 64)), r"must be an array \(H, W\)"),
        ("no-such.png", "cannot be opened"),
    ],
)
def test_a_mask_that_is_none_is_refused(given, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        HVQTransDetector(ignore=given, **HVQ).fit(GOOD)


def test_masks_that_do_not_fit_are_refused_by_name():
    with pytest.raises(ValueError, match="3 masks to ignore for 24 images"):
        check_images(GOOD).ignoring([MASK] * 3)
    with pytest.raises(ValueError, match=r"image 1 of X has \(64, 64\) pixels, but its mask .* \(32, 64\)"):
        check_images(GOOD).ignoring([None, MASK[:32], *[None] * 22]).pixels(1)
    with pytest.raises(ValueError, match="ignore= is a mask for images"):
        HVQTransDetector(backbone=None, ignore=MASK).fit(np.zeros((5, 4)))


def test_memory_does_not_take_an_image_for_the_same_with_a_mask(tmp_path):
    made = HVQTransDetector(memory=tmp_path, **HVQ).fit(GOOD)
    plain = made.score_samples(BAD)
    masked = made.score_samples(check_images(BAD).ignoring(MASK))
    assert (plain != masked).all()
    np.testing.assert_array_equal(masked, made.set_params(memory=None).score_samples(check_images(BAD).ignoring(MASK)))


@pytest.mark.slow
def test_the_command_takes_one_mask_or_a_folder_of_masks(tmp_path, capsys):
    for k, (good, changed) in enumerate(zip(GOOD, elsewhere(GOOD))):
        save_png(tmp_path / "good" / f"{k}.png", good)
        save_png(tmp_path / "changed" / f"{k}.png", changed)
        save_png(tmp_path / "masks" / f"{k}_mask.png", MASK.astype(np.uint8) * 255)
    one, folder = str(tmp_path / "masks" / "0_mask.png"), str(tmp_path / "masks")
    tiny = [f"--set={name}={value}" for name, value in HVQ.items() if name in ("d_model", "n_layers", "n_codes")]
    tiny += ["--image-size", "64", "--max-iter", "1", "--false-alarm-rate", "0.25"]
    tables = []
    for mask, asked in ((one, []), (folder, ["--ignore", folder])):
        model = str(tmp_path / "model.safetensors")
        assert main(["fit", str(tmp_path / "good"), "-o", model, "--ignore", mask, *tiny]) == 0
        for images in ("good", "changed"):
            capsys.readouterr()
            assert main(["score", model, str(tmp_path / images), *asked]) == 0
            rows = [line.split() for line in capsys.readouterr().out.splitlines() if ".png" in line]
            tables.append([row[1:] for row in rows])
    assert len(tables[0]) == 24
    assert all(table == tables[0] for table in tables)
    empty = tmp_path / "none"
    save_png(empty / "other.png", GOOD[0])
    assert main(["score", model, str(tmp_path / "good"), "--ignore", str(empty)]) == 2
