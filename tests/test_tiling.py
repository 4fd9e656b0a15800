"""Images in tiles: learned, judged and calibrated as one image each, with one map."""

import pickle

import numpy as np
import PIL.Image
import pytest
from conftest import save_png
from hypothesis import given
from hypothesis import strategies as st

import vqad
from vqad import HVQTransDetector, VQFlowDetector
from vqad.cli import main
from vqad.images import check_images
from vqad.scoring import score_and_map, tile_chunks
from vqad.tiling import Box, Stitched, Tiles, Tiling

SMALL = {
    "image_size": 64, "weights": "random", "max_iter": 1, "false_alarm_rate": 0.25, "random_state": 0,
    "tiles": (64, 16), "calibration_fraction": 0.4,
}  # fmt: skip
HVQ = {"d_model": 16, "n_layers": 1, "n_codes": 8, **SMALL}
FLOW = {"hidden": 8, "n_patterns": 8, "n_concepts": 4, "n_blocks": (1, 1, 1), **SMALL}
SHAPE, FAULT = (120, 208), np.s_[70:86, 150:166]


def scans(n, seed=0, fault=False):
    rng = np.random.default_rng(seed)
    images = (110 + 25 * rng.standard_normal((n, *SHAPE))).clip(0, 255).astype(np.uint8)
    if fault:
        images[(slice(None), *FAULT)] = 255
    return images


@pytest.fixture(scope="module")
def detector():
    return HVQTransDetector(**HVQ).fit(scans(12))


@given(st.integers(32, 200), st.integers(0, 100), st.integers(1, 900), st.integers(1, 900))
def test_tiles_cover_an_image_evenly_and_overlap(size, overlap, height, width):
    tiling = Tiling.of((size, min(overlap, size // 2)))
    boxes = tiling.boxes((height, width))
    covered = np.zeros((height, width), bool)
    for top, left, h, w in boxes:
        assert (h, w) == (min(size, height), min(size, width))
        assert 0 <= top <= height - h
        assert 0 <= left <= width - w
        covered[top : top + h, left : left + w] = True
    assert covered.all()
    for side in (0, 1):
        starts = np.unique([box[side] for box in boxes])
        length = boxes[0][2 + side]
        assert (np.diff(starts) <= length - tiling.overlap).all()
        assert len(starts) == 1 or len(starts) <= np.ceil((height, width)[side] / (length - tiling.overlap))


@given(st.integers(33, 150), st.integers(33, 150), st.floats(-2, 2), st.floats(-2, 2))
def test_a_ramp_has_no_seams(height, width, down, across):
    """Tiles that each see a part of one ramp make that ramp again, but for a cell at the border of the image."""
    tiling = Tiling(48, 12)
    boxes = tiling.boxes((height, width))
    whole = Stitched((height, width), boxes, tiling)
    for k, (top, left, h, w) in enumerate(boxes):
        y, x = (np.arange(6) + 0.5) * h / 6 + top, (np.arange(6) + 0.5) * w / 6 + left
        whole.add(k, down * y[:, None] + across * x)
    made = whole.map()
    y, x = ((np.arange(n) + 0.5) * side / n for n, side in zip(made.shape, (height, width)))
    pitch = 8.0 * (abs(down) + abs(across))
    np.testing.assert_allclose(made, down * y[:, None] + across * x, atol=0.5 * pitch + 1e-3)
    steps = np.broadcast_to(across * np.diff(x), (len(y), len(x) - 1))
    np.testing.assert_allclose(np.diff(made, axis=1), steps, atol=0.5 * pitch + 1e-3)


def test_tiles_that_do_not_agree_fade_into_each_other():
    tiling = Tiling(64, 32)
    boxes = tiling.boxes((64, 200))
    whole = Stitched((64, 200), boxes, tiling)
    for k in range(len(boxes)):
        whole.add(k, np.full((16, 16), float(k % 2)))
    made = whole.map()
    assert made.min() == pytest.approx(0, abs=0.02)
    assert made.max() == pytest.approx(1, abs=0.02)
    assert np.abs(np.diff(made, axis=1)).max() < 0.25  # eight cells overlap


def test_a_single_tile_is_the_map_itself():
    heat = np.random.default_rng(0).random((7, 7))
    whole = Stitched((40, 50), [Box(0, 0, 40, 50)], Tiling(64, 8))
    whole.add(0, heat)
    np.testing.assert_allclose(whole.map(), heat, rtol=1e-6)


def test_the_score_is_that_of_the_worst_tile_and_explained_by_it(detector):
    X = np.concatenate([scans(2, 1), scans(2, 2, fault=True)])
    score = -detector.score_samples(X)
    assert score[2:].min() > score[:2].max() + 3
    for i, e in enumerate(detector.explain(X)):
        assert e.anomaly_score == pytest.approx(score[i], abs=1e-6)
        if i >= 2:
            top, left, height, width = e.tile
            assert top <= 70 < 86 <= top + height or top <= 78 < top + height
            assert left <= 158 < left + width
        source = detector.map_source(X)
        found = tile_chunks(detector.scorer_, source, i, source.boxes(i), 0, score_and_map)
        worst = max(float(f["score"].max()) for _, f in found)
        assert worst + 10 * e.too_far == pytest.approx(score[i], abs=1e-6)


def test_maps_are_of_the_whole_and_highest_at_the_fault(detector):
    heat = detector.anomaly_map(scans(2, 3, fault=True))
    assert heat.shape == (2, *SHAPE)
    for each in heat:
        row, column = np.unravel_index(each.argmax(), each.shape)
        assert abs(row - 78) < 16
        assert abs(column - 158) < 16
        assert each.max() > detector.map_threshold_
    ragged = detector.anomaly_map([scans(1, 3)[0], scans(1, 3)[0, :100, :64]])
    assert [m.shape for m in ragged] == [SHAPE, (100, 64)]


def test_scores_do_not_depend_on_company_and_a_model_keeps_its_tiles(detector, tmp_path):
    X = scans(4, 4)
    score = detector.score_samples(X)
    np.testing.assert_array_equal(score[::-1], detector.score_samples(X[::-1]))
    np.testing.assert_array_equal(score[1:2], detector.score_samples([X[1]]))
    vqad.save(detector, tmp_path / "m.safetensors")
    for again in (vqad.load(tmp_path / "m.safetensors"), pickle.loads(pickle.dumps(detector))):
        assert again.fitted_.tiles == (64, 16)
        np.testing.assert_array_equal(again.score_samples(X), score)
        np.testing.assert_array_equal(again.anomaly_map(X), detector.anomaly_map(X))
    cached = HVQTransDetector(**HVQ, memory=tmp_path).fit(scans(12))
    np.testing.assert_array_equal(cached.score_samples(X), score)
    np.testing.assert_array_equal(cached.score_samples(X), score)


def test_no_tile_of_a_held_out_image_is_learned_from(monkeypatch):
    seen = []
    write = vqad.sampling._maps_of_tiles

    def spy(source, images, boxes, verbose):
        seen.extend(images.tolist())
        return write(source, images, boxes, verbose)

    monkeypatch.setattr(vqad.sampling, "_maps_of_tiles", spy)
    made = HVQTransDetector(**HVQ).fit(scans(12), groups=[0, 0, 1, 1, *range(2, 10)])
    assert len(set(seen)) == len(seen)
    assert len(made.fitted_.held_out) == 4  # of 10 groups 4, one image each
    assert len(seen) <= 12 - 4
    assert {0, 1} <= set(seen) or not {0, 1} & set(seen)
    assert len(made.prototypes_.tile["level_0"][0, 0]) == 4
    assert set(made.prototypes_.image["level_0"].ravel()) <= {-1, *seen}


def test_images_are_decoded_once_a_look_and_let_go():
    class Lazy:
        asked = 0

        def __len__(self):
            return 3

        def __getitem__(self, i):
            self.asked += 1
            return scans(3, 5)[i]

    X = Lazy()
    made = HVQTransDetector(**HVQ, n_jobs=None).fit(scans(8))
    made.score_samples(X)
    # A glance at the whole, its size, and its tiles; not one of the six tiles of each asks for it.
    assert X.asked <= 3 * 4


@pytest.mark.parametrize(("kind", "parameters"), [(HVQTransDetector, HVQ), (VQFlowDetector, FLOW)])
def test_all_that_learns_or_decides_takes_tiles(kind, parameters):
    X, bad = scans(14, 6), scans(2, 7, fault=True)
    made = kind(**parameters, early_stopping=True, contamination=0.2).fit(X)
    assert (made.predict(X) == -1).sum() == 3  # the share asked for, of the images learned from
    made.set_params(contamination="auto").recalibrate(scans(8, 8))
    assert (made.predict(bad) == -1).all()
    other = (scans(8, 9) // 3).astype(np.uint8)
    made.partial_fit(other, category=np.ones(8, int))
    assert made.predict_category([X[0], other[0]]).tolist() == [0, 1]
    assert len(made.prototypes_.tile) == len(made.prototypes_.codebooks)
    made.partial_fit(X[:6])
    made.set_threshold(np.concatenate([scans(6, 10), bad]), [1] * 6 + [-1] * 2)
    assert (made.predict(bad) == -1).all()
    assert 0 < made.drift(scans(4, 11)) <= 1


def test_what_is_ignored_is_no_tile_and_changes_nothing():
    mask = np.zeros(SHAPE, bool)
    mask[:, :100] = True
    changed = scans(9)
    changed[:, mask] = 0
    a, b = (HVQTransDetector(**HVQ, ignore=mask).fit(X) for X in (scans(9), changed))
    np.testing.assert_array_equal(a.score_samples(scans(2, 1)), b.score_samples(scans(2, 1)))
    np.testing.assert_array_equal(a.score_samples(scans(9)), a.score_samples(changed))
    assert not a.anomaly_map(scans(2, 1, fault=True))[:, mask].any()
    source = a.map_source(scans(1))
    assert len(source.boxes(0)) < len(Tiling(64, 16).boxes(SHAPE))
    per = check_images(scans(2, 1)).ignoring([mask, None])
    assert np.isfinite(HVQTransDetector(**HVQ).fit(scans(9)).score_samples(per)).all()


@pytest.mark.parametrize("tiles", [16, (64, 40), (64,), "64", (64.5, 2)])
def test_tiles_that_are_none_are_refused(tiles):
    with pytest.raises(ValueError, match="tiles"):
        HVQTransDetector(**{**HVQ, "tiles": tiles}).fit(scans(4))


def test_what_takes_no_tiles_says_so(detector, tmp_path):
    with pytest.raises(ValueError, match="tiles= cuts images"):
        HVQTransDetector(backbone=None, tiles=64).fit(np.zeros((5, 4)))
    pytest.importorskip("onnxscript")
    with pytest.raises(ValueError, match=r"tiles=\(64, 16\)"):
        vqad.export_onnx(detector, tmp_path / "m.onnx")
    tiles = Tiles(check_images(scans(2) * 2.0), 1, [Box(8, 0, 64, 64)])
    with pytest.raises(ValueError, match="image 1 of X, tile of 64 x 64 pixels at row 8, column 0 has float pixels"):
        tiles.load([0], (64, 64))


@pytest.mark.slow
def test_the_command_reads_scans_over_the_limit_if_told_to(tmp_path, capsys, monkeypatch):
    for k, pixels in enumerate(scans(10)):
        save_png(tmp_path / "scans" / f"{k}.png", pixels)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 10_000)
    told = ["--set=tiles=(64, 16)", "--set=weights=random", "--set=d_model=16", "--set=n_codes=8"]
    told += ["--image-size=64", "--max-iter=1", "--false-alarm-rate=0.4"]
    model, folder = str(tmp_path / "m.safetensors"), str(tmp_path / "scans")
    assert main(["fit", folder, "-o", model, *told]) == 2
    assert "or pass --any-size to the command" in capsys.readouterr().err
    assert main(["fit", folder, "-o", model, *told, "--any-size"]) == 0
    assert vqad.load(model).fitted_.tiles == (64, 16)
    assert main(["score", model, folder]) == 2
    capsys.readouterr()
    assert main(["score", model, folder, "--any-size", "--maps", str(tmp_path / "maps")]) == 0
    assert len(list((tmp_path / "maps").iterdir())) == 10
    assert PIL.Image.MAX_IMAGE_PIXELS == 10_000
